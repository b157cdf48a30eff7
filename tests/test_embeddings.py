"""Embeddings: the regressors' inputs and the mean of the frame features, for each clip on its own."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import SMALL_HEAD, small_model, speech
from transformers import pipeline

from emoshare import EMOTIONS, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.cli import main
from emoshare.embeddings_emoshare import embedding_widths
from emoshare.evaluation import embeddings


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


def assert_same(embedding, expected, tolerance=1e-5):
    assert list(embedding) == list(expected)
    for name, vector in embedding.items():
        np.testing.assert_allclose(vector, expected[name], atol=tolerance, err_msg=name)


def predicted_from(model, embedding):
    """The shares that the regressors of a model with separate heads make of their embeddings."""
    shares = {}
    for label, head in zip(model.config.labels, model.heads, strict=True):
        pooled = torch.from_numpy(embedding[label])[None]
        with torch.no_grad():
            shares[label] = head.output_activation(head.output(head.ffn(pooled, head.dropout))).item()
    return shares


def test_an_embedding_is_what_the_regressor_makes_its_share_of(emotion_share, wav):
    result = emotion_share(str(wav), return_embedding=True)
    embedding = result["embedding"]
    assert {name: vector.shape for name, vector in embedding.items()} == {
        name: (width,) for name, width in embedding_widths(emotion_share.model).items()
    }
    assert all(vector.dtype == np.float32 for vector in embedding.values())
    shares = {share["label"]: share["score"] for share in result["shares"]}
    assert predicted_from(emotion_share.model, embedding) == pytest.approx(shares, abs=1e-6)
    inputs = emotion_share.feature_extractor(soundfile.read(wav)[0], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        features = emotion_share.model.frame_features(inputs["input_values"]).by_layer[-1]
    np.testing.assert_allclose(embedding["backbone"], features[0].mean(dim=0), atol=1e-5)
    assert emotion_share(str(wav)) == result["shares"]  # and nothing is left behind in the model


def test_neighbours_in_a_batch_change_nothing_and_windows_are_averaged_by_duration(emotion_share):
    clips = [speech(seconds, seed) for seed, seconds in enumerate((1.4, 1.0, 1.2))]
    for result, clip in zip(emotion_share(clips, return_embedding=True, batch_size=3), clips, strict=True):
        assert_same(result["embedding"], emotion_share(clip, return_embedding=True)["embedding"])
    whole = emotion_share(clips[0], return_embedding=True, chunk_length_s=1.0)["embedding"]
    first, second = (
        emotion_share(part, return_embedding=True)["embedding"] for part in (clips[0][:16000], clips[0][16000:])
    )
    assert_same(whole, {name: (first[name] * 1.0 + second[name] * 0.4) / 1.4 for name in first})


@pytest.mark.parametrize(
    "fields", [{}, {"separate_heads": False}, {"architecture": "cnn_lstm"}, {"architecture": "functionals"}]
)
def test_every_model_has_them(fields):
    model = small_model(**fields)
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor("mel"), device="cpu")
    embedding = emotion_share(speech(0.5), return_embedding=True)["embedding"]
    assert {name: len(vector) for name, vector in embedding.items()} == embedding_widths(model)
    features = emotion_share.feature_extractor(speech(0.5), sampling_rate=16000)["input_features"][0]
    np.testing.assert_allclose(embedding["backbone"], features.mean(axis=0), atol=1e-5)


def test_of_weighted_layers_the_mean_is_taken_too(backbone_folder):
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, backbone_layer="weighted", **SMALL_HEAD).eval()
    extractor = EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config)
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=extractor, device="cpu")
    clips = [speech(1.0), speech(0.8, seed=1)]
    for result, clip in zip(emotion_share(clips, return_embedding=True, batch_size=2), clips, strict=True):
        with torch.no_grad():
            features = model.frame_features(torch.from_numpy(clip)[None]).by_layer["weighted"]
        np.testing.assert_allclose(result["embedding"]["backbone"], features[0].mean(dim=(0, 1)), atol=1e-5)


def test_a_label_that_is_called_as_something_else_in_a_result_is_predicted_and_refused_there(tmp_path, wav, capfd):
    """Models of earlier versions may have such labels."""
    extractor = EmoShareFeatureExtractor("mel")
    EmotionSharePipeline(small_model(id2label={0: "time", 1: "backbone"}), extractor).save_pretrained(tmp_path)
    emotion_share = pipeline("emotion-share", model=str(tmp_path))
    assert {share["label"] for share in emotion_share(str(wav))} == {"time", "backbone"}
    for option, label in {"return_attention": "time", "return_embedding": "backbone"}.items():
        with pytest.raises(ValueError, match=f"{option}: the model has the label '{label}'"):
            emotion_share(str(wav), **{option: True})
    assert main(["embed", str(wav), "--model", str(tmp_path), "--output", str(tmp_path / "e.parquet")]) == 2
    assert "error: embeddings: the model has the label 'backbone'" in capfd.readouterr().err


# emoshare embed


def test_rows_of_parquet_are_the_pipelines(emotion_share, model_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(embeddings, "ROWS_AT_A_TIME", 2)
    clips = [str(tmp_path / "clips" / f"{number}.wav") for number in range(3)]
    (tmp_path / "clips").mkdir()
    for number, clip in enumerate(clips):
        soundfile.write(clip, speech(0.3 + 0.1 * number, number), 16000)
    (tmp_path / "clips" / "broken.wav").write_text("no audio")
    output = tmp_path / "embeddings.parquet"
    assert main(["embed", str(tmp_path / "clips"), "--model", str(model_folder), "--output", str(output)]) == 1
    assert "1 of 4 files could not be predicted:\n  " in capfd.readouterr().err
    table = pq.read_table(output)
    assert table.column_names == ["filename", *EMOTIONS, "backbone"]
    assert table.schema.field("backbone").type == pa.list_(pa.float32(), emotion_share.model.config.feature_size)
    assert pq.ParquetFile(output).metadata.num_row_groups == 2
    assert table["filename"].to_pylist() == clips
    for row in table.to_pylist():
        expected = emotion_share(row.pop("filename"), return_embedding=True)["embedding"]
        assert_same(row, expected)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (MemoryError, 2)])
def test_a_command_that_is_stopped_keeps_its_rows(stop, code, model_folder, tmp_path, monkeypatch):
    clips = [str(tmp_path / f"{number}.wav") for number in range(4)]
    for number, clip in enumerate(clips):
        soundfile.write(clip, speech(0.3, number), 16000)
    forward = EmotionSharePipeline._forward
    passes = []

    def stopped(self, *arguments, **options):
        passes.append(self)
        if len(passes) == 4:
            raise stop
        return forward(self, *arguments, **options)

    monkeypatch.setattr(EmotionSharePipeline, "_forward", stopped)
    monkeypatch.setattr(embeddings, "ROWS_AT_A_TIME", 2)
    output = tmp_path / "embeddings.parquet"
    assert main(["embed", *clips, "--model", str(model_folder), "--output", str(output)]) == code
    assert pq.read_table(output)["filename"].to_pylist() == clips[:3]


def test_names_that_are_not_utf_8_are_escaped_and_a_file_without_rows_is_one(model_folder, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.wav")
    soundfile.write(tmp_path / "clip.wav", speech(0.3), 16000)
    shutil.move(tmp_path / "clip.wav", name)
    output = tmp_path / "embeddings.parquet"
    assert main(["embed", name, "--model", str(model_folder), "--output", str(output)]) == 0
    assert pq.read_table(output)["filename"].to_pylist() == [f"{tmp_path}/M\\udcfcller.wav"]
    (tmp_path / "broken.wav").write_text("no audio")
    assert main(["embed", str(tmp_path / "broken.wav"), "--model", str(model_folder), "--output", str(output)]) == 1
    assert pq.read_table(output).num_rows == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [("embeddings.csv", "--output: got 'embeddings.csv'; expected a name that ends in .parquet"), (None, "--output")],
)
def test_embeddings_are_parquet(output, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["embed", "clip.wav", "--model", "M", *(["--output", output] if output else [])])
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_one_line(model_folder, wav, capfd):
    assert main(["embed", str(wav), "--model", str(model_folder), "--output", "missing/a.parquet"]) == 2
    assert (
        capfd.readouterr().err.splitlines()[-1]
        == "emoshare embed: error: missing/a.parquet cannot be written: No such file or directory"
    )
