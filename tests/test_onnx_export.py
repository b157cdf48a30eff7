"""Models as ONNX files: their shares in onnxruntime are the model's, and what cannot be exported is refused."""

import io
import json
import sys
from contextlib import redirect_stdout

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, run_python, small_model, speech, write_corpus
from transformers import pipeline

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, onnx_export_emoshare
from emoshare.architectures_emoshare import ARCHITECTURES
from emoshare.cli import main
from emoshare.onnx_export_emoshare import OnnxFile

pytestmark = pytest.mark.slow
ONE_LABEL = {"id2label": {0: "awe"}}


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs_of(session, clips):
    """The graph's outputs for a batch of clips. The values of the padding must not matter."""
    lengths = np.array([len(clip) for clip in clips])
    waveforms = np.full((len(clips), lengths.max()), 7.0, np.float32)
    for row, clip in zip(waveforms, clips, strict=True):
        row[: len(clip)] = clip
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"waveforms": waveforms, "lengths": lengths}), strict=True))


@torch.inference_mode()
def assert_equal_to_the_model(session, model, feature_extractor, tolerance=1e-5):
    shortest = feature_extractor.min_samples
    clips = [speech(seconds, seed) for seed, seconds in enumerate((0.7, 1.6, 0.4))]
    clips += [clips[0][:shortest], clips[1][: shortest + 1]]
    for rows in ([0], [3], [3, 4], [2, 3, 1, 0, 4]):
        batch = [clips[row] for row in rows]
        inputs = feature_extractor(batch, sampling_rate=16000, return_tensors="pt")
        expected = model(**inputs, output_attentions=True)
        outputs = outputs_of(session, batch)
        expected = {
            "shares": expected.logits,
            "attention": expected.attentions,
            "concentrations": expected.concentrations,
        }
        assert set(outputs) == {name for name, values in expected.items() if values is not None}
        for name, found in outputs.items():
            scale = max(1, float(expected[name].abs().max()))
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=tolerance * scale, err_msg=name)


# As they are put together elsewhere: the released norms pad every clip to the same length, and one head has all labels.
FIELDS = {
    "cnn_lstm": {"normalization": "sequence", "separate_heads": False, "max_frames": 200, "id2label": {0: "a", 1: "b"}},
    "functionals": {"separate_heads": False, "id2label": {0: "a", 1: "b"}, "feature_size": 30},
}
FEATURES = {"functionals": "descriptors", "cnn_lstm_statistics": "mfcc"}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"cnn_lstm_attention"}))
def test_every_architecture_on_acoustic_features(architecture, tmp_path):
    model = small_model(architecture=architecture, **{**ONE_LABEL, **FIELDS.get(architecture, {})})
    feature_extractor = EmoShareFeatureExtractor(FEATURES.get(architecture, "mel"), chunk_length_s=2.0)
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    assert_equal_to_the_model(session_of(file.path), model, feature_extractor)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["emoshare_runtime.py", "model.onnx"]


# A model that the command has exported, in both forms, and what it printed


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    small_model(loss="beta_binomial", id2label={0: "awe", 1: "joy"}).save_pretrained(folder)
    EmoShareFeatureExtractor("mel", chunk_length_s=2.0).save_pretrained(folder)
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["export", str(folder), "--output", str(folder), "--int8"]) == 0
    return folder, printed.getvalue()


def test_the_command_writes_what_the_model_says(repository):
    folder, printed = repository
    model, feature_extractor = (kind.from_pretrained(folder) for kind in (EmoShareModel, EmoShareFeatureExtractor))
    path = folder / "onnx" / "model.onnx"
    assert_equal_to_the_model(session_of(path), model, feature_extractor)
    for name in ("model.onnx", "model_int8.onnx"):
        assert f"{folder / 'onnx' / name}: " in printed
    assert "MB, opset 20" in printed
    assert "LSTM (4)" in printed
    assert "DequantizeLinear (" in printed


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.onnx"])
def test_the_file_says_what_a_program_needs_to_know(name, repository):
    written = onnx.load(repository[0] / "onnx" / name)
    metadata = {entry.key: entry.value for entry in written.metadata_props if not entry.key.startswith("onnx")}
    assert {key: json.loads(value) for key, value in metadata.items()} == {
        "labels": ["awe", "joy"],
        "architecture": "cnn_lstm_attention",
        "feature_type": "mel",
        "sampling_rate": 16000,
        "max_window_samples": 32000,
        "min_samples": 560,
        "frame_length": 400,
        "hop_length": 160,
        "pool_size": 2,
    }
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    }
    assert (sizes["waveforms"], sizes["lengths"], sizes["shares"]) == (["batch", "samples"], ["batch"], ["batch", 2])
    said = "".join(entry.value for node in written.graph.node for entry in node.metadata_props)
    assert "/" not in said  # no folders of the machine that wrote it


