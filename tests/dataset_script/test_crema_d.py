"""CREMA-D in the layout of its repository, with votes and actors that are made up."""

import re
import shutil

import datasets
import numpy as np
import pytest
from conftest import read_csv, write_csv
from huggingface_hub import DatasetCard

from emoshare.dataset_script import CORPORA, load_corpus
from emoshare.dataset_script.__main__ import main
from emoshare.dataset_script.crema_d import ACTORS, BROKEN, DEVEL, TEST, VOTES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:c6f94b\nsize 72862\n"
COLUMNS = ["", "A", "D", "F", "H", "N", "S", "fileName", "numResponses", "agreement", "emoVote"]
VOICE = [
    ["100001", 2, 0, 0, 6, 2, 0, "1001_IEO_HAP_HI", 10, 0.6, "H"],
    ["100002", 0, 0, 0, 1, 3, 0, "1002_DFA_NEU_XX", 4, 0.75, "N"],
    ["100003", 8, 0, 1, 0, 0, 0, "1003_TIE_ANG_LO", 9, 0.9, "A"],
    ["100004", 0, 1, 1, 0, 1, 5, "1004_WSI_SAD_MD", 8, 0.6, "S"],
]
# The same clips as others saw them, in the same file.
FACE = [["2" + row[0][1:], 0, 0, 0, 0, 0, 7, row[7], 7, 1.0, "S"] for row in VOICE]
BOTH = [["3" + row[0][1:], 0, 5, 0, 0, 0, 0, row[7], 5, 1.0, "D"] for row in VOICE]
PEOPLE = [
    [1001, 51, "Male", "Caucasian", "Not Hispanic"],
    [1002, 21, "Female", "Asian", "Hispanic"],
    [1003, 40, "Female", "Unknown", "Not Hispanic"],
    [1004, "", "Male", "African American", ""],
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def clone(tmp_path, wav):
    clone = tmp_path / "CREMA-D"
    (clone / "AudioWAV").mkdir(parents=True)
    (clone / "processedResults").mkdir()
    for row in VOICE:
        (clone / "AudioWAV" / f"{row[7]}.wav").symlink_to(wav)
    write_csv(clone / VOTES, COLUMNS, VOICE + FACE + BOTH)
    write_csv(clone / ACTORS, ["ActorID", "Age", "Sex", "Race", "Ethnicity"], PEOPLE)
    return clone


@pytest.fixture
def load(clone):
    """Loads the corpus, which warns that its splits are smaller than the real ones."""

    def load():
        with pytest.warns(UserWarning, match="CREMA-D has {'train': 4339, 'devel': 1547, 'test': 1552}"):
            return load_corpus("crema_d", data_dir=clone)

    return load


def change(path, row, column, value):
    """Changes a field of a CSV file; rows are counted as in messages."""
    rows = read_csv(path)
    rows[row - 1][rows[0].index(column)] = value
    write_csv(path, rows[0], rows[1:])


def add(path, *rows):
    header, *before = read_csv(path)
    write_csv(path, header, [*before, *rows])


def test_shares_are_those_of_who_heard_the_voice_alone(load):
    corpus = load()
    assert corpus.labels == ["Anger", "Disgust", "Fear", "Happiness", "Neutral", "Sadness"]
    assert corpus.splits["train"]["filename"][:] == ["1001_IEO_HAP_HI.wav", "1002_DFA_NEU_XX.wav"]
    np.testing.assert_array_equal(corpus.shares("train"), [[0.2, 0, 0, 0.6, 0.2, 0], [0, 0, 0, 0.25, 0.75, 0]])
    np.testing.assert_array_equal(corpus.shares("devel"), [[8 / 9, 0, 1 / 9, 0, 0, 0]])
    np.testing.assert_array_equal(corpus.shares("test"), [[0, 1 / 8, 1 / 8, 0, 1 / 8, 5 / 8]])
    np.testing.assert_array_equal(corpus.listeners("train"), [10, 4])


def test_facts(load):
    corpus = load()
    assert corpus.metadata["train"] == {
        "speaker": ["1001", "1002"],
        "sex": ["male", "female"],
        "age": [51.0, 21.0],
        "race": ["Caucasian", "Asian"],
        "ethnicity": ["Not Hispanic", "Hispanic"],
        "sentence": ["IEO", "DFA"],
        "emotion": ["Happiness", "Neutral"],
        "level": ["high", None],
        "listeners": [10.0, 4.0],
    }
    assert corpus.metadata["devel"]["race"] == [None]
    assert corpus.metadata["test"]["age"] == [None]
    assert corpus.metadata["test"]["ethnicity"] == [None]


def test_the_split_is_by_actors():
    actors = {str(number) for number in range(1001, 1092)}
    assert set(DEVEL) | set(TEST) < actors
    assert len({*DEVEL, *TEST}) == len(DEVEL) + len(TEST) == 38
    assert sum(CORPORA["crema_d"].split_sizes.values()) == 7442 - len(BROKEN)


def test_broken_clips_are_left_out_and_listed(clone, load, wav):
    for number, name in enumerate(BROKEN):
        add(clone / VOTES, [f"1001{number:02d}", 0, 0, 0, 0, 7, 0, name, 7, 1.0, "N"])
        shutil.copy(wav, clone / "AudioWAV" / f"{name}.wav")
    with pytest.warns(UserWarning, match="4 clip") as warnings:
        corpus = load()
    (message,) = [str(warning.message) for warning in warnings if "left out" in str(warning.message)]
    first, *lines = message.split("\n  ")
    assert first == f"{clone}: 4 clip(s) left out that are known to be broken"
    for row, (name, reason), line in zip(range(14, 18), BROKEN.items(), lines, strict=True):
        assert line == f"{VOTES}, row {row}: {name}: {reason}"
    assert corpus.splits.num_rows == {"train": 2, "devel": 1, "test": 1}


def test_clips_without_audio_or_votes_are_left_out_and_listed(clone, load):
    """As with 1040_ITH_SAD_XX in clones from before October 2022, whose file had another name."""
    (clone / "AudioWAV" / "1001_IEO_HAP_HI.wav").rename(clone / "AudioWAV" / "1001_IEO_HAP_H.wav")
    add(clone / VOTES, ["100009", 0, 0, 0, 0, 7, 0, "1077_IEO_HAP_HI", 7, 1.0, "N"])
    with pytest.warns(UserWarning, match="left out") as warnings:
        corpus = load()
    (message,) = [str(warning.message) for warning in warnings if "left out" in str(warning.message)]
    assert message.split("\n  ") == [
        f"{clone}: 3 clip(s) left out that have no votes or no audio",
        f"{VOTES}, row 2: 1001_IEO_HAP_HI has votes, but no AudioWAV/1001_IEO_HAP_HI.wav",
        f"{VOTES}, row 14: 1077_IEO_HAP_HI has votes, but no AudioWAV/1077_IEO_HAP_HI.wav",
        f"AudioWAV: 1001_IEO_HAP_H.wav has no row with votes on the voice alone in {VOTES}",
    ]
    assert corpus.splits["train"]["filename"][:] == ["1002_DFA_NEU_XX.wav"]


def test_pointers_of_git_lfs_are_one_error(clone):
    for name in ("1002_DFA_NEU_XX", "1003_TIE_ANG_LO"):
        (clone / "AudioWAV" / f"{name}.wav").unlink()
        (clone / "AudioWAV" / f"{name}.wav").write_text(POINTER)
    with pytest.raises(ValueError, match=r"2 of 4 WAV files, AudioWAV/1002_DFA_NEU_XX\.wav the first") as error:
        load_corpus("crema_d", data_dir=clone)
    assert str(error.value).startswith(f"{clone}: ")
    assert "`git lfs pull`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        (
            "numResponses",
            "11",
            "got A '2', D '0', F '0', H '6', N '2', S '0', numResponses '11'; expected whole",
        ),
        ("A", "2.5", "1001_IEO_HAP_HI: got A '2.5', D "),
        ("A", "-2", "1001_IEO_HAP_HI: got A '-2', D "),
        ("A", "two", "1001_IEO_HAP_HI: got A 'two', D "),
        ("A", "", "1001_IEO_HAP_HI: got A '', D "),
        ("numResponses", "nan", "numResponses 'nan'; expected whole numbers"),
        ("fileName", "1002_DFA_NEU_XX", None),
    ],
)
def test_a_wrong_row_of_votes_is_named(column, value, problem, clone):
    change(clone / VOTES, 2, column, value)
    if problem is None:
        problem, row = "1002_DFA_NEU_XX is listed again for the voice alone; first in row 2", 3
    else:
        row = 2
    with pytest.raises(ValueError, match=re.escape(problem)) as error:
        load_corpus("crema_d", data_dir=clone)
    assert str(error.value).startswith(f"{clone}: 1 problem(s)\n  {VOTES}, row {row}: ")


