"""Facts about clips, from `lab/clips.csv`."""

import shutil

import numpy as np
import pytest
from conftest import read_csv, write_csv

from emoshare.dataset_script.labels import read_folder


@pytest.fixture
def corpus(corpus_folder, tmp_path):
    return shutil.copytree(corpus_folder, tmp_path / "corpus")


def facts_of(corpus, rows, header=("filename", "speaker", "age")):
    """The facts read from these rows of `lab/clips.csv`: {split: {fact: values}}."""
    write_csv(corpus / "lab" / "clips.csv", list(header), rows)
    return {split: table.facts for split, table in read_folder(corpus).splits.items()}


def problems_of(corpus, rows, header=("filename", "speaker", "age")):
    with pytest.raises(ValueError, match="problem") as error:
        facts_of(corpus, rows, header)
    first, *lines = str(error.value).split("\n  ")
    assert first == f"{corpus}: {len(lines)} problem(s)"
    return lines


def test_there_may_be_none(corpus):
    tables = read_folder(corpus)
    assert tables.facts == []
    assert [table.facts for table in tables.splits.values()] == [{}, {}, {}]


def test_a_clip_that_is_missing_has_unknown_facts(corpus):
    rows = [["devel_001.wav", "eve", "31"], ["train_003.wav", "adam", "?"], ["./train_000.wav", " ", "27.5"]]
    facts = facts_of(corpus, rows)
    assert facts["train"] == {
        "speaker": [None, None, None, "adam"] + 8 * [None],
        "age": [27.5] + 11 * [None],
    }
    assert facts["devel"] == {"speaker": [None, "eve"] + 6 * [None], "age": [None, 31.0] + 6 * [None]}
    assert facts["test"] == {"speaker": 4 * [None], "age": 4 * [None]}


def test_facts_are_numbers_only_if_all_known_ones_are(corpus):
    names = ["train_000.wav", "train_001.wav", "devel_000.wav"]
    columns = {"all": ["3", "?", "1e1"], "codes": ["03", "10", "?"], "python": ["1_0", "", ""], "none": ["", "", "?"]}
    facts = facts_of(corpus, zip(names, *columns.values(), strict=True), header=("filename", *columns))
    assert {fact: values[:2] for fact, values in facts["train"].items()} == {
        "all": [3.0, None],
        "codes": ["03", "10"],
        "python": ["1_0", None],
        "none": [None, None],
    }
    assert facts["devel"]["all"][0] == 10.0


def test_labels_stay_what_they_are(corpus):
    before = read_folder(corpus)
    facts_of(corpus, [["devel_001.wav", "eve", "31"]])
    after = read_folder(corpus)
    assert after.labels == before.labels
    np.testing.assert_array_equal(after.splits["devel"].shares, before.splits["devel"].shares)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([["other.wav", "eve", "3"]], "row 2: 'other.wav' is in no split"),
        ([["", "eve", "3"]], "row 2: '' is in no split"),
        ([["train_000.wav", "a", "3"], ["./train_000.wav", "b", "4"]], "row 3: ./train_000.wav is listed again; first"),
        ([["train_000.wav", "eve"]], "row 2: has 2 fields; expected 3, as in the header"),
        ([], "row 1: is followed by no clip"),
    ],
)
def test_a_wrong_row_is_named(rows, problem, corpus):
    problems = problems_of(corpus, rows)
    assert problems[0].startswith(f"lab/clips.csv, {problem}")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (("filename", "Anger"), "row 1: got the column 'Anger'; a fact cannot be called as a label is"),
        (("filename", "audio"), "row 1: got the column 'audio'; a fact cannot be called 'audio' or nothing"),
        (("filename", " "), "row 1: got the column ''; a fact cannot be called"),
        (("filename", "filename"), "row 1: got the columns ['filename'] more than once"),
        (("filename", "sex", " sex"), "row 1: got the columns ['sex'] more than once"),
        (("clip", "speaker"), "row 1: got the columns ['clip', 'speaker']; expected a column 'filename'"),
        (("filename",), "row 1: got no column but 'filename'"),
    ],
)
def test_a_wrong_header_is_named(header, problem, corpus):
    (found,) = problems_of(corpus, [["train_000.wav", "1", "2"][: len(header)]], header)
    assert found.startswith(f"lab/clips.csv, {problem}")


def test_an_empty_file_is_named(corpus):
    (corpus / "lab" / "clips.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"lab/clips.csv, row 1: got the columns \[\]; expected a column 'filename'"):
        read_folder(corpus)
    (corpus / "lab" / "clips.csv").write_bytes("filename,größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"lab/clips.csv: not a CSV file in UTF-8"):
        read_folder(corpus)


@pytest.mark.parametrize("listeners", ["0", "-3", "2.5", "many", "nan", "inf", "1_0"])
def test_listeners_are_positive_whole_numbers(listeners, corpus):
    rows = [["train_000.wav", "12"], ["train_001.wav", listeners], ["train_002.wav", "?"]]
    (problem,) = problems_of(corpus, rows, header=("filename", "listeners"))
    assert problem == f"lab/clips.csv, row 3: listeners is {listeners!r}; expected a positive whole number"


def test_problems_of_labels_and_facts_are_one_error(corpus):
    rows = read_csv(corpus / "lab" / "train.csv")
    rows[1][1] = "2"
    write_csv(corpus / "lab" / "train.csv", rows[0], rows[1:])
    header = ("filename", "Anger", "listeners")
    assert problems_of(corpus, [["train_000.wav", "1", "0"], ["other.wav", "1", "7"]], header) == [
        "lab/train.csv, row 2: Anger is 2; expected a number in [0, 1]",
        "lab/clips.csv, row 1: got the column 'Anger'; a fact cannot be called as a label is",
        "lab/clips.csv, row 2: listeners is '0'; expected a positive whole number",
        "lab/clips.csv, row 3: 'other.wav' is in no split",
    ]
