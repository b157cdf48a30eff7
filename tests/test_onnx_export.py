"""Models as ONNX files: their shares in onnxruntime are the model's, and what cannot be exported is refused."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, small_model, speech

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, onnx_export_emoshare
from emoshare.architectures_emoshare import ARCHITECTURES
from emoshare.cli import main

pytestmark = pytest.mark.slow
ONE_LABEL = {"id2label": {0: "awe"}}


def session_of(file):
    return onnxruntime.InferenceSession(file.path, providers=["CPUExecutionProvider"])


def outputs_of(session, clips):
    """What the graph makes of clips in a batch. Whatever stands in the padding, no clip may hear it."""
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_on_acoustic_features(architecture, tmp_path):
    fields = {"loss": "beta_binomial"} if architecture == "cnn_lstm_attention" else {}
    model = small_model(architecture=architecture, **ONE_LABEL, **fields)
    feature_extractor = EmoShareFeatureExtractor("mfcc" if architecture == "functionals" else "mel")
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    assert_equal_to_the_model(session_of(file), model, feature_extractor)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["emoshare_runtime.py", "model.onnx"]
    written = onnx.load(file.path)
    metadata = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
    assert metadata == {
        "labels": ["awe"],
        "architecture": architecture,
        "feature_type": feature_extractor.feature_type,
        "sampling_rate": 16000,
        "max_window_samples": 128000,
        "min_samples": 560,
        "frame_length": 400,
        "hop_length": 160,
        "pool_size": 2,
    }
    assert "/" not in "".join(entry.value for node in written.graph.node for entry in node.metadata_props)


def test_a_shared_trunk_and_the_released_norms(tmp_path):
    """With `normalization="sequence"`, every clip is padded to the same length, also in the graph."""
    model = small_model(normalization="sequence", separate_heads=False, max_frames=100)
    feature_extractor = EmoShareFeatureExtractor(floor="absolute", feature_type="mel", chunk_length_s=1.0)
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    clips = [speech(1.0), speech(0.5, seed=1)]
    with torch.inference_mode():
        expected = model(**feature_extractor(clips, sampling_rate=16000, return_tensors="pt")).logits
    np.testing.assert_allclose(outputs_of(session_of(file), clips)["shares"], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """A model with a backbone like HuBERT Base, whose GroupNorm is over time; its folder, extractor, and both files."""
    torch.manual_seed(0)
    backbone = backbone_config(feat_extract_norm="group", do_stable_layer_norm=False)
    config = EmoShareConfig(backbone_config=backbone, backbone_layer="weighted", **SMALL_HEAD, **ONE_LABEL)
    model, folder = EmoShareModel(config).eval(), tmp_path_factory.mktemp("hubert")
    feature_extractor = EmoShareFeatureExtractor()
    return model, feature_extractor, model.export_onnx(folder, feature_extractor, int8=True)


def test_a_backbone_with_its_preprocessing(hubert):
    model, feature_extractor, (file, _) = hubert
    assert_equal_to_the_model(session_of(file), model, feature_extractor)
    assert file.opset == 20
    assert {"LSTM", "Gelu", "MatMul"} <= set(file.operators)
    assert file.difference < 1e-6


def test_int8_is_smaller_and_near(hubert):
    model, feature_extractor, (_, file) = hubert
    assert file.path.name == "model_int8.onnx"
    weights = {tensor.data_type for tensor in onnx.load(file.path).graph.initializer if np.prod(tensor.dims) > 1000}
    # What stays as it is: the positional convolution.
    assert weights <= {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}
    assert {"MatMulInteger", "DynamicQuantizeLSTM"} <= set(file.operators)
    assert "Gemm" not in file.operators
    assert_equal_to_the_model(session_of(file), model, feature_extractor, tolerance=0.02)
    assert 1e-6 < file.difference < 0.02


def test_layers_above_the_one_that_is_read_are_left_out(tmp_path):
    config = EmoShareConfig(
        backbone_config=backbone_config("wavlm"), backbone_layer=1, architecture="statistics", **ONE_LABEL
    )
    model, feature_extractor = EmoShareModel(config).eval(), EmoShareFeatureExtractor(do_normalize=False)
    (file,) = model.export_onnx(tmp_path, feature_extractor)
    assert_equal_to_the_model(session_of(file), model, feature_extractor)
    names = [tensor.name for tensor in onnx.load(file.path).graph.initializer]
    assert any("layers.0." in name for name in names)
    assert not any("layers.1." in name for name in names)


@pytest.mark.parametrize(
    ("model_fields", "extractor_fields", "message"),
    [
        ({"feature_size": 30}, {"feature_type": "descriptors"}, "feature_type: 'descriptors' cannot be exported"),
        ({}, {}, "feature_type: got 'waveform'; this model takes acoustic features"),
        ({"feature_size": 30}, {"feature_type": "mel"}, "'mel' makes features of width 40; this model takes 30"),
        ({"backbone_config": backbone_config()}, {"feature_type": "mel"}, "got 'mel'; this model takes waveform"),
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
    monkeypatch.setattr(onnx_export_emoshare, "_difference", lambda *_: 0.5)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_text("earlier")
    with pytest.raises(RuntimeError, match="the exported shares differ by 5.0e-01 from the model's"):
        small_model(architecture="statistics", **ONE_LABEL).export_onnx(tmp_path, EmoShareFeatureExtractor("mel"))
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    assert (tmp_path / "onnx" / "model.onnx").read_text() == "earlier"


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    model, feature_extractor = small_model(architecture="statistics", **ONE_LABEL), EmoShareFeatureExtractor("mel")
    model.save_pretrained(tmp_path)
    feature_extractor.save_pretrained(tmp_path)
    assert main(["export", str(tmp_path), "--output", str(tmp_path), "--int8"]) == 0
    printed = capsys.readouterr().out
    for name in ("model.onnx", "model_int8.onnx"):
        assert f"{tmp_path / 'onnx' / name}: " in printed
    assert "MB, opset 20" in printed
    assert "MatMul (" in printed
    assert main(["export", "./missing", "--output", str(tmp_path)]) == 2
    assert "MODEL: got './missing'; expected a folder, or a Hub id" in capsys.readouterr().err
