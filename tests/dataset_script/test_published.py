"""Datasets that are not emotion share corpora are refused, with what was found and what was expected."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emoshare import EMOTIONS
from emoshare.dataset_script import load_corpus

AUDIO = datasets.Audio(decode=False)
NUMBER = datasets.Value("float64")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def publish(folder, splits, features=None, config_name="default", emoshare=None):
    """
    Writes a dataset as anybody may: {split: {column: values}}, with audio if there is no such column. `emoshare` is the
    card's field of that name, JSON.
    """
    kinds = {"audio": AUDIO, "filename": datasets.Value("string"), **(features or {})}
    lines = ["---", "configs:", f"- config_name: {config_name}", "  data_files:"]
    folder.mkdir()
    for name, columns in splits.items():
        columns = {"audio": [{"bytes": b"RIFF", "path": "a.wav"}] * 2, **columns}
        schema = datasets.Features({column: kinds.get(column, NUMBER) for column in columns}).arrow_schema
        pq.write_table(pa.table(columns, schema=schema), folder / f"{name}.parquet")
        lines += [f"  - split: {name}", f"    path: {name}.parquet"]
    lines += [f"emoshare: {emoshare}"] if emoshare else []
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def split(name, **columns):
    return {"filename": [f"{name}_0.wav", f"{name}_1.wav"], **(columns or {"joy": [0.0, 1.0]})}


def whole(**changed):
    return {"train": split("train"), "devel": split("devel"), **changed}


def test_anybodys_dataset_is_taken(tmp_path):
    splits = whole(test=split("test", joy=[None, 0.5]), validation=split("validation", joy=[7.0, 8.0]))
    features = {"audio": datasets.Audio(), "joy": datasets.Value("float32")}
    corpus = load_corpus(publish(tmp_path / "data", splits, features))
    assert (corpus.name, corpus.labels, corpus.facts) == ("csv", ["joy"], [])
    loaded = corpus.splits
    assert list(loaded) == ["train", "devel", "test"]  # other columns do not matter
    assert loaded["train"][1] == {"audio": {"bytes": b"RIFF", "path": "a.wav"}, "filename": "train_1.wav", "joy": 1.0}
    assert loaded["test"]["joy"][:] == [None, 0.5]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": split("train")}, r"got the splits \['train'\]; expected train, devel and"),
        (whole(train=split("train", joy=[0.5, None])), r"1 problem\(s\).*\n  train, row 1: joy is nan"),
        (whole(devel=split("devel", joy=[np.nan, 0.5])), "devel, row 0: joy is nan"),
        (whole(train=split("train", joy=[-0.1, 1.5])), r"2 problem\(s\).*\n.*joy is -0.1; expected .*\n.*joy is 1.5"),
        (whole(test=split("test", joy=[0.5, 2.0])), "test, row 1: joy is 2; expected a number in"),
        (whole(devel=split("train")), "devel, row 0: train_0.wav is listed again; first in train, row 0"),
        (whole(devel={"filename": ["a.wav", None], "joy": [0, 1]}), "devel, row 1: filename is None"),
    ],
)
def test_wrong_rows_are_named(splits, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(publish(tmp_path / "data", splits))


@pytest.mark.parametrize(
    ("features", "columns", "got"),
    [
        ({"joy": datasets.Value("string")}, {"joy": ["a", "b"]}, "'joy': 'string'"),
        ({"joy": datasets.List(NUMBER)}, {"joy": [[0.5], [0.5]]}, "'joy': 'List'"),
        ({"joy": datasets.Value("bool")}, {"joy": [True, False]}, "'joy': 'bool'"),
        ({"filename": datasets.Value("int64")}, {"filename": [1, 2], "joy": [0, 1]}, "'filename': 'int64'"),
        ({"audio": datasets.Value("binary")}, {"audio": [b"a", b"b"], "joy": [0, 1]}, "'audio': 'binary'"),
        ({}, {}, "got the columns {'audio': 'Audio', 'filename': 'string'}"),
    ],
)
def test_wrong_columns_are_named(features, columns, got, tmp_path):
    filenames = {name: {"filename": [f"{name}_0.wav", f"{name}_1.wav"]} for name in ("train", "devel")}
    splits = {name: {**filename, **columns} for name, filename in filenames.items()}
    with pytest.raises(ValueError, match=r"expected 'filename' \(string\), 'audio' \(Audio\), a column of") as error:
        load_corpus(publish(tmp_path / "data", splits, features))
    assert got in str(error.value)


def with_facts(**facts):
    """A dataset with the label `joy` and facts: {name: (type, values)}, of both clips in each split."""
    columns = {fact: values for fact, (_, values) in facts.items()}
    splits = {name: split(name, joy=[0, 1], **columns) for name in ("train", "devel")}
    return splits, {fact: datasets.Value(kind) for fact, (kind, _) in facts.items()}


def test_the_card_tells_facts_from_labels(tmp_path):
    splits, features = with_facts(
        speaker=("large_string", ["eve", "?"]),
        age=("int32", [31, None]),
        listeners=("float64", [np.nan, 12.0]),
        calm=("float32", [0.25, 0.5]),
    )
    emoshare = '{"labels": ["calm", "joy"], "facts": ["age", "speaker", "listeners"]}'
    corpus = load_corpus(publish(tmp_path / "data", splits, features, emoshare=emoshare))
    assert (corpus.labels, corpus.facts) == (["calm", "joy"], ["age", "speaker", "listeners"])
    assert corpus.metadata["devel"] == {"age": [31, None], "speaker": ["eve", None], "listeners": [None, 12.0]}
    np.testing.assert_array_equal(corpus.shares("train"), [[0.25, 0], [0.5, 1]])
    np.testing.assert_array_equal(corpus.listeners("train"), [np.nan, 12])


@pytest.mark.parametrize(
    ("emoshare", "message"),
    [
        ('["joy"]', r"emoshare is \['joy'\]; expected {labels: \[...\], facts: \[...\]}"),
        ('{"labels": ["joy"]}', r"emoshare is {'labels': \['joy'\]}; expected"),
        ('{"labels": "joy", "facts": ["age"]}', "labels is 'joy'; expected a list of column names"),
        ('{"labels": ["joy"], "facts": [1]}', r"facts is \[1\]; expected a list of column names"),
        ('{"labels": ["joy"], "facts": []}', r"names the columns \['joy'\]; expected each column .*: \['joy', 'age'\]"),
        ('{"labels": ["joy", "age"], "facts": ["age"]}', r"names the columns \['joy', 'age', 'age'\]"),
        ('{"labels": ["joy"], "facts": ["sex"]}', r"names the columns \['joy', 'sex'\]"),
        ('{"labels": [], "facts": ["joy", "age"]}', r"expected 'filename' \(string\), 'audio' \(Audio\), a column of"),
        ('{"labels": ["joy", "age"], "facts": []}', "train, row 0: age is 31; expected a number in"),
    ],
)
def test_a_card_that_does_not_fit_the_columns_is_refused(emoshare, message, tmp_path):
    splits, features = with_facts(age=("int32", [31, 45]))
    with pytest.raises(ValueError, match=message):
        load_corpus(publish(tmp_path / "data", splits, features, emoshare=emoshare))


def test_wrong_facts_are_named(tmp_path):
    splits, features = with_facts(listeners=("string", ["7", "0"]))
    emoshare = '{"labels": ["joy"], "facts": ["listeners"]}'
    with pytest.raises(ValueError, match=r"2 problem.*\n  train, row 1: listeners is '0'; expected a positive whole"):
        load_corpus(publish(tmp_path / "data", splits, features, emoshare=emoshare))
    splits, features = with_facts(listeners=("bool", [True, False]))
    with pytest.raises(ValueError, match="facts \\(numbers or strings\\)"):
        load_corpus(publish(tmp_path / "bool", splits, features, emoshare=emoshare))


def test_a_dataset_may_have_no_card(tmp_path):
    folder = Path(publish(tmp_path / "corpus", whole()))
    (folder / "README.md").unlink()
    (folder / "data").mkdir()
    for name in ("train", "devel"):
        (folder / f"{name}.parquet").rename(folder / "data" / f"{name}-00000-of-00001.parquet")
    assert load_corpus(str(folder)).labels == ["joy"]


def test_what_is_called_compare2023_must_look_like_it(tmp_path):
    splits = {name: split(name, **{emotion: [0.5, 0.5] for emotion in EMOTIONS}) for name in ("train", "devel")}
    with pytest.warns(UserWarning, match="the splits have {'train': 2, 'devel': 2} clips; ComParE 2023 has"):
        load_corpus(publish(tmp_path / "data", splits, config_name="compare2023"))
    with pytest.raises(ValueError, match=r"got the labels \['joy'\]; its configuration is compare2023: expected"):
        load_corpus(publish(tmp_path / "other", whole(), config_name="compare2023"))
