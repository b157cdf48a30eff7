"""Finished cells are compared with the grid's current corpus."""

import json

import pytest
import soundfile
import yaml
from accelerate import PartialState
from conftest import read_csv, speech, torch_threads, write_corpus, write_csv

from emoshare.dataset_script import load_corpus
from emoshare.evaluation.scores import MEAN, Score, write_scores
from emoshare.reproduction import run
from emoshare.reproduction.command import main
from emoshare.reproduction.done import check_done_cells
from emoshare.reproduction.grid import read_grid, with_folds
from emoshare.training.corpus import corpus_of_run

FLAGS = {"dataset": "csv", "num_train_epochs": 1, "bootstrap": 0, "conv_channels": [8], "lstm_hidden_size": 4}


@pytest.fixture
def folder(tmp_path):
    """A corpus, and the grid of two cells that `grid_of` reads."""
    corpus = write_corpus(tmp_path / "corpus", {"train": 6, "devel": 5}, labels=["joy", "awe"])
    entries = {
        "title": "A grid",
        "output_dir": str(tmp_path / "grid"),
        "train": {**FLAGS, "data_dir": str(corpus), "ffn_sizes": [4]},
        "features": {"Mel": {}},
        "architectures": {"cnn_lstm": {}},
        "seeds": [0, 1],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


def load(folder):
    return load_corpus("csv", data_dir=folder / "corpus", cache_dir=folder / "cache")


def finish(cell, corpus, made_from=True):
    cell.folder.mkdir(parents=True)
    scores = {MEAN: Score(0.5), "joy": Score(0.5), "awe": Score(0.5)}
    write_scores(cell.results, scores, corpus.fingerprints() if made_from else None)


def check(grid, folder):
    check_done_cells(grid, load(folder), PartialState())


def change_shares(folder):
    header, *rows = read_csv(folder / "corpus" / "lab" / "train.csv")
    write_csv(folder / "corpus" / "lab" / "train.csv", header, [[rows[0][0], "0.111", "0.222"], *rows[1:]])


def change_clip(folder):
    soundfile.write(folder / "corpus" / "wav" / "devel_001.wav", speech(0.7, seed=99), 16000)


def add_test(folder):
    header, *rows = read_csv(folder / "corpus" / "lab" / "devel.csv")
    write_csv(folder / "corpus" / "lab" / "devel.csv", header, rows[1:])
    write_csv(folder / "corpus" / "lab" / "test.csv", header, rows[:1])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_shares, "other shares in train"),
        (change_clip, "other clips in devel"),
        (add_test, "other clips in devel, other shares in devel, there was no test"),
    ],
)
def test_a_cell_of_another_corpus_is_refused_by_what_differs(change, difference, folder):
    grid = read_grid(folder / "grid.yaml")
    finish(grid.cells[0], load(folder))
    check(grid, folder)
    change(folder)
    with pytest.raises(ValueError, match=r"1 finished cell\(s\) are of another corpus:") as error:
        check(grid, folder)
    assert f"\n  {grid.cells[0].folder.name}: {difference}\n" in str(error.value)
    assert "delete their folders" in str(error.value)
    assert grid.cells[0].is_done


def give_speakers(folder, speakers):
    rows = [[f"train_{number:03d}.wav", speakers[number]] for number in range(6)]
    rows += [[f"devel_{number:03d}.wav", speakers[6 + number]] for number in range(5)]
    write_csv(folder / "corpus" / "lab" / "clips.csv", ["filename", "speaker"], rows)


