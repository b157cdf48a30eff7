"""Whole grids, launched as users launch them: finished, broken, killed and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL_BACKBONE, run_command, run_script, write_corpus

pytestmark = pytest.mark.slow

REPRODUCE = ROOT / "reproduce.py"
LAUNCH = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", ROOT / "accelerate_config.yaml"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of four cells and, swept, three more."""
    folder = tmp_path_factory.mktemp("grid")
    corpus = write_corpus(folder / "corpus", {"train": 8, "devel": 6}, labels=["joy", "awe"])
    path = folder / "grid.yaml"
    flags = {"dataset": "csv", "data_dir": str(corpus), "num_train_epochs": 2, "bootstrap": 20}
    flags |= {"conv_channels": [16, 8], "lstm_hidden_size": 8, "ffn_sizes": [8], "per_device_train_batch_size": 4}
    entries = {
        "title": "A small grid",
        "output_dir": str(folder / "own"),
        "train": flags,
        "features": {
            "HuBERT (Small)": {"random_backbone": {"model_type": "hubert", **SMALL_BACKBONE}},
            "MFCC": {"acoustic_features": "mfcc"},
        },
        "architectures": {"cnn_lstm": {}, "cnn_lstm_attention": {}},
        "seeds": [0],
    }
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return path


def reproduce(grid, folder, *flags, check=True):
    return run_script(REPRODUCE, "--config", grid, "--output_dir", folder, *flags, cwd=grid.parent, check=check)


@pytest.fixture(scope="module")
def undisturbed(grid):
    folder = grid.parent / "undisturbed"
    command = [*LAUNCH, REPRODUCE, "--config", grid, "--output_dir", folder, "--sweep_layers"]
    return folder, run_command(*command, cwd=grid.parent)


def test_a_grid_leaves_a_report(undisturbed):
    folder, result = undisturbed
    assert "Cell 7 of 7" in result.stdout
    # One pass of the backbone for all layers, and a store for each layer and split; the MFCCs have two more.
    assert result.stdout.count("features of 4 layers") == 1
    assert len([path for path in (folder / "features").iterdir() if path.is_dir()]) == 2 * (4 + 1)
    assert not list(folder.glob("cells/*/checkpoint-*"))
    page = (folder / "README.md").read_text()
    assert "Finished: 7 of 7 cells" in page
    assert (folder / "figures" / "layers.png").is_file()
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 7 * 3


def test_a_cell_that_fails_is_listed_and_loses_no_other(grid, tmp_path):
    broken = tmp_path / "cells" / "mfcc-cnn_lstm-layer-1-seed0"
    (broken / "checkpoint-epoch-1").mkdir(parents=True)
    (broken / "checkpoint-epoch-1" / "run.json").write_text("{}")  # of another run, from which none can resume
    result = reproduce(grid, tmp_path, check=False)
    assert result.returncode == 1
    assert f"failed: {broken.name}: " in result.stderr
    assert "Finished: 3 of 4 cells" in (tmp_path / "README.md").read_text()
    assert "## Cells that failed" in (tmp_path / "README.md").read_text()

    shutil.rmtree(broken / "checkpoint-epoch-1")
    done = next(tmp_path.glob("cells/*/eval_results.json")).parent
    (done / "checkpoint-epoch-1").mkdir()  # the run was killed before it could remove it
    result = reproduce(grid, tmp_path)
    assert not (done / "checkpoint-epoch-1").exists()
    assert f"Cell 1 of 1: {broken.name}" in result.stdout
    assert "Finished: 4 of 4 cells" in (tmp_path / "README.md").read_text()
    assert "failed" not in result.stderr


def test_a_killed_grid_continues_with_what_is_not_done(grid, undisturbed, tmp_path):
    command = [*LAUNCH, REPRODUCE, "--config", grid, "--output_dir", tmp_path, "--sweep_layers"]
    process = subprocess.Popen([str(part) for part in command], cwd=grid.parent, start_new_session=True)
    deadline = time.monotonic() + 180
    while len(list(tmp_path.glob("cells/*/eval_results.json"))) < 3:
        assert process.poll() is None, "the grid ended before its third cell"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("cells/*/eval_results.json")))
    assert done < 7

    result = reproduce(grid, tmp_path, "--sweep_layers")
    assert f"Cell 1 of {7 - done}" in result.stdout
    assert result.stdout.count("train: extracting") <= 1  # the MFCCs, if they had not been reached
    for name in ("results.csv", "README.md"):
        assert (tmp_path / name).read_text() == (undisturbed[0] / name).read_text()


def test_a_dry_run_shows_time_and_disk_and_trains_nothing(grid, tmp_path):
    result = reproduce(grid, tmp_path, "--dry_run")
    assert "hubert-small-cnn_lstm-layer-1-seed0" in result.stdout
    assert "In all: " in result.stdout
    assert not list(tmp_path.glob("cells/*"))


def test_a_wrong_grid_starts_nothing(grid, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(grid.read_text().replace("cnn_lstm_attention", "gru"))
    result = reproduce(wrong, tmp_path / "output", check=False)
    assert result.returncode != 0
    assert "unknown architecture 'gru'" in result.stderr
    assert not (tmp_path / "output").exists()