WITHOUT_TORCH = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchaudio", "transformers", "emoshare", "onnx", "scipy"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing())
import numpy, soundfile
from emoshare_runtime import EmotionShareRuntime

paths = sys.argv[1:]
emotion_share = EmotionShareRuntime(".")
samples, rate = soundfile.read(paths[0], dtype="int16")
forms = [
    open(paths[0], "rb").read(),
    open(paths[0], "rb"),
    (rate, samples),
    {"array": samples / numpy.float32(32768), "sampling_rate": rate},
    {"audio": {"bytes": None, "path": paths[0]}},
]
results = {
    "alone": [emotion_share(path) for path in paths],
    "list": emotion_share(paths, batch_size=4),
    "generator": list(emotion_share(iter(paths), batch_size=3)),
    "forms": [emotion_share(form) for form in forms],
    "timeline": emotion_share(paths[-1], return_timeline=True, top_k=1),
    "int8": EmotionShareRuntime(".", "model_int8.onnx")(paths, batch_size=4),
}
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(results))
"""


def test_the_runtime_gives_what_the_pipeline_gives(repository, tmp_path):
    """In a process without PyTorch and Transformers; clips of several windows, rates and channels among them."""
    folder, _ = repository
    write_corpus(tmp_path, {"train": 6}, mixed_formats=True, seconds=(0.3, 5.0))
    paths = sorted(map(str, (tmp_path / "wav").glob("*.wav")))
    emotion_share = pipeline("emotion-share", model=str(folder))
    result = run_python("-c", WITHOUT_TORCH, *paths, cwd=folder / "onnx")
    found = json.loads(result.stdout)
    expected = emotion_share(paths, batch_size=2)
    for name in ("alone", "list", "generator"):
        assert_same(found[name], expected, 1e-5)
    assert_same(found["forms"], [expected[0]] * 5, 1e-5)
    assert_same(found["int8"], expected, 0.02)
    detailed = emotion_share(paths[-1], return_timeline=True, top_k=1)
    assert_same([found["timeline"]["shares"]], [detailed["shares"]], 1e-5)
    for part, of_pipeline in zip(found["timeline"]["timeline"], detailed["timeline"], strict=True):
        assert (part["start"], part["end"]) == (of_pipeline["start"], of_pipeline["end"])
        assert part["shares"] == pytest.approx(of_pipeline["shares"], abs=1e-5)


def assert_same(found, expected, tolerance):
    for shares, own in zip(found, expected, strict=True):
        scores, own_scores = ({share["label"]: share["score"] for share in clip} for clip in (shares, own))
        assert scores == pytest.approx(own_scores, abs=tolerance)
        assert [share["score"] for share in shares] == sorted(scores.values(), reverse=True)


# backbones


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A model that reads the first of two layers of a HuBERT whose GroupNorm is over time, as that of HuBERT Base."""
    torch.manual_seed(0)
    backbone = backbone_config(feat_extract_norm="group", do_stable_layer_norm=False)
    config = EmoShareConfig(
        backbone_config=backbone, backbone_layer=1, architecture="cnn_lstm", **SMALL_HEAD, **ONE_LABEL
    )
    model, feature_extractor = EmoShareModel(config).eval(), EmoShareFeatureExtractor()
    return model, feature_extractor, model.export_onnx(tmp_path_factory.mktemp("hubert"), feature_extractor, int8=True)


def test_a_backbone_with_its_preprocessing(hubert):
    model, feature_extractor, (file, _) = hubert
    assert_equal_to_the_model(session_of(file.path), model, feature_extractor)
    assert file.difference < 1e-6
    assert file.operators["Softmax"] == 1  # of the one layer that is read, and not of the one above it


