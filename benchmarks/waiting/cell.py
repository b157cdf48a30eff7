"""
The time of a grid's cell outside training, on a corpus of ComParE 2023's size, 51,813 clips.

    python benchmarks/waiting/cell.py [FRACTION]

The clips are 0.1 s of noise, so that extracting the grid's features, log-mels, takes only a few minutes; FRACTION
(default 1) reduces their number. The grid has two cells of small heads that train for one epoch. The table shows the
time that each cell took outside training, by step. The first cell computes the clips' digests and extracts their
features; the second one shows what every later cell takes.
"""

import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import yaml
from datasets.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
from machine import describe

from emoshare import EMOTIONS
from emoshare.reproduction import run as grid_run
from emoshare.reproduction.command import main as reproduce
from emoshare.training import run as training_run

SIZES = {"train": 31745, "devel": 9925, "test": 10143}
# Steps of a run, with the names of their functions in `training/run.py`.
STEPS = {
    "corpus": ["load_run_corpus"],
    "model": ["build_model"],
    "checking audio, extracting or opening features": ["check_new_audio", "extract_frame_features"],
    "prediction": ["predict_votes"],
    "noise ceiling": ["noise_ceiling"],
    "writing model, card, figure, predictions and results": ["save"],
}


def main(fraction):
    print(describe())
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_corpus(folder / "corpus", fraction)
        grid = {
            "title": "Two cells",
            "output_dir": str(folder / "grid"),
            "train": {
                "dataset": "csv",
                "data_dir": str(folder / "corpus"),
                "num_train_epochs": 1,
                "conv_channels": [8],
                "lstm_hidden_size": 8,
                "ffn_sizes": [8],
                "per_device_train_batch_size": 512,
            },
            "features": {"Log-mels": {}},
            "architectures": {"cnn_lstm": {}},
            "seeds": [0, 1],
        }
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        with timed_cells() as cells:
            assert reproduce(["--config", str(folder / "grid.yaml")]) == 0
    print_table(cells, sum(int(size * fraction) for size in SIZES.values()))


def write_corpus(folder, fraction):
    rng = np.random.default_rng(0)
    for name in ("wav", "lab"):
        (folder / name).mkdir(parents=True)
    for split, size in SIZES.items():
        lines = [",".join(["filename", *EMOTIONS])]
        for index in range(int(size * fraction)):
            name = f"{split}_{index:05d}.wav"
            soundfile.write(folder / "wav" / name, 0.1 * rng.standard_normal(1600), 16000)
            lines.append(",".join([name, *(f"{votes / 20}" for votes in rng.binomial(20, rng.beta(0.6, 2.5, 9)))]))
        (folder / "lab" / f"{split}.csv").write_text("\n".join(lines) + "\n")


@contextmanager
def timed_cells():
    """Yields a list with the seconds of each cell's steps by name; `train` is the whole cell."""
    cells = []
    timed(grid_run, "train", cells, is_cell=True)
    for names in STEPS.values():
        for name in names:
            timed(training_run, name, cells)
    timed(training_run.HeadTrainer, "fit", cells)
    timed(training_run.Scorer, "scores", cells)
    timed(training_run.Scorer, "__init__", cells)
    yield cells


def timed(owner, name, cells, is_cell=False):
    function = getattr(owner, name)

    def call(*args, **options):
        if is_cell:
            cells.append({})
        started, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **options)
        finally:
            if cells:  # the grid calls some of these functions before its first cell
                spent = np.array([time.perf_counter() - started, time.process_time() - cpu])
                cells[-1][name] = cells[-1].get(name, 0) + spent

    setattr(owner, name, call)


def print_table(cells, num_clips):
    steps = {**STEPS, "scores, and intervals of 1,000 resamples": ["__init__", "scores"]}
    print(f"\n{num_clips:,} clips\n\n| | first cell, s | CPU s | second cell, s | CPU s |\n|---|---|---|---|---|")
    beside = [np.subtract(cell["train"], cell["fit"]) for cell in cells]
    rows = {step: [sum_of(cell, names) for cell in cells] for step, names in steps.items()}
    rows["everything else"] = np.subtract(beside, np.sum(list(rows.values()), axis=0))
    rows["all except training"] = beside
    for step, of_cells in rows.items():
        print(f"| {step} | " + " | ".join(f"{value:.2f}" for of_cell in of_cells for value in of_cell) + " |")


def sum_of(cell, names):
    return np.sum([cell[name] for name in names], axis=0)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
