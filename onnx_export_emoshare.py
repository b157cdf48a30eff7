"""
Exports a model to an ONNX file, which onnxruntime runs without PyTorch and Transformers.

This needs the libraries onnx, onnxscript and onnxruntime. They are imported where they are used, because Transformers
refuses a repository whose modules import what is not installed.
"""

import copy
import json
import logging
import os
import shutil
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .onnx_graph_emoshare import WaveformsToShares
from .repository_emoshare import RUNTIME, fetch_file

FOLDER = "onnx"  # of a model repository, where the Hub and its tools look for ONNX files
FLOAT32, INT8 = "model.onnx", "model_int8.onnx"
OPSET = 20  # the first one with GELU
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest difference allowed between the shares of a float32 file and the model's
COMPUTED_IN_INT8 = ("MatMul", "Gemm")  # if they are linear layers of an encoder
PREPROCESSING, FRONT_END, HEADS = "features.", "backbone.feature_extractor.", "heads."  # prefixes of weight names
LARGEST_FILE = 2_000_000_000  # bytes; larger weights go into a second file, because of a limit of ONNX's format


@dataclass(frozen=True)
class OnnxFile:
    """
    Attributes:
        path (`Path`): the file.
        num_bytes (`int`): its size, including a second file with weights if there is one.
        opset (`int`): the version of ONNX's operators.
        operators (`dict[str, int]`): how often it uses each operator, including onnxruntime's own.
        difference (`float`): largest difference between its shares and the model's, on a batch of noise.
    """

    path: Path
    num_bytes: int
    opset: int
    operators: dict
    difference: float


class ExportsOnnx:
    """Mixin for the model's class that exports it to ONNX."""

    def export_onnx(self, folder, feature_extractor, int8=False):
        """
        Writes `onnx/model.onnx` into a folder, and next to it `emoshare_runtime.py`, which runs it without PyTorch and
        Transformers. Needs the libraries onnx, onnxscript and onnxruntime. Files of an earlier export are replaced or
        removed.

        The graph takes `waveforms` (batch, samples) float32 and `lengths` (batch,) int64, each clip's number of
        samples. It returns `shares` (batch, labels) and, if the model has them, `attention` (batch, labels, steps) and
        `concentrations` (batch, labels). It includes preprocessing. A clip's shares are the model's, alone and in any
        batch. The file's metadata have what a program needs to know, each value in JSON: `labels`, `sampling_rate` in
        Hz, `max_window_samples` and `min_samples`, `frame_length` and `hop_length` in samples, `pool_size` in frames,
        `feature_type` and `architecture`.

        Args:
            folder: a model repository or any other folder; created if it does not exist.
            feature_extractor: the model's `EmoShareFeatureExtractor`.
            int8: also write `onnx/model_int8.onnx`, with weights in 8 bits. Its shares are not exact, and depend a
                little on the other clips of a batch.

        Returns:
            `list[OnnxFile]`: the files written.

        Raises:
            ImportError: if one of the libraries is missing.
            ValueError: if the model or its feature extractor cannot be exported, or the two do not match.
            RuntimeError: if the file's shares differ from the model's.
            OSError: if a file cannot be written.
        """
        _check_libraries()
        _check_goes_together(self, feature_extractor)
        target = Path(folder) / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target) as unfinished:  # a failed export leaves an earlier one unchanged
            paths = [Path(unfinished) / FLOAT32]
            with _quiet():
                _write_float32(self, feature_extractor, paths[0])
                if int8:
                    paths.append(Path(unfinished) / INT8)
                    _write_int8(*paths)
            written = [_described(path, self, feature_extractor) for path in paths]
            if written[0].difference > TOLERANCE:
                raise RuntimeError(f"the exported shares differ by {written[0].difference:.1e} from the model's")
            _put_in_place(Path(unfinished), target)
        shutil.copyfile(_runtime_of(self), target / RUNTIME)
        return [OnnxFile(**{**vars(file), "path": target / file.path.name}) for file in written]


def _put_in_place(unfinished, target):
    """Moves the new files into place, and removes those of an earlier export, whose weights may differ."""
    new = {path.name for path in unfinished.iterdir()}
    for earlier in [path for name in (FLOAT32, INT8) for path in target.glob(f"{name}*")]:
        # A file with its weights in a second file is removed first: it must never be found next to other weights.
        if earlier.name not in new or f"{earlier.name}.data" in new:
            earlier.unlink()
    for name in sorted(new, reverse=True):  # the second files first
        os.replace(unfinished / name, target / name)


def _check_libraries():
    for library in LIBRARIES:
        try:
            import_module(library)
        except ImportError as error:
            raise ImportError(
                f"an ONNX export needs {', '.join(LIBRARIES)}; `pip install {' '.join(LIBRARIES)}` ({error})"
            ) from error


