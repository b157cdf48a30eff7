"""Figures of a grid, each saved as PNG and SVG."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..architectures_emoshare import ARCHITECTURES
from ..evaluation.figures import plot_shares, save_figure

SUFFIXES = (".png", ".svg")
COLUMNS = 3
PANEL_INCHES = 2.6
LEGEND_INCHES = 3.2  # width of the longest entry
BINS = np.arange(-0.025, 1.05, 0.05)  # centred on multiples of 0.05; the first holds clips without any vote
LAYER_NAMES = {-1: "last", "weighted": "all"}


@dataclass(frozen=True)
class Style:
    """How an architecture is drawn. Markers and lines differ too, so that figures can be read without colours."""

    color: str
    marker: str
    linestyle: str | tuple
    legend: str


# Okabe and Ito's colours. The lists have different lengths, so that combinations of the three repeat late.
COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINESTYLES = ("--", "-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)), (0, (9, 3)), (0, (9, 2, 1, 2)), (0, (3, 6)))


def style_of(architecture):
    """The `Style` of an architecture, which depends on its place in `ARCHITECTURES`."""
    place = list(ARCHITECTURES).index(architecture)
    entry = ARCHITECTURES[architecture]
    return Style(
        COLORS[place % len(COLORS)],
        MARKERS[place % len(MARKERS)],
        LINESTYLES[place % len(LINESTYLES)],
        f"{entry.title}: {entry.summary}",
    )


def plot_best_shares(stem, run, references, predictions, title):
    """
    Plots the paper's Figure 2 for one run: see `plot_shares`.

    Args:
        stem: path of the figure without its suffix.
        run: `Run`.
        references, predictions: (clips, labels) shares of the scored clips.
        title: title above all panels.
    """
    for suffix in SUFFIXES:
        plot_shares(stem.with_suffix(suffix), references, predictions, run.scores, title)


def plot_architectures(stem, systems, title, scored="devel", published=None, baseline=None):
    """
    Plots the paper's Figure 3: mean ρ of each architecture, by features, with the standard deviation over seeds.

    Args:
        stem: path of the figure without its suffix.
        systems: `System`s.
        title: title of the figure.
        scored: name of the scored clips, such as devel.
        published: the paper's mean ρ, by row and architecture.
        baseline: mean ρ of the challenge's baseline.
    """
    rows = list(dict.fromkeys(system.row for system in systems))
    architectures = list(dict.fromkeys(system.architecture for system in systems))
    figure = Figure((7.5, 1.6 + 0.26 * len(rows) * (len(architectures) + 0.6)), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title, fontsize="medium")
    seeds = max(len(system.runs) for system in systems)
    for index, architecture in enumerate(architectures):
        shift = (index - (len(architectures) - 1) / 2) * 0.6 / len(architectures)
        members = {rows.index(system.row) + shift: system for system in systems if system.architecture == architecture}
        _plot_architecture(panel, architecture, members, seeds, published or {})
    if baseline is not None:
        panel.axvline(baseline, color="black", linestyle="--", linewidth=1, label="challenge baseline")
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    for boundary in range(1, len(rows)):
        panel.axhline(boundary - 0.5, color="0.9", linewidth=0.8)
    bars = f"bars: ± one standard deviation over {seeds} seeds" if seeds > 1 else "one seed each"
    panel.set_xlabel(f"mean Spearman's ρ on {scored}\n({bars})")
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    _legend_below(figure)
    _save(figure, stem)


def _plot_architecture(panel, architecture, members, seeds, published):
    """Plots one architecture; `members` are its `System`s by their height in the panel."""
    style = style_of(architecture)
    panel.errorbar(
        [system.rho() for system in members.values()],
        list(members),
        xerr=np.nan_to_num([system.spread() for system in members.values()]) if seeds > 1 else None,
        fmt=style.marker,
        color=style.color,
        capsize=3,
        label=style.legend,
    )
    known = [
        (published[system.row, architecture], height)
        for height, system in members.items()
        if (system.row, architecture) in published
    ]
    if known:
        panel.plot(
            *zip(*known, strict=True),
            style.marker,
            color=style.color,
            fillstyle="none",
            markersize=9,
            label=f"{ARCHITECTURES[architecture].title} in the paper",
        )


def plot_folds(stem, systems, pooled, title):
    """
    Plots a row for each system: mean ρ on each test fold, and pooled over all folds, with its interval.

    Args:
        stem: path of the figure without its suffix.
        systems: `System`s.
        pooled: each system's `Score`, pooled over all folds.
        title: title of the figure.
    """
    figure = Figure((7.5, 1.8 + 0.32 * len(systems)), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title, fontsize="medium")
    for height, (system, score) in enumerate(zip(systems, pooled, strict=True)):
        style, rhos = style_of(system.architecture), system.rhos_of_folds()
        panel.plot(rhos, np.full(len(rhos), height), "|", color="0.5", markersize=9, label="one fold")
        panel.plot([score.low, score.high], [height, height], color=style.color, label="95 % interval")
        panel.plot([score.rho], [height], style.marker, color=style.color, label=style.legend)
    panel.axvline(0, color="0.6", linewidth=0.8)
    panel.set_yticks(range(len(systems)), [f"{system.row}\n{system.title}" for system in systems], fontsize="small")
    panel.set_ylim(len(systems) - 0.5, -0.5)
    panel.set_xlabel("mean Spearman's ρ on the test folds")
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    _legend_below(figure)
    _save(figure, stem)


def plot_layers(stem, systems, title, scored="devel"):
    """
    Plots mean ρ by the backbone layer that the heads read, with a panel for each backbone.

    Args:
        stem: path of the figure without its suffix.
        systems: `System`s of backbones that were run with several layers.
        title: title above all panels.
        scored: name of the scored clips, such as devel.
    """
    backbones = list(dict.fromkeys(system.feature_set for system in systems))
    figure, panels = _panels(len(backbones), title, "layer: hidden_states[k]", f"mean ρ on {scored}", sharey=True)
    for panel, backbone in zip(panels, backbones, strict=True):
        members = [system for system in systems if system.feature_set == backbone]
        layers = {system.layer for system in members}
        named = [layer for layer in LAYER_NAMES if layer in layers]
        numbered = sorted(layers - set(named))
        first_place = numbered[-1] + 2 if numbered else 0
        places = {layer: layer for layer in numbered}
        places |= {layer: first_place + 2 * index for index, layer in enumerate(named)}
        for architecture in dict.fromkeys(system.architecture for system in members):
            of_layer = {system.layer: system for system in members if system.architecture == architecture}
            _plot_curve(panel, [layer for layer in numbered if layer in of_layer], of_layer, places, is_line=True)
            _plot_curve(panel, [layer for layer in named if layer in of_layer], of_layer, places, is_line=False)
        shown = numbered[:: max(1, math.ceil(len(numbered) / 7))] + named
        panel.set_xticks([places[layer] for layer in shown], [LAYER_NAMES.get(layer, layer) for layer in shown])
        panel.set_title(backbone, fontsize="medium")
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.grid(color="0.9")
    _legend_below(figure)
    _save(figure, stem)


def _plot_curve(panel, layers, of_layer, places, is_line):
    if not layers:
        return
    systems = [of_layer[layer] for layer in layers]
    style = style_of(systems[0].architecture)
    panel.errorbar(
        [places[layer] for layer in layers],
        [system.rho() for system in systems],
        yerr=np.nan_to_num([system.spread() for system in systems]),
        color=style.color,
        marker=style.marker,
        markersize=4,
        linestyle=style.linestyle if is_line else "none",
        label=style.legend,
    )


def plot_training_loss(stem, runs, histories, title):
    """
    Plots training loss over epochs, with a panel for each head and a line for each run.

    Args:
        stem: path of the figure without its suffix.
        runs: `Run`s.
        histories: each run's history, as `read_history` returns it.
        title: title above all panels.
    """
    labels = list(dict.fromkeys(label for history in histories for label in history))
    figure, panels = _panels(len(labels), title, "epoch", "training loss")
    for panel, label in zip(panels, labels, strict=True):
        for run, history in zip(runs, histories, strict=True):
            style = style_of(run.cell.architecture)
            epochs, losses = history.get(label, ([], []))
            panel.plot(
                epochs,
                losses,
                color=style.color,
                linestyle=style.linestyle,
                marker=style.marker,
                markersize=3.5,
                markevery=max(1, len(epochs) // 8),
                linewidth=1.2,
                label=style.legend,
            )
        panel.set_title(label, fontsize="medium")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.grid(color="0.9")
    _legend_below(figure)
    _save(figure, stem)


def plot_label_distribution(stem, shares, labels, title):
    """
    Plots histograms of the true shares, in bins of 0.05, with a panel for each label.

    Args:
        stem: path of the figure without its suffix.
        shares: true shares (clips, labels), NaN where unknown, of one or two sets of clips, by the name of the set.
        labels: label names.
        title: title above all panels.
    """
    figure, panels = _panels(
        len(labels), title, "true share of listeners", "clips of the split", sharex=True, sharey=True
    )
    first = next(iter(shares))
    for index, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        of_split = {split: known[~np.isnan(known)] for split, known in ((s, v[:, index]) for s, v in shares.items())}
        for split, values in of_split.items():
            filled = split == first
            panel.hist(
                values,
                BINS,
                weights=np.full(len(values), 1 / max(len(values), 1)),
                histtype="stepfilled" if filled else "step",
                color="#56B4E9" if filled else "black",
                linewidth=1.2,
                label=split,
            )
        median = f", median {np.median(of_split[first]):.2f}" if len(of_split[first]) else ": no known shares"
        panel.set_title(f"{label}{median}", fontsize="medium")
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    _legend_below(figure)
    _save(figure, stem)


def _panels(count, title, x_label, y_label, **options):
    """A figure with `count` panels in rows of `COLUMNS`, and these panels."""
    rows, columns = math.ceil(count / COLUMNS), min(count, COLUMNS)
    size = (max(columns * PANEL_INCHES, 4.5), rows * (PANEL_INCHES - 0.4) + 1.3)
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for index, panel in enumerate(panels[:count]):
        if index % columns == 0:
            panel.set_ylabel(y_label)
        if index + columns >= count:  # nothing below it
            panel.set_xlabel(x_label)
            panel.tick_params(labelbottom=True)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _legend_below(figure):
    """Adds one legend for all panels, with each entry once."""
    entries = {}
    for panel in figure.axes:
        handles, names = panel.get_legend_handles_labels()
        # matplotlib lists plain lines before error bars; the grid's own results, with error bars, come first here.
        named = sorted(zip(names, handles, strict=True), key=lambda entry: not isinstance(entry[1], ErrorbarContainer))
        entries |= {name: handle for name, handle in named if name not in entries}
    if entries:
        columns = max(1, int(figure.get_figwidth() // LEGEND_INCHES))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _save(figure, stem):
    for suffix in SUFFIXES:
        save_figure(figure, stem.with_suffix(suffix))
