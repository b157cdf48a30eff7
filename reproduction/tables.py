"""The paper's tables for a grid's results, next to the paper's own values, as Markdown."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..evaluation.markdown import markdown_table
from ..evaluation.paper import PAPER, PAPER_ARCHITECTURES, rhos_of
from ..evaluation.scores import MEAN
from ..metrics.emotion_share_spearman.spearman import mean_rho

NONE = "–"


def number(value, sign=""):
    """A number with three decimals, as in the paper; a dash for NaN. `sign="+"` also signs positive numbers."""
    return NONE if math.isnan(value) else f"{value:{sign}.3f}"


def percentage(value):
    """A percentage with one decimal, as in the paper, and its sign; a dash for NaN."""
    return NONE if math.isnan(value) else f"{value:+.1f} %"


def percentage_change(value, reference):
    """The change from `reference` to `value` in %; NaN unless `reference` is positive."""
    return 100 * (value - reference) / reference if reference > 0 else math.nan


def table_1(systems, labels, with_paper):
    """
    Spearman's ρ per label and their mean, averaged over seeds, with the best of each column in bold.

    Args:
        systems: `System`s.
        labels: label names.
        with_paper: whether to add the paper's values and the differences below each system's.

    Returns:
        `str`: Markdown.
    """
    columns = [*labels, MEAN]
    best = {column: max((number(system.rho(column)) for system in systems), key=_as_number) for column in columns}
    header = ["features", "architecture", *([""] if with_paper else []), *labels, "mean"]
    rows = []
    for system in systems:
        texts = []
        for column in columns:
            rho, spread = number(system.rho(column)), system.spread(column)
            text = f"**{rho}**" if rho == best[column] != NONE else rho
            texts.append(text if math.isnan(spread) else f"{text} ± {spread:.3f}")
        rows.append([system.row, system.title, *(["here"] if with_paper else []), *texts])
        paper = rhos_of(system.paper_row, system.architecture) if with_paper else {}
        if paper:
            rows.append(["", "", "paper", *(number(paper[column]) for column in columns)])
            differences = (number(system.rho(column) - paper[column], "+") for column in columns)
            rows.append(["", "", "difference", *differences])
    return markdown_table(header, rows)


def _as_number(text):
    return -math.inf if text == NONE else float(text)


def by_architecture(systems, labels):
    """The ρ per label of `System`s, by row and by architecture, as in `paper_results.json`."""
    table = {}
    for system in systems:
        table.setdefault(system.row, {})[system.architecture] = [system.rho(label) for label in labels]
    return table


def mean(rhos):
    """Mean over the labels that have a ρ; NaN if none has."""
    return float(mean_rho(np.array(rhos)))


def average(rhos):
    """`mean` rounded to three decimals, which the paper also computes with."""
    return round(mean(rhos), 3)


def average_of_better(row):
    """
    The average in the paper's Table 2: the mean over emotions of the better of its two architectures.

    Args:
        row: ρ per emotion, by architecture.
    """
    return average(np.fmax(*(row[architecture] for architecture in PAPER_ARCHITECTURES)))


def table_2(systems, labels, with_paper):
    """
    Average ρ of each row of features: of the better of the paper's two architectures per label, and of each single
    architecture.

    Args:
        systems: `System`s.
        labels: label names.
        with_paper: whether to add the change against the challenge's baseline, and the paper's numbers.

    Returns:
        `str`: Markdown.
    """
    baseline = average(PAPER["baseline"])
    titles = {system.architecture: system.title for system in systems}

    def cells(value):
        return [number(value), percentage(percentage_change(value, baseline))] if with_paper else [number(value)]

    def columns(name):
        return [name, "change"] if with_paper else [name]

    header = ["features", *columns("better of 1 and 2"), *(columns("the paper's") if with_paper else [])]
    header += [name for title in titles.values() for name in columns(title)]
    rows = []
    for name, row in by_architecture(systems, labels).items():
        has_both = all(architecture in row for architecture in PAPER_ARCHITECTURES)
        line = [name, *cells(average_of_better(row) if has_both else math.nan)]
        if with_paper:
            papers = {system.paper_row for system in systems if system.row == name}
            paper_row = papers.pop() if len(papers) == 1 else None
            published = PAPER["table_2"]["average"].get(paper_row, math.nan)
            line += [number(published), percentage(PAPER["table_2"]["change"].get(paper_row, math.nan))]
        for architecture in titles:
            line += cells(average(row.get(architecture, [math.nan])))
        rows.append(line)
    return markdown_table(header, rows)


@dataclass(frozen=True)
class Claim:
    """
    A number in the paper's text.

    Attributes:
        what: what the number measures.
        said: the number in the text.
        rows: the rows of the paper's Table 1 from which it can be computed.
        recompute: computes it, in %, from these rows, each of which has ρ per emotion by architecture.
        needs_baseline: whether it compares with the challenge's baseline.
    """

    what: str
    said: str
    rows: tuple
    recompute: Callable
    needs_baseline: bool = False


def over_baseline(row):
    return percentage_change(average_of_better(row), average(PAPER["baseline"]))


def over_other_row(row, other):
    return percentage_change(average_of_better(row), average_of_better(other))


def gain_of_attention(row):
    """The change from Architecture 1 to 2. Uses unrounded means, since three decimals are too few for such changes."""
    without, with_attention = (mean(row[architecture]) for architecture in PAPER_ARCHITECTURES)
    return percentage_change(with_attention, without)


W2V2_BASE, W2V2_LARGE = "wav2vec2.0 (Base)", "wav2vec2.0 (Large)"
HUBERT_BASE, HUBERT_LARGE, ACOUSTIC_ROW = "HuBERT (Base)", "HuBERT (Large)", "MFCC Features"
CLAIMS = (
    Claim("HuBERT Large over the challenge's baseline", "4.6 %", (HUBERT_LARGE,), over_baseline, needs_baseline=True),
    Claim("wav2vec 2.0 Base over Large", "55 %", (W2V2_BASE, W2V2_LARGE), over_other_row),
    Claim("Architecture 2 over 1, wav2vec 2.0 Base", "1 to 1.8 %", (W2V2_BASE,), gain_of_attention),
    Claim("Architecture 2 over 1, HuBERT Base", "1 to 1.8 %", (HUBERT_BASE,), gain_of_attention),
    Claim("Architecture 2 over 1, HuBERT Large", "1 to 1.8 %", (HUBERT_LARGE,), gain_of_attention),
    Claim("Architecture 2 over 1, wav2vec 2.0 Large", "worse", (W2V2_LARGE,), gain_of_attention),
    Claim("Architecture 2 over 1, acoustic features", "worse", (ACOUSTIC_ROW,), gain_of_attention),
)


def claims_table(systems, labels, corpus, has_baseline):
    """
    The claims in the paper's text, next to the values from its own Table 1 and from this grid.

    Args:
        systems: `System`s.
        labels: label names.
        corpus: title of the grid's corpus.
        has_baseline: whether the challenge's baseline is on this corpus.

    Returns:
        `str`: Markdown.
    """
    here = {}  # by the paper's row, the grid's rows with these features that have both architectures
    for paper_row in dict.fromkeys(system.paper_row for system in systems):
        rows = by_architecture([system for system in systems if system.paper_row == paper_row], labels).values()
        here[paper_row] = [row for row in rows if all(architecture in row for architecture in PAPER_ARCHITECTURES)]
    lines = []
    for claim in CLAIMS:
        in_paper = percentage(claim.recompute(*(PAPER["table_1"][row] for row in claim.rows)))
        if claim.needs_baseline and not has_baseline:
            in_grid = "no baseline"
        elif not all(here.get(row) for row in claim.rows):
            in_grid = "not run"
        elif any(len(here[row]) > 1 for row in claim.rows):
            in_grid = "several rows"
        else:
            in_grid = percentage(claim.recompute(*(here[row][0] for row in claim.rows)))
        lines.append([claim.what, claim.said, in_paper, in_grid])
    return markdown_table(["", "the paper's text", "the paper's Table 1", f"this grid, {corpus}"], lines)