def test_int8_is_near_and_computes_in_8_bits_what_is_of_the_encoder_alone(hubert):
    model, feature_extractor, (exact, file) = hubert
    graph = onnx.load(file.path).graph
    assert {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 1000} == {onnx.TensorProto.INT8}
    linear = [name for name, module in model.backbone.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [name for name in linear if not name.startswith("encoder.layers.1.")]  # which is not read
    assert file.operators["MatMulInteger"] == len(linear)
    assert "DynamicQuantizeLinear" not in file.operators  # to 8 bits, which overflow on some processors
    assert file.operators["LSTM"] == exact.operators["LSTM"]
    assert_equal_to_the_model(session_of(file.path), model, feature_extractor, tolerance=0.02)
    assert 1e-6 < file.difference < 0.02


def test_int8_of_a_large_model_has_its_weights_once_in_a_second_file(tmp_path, monkeypatch):
    model, feature_extractor = small_model(architecture="statistics", **ONE_LABEL), EmoShareFeatureExtractor("mel")
    _, whole = model.export_onnx(tmp_path / "whole", feature_extractor, int8=True)
    monkeypatch.setattr(onnx_export_emoshare, "LARGEST_FILE", 0)
    _, file = model.export_onnx(tmp_path / "in two", feature_extractor, int8=True)
    names = {path.name for path in file.path.parent.glob("model_int8*")}
    assert names == {"model_int8.onnx", "model_int8.onnx.data"}
    assert file.difference == whole.difference
    assert file.num_bytes < 1.2 * whole.num_bytes


def test_int8_computes_with_heads_in_float32(tmp_path):
    """Also those of a transformer, whose weights have lost their names in the file."""
    model = small_model(architecture="transformer", **ONE_LABEL)
    _, file = model.export_onnx(tmp_path, EmoShareFeatureExtractor("mel", chunk_length_s=2.0), int8=True)
    assert "MatMulInteger" not in file.operators
    assert "DequantizeLinear" in file.operators
    assert file.difference < 0.01


def test_layer_norm_in_the_front_end_and_relative_positions(tmp_path):
    backbone = backbone_config("wavlm", num_hidden_layers=1)
    config = EmoShareConfig(
        backbone_config=backbone, backbone_layer="weighted", architecture="cnn_lstm", **SMALL_HEAD, **ONE_LABEL
    )
    model, feature_extractor = EmoShareModel(config).eval(), EmoShareFeatureExtractor(do_normalize=False)
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    assert_equal_to_the_model(session_of(file.path), model, feature_extractor)


def test_adapters_become_a_part_of_the_layers_of_the_file_alone(tmp_path):
    backbone = backbone_config(num_hidden_layers=1)
    tuned = {"finetuned_layers": 1, "lora_rank": 2}
    config = EmoShareConfig(backbone_config=backbone, architecture="cnn_lstm", **SMALL_HEAD, **ONE_LABEL, **tuned)
    model, feature_extractor = EmoShareModel(config).eval(), EmoShareFeatureExtractor()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    assert model.config.lora_rank == 2
    assert_equal_to_the_model(session_of(file.path), model, feature_extractor)


# what is refused


@pytest.mark.parametrize(
    ("model_fields", "extractor_fields", "message"),
    [
        ({}, {}, "feature_type: got 'waveform'; this model takes acoustic features"),
        ({"feature_size": 30}, {"feature_type": "mel"}, "'mel' makes features of width 40; this model takes 30"),
        ({"backbone_config": backbone_config()}, {"feature_type": "mel"}, "got 'mel'; this model takes waveform"),
        ({"normalization": "sequence"}, {"feature_type": "mel"}, "chunk_length_s: windows have up to 798 frames; with"),
    ],
)
def test_what_does_not_go_together_is_refused(model_fields, extractor_fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small_model(**model_fields).export_onnx(tmp_path, EmoShareFeatureExtractor(**extractor_fields))
    assert list(tmp_path.rglob("*.onnx")) == []


def test_other_dtypes_and_families_are_refused(tmp_path, monkeypatch):
    model = small_model(backbone_config=backbone_config())
    with monkeypatch.context() as patch:
        patch.delattr(type(model.family), "exportable")
        with pytest.raises(ValueError, match="backbone_config: hubert backbones cannot be exported yet"):
            model.export_onnx(tmp_path, EmoShareFeatureExtractor())
    model.backbone.bfloat16()
    with pytest.raises(ValueError, match=r"dtype: got a model in torch\.bfloat16, torch\.float32; load it with"):
        model.export_onnx(tmp_path, EmoShareFeatureExtractor())


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="an ONNX export needs onnx, onnxscript, onnxruntime; `pip install"):
        small_model().export_onnx(tmp_path, EmoShareFeatureExtractor("mel"))


def test_a_wrong_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export_emoshare, "_write_float32", lambda model, extractor, path: path.write_text("wrong"))
    file = OnnxFile(tmp_path, 0, 20, {}, difference=0.5)
    monkeypatch.setattr(onnx_export_emoshare, "_described", lambda *_: file)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_text("earlier")
    with pytest.raises(RuntimeError, match=r"the exported shares differ by 5.0e-01 from the model's"):
        small_model().export_onnx(tmp_path, EmoShareFeatureExtractor("mel"))
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    assert (tmp_path / "onnx" / "model.onnx").read_text() == "earlier"


def test_files_of_an_earlier_export_go_with_it(tmp_path):
    """Files left from an earlier export could have the weights of another training."""
    extractor = EmoShareFeatureExtractor("mel")
    small_model().export_onnx(tmp_path, extractor, int8=True)
    assert (tmp_path / "onnx" / "model_int8.onnx").is_file()
    small_model().export_onnx(tmp_path, extractor)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["emoshare_runtime.py", "model.onnx"]


def test_the_command_says_what_it_cannot_export(tmp_path, capsys):
    assert main(["export", "./missing", "--output", str(tmp_path)]) == 2
    assert "MODEL: got './missing'; expected a folder, or a Hub id" in capsys.readouterr().err
    small_model(feature_size=30).save_pretrained(tmp_path)
    EmoShareFeatureExtractor("mel").save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "emoshare export: error: feature_type: 'mel' makes features of width 40; this" in capsys.readouterr().err
