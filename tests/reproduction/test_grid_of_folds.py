"""Whole grids with folds: features are extracted once, and a cell is a run of train.py on a fold."""

import json
import shutil

import pytest
import yaml
from conftest import read_csv, torch_threads, write_corpus, write_csv

from emoshare.evaluation import figures as shares_figure
from emoshare.reproduction import figures
from emoshare.reproduction.command import main
from emoshare.training import command, corpus, features
from emoshare.training.trainer import HeadTrainer

FLAGS = {"num_train_epochs": 2, "bootstrap": 0, "conv_channels": [8], "lstm_hidden_size": 4, "ffn_sizes": [4]}


class Killed(BaseException):
    """Ends a run in the middle, past every `except Exception`."""


@pytest.fixture(autouse=True)
def _threads():
    with torch_threads(1):  # a run sets its own number
        yield


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid of four cells, one for each speaker; its figures are not drawn."""
    for module in (figures, shares_figure):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())
    sizes = {"train": 4, "devel": 3, "test": 2}
    corpus = write_corpus(tmp_path / "corpus", sizes, labels=["joy", "awe"], seconds=(0.3, 0.5))
    clips = sorted(path.name for path in (corpus / "wav").iterdir())
    speakers = [[clip, "abcd"[number % 4]] for number, clip in enumerate(clips)]
    write_csv(corpus / "lab" / "clips.csv", ["filename", "speaker"], speakers)
    entries = {
        "title": "Folds",
        "output_dir": str(tmp_path / "grid"),
        "folds": "leave_one_out",
        "group_by": "speaker",
        "train": {**FLAGS, "dataset": "csv", "data_dir": str(corpus), "checkpoint_minutes": 0},
        "features": {"Mel": {}},
        "architectures": {"cnn_lstm": {}},
        "seeds": [0],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


@pytest.mark.slow
def test_a_grid_of_folds_extracts_each_clip_once_and_resumes_where_it_was_killed(grid, monkeypatch, capsys):
    extracted, windows = [], features.windows_of
    monkeypatch.setattr(
        features, "windows_of", lambda row, *rest: extracted.append(row["filename"]) or windows(row, *rest)
    )
    train_epoch, epochs = HeadTrainer.train_epoch, []

    def killed_in_the_second_cell(trainer, heads):
        epochs.append(trainer.progress.epochs_done)
        if epochs == [0, 1, 0, 1]:
            raise Killed
        return train_epoch(trainer, heads)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HeadTrainer, "train_epoch", killed_in_the_second_cell)
        main(["--config", str(grid / "grid.yaml")])
    capsys.readouterr()
    loaded, load = [], corpus.load_corpus
    monkeypatch.setattr(corpus, "load_corpus", lambda *args, **options: loaded.append(args) or load(*args, **options))
    assert main(["--config", str(grid / "grid.yaml")]) == 0
    assert len(loaded) == 1  # which all cells share
    output = capsys.readouterr().out
    assert "Cell 1 of 3: mel-cnn_lstm-layer-1-seed0-fold1\n" in output
    assert "Resuming after epoch 1" in output
    assert "Spearman's rho on test, the fold 3" in output

    cells = sorted((grid / "grid" / "cells").iterdir())
    assert [cell.name for cell in cells] == [f"mel-cnn_lstm-layer-1-seed0-fold{fold}" for fold in range(4)]
    tested = [row[0] for cell in cells for row in read_csv(cell / "predictions_test.csv")[1:]]
    assert sorted(tested) == sorted(extracted)  # each of the 9 clips once
    assert len(set(tested)) == len(tested) == 9
    assert len([path for path in (grid / "grid" / "features").iterdir() if path.is_dir()]) == 3
    check_against_a_run_by_hand(cells[1], grid)
    assert len(extracted) == 9


def check_against_a_run_by_hand(cell, grid):
    """A cell, killed or not, has the results of train.py with the same flags."""
    flags = []
    of_cell = {"architecture": "cnn_lstm", "folds": "leave_one_out", "fold": 1, "group_by": "speaker"}
    for name, value in {**FLAGS, **of_cell}.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    flags += ["--dataset", "csv", "--data_dir", str(grid / "corpus"), "--output_dir", str(grid / "by hand")]
    assert command.main([*flags, "--feature_cache_dir", str(grid / "grid" / "features")]) == 0
    for name in ("predictions_devel.csv", "predictions_test.csv", "eval_results.json", "model.safetensors"):
        assert (grid / "by hand" / name).read_bytes() == (cell / name).read_bytes(), name
    card = (cell / "README.md").read_text()
    of_test = json.loads((cell / "eval_results.json").read_text())["test"]
    assert set(of_test) == {"spearman", "spearman_joy", "spearman_awe"}
    assert f"On test, which nothing was selected on, the mean ρ is {of_test['spearman']:.3f}." in card
    for setting in ("| folds | leave_one_out |", "| fold | 1 |", "| group_by | speaker |"):
        assert setting in card


def test_what_is_wrong_with_folds_is_one_message_before_anything_is_trained(grid, capsys):
    shutil.copy(grid / "grid.yaml", grid / "copy.yaml")
    for folds, group_by, message in [
        (5, "speaker", "folds: got 4 values of 'speaker'; expected at least 5, one for each fold"),
        (3, "sex", "group_by: got 'sex'; expected a fact of the corpus: speaker"),
        (2, "speaker", f"{grid / 'grid.yaml'}, line 5: mel-cnn_lstm-layer-1-seed0: --folds: got '2'"),
    ]:
        entries = yaml.safe_load((grid / "copy.yaml").read_text())
        (grid / "grid.yaml").write_text(yaml.safe_dump({**entries, "folds": folds, "group_by": group_by}))
        try:
            code = main(["--config", str(grid / "grid.yaml")])
        except SystemExit as end:
            code = end.code
        errors = capsys.readouterr().err
        assert code == 2
        assert f"reproduce.py: error: {message}" in errors
        assert "Traceback" not in errors
    assert not (grid / "grid").exists()