def test_votes_of_nobody_are_named(clone):
    for column in ("A", "H", "N", "numResponses"):
        change(clone / VOTES, 2, column, "0")
    with pytest.raises(ValueError, match="row 2: 1001_IEO_HAP_HI: got A '0', D '0'"):
        load_corpus("crema_d", data_dir=clone)


def test_a_wrong_name_is_named(clone):
    (clone / "AudioWAV" / "1001_IEO_HAP_HI.wav").rename(clone / "AudioWAV" / "1001_IEO_JOY_HI.wav")
    change(clone / VOTES, 2, "fileName", "1001_IEO_JOY_HI")
    with pytest.raises(ValueError, match="row 2: fileName is '1001_IEO_JOY_HI'; expected a name such as 1001_DFA"):
        load_corpus("crema_d", data_dir=clone)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("ActorID", "1010", f"{VOTES}, row 2: 1001_IEO_HAP_HI: actor 1001 is not in {ACTORS}"),
        ("ActorID", "1003", f"{ACTORS}, row 4: actor 1003 is listed again"),
        ("Age", "old", f"{ACTORS}, row 2: Age is 'old'; expected a positive number"),
        ("Age", "-1", f"{ACTORS}, row 2: Age is '-1'; expected a positive number"),
    ],
)
def test_a_wrong_row_of_actors_is_named(column, value, problem, clone):
    change(clone / ACTORS, 2, column, value)
    with pytest.raises(ValueError, match=re.escape(problem)):
        load_corpus("crema_d", data_dir=clone)


