"""Published corpora whose audio stays in its Parquet files."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from conftest import SMALL_HEAD_FLAGS, small_model, write_corpus, write_csv

from emoshare import EmoShareFeatureExtractor
from emoshare.dataset_script import EmotionShare, emotion_share, load_corpus, streamed
from emoshare.dataset_script.publishing import write_dataset
from emoshare.training import features
from emoshare.training.command import main
from emoshare.training.features import extract_layers
from emoshare.training.parts import Part

SIZES = {"train": 7, "devel": 3}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder of Parquet files with row groups of two clips."""
    monkeypatch.setattr(emotion_share, "ROWS_PER_TABLE", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_corpus(tmp_path / "corpus", SIZES, labels=["joy", "awe"])
    write_csv(folder / "lab" / "clips.csv", ["filename", "listeners"], [["train_001.wav", 7]])
    write_dataset(EmotionShare("csv", data_dir=folder, cache_dir=tmp_path / "made"), tmp_path / "published", "ORG/NAME")
    streamed._row_group.cache_clear()
    return tmp_path / "published"


def extract(corpus, folder, part=None):
    model, extractor = small_model(id2label={0: "joy", 1: "awe"}), EmoShareFeatureExtractor("mel")
    of_all = (model, extractor, folder, Accelerator(cpu=True), "float16", [-1])
    return extract_layers(corpus.splits["train"], "train", *of_all, part=part)[-1]


def shards(store):
    return {path.name: path.read_bytes() for path in store.glob("*.arrow")}


def test_a_streamed_corpus_is_the_one_that_is_copied(published, tmp_path):
    corpus = load_corpus(str(published), streaming=True)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    copied = load_corpus(str(published), cache_dir=tmp_path / "copies")
    assert (corpus.name, corpus.labels, corpus.facts) == (copied.name, copied.labels, copied.facts)
    for split, clips in copied.splits.items():
        own = corpus.splits[split]
        assert own.features == clips.features
        np.testing.assert_array_equal(corpus.shares(split), copied.shares(split))
        np.testing.assert_array_equal(corpus.listeners(split), copied.listeners(split))
        for streamed_clip, clip in zip(corpus.audio(split), copied.audio(split), strict=True):
            assert (streamed_clip.filename, streamed_clip["bytes"]) == (clip.filename, clip["bytes"])


def test_features_are_those_of_the_copy_whole_or_in_parts(published, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    expected = shards(extract(load_corpus(str(published), cache_dir=tmp_path / "copies"), tmp_path / "of the copy"))
    corpus = load_corpus(str(published), streaming=True)
    read, row_group = [], streamed.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        streamed.pq.ParquetFile,
        "read_row_group",
        lambda file, group, **o: read.append(group) or row_group(file, group, **o),
    )
    assert shards(extract(corpus, tmp_path / "whole")) == expected
    assert read == [0, 1, 2, 3]
    for number in (1, 2):
        store = extract(corpus, tmp_path / "parts", Part(number, 2))
    assert read[4:] == [0, 2, 1, 3]  # each is read by the part that needs it
    assert shards(store) == expected


def test_the_features_of_other_files_are_others(published):
    first = load_corpus(str(published), streaming=True).fingerprints()
    assert load_corpus(str(published), streaming=True).fingerprints() == first
    (file,) = published.glob("data/train*.parquet")
    pq.write_table(pq.read_table(file), file, row_group_size=3)
    other = load_corpus(str(published), streaming=True).fingerprints()
    assert other["train"]["clips"] != first["train"]["clips"]
    assert other["devel"] == first["devel"]


def test_what_is_wrong_is_named(published, tmp_path, capsys):
    flags = ["--dataset", str(published), "--streaming", "--output_dir", str(tmp_path / "output"), *SMALL_HEAD_FLAGS]
    (file,) = published.glob("data/train*.parquet")
    table = pq.read_table(file)
    audio = table["audio"].to_pylist()
    audio[4]["bytes"] = b"nothing"
    table = table.set_column(table.column_names.index("audio"), table.schema.field("audio"), [audio])
    pq.write_table(table, file)
    assert main(flags) == 2
    assert "clip train_004.wav: " in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-8])
    assert main(flags) == 2
    assert file.name in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--dataset", "synthetic", "--streaming"])
    assert "--streaming is for published datasets; got --dataset synthetic" in capsys.readouterr().err
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train.csv").write_text("filename,audio,joy\na.wav,a.wav,0.5\n")
    with pytest.raises(ValueError, match=r"is not in Parquet files, which --streaming needs; got .*train\.csv"):
        load_corpus(str(folder), streaming=True)
    assert Path(file).exists()
