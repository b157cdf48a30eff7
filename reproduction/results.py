"""Reads the scores of a grid's finished cells from their folders."""

import csv
import math
from dataclasses import dataclass

import numpy as np

from ..architectures_emoshare import ARCHITECTURES
from ..dataset_script.whole_files import whole_file
from ..evaluation.paper import row_of
from ..evaluation.scores import MEAN, read_scores
from .grid import Cell


@dataclass(frozen=True)
class Run:
    """
    The results of training with one seed.

    Attributes:
        cells: its finished `Cell`s: one, or one for each fold.
        scores: its `Score`s by label and by `MEAN`, on devel or on all test folds together.
        of_folds: its `Score`s on each test fold; empty if there are no folds.
    """

    cells: tuple[Cell, ...]
    scores: dict
    of_folds: tuple = ()

    @property
    def cell(self):
        """The only cell, or the cell of the first fold."""
        return self.cells[0]


@dataclass(frozen=True)
class System:
    """One or more `Run`s that differ only in their seed."""

    runs: tuple

    @property
    def feature_set(self):
        return self.runs[0].cell.feature_set

    @property
    def layer(self):
        return self.runs[0].cell.layer

    @property
    def architecture(self):
        return self.runs[0].cell.architecture

    @property
    def title(self):
        """Name of its architecture in tables."""
        return ARCHITECTURES[self.architecture].title

    @property
    def row(self):
        return row_name(self.runs[0].cell)

    @property
    def paper_row(self):
        """Name of the row of the paper's Table 1 with the same features, or `None`."""
        return row_of(self.runs[0].cell.arguments.model)

    def rho(self, label=MEAN):
        """Mean ρ over the seeds; NaN if no seed has one."""
        rhos = self._known_rhos(label)
        return float(np.mean(rhos)) if rhos else math.nan

    def spread(self, label=MEAN):
        """Standard deviation of ρ over the seeds; NaN for fewer than two."""
        rhos = self._known_rhos(label)
        return float(np.std(rhos, ddof=1)) if len(rhos) > 1 else math.nan

    def rhos_of_folds(self, label=MEAN):
        """Mean ρ over the seeds on each test fold, (folds,); NaN where no seed has one."""
        rhos = np.array([[scores[label].rho for scores in run.of_folds] for run in self.runs])
        known = ~np.isnan(rhos)
        with np.errstate(invalid="ignore"):
            return np.where(known, rhos, 0).sum(axis=0) / known.sum(axis=0)

    def _known_rhos(self, label):
        rhos = [run.scores[label].rho for run in self.runs]
        return [rho for rho in rhos if not math.isnan(rho)]


def row_name(cell):
    """Name of the cell's features in tables."""
    if cell.layer == -1:
        return cell.feature_set
    return f"{cell.feature_set}, {'weighted layers' if cell.layer == 'weighted' else f'layer {cell.layer}'}"


def cell_name(cell):
    """Name of a cell in the report."""
    fold = "" if cell.fold is None else f", fold {cell.fold}"
    return f"{run_name(cell)}{fold}"


def run_name(cell):
    """Name of the cell's run in the report, without its fold."""
    return f"{row_name(cell)}, {ARCHITECTURES[cell.architecture].title}, seed {cell.seed}"


def read_run(cell, labels):
    """
    Args:
        cell: a finished `Cell`.
        labels: label names.

    Returns:
        `Run`.

    Raises:
        ValueError: naming the file, if it does not contain the scores of these labels.
    """
    return Run((cell,), read_scores(cell.results, labels))


def systems_of(runs):
    """Groups runs into `System`s, in the order of their first runs."""
    grouped = {}
    for run in runs:
        grouped.setdefault((row_name(run.cell), run.cell.architecture), []).append(run)
    return [System(tuple(members)) for members in grouped.values()]


def write_results(path, runs):
    """
    Writes a CSV with a row for each run and label, and for the mean. Numbers that do not exist are left empty. If there
    are folds, a column `fold` has the number of the fold, without intervals, or `all` for all folds together.
    """
    has_folds = any(run.of_folds for run in runs)
    with whole_file(path, newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["features", "architecture", "layer", "seed", *(["fold"] if has_folds else []), "label"]
        writer.writerow([*columns, "rho", "low", "high"])
        for run in runs:
            cell = run.cell
            for fold, scores in {"all": run.scores, **dict(enumerate(run.of_folds))}.items():
                for label, score in scores.items():
                    numbers = (
                        "" if math.isnan(number) else f"{number:.6f}" for number in (score.rho, score.low, score.high)
                    )
                    own = [cell.feature_set, cell.architecture, cell.layer, cell.seed, *([fold] if has_folds else [])]
                    writer.writerow([*own, "mean" if label is MEAN else label, *numbers])
