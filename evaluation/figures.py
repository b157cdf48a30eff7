"""Figures of a run."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..dataset_script.whole_files import whole_file
from .scores import MEAN

COLUMNS = 3
PANEL_INCHES = 2.6


def plot_shares(path, references, predictions, scores, title):
    """
    Plots predicted against true shares, one panel per label (the paper's Figure 2). Darker cells hold more clips; on
    the dashed line, the two shares are equal.

    Args:
        path: path of the figure; its suffix gives the format.
        references: (clips, labels) true shares, NaN where unknown.
        predictions: (clips, labels) predicted shares.
        scores: what `Scorer.scores` returned.
        title: title above all panels.
    """
    labels = [label for label in scores if label is not MEAN]
    rows = math.ceil(len(labels) / COLUMNS)
    columns = min(len(labels), COLUMNS)
    figure = Figure((columns * PANEL_INCHES, rows * PANEL_INCHES + 0.6), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel("share of listeners")
    figure.supylabel("predicted share")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(labels) :]:
        panel.set_axis_off()
    for index, (panel, label) in enumerate(zip(panels, labels, strict=False)):
        known = ~np.isnan(references[:, index])
        true, predicted = references[known, index], predictions[known, index]
        limit = max(true.max(initial=0.1), predicted.max(initial=0.1)) * 1.03
        panel.plot([0, limit], [0, limit], color="black", linewidth=0.8, linestyle="--")
        panel.hexbin(true, predicted, gridsize=28, extent=(0, limit, 0, limit), bins="log", mincnt=1, cmap="viridis_r")
        panel.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
        rho = scores[label].rho
        panel.set_title(f"{label}: no ρ" if math.isnan(rho) else f"{label}: ρ = {rho:.2f}", fontsize="medium")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(4))
    save_figure(figure, path)


def plot_calibration(path, calibrations, title):
    """
    Plots two panels: mean true against predicted shares, and empirical against nominal coverage of intervals. On the
    dashed line, the two are equal.

    Args:
        path: path of the figure; its suffix gives the format.
        calibrations: `Calibration`s, by split.
        title: title above both panels.
    """
    figure = Figure((COLUMNS * PANEL_INCHES, PANEL_INCHES + 1.2), layout="constrained")
    figure.suptitle(title)
    shares, intervals = figure.subplots(1, 2)
    for split, calibration in calibrations.items():
        shares.plot(calibration.predicted, calibration.true, marker="o", markersize=4, label=split)
        intervals.plot(calibration.stated, calibration.held, marker="o", markersize=4, label=split)
    largest = max(max(*calibration.predicted, *calibration.true) for calibration in calibrations.values())
    for panel, limit in ((shares, min(1.1 * largest, 1)), (intervals, 1)):
        panel.plot([0, limit], [0, limit], color="black", linewidth=0.8, linestyle="--")
        panel.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    shares.set(xlabel="predicted share", ylabel="mean share of listeners")
    intervals.set(xlabel="nominal coverage of intervals", ylabel="empirical coverage")
    shares.legend()
    save_figure(figure, path)


def save_figure(figure, path):
    """Writes a matplotlib figure in the format of the suffix. The same figure always gives the same bytes."""
    metadata = {"Date": None} if Path(path).suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "emoshare"}), whole_file(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.removeprefix("."), dpi=150, metadata=metadata)
