"""Emo-DB in its layout, with recognition rates that are made up."""

import re

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard

from emoshare.dataset_script import CORPORA, load_corpus
from emoshare.dataset_script.__main__ import main

LABELS = ["Anger", "Boredom", "Disgust", "Fear", "Happiness", "Neutral", "Sadness"]
CLIPS = ["03a01Wa.wav", "09b03Td.wav", "10a01Lb.wav", "16b10Nc.wav"]
ROWS = [
    ["1", "03a01Wa.wav", "85,00", "75,00"],
    ["2", "03a01Wb.wav", "40,00", "10,00"],  # not published
    ["3", "09b03Td.wav", "95,24", "100,00"],  # 20 and 21 of 21 listeners
    ["4", "10a01Lb.wav", "100,00", "55,00"],
    ["5", "16b10Nc.wav", "80,00", "90,00"],
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path, wav):
    folder = tmp_path / "emodb"
    (folder / "wav").mkdir(parents=True)
    for name in CLIPS:
        (folder / "wav" / name).symlink_to(wav)
    write_rates(folder, ROWS)
    return folder


def write_rates(folder, rows, header="Nr.\tSatz\terkannt\tnatuerlich"):
    """As the original: Latin-1, tabs, decimal commas, non-breaking spaces after numbers, a blank line at the end."""
    padded = [[number + 2 * "\xa0", name, *(rate + 5 * "\xa0" for rate in rates)] for number, name, *rates in rows]
    lines = [header, *("\t".join(row) for row in padded), ""]
    (folder / "erkennung.txt").write_text("\n".join(lines), encoding="latin-1")


def load(folder):
    """Loads the corpus, which warns that its splits are smaller than the real ones."""
    with pytest.warns(UserWarning, match="Emo-DB has {'train': 309, 'devel': 99, 'test': 127}"):
        return load_corpus("emodb", data_dir=folder)