def _check_goes_together(model, feature_extractor):
    expected = "waveform" if model.main_input_name == "input_values" else "acoustic features"
    is_waveform = feature_extractor.feature_type == "waveform"
    if model.backbone is not None and not hasattr(model.family, "exportable"):
        raise ValueError(f"backbone_config: {model.config.backbone_config.model_type} backbones cannot be exported yet")
    if is_waveform != (expected == "waveform"):
        raise ValueError(f"feature_type: got {feature_extractor.feature_type!r}; this model takes {expected}")
    if not is_waveform and feature_extractor.feature_size != model.config.feature_size:
        raise ValueError(
            f"feature_type: {feature_extractor.feature_type!r} makes features of width "
            f"{feature_extractor.feature_size}; this model takes {model.config.feature_size}"
        )
    longest, most = feature_extractor.num_frames(feature_extractor.max_window_samples), model.config.max_frames
    if model.config.normalization == "sequence" and longest > most:
        raise ValueError(
            f"chunk_length_s: windows have up to {longest} frames; with normalization='sequence', this model takes at "
            f"most max_frames={most}"
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"dtype: got a model in {found}; load it with dtype='float32' to export it")


def _write_float32(model, feature_extractor, path):
    if model.config.lora_rank:
        model = copy.deepcopy(model).merge_adapters()
    graph = WaveformsToShares(model, feature_extractor.as_module()).eval().requires_grad_(False)
    # Tracing treats a size of 1 as a special case, so the example has at least two clips, frames and steps. The graph
    # also works for fewer, which `_difference` checks.
    batch, fewest = torch.export.Dim("batch", min=2), feature_extractor.samples_of(2 * model.config.pool_size)
    samples = torch.export.Dim("samples", min=fewest, max=feature_extractor.max_window_samples)
    lengths = torch.tensor([fewest, 2 * fewest + 1])
    with torch.no_grad():
        program = torch.export.export(
            graph,
            (torch.zeros(2, int(lengths.max())), lengths),
            dynamic_shapes=({0: batch, 1: samples}, {0: batch}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["waveforms", "lengths"],
            output_names=graph.output_names,
            dynamic_shapes=({0: "batch", 1: "samples"}, {0: None}),  # dimension names; `lengths` takes the first's
        )
    for node in onnx.model.graph.all_nodes():
        node.metadata_props.clear()  # source lines and paths of the code that made the nodes
    onnx.model.producer_name, onnx.model.producer_version = "emoshare", None
    onnx.model.metadata_props.update(_metadata(model, feature_extractor))
    onnx.save(path)


def _metadata(model, feature_extractor):
    """The file's metadata; each value as JSON."""
    names = ("feature_type", "sampling_rate", "max_window_samples", "min_samples", "frame_length", "hop_length")
    values = {
        "labels": model.config.labels,
        "architecture": model.config.architecture,
        "pool_size": model.config.pool_size,
        **{name: getattr(feature_extractor, name) for name in names},
    }
    return {name: json.dumps(value) for name, value in values.items()}


def _write_int8(source, target):
    """
    Linear layers of the encoder compute in 8 bits. Their weights have one scale per output; activations are quantised
    dynamically, to 7 bits, because processors without VNNI add pairs of products in 16 bits, which would overflow. The
    eighth bit goes to the weights, whose rounding changes shares the most. All other weights are stored in 8 bits and
    computed in float32: those of the heads, so that shares keep their order, and those of the front end, whose feature
    maps have values too large for one scale.
    """
    quantization, onnx = (import_module(name) for name in ("onnxruntime.quantization", "onnx"))
    model = onnx.load(source)
    # onnxruntime warns that shapes should be inferred first, unless its own tool has set this mark. The exporter has
    # already written the shapes.
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    of_encoder = _weights_of_encoder(model.graph)
    for tensor in list(model.graph.initializer):
        is_matrix = len(tensor.dims) > 1 and tensor.data_type == onnx.TensorProto.FLOAT
        if is_matrix and tensor.name not in of_encoder and not tensor.name.startswith(PREPROCESSING):
            _store_in_int8(tensor, model.graph, onnx)
    others = [node.name for node in model.graph.node if not of_encoder & {*node.input[1:2]}]
    is_large = _num_bytes(source) > 4 * LARGEST_FILE
    quantization.quantize_dynamic(
        model,
        target,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=list(COMPUTED_IN_INT8),
        nodes_to_exclude=others,
        use_external_data_format=is_large,
    )
    model = onnx.load(target)
    _round_inputs_to_7_bits(model.graph, onnx)
    data = target.with_name(f"{target.name}.data")
    data.unlink(missing_ok=True)  # saving would append to it
    onnx.save(model, target, save_as_external_data=is_large, location=data.name)


def _weights_of_encoder(graph):
    """Names of the weights of linear layers between the front end and the heads."""
    weights, found, of_heads = {tensor.name for tensor in graph.initializer}, set(), set()
    for node in graph.node:  # in topological order
        if any(name.startswith(HEADS) or name in of_heads for name in node.input):
            of_heads.update(node.output)
        elif node.op_type in COMPUTED_IN_INT8 and not node.input[1].startswith((FRONT_END, PREPROCESSING)):
            found.update(weights & {node.input[1]})
    return found


def _store_in_int8(tensor, graph, onnx):
    """Stores a weight in 8 bits, in place, with a scale for each slice along its longest dimension."""
    name, weight = tensor.name, torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    axis = max(range(weight.dim()), key=lambda dim: weight.shape[dim])
    others = tuple(dim for dim in range(weight.dim()) if dim != axis)
    scale = weight.abs().amax(dim=others, keepdim=True).clamp(min=1e-12) / 127
    graph.initializer.remove(tensor)
    graph.initializer.extend(
        [
            onnx.numpy_helper.from_array((weight / scale).round().to(torch.int8).numpy(), f"{name}_int8"),
            onnx.numpy_helper.from_array(scale.flatten().numpy(), f"{name}_scale"),
        ]
    )
    inputs = [f"{name}_int8", f"{name}_scale"]
    node = onnx.helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_dequantized", axis=axis)
    graph.node.insert(0, node)


def _round_inputs_to_7_bits(graph, onnx):
    """Replaces, in place, each operator that quantises activations to 8 bits by operators that use 0 to 128."""
    constants = {"int8_zero": 0.0, "int8_steps": 127.0, "int8_smallest": 1e-12}
    graph.initializer.extend(onnx.helper.make_tensor(name, 1, (), [value]) for name, value in constants.items())
    nodes = []
    for node in graph.node:
        if node.op_type != "DynamicQuantizeLinear":
            nodes.append(node)
            continue
        (values,), (rounded, scale, zero) = node.input, node.output
        for operator, inputs, output, attributes in (
            ("ReduceMax", [values], f"{scale}_max", {"keepdims": 0}),
            ("ReduceMin", [values], f"{scale}_min", {"keepdims": 0}),
            ("Max", [f"{scale}_max", "int8_zero"], f"{scale}_high", {}),
            ("Min", [f"{scale}_min", "int8_zero"], f"{scale}_low", {}),
            ("Sub", [f"{scale}_high", f"{scale}_low"], f"{scale}_range", {}),
            ("Max", [f"{scale}_range", "int8_smallest"], f"{scale}_width", {}),
            ("Div", [f"{scale}_width", "int8_steps"], scale, {}),
            ("Div", [f"{scale}_low", scale], f"{scale}_quotient", {}),
            ("Neg", [f"{scale}_quotient"], f"{scale}_offset", {}),
            ("Round", [f"{scale}_offset"], f"{scale}_whole", {}),
            ("Cast", [f"{scale}_whole"], zero, {"to": onnx.TensorProto.UINT8}),
            ("QuantizeLinear", [values, scale, zero], rounded, {}),
        ):
            nodes.append(onnx.helper.make_node(operator, inputs, [output], **attributes))
    graph.ClearField("node")
    graph.node.extend(nodes)


def _described(path, model, feature_extractor):
    onnx = import_module("onnx").load(path, load_external_data=False)
    operators = Counter(node.op_type for node in onnx.graph.node)
    (opset,) = (entry.version for entry in onnx.opset_import if entry.domain == "")
    difference = _difference(path, model, feature_extractor)
    return OnnxFile(path, _num_bytes(path), opset, dict(sorted(operators.items())), difference)


def _num_bytes(path):
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


@torch.inference_mode()
def _difference(path, model, feature_extractor):
    """Largest difference from the model's shares on noise: the shortest clip alone, and in a batch with longer ones."""
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    shortest, longest = feature_extractor.min_samples, feature_extractor.max_window_samples
    generator = torch.Generator().manual_seed(0)
    noise = [0.1 * torch.randn(length, generator=generator) for length in (longest // 3, shortest, longest // 4)]
    was_training, largest = model.training, 0.0
    model.eval()
    for clips in ([noise[1]], noise):
        inputs = feature_extractor(clips, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
        expected = model(**inputs.to(model.device)).logits.cpu()
        waveforms = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).numpy()
        lengths = torch.tensor([len(clip) for clip in clips]).numpy()
        (shares,) = session.run(["shares"], {"waveforms": waveforms, "lengths": lengths})
        largest = max(largest, float((torch.from_numpy(shares) - expected).abs().max()))
    model.train(was_training)
    return largest


def _runtime_of(model):
    """Path of the runtime's file, in the installed package, or in the repository of remote code."""
    installed = Path(__file__).with_name(RUNTIME)
    found = installed if installed.is_file() else fetch_file(RUNTIME, model.name_or_path)
    if found is None:
        raise ValueError(f"{model.name_or_path}: has no {RUNTIME}; install the package emoshare to export this model")
    return found


@contextmanager
def _quiet():
    """Hides all messages but errors of the exporter and its libraries, which are meant for their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