@pytest.mark.parametrize(("name", "column"), [(VOTES, "fileName"), (VOTES, ""), (ACTORS, "Race")])
def test_a_missing_column_is_named(name, column, clone):
    change(clone / name, 1, column, "other")
    with pytest.raises(ValueError, match=re.escape(f"{clone / name}, row 1: got the columns")) as error:
        load_corpus("crema_d", data_dir=clone)
    assert str(error.value).endswith(f"missing: ['{column}']")


@pytest.mark.parametrize("name", ["AudioWAV", VOTES, ACTORS, ""])
def test_what_is_missing_is_named(name, clone):
    (clone / name).rename(clone.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{clone / name}: not found; CREMA-D is a folder with Aud")):
        load_corpus("crema_d", data_dir=clone)


def test_an_empty_split_is_named(clone):
    (clone / "AudioWAV" / "1003_TIE_ANG_LO.wav").unlink()
    with pytest.raises(ValueError, match=re.escape("actor, have {'train': 2, 'devel': 0, 'test': 1} clips; expected")):
        load_corpus("crema_d", data_dir=clone)


@pytest.mark.filterwarnings("ignore:the splits have")
def test_a_published_copy_is_the_same_corpus(clone, load, tmp_path):
    main(["--config", "crema_d", "--data_dir", str(clone), "--output_dir", str(tmp_path / "published")])
    local, published = load(), load_corpus(str(tmp_path / "published"))
    assert (published.name, published.labels, published.facts) == ("crema_d", local.labels, local.facts)
    assert published.metadata == local.metadata
    np.testing.assert_array_equal(published.shares("train"), local.shares("train"))
    card = DatasetCard.load(tmp_path / "published" / "README.md")
    assert card.data.license == "odbl"
    assert "Cao, Houwei" in card.text
