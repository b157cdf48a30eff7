import shutil

import pytest
from conftest import read_csv, write_csv

from emoshare import EMOTIONS
from emoshare.dataset_script.labels import read_folder


@pytest.fixture
def corpus(corpus_folder, tmp_path):
    """A user's corpus to damage."""
    return shutil.copytree(corpus_folder, tmp_path / "corpus")


def spoil(corpus, split, change):
    """Applies `change` to the rows of a label file, the header being row 0 of the list."""
    path = corpus / "lab" / f"{split}.csv"
    rows = read_csv(path)
    change(rows)
    write_csv(path, rows[0], rows[1:])


def test_rows_keep_the_order_of_the_file_and_labels_the_challenges(corpus):
    def reorder(rows):
        rows[0][1], rows[0][2] = rows[0][2], rows[0][1]
        for row in rows[1:]:
            row[1], row[2] = "0.25", "0.75"

    spoil(corpus, "train", reorder)
    tables = read_folder(corpus, expected_labels=EMOTIONS)
    assert tuple(tables.labels) == EMOTIONS
    assert tables.splits["train"].filenames == [f"train_{number:03d}.wav" for number in range(12)]
    assert tables.splits["train"].shares[0][:2] == [0.75, 0.25]  # Boredom stood before Anger in the file


@pytest.mark.parametrize("unknown", ["", "?", None])
def test_test_labels_may_be_unknown(corpus, unknown):
    def hide(rows):
        for row in rows:
            if unknown is None:
                del row[1:]
            elif row[0] != "filename":
                row[1:] = [unknown] * 9

    spoil(corpus, "test", hide)
    tables = read_folder(corpus, expected_labels=EMOTIONS)
    assert tables.splits["test"].shares == [[None] * 9] * 4


@pytest.mark.parametrize("cell", ["?", "", "many", "1.5", "-0.1", "nan", "inf", "0_1"])
def test_a_bad_share_names_file_row_label_and_value(corpus, cell):
    spoil(corpus, "train", lambda rows: rows[3].__setitem__(2, cell))
    with pytest.raises(
        ValueError, match=rf"1 problem.*\n  lab/train\.csv, row 4: Boredom is '?{cell.replace('?', '.')}"
    ):
        read_folder(corpus, expected_labels=EMOTIONS)


def test_all_problems_are_counted_and_the_first_are_shown(corpus):
    for number in range(3, 10):
        (corpus / "wav" / f"train_{number:03d}.wav").unlink()
    spoil(corpus, "devel", lambda rows: rows[1].__setitem__(1, "2"))
    with pytest.raises(ValueError, match=r"8 problem") as error:
        read_folder(corpus)
    message = str(error.value)
    assert "lab/devel.csv, row 2: Anger is 2; expected a number in [0, 1]" in message
    assert "lab/train.csv, row 5: wav/train_003.wav: no such file" in message
    assert message.endswith("... and 3 more")


def test_a_clip_twice_in_a_split(corpus):
    spoil(corpus, "train", lambda rows: rows.append(rows[2]))
    with pytest.raises(ValueError, match=r"row 14: train_001\.wav is listed again; first in train\.csv, row 3"):
        read_folder(corpus)


def test_a_clip_in_two_splits(corpus):
    spoil(corpus, "devel", lambda rows: rows[1].__setitem__(0, "train_000.wav"))
    with pytest.raises(
        ValueError, match=r"devel\.csv, row 2: train_000\.wav is listed again; first in train\.csv, row 2"
    ):
        read_folder(corpus)


@pytest.mark.parametrize("filename", ["../wav/train_000.wav", "/tmp/clip.wav", ""])
def test_a_filename_outside_of_the_folder_wav(corpus, filename):
    spoil(corpus, "devel", lambda rows: rows[1].__setitem__(0, filename))
    with pytest.raises(
        ValueError, match=rf"devel\.csv, row 2: filename is '{filename}'; expected a file in the folder wav"
    ):
        read_folder(corpus)


def test_a_filename_that_is_too_long_for_a_file(corpus):
    spoil(corpus, "devel", lambda rows: rows[1].__setitem__(0, "a" * 5000))
    with pytest.raises(ValueError, match=r"devel\.csv, row 2: wav/a{5000}: no such file"):
        read_folder(corpus)


def test_another_spelling_of_a_clip_is_the_same_clip(corpus):
    spoil(corpus, "devel", lambda rows: rows[1].__setitem__(0, "./train_000.wav"))
    with pytest.raises(ValueError, match=r"devel\.csv, row 2: \./train_000\.wav is listed again"):
        read_folder(corpus)


@pytest.mark.parametrize("content", ["filename,Ängst\n".encode("latin-1"), b"filename,a\nx," + b"1" * 200_000])
def test_a_file_that_is_no_csv_is_named(corpus, content):
    (corpus / "lab" / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"lab/train\.csv: not a CSV file in UTF-8"):
        read_folder(corpus)


def test_an_empty_split(corpus):
    spoil(corpus, "devel", lambda rows: rows.__delitem__(slice(1, None)))
    with pytest.raises(ValueError, match=r"lab/devel\.csv, row 1: is followed by no clip"):
        read_folder(corpus)


def test_a_row_with_too_few_fields(corpus):
    spoil(corpus, "train", lambda rows: rows[2].pop())
    with pytest.raises(ValueError, match=r"row 3: has 9 fields; expected 10"):
        read_folder(corpus)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.__setitem__(1, "Rage"), "missing: \\['Anger'\\]; unknown: \\['Rage'\\]"),
        (lambda header: header.__setitem__(0, "clip"), "expected a column 'filename'"),
        (lambda header: header.__setitem__(2, "Anger"), "\\['Anger'\\] more than once"),
    ],
)
def test_a_wrong_header_names_the_columns(corpus, change, message):
    spoil(corpus, "devel", lambda rows: change(rows[0]))
    with pytest.raises(ValueError, match=rf"devel\.csv, row 1: .*{message}"):
        read_folder(corpus, expected_labels=EMOTIONS)


@pytest.mark.parametrize("name", ["ci95", "Anger_ci95", "time", "backbone"])
def test_a_label_cannot_be_called_as_something_else_in_results_is(corpus, name):
    """It would overwrite an interval in eval_results.json, the times of attention, or an embedding."""
    spoil(corpus, "train", lambda rows: rows[0].__setitem__(1, name))
    with pytest.raises(ValueError, match=rf"train\.csv, row 1: got the labels \['{name}'\]"):
        read_folder(corpus)


def test_devel_must_have_the_labels_of_train(corpus):
    spoil(corpus, "devel", lambda rows: rows[0].__setitem__(1, "Rage"))
    with pytest.raises(ValueError, match="unknown: \\['Rage'\\]"):
        read_folder(corpus)


@pytest.mark.parametrize("missing", ["wav", "lab", "lab/train.csv", "lab/test.csv"])
def test_missing_files_and_folders_are_named(corpus, missing):
    path = corpus / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        read_folder(corpus)


def test_only_test_is_optional(corpus):
    (corpus / "lab" / "test.csv").unlink()
    tables = read_folder(corpus, test_is_optional=True)
    assert list(tables.splits) == ["train", "devel"]
    (corpus / "lab" / "devel.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"devel\.csv"):
        read_folder(corpus, test_is_optional=True)