def test_a_cell_of_another_fold_is_refused_by_what_differs(folder):
    entries = yaml.safe_load((folder / "grid.yaml").read_text())
    (folder / "grid.yaml").write_text(yaml.safe_dump({**entries, "folds": "leave_one_out", "group_by": "speaker"}))
    give_speakers(folder, "abcabcabcab")
    grid = with_folds(read_grid(folder / "grid.yaml"), load(folder))
    assert len(grid.cells) == 2 * 3
    for cell in grid.cells[:4]:
        finish(cell, corpus_of_run(load(folder), cell.arguments.data))
    check(grid, folder)
    give_speakers(folder, "xyzxyzxyzxy")  # the same clips by other names
    check(grid, folder)
    change_clip(folder)  # devel_001, of the second speaker: it is test, devel or train of each fold
    with pytest.raises(ValueError, match=r"4 finished cell\(s\) are of another corpus:") as error:
        check(grid, folder)
    folders = [cell.folder.name for cell in grid.cells[:4]]
    splits = ["devel", "test", "train", "devel"]
    for name, split in zip(folders, splits, strict=True):
        assert f"\n  {name}: other clips in {split}\n" in str(error.value)
    give_speakers(folder, "xyzxyzxyzxx")
    with pytest.raises(
        ValueError, match=f"{folders[0]}: other clips in devel, other shares in devel, other clips in test"
    ):
        check(grid, folder)


def test_what_changes_no_result_is_no_difference(folder, tmp_path):
    grid = read_grid(folder / "grid.yaml")
    finish(grid.cells[0], load(folder))
    (folder / "corpus" / "lab" / "clips.csv").write_text("filename,speaker\ntrain_000.wav,eve\n")
    (folder / "corpus").rename(folder / "moved")
    (folder / "corpus").symlink_to(folder / "moved")
    check(grid, folder)


def test_results_of_an_earlier_version_are_kept_and_named(folder, capsys):
    grid = read_grid(folder / "grid.yaml")
    finish(grid.cells[0], load(folder), made_from=False)
    check(grid, folder)
    assert grid.cells[0].is_done
    errors = capsys.readouterr().err
    assert "1 finished cell(s) do not say what corpus they were made from" in errors
    assert grid.cells[0].folder.name in errors


@pytest.mark.parametrize("content", ["", '{"eval_spearman": 0.5, "eval', "[]"])
def test_results_that_cannot_be_read_are_made_again(content, folder, capsys):
    grid = read_grid(folder / "grid.yaml")
    finish(grid.cells[0], load(folder))
    grid.cells[0].results.write_text(content)
    assert not grid.cells[0].is_done
    check(grid, folder)
    assert f"{grid.cells[0].results} cannot be read: the cell is trained again" in capsys.readouterr().err
    assert grid.cells[0].results.read_text() == content  # a dry run removes nothing; the new run replaces them


def test_a_dry_run_leaves_damaged_results(folder, capsys):
    results = read_grid(folder / "grid.yaml").cells[0].results
    results.parent.mkdir(parents=True)
    results.write_text("{")
    with torch_threads(1):
        assert main(["--config", str(folder / "grid.yaml"), "--dry_run"]) == 0
    assert f"{results} cannot be read: the cell is trained again" in capsys.readouterr().err
    assert results.read_text() == "{"


@pytest.mark.slow
def test_a_grid_says_it_before_anything_else(folder, capsys):
    with torch_threads(1):  # a run sets its own number
        command = ["--config", str(folder / "grid.yaml")]
        assert main(command) == 0
        made_from = json.loads(read_grid(folder / "grid.yaml").cells[1].results.read_text())["made_from"]
        assert made_from == load(folder).fingerprints()
        change_shares(folder)
        capsys.readouterr()
        assert main(command) == 2
        errors = capsys.readouterr().err
        assert errors.count("reproduce.py: error: ") == 1
        assert errors.count("other shares in train") == 2
        (folder / "corpus" / "wav" / "devel_002.wav").write_text("not audio")
        for cell in read_grid(folder / "grid.yaml").cells:
            cell.results.unlink()
        assert main(command) == 2
        assert "lab/devel.csv, row 4: devel_002.wav: not an audio file" in capsys.readouterr().err


def test_a_cell_that_fails_without_a_message_is_listed(folder, capsys, monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr(run, "train", fail)
    with torch_threads(1):
        assert main(["--config", str(folder / "grid.yaml")]) == 1
    names = [cell.folder.name for cell in read_grid(folder / "grid.yaml").cells]
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed")] == [
        f"failed: {name}: OSError" for name in names
    ]
