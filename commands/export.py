"""`emoshare export`."""

from .loading import load_model


def run(arguments):
    """`emoshare export`: writes a model as an ONNX file with the module that runs it, and prints what was written."""
    model, feature_extractor = load_model(arguments, "float32")
    try:
        files = model.export_onnx(arguments.output, feature_extractor, int8=arguments.int8)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"cannot export {arguments.model}: {error}") from error
    for file in files:
        operators = ", ".join(f"{name} ({count})" for name, count in file.operators.items())
        print(f"{file.path}: {file.num_bytes / 1e6:.1f} MB, opset {file.opset}")
        print(f"  shares of noise differ from the model's by at most {file.difference:.1e}")
        print(f"  operators: {operators}")
    print(f"To run it, with numpy, soundfile and onnxruntime alone: {files[0].path.with_name('emoshare_runtime.py')}")
    return 0
