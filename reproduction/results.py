"""Reads what the finished cells of a grid left in their folders."""

import csv
import json
import math
from dataclasses import dataclass

import numpy as np

from ..training.paper import row_of
from .grid import Cell

MEAN = None  # stands where a label does; a label may have any name

# What the tables call each `EmoShareConfig.architecture`. The first two are the paper's.
PAPER_ARCHITECTURES = ("cnn_lstm", "cnn_lstm_attention")
ARCHITECTURES = {
    "cnn_lstm": "Architecture 1",
    "cnn_lstm_attention": "Architecture 2",
    "transformer": "Transformer (ours)",
}


@dataclass(frozen=True)
class Score:
    """Spearman's ρ on devel with the ends of its 95 % interval; NaN where there is none."""

    rho: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """A finished cell and its scores, by label, with `MEAN` for their mean."""

    cell: Cell
    scores: dict


@dataclass(frozen=True)
class System:
    """The `Run`s that differ in nothing but their seed, at least one."""

    runs: tuple

    @property
    def features(self):
        return self.runs[0].cell.features

    @property
    def layer(self):
        return self.runs[0].cell.layer

    @property
    def architecture(self):
        return self.runs[0].cell.architecture

    @property
    def row(self):
        return row_name(self.runs[0].cell)

    @property
    def name(self):
        return f"{self.row}, {architecture_name(self.architecture)}"

    @property
    def paper_row(self):
        """The row of the paper's Table 1 with the same features, or `None`."""
        flags = self.runs[0].cell.flags
        return row_of(flags.get("backbone"), flags.get("acoustic_features"), self.layer)

    def rho(self, label=MEAN):
        """Mean over the seeds; NaN if no seed has a ρ."""
        rhos = self._known_rhos(label)
        return float(np.mean(rhos)) if rhos else math.nan

    def spread(self, label=MEAN):
        """Standard deviation over the seeds; NaN for fewer than two."""
        rhos = self._known_rhos(label)
        return float(np.std(rhos, ddof=1)) if len(rhos) > 1 else math.nan

    def _known_rhos(self, label):
        rhos = [run.scores[label].rho for run in self.runs]
        return [rho for rho in rhos if not math.isnan(rho)]


def architecture_name(architecture):
    return ARCHITECTURES.get(architecture, architecture)


def row_name(cell):
    """What the tables call the cell's features."""
    if cell.layer == "-1":
        return cell.features
    return f"{cell.features}, {'weighted layers' if cell.layer == 'weighted' else f'layer {cell.layer}'}"


def read_run(cell, labels):
    """
    Args:
        cell: a finished `Cell`.
        labels: label names.

    Returns:
        `Run`.

    Raises:
        ValueError: naming the file, if it does not hold the scores of these labels.
    """
    path = cell.folder / "eval_results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    scores = {}
    for label, key in [(MEAN, "eval_spearman"), *((label, f"eval_spearman_{label}") for label in labels)]:
        if key not in results:
            raise ValueError(f"{path}: has no {key!r}; expected the scores of {', '.join(labels)}")
        values = results[key], *results.get(f"{key}_ci95", (None, None))
        scores[label] = Score(*(math.nan if value is None else value for value in values))
    return Run(cell, scores)


def systems_of(runs):
    """The runs as `System`s, in the order in which they come."""
    grouped = {}
    for run in runs:
        grouped.setdefault((row_name(run.cell), run.cell.architecture), []).append(run)
    return [System(tuple(members)) for members in grouped.values()]


def write_results(path, runs):
    """Writes a row for each run and label, and one for the mean; what does not exist is left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["features", "architecture", "layer", "seed", "label", "rho", "low", "high"])
        for run in runs:
            cell = run.cell
            for label, score in run.scores.items():
                numbers = (
                    "" if math.isnan(number) else f"{number:.6f}" for number in (score.rho, score.low, score.high)
                )
                name = "mean" if label is MEAN else label
                writer.writerow([cell.features, cell.architecture, cell.layer, cell.seed, name, *numbers])


def read_history(cell):
    """
    Returns:
        The training losses of a finished cell, `dict` from a network's label to its epochs and losses, two lists;
        empty if the cell has no `training_history.csv`.
    """
    path = cell.folder / "training_history.csv"
    if not path.is_file():
        return {}
    losses = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epochs, values = losses.setdefault(row["label"], ([], []))
            if row["train_loss"]:
                epochs.append(int(row["epoch"]))
                values.append(float(row["train_loss"]))
    return losses