def test_shares_of_the_emotion_that_was_meant_and_of_the_others(folder):
    corpus = load(folder)
    assert corpus.labels == LABELS
    assert {split: clips["filename"][:] for split, clips in corpus.splits.items()} == {
        "train": ["03a01Wa.wav", "09b03Td.wav"],
        "devel": ["10a01Lb.wav"],
        "test": ["16b10Nc.wav"],
    }
    np.testing.assert_allclose(corpus.shares("train"), [[0.85] + 6 * [0.025], 6 * [0.0476 / 6] + [0.9524]])
    np.testing.assert_allclose(corpus.shares("devel"), [[0, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(corpus.shares("test"), [5 * [0.2 / 6] + [0.8, 0.2 / 6]])


def test_facts(folder):
    corpus = load(folder)
    assert corpus.metadata["train"] == {
        "speaker": ["03", "09"],
        "sex": ["male", "female"],
        "age": [31.0, 21.0],
        "sentence": ["a01", "b03"],
        "emotion": ["Anger", "Sadness"],
        "naturalness": [0.75, 1.0],
        "listeners": [20.0, 21.0],
    }
    np.testing.assert_array_equal(corpus.listeners("devel"), [20])  # 100 % could be either unit
    np.testing.assert_array_equal(corpus.listeners("test"), [20])


@pytest.mark.parametrize(("letter", "label"), list(zip("WLEAFNT", LABELS, strict=True)))
def test_letters_of_emotions(letter, label, folder, wav):
    name = f"08a02{letter}a.wav"
    (folder / "wav" / name).symlink_to(wav)
    write_rates(folder, [*ROWS, ["6", name, "90,00", "90,00"]])
    corpus = load(folder)
    assert corpus.metadata["train"]["emotion"][-1] == label
    assert LABELS[corpus.shares("train")[-1].argmax()] == label


def test_a_clip_without_a_row_is_left_out_and_listed(folder, wav):
    (folder / "wav" / "08a01Wa.wav").symlink_to(wav)
    with pytest.warns(UserWarning, match="left out") as warnings:
        corpus = load(folder)
    (message,) = [str(warning.message) for warning in warnings if "left out" in str(warning.message)]
    assert (
        message == f"{folder}: 1 clip(s) left out that are not listed\n  wav: 08a01Wa.wav has no row in erkennung.txt"
    )
    assert corpus.splits.num_rows == {"train": 2, "devel": 1, "test": 1}


@pytest.mark.parametrize(
    ("column", "text", "problem"),
    [
        (2, "101,00", "erkannt is 101.00; expected a percentage from 0 to 100"),
        (2, "viel", "erkannt is 'viel'; expected a percentage from 0 to 100"),
        (2, "", "erkannt is ''; expected a percentage from 0 to 100"),
        (3, "-5,00", "natuerlich is -5.00; expected a percentage from 0 to 100"),
        (1, "10a01Lb.wav", None),
    ],
)
def test_a_wrong_row_is_named(column, text, problem, folder):
    rows = [list(row) for row in ROWS]
    rows[0][column] = text
    write_rates(folder, rows)
    problem = f"row 2: {problem}" if problem else "row 5: 10a01Lb.wav is listed again; first in row 2"
    with pytest.raises(ValueError, match=re.escape(f"{folder}: 1 problem(s)\n  erkennung.txt, {problem}")):
        load_corpus("emodb", data_dir=folder)


@pytest.mark.parametrize("name", ["17a01Wa.wav", "03a01Xa.wav", "other.wav"])
def test_a_wrong_name_is_named(name, folder):
    (folder / "wav" / "03a01Wa.wav").rename(folder / "wav" / name)
    write_rates(folder, [["1", name, "85,00", "75,00"], *ROWS[1:]])
    with pytest.raises(ValueError, match=f"erkennung.txt, row 2: Satz is '{name}'; expected an actor's clip such as"):
        load_corpus("emodb", data_dir=folder)


def test_a_row_with_another_number_of_fields_is_named(folder):
    with (folder / "erkennung.txt").open("a", encoding="latin-1") as file:
        file.write("6\t08a01Wa.wav\t90,00\n")
    with pytest.raises(ValueError, match=r"erkennung\.txt, row 7: has 3 fields; expected 4, as in the header"):
        load_corpus("emodb", data_dir=folder)


def test_a_missing_column_is_named(folder):
    write_rates(folder, ROWS, header="Nr.\tSatz\tRate\tnatuerlich")
    with pytest.raises(ValueError, match=r"erkennung.txt, row 1: got the columns .* missing: \['erkannt'\]"):
        load_corpus("emodb", data_dir=folder)


@pytest.mark.parametrize("name", ["wav", "erkennung.txt", ""])
def test_what_is_missing_is_named(name, folder):
    (folder / name).rename(folder.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / name}: not found; Emo-DB is a folder with wav/")):
        load_corpus("emodb", data_dir=folder)


def test_an_empty_split_is_named(folder):
    (folder / "wav" / "16b10Nc.wav").unlink()
    with pytest.raises(ValueError, match=re.escape("actor, have {'train': 2, 'devel': 1, 'test': 0} clips; expected")):
        load_corpus("emodb", data_dir=folder)


@pytest.mark.filterwarnings("ignore:the splits have")
def test_a_published_copy_is_the_same_corpus(folder, tmp_path):
    main(["--config", "emodb", "--data_dir", str(folder), "--output_dir", str(tmp_path / "published")])
    local, published = load(folder), load_corpus(str(tmp_path / "published"))
    assert (published.name, published.labels, published.facts) == ("emodb", LABELS, local.facts)
    assert published.metadata == local.metadata
    card = DatasetCard.load(tmp_path / "published" / "README.md")
    assert card.data.license == "cc0-1.0"
    assert "What the other listeners heard was not published" in card.text
    assert "What the others heard was not" in CORPORA["emodb"].caution
