"""The page of a grid: what its finished cells gave, beside the paper's values where the corpus is the paper's."""

import math
from pathlib import Path
from string import Template

import numpy as np

from ..dataset_script import corpora
from ..dataset_script.corpus import known_shares
from ..dataset_script.tables import FILENAME
from ..evaluation.predictions import read_predictions, read_submission
from ..training.card import UNTOLD
from ..training.paper import PAPER
from .figures import (
    LAYER_NAMES,
    plot_architectures,
    plot_best_shares,
    plot_label_distribution,
    plot_layers,
    plot_training_loss,
)
from .results import (
    MEAN,
    PAPER_ARCHITECTURES,
    architecture_name,
    read_history,
    read_run,
    row_name,
    systems_of,
    write_results,
)
from .significance import paired_difference
from .tables import NONE, claims_table, markdown_table, mean, number, paper_rhos, table_1, table_2

RESAMPLES = 1000
COMPARE2023 = "compare2023"
CORPORA = {
    COMPARE2023: "ComParE 2023 Emotion Share",
    "synthetic": "the synthetic corpus",
    "csv": "a corpus in a local folder",
}
CAUTIONS = {
    COMPARE2023: "The corpus is that of the paper, ComParE 2023 Emotion Share: the paper's values stand beside.",
    "synthetic": "**These are not the paper's results.** The corpus is synthetic: voices made of pulses and filters, "
    "and simulated listeners. The numbers show that the software works. They say nothing about people, nor about which "
    "features or architecture are better on speech.",
}
OTHER_CAUTION = (
    "**These are not the paper's results.** The corpus is $corpus; the paper's is ComParE 2023 Emotion Share. ρ of "
    "different corpora cannot be compared, so no value of the paper stands beside."
)
OTHER_SIZES = (
    "**The splits are not the challenge's**, which have $expected: the differences from the paper mean little."
)
NOTES_ON_PAPERS_CORPUS = {
    "Table 1: each emotion": "Below each row: the paper's values, of one run, and the differences. Which backbones the "
    "paper's rows but HuBERT (Large) took is inferred. Its row MFCC Features stands below MFCCs, though its section "
    "2.3 describes a mel filterbank.",
    "Table 2: averages": "*Change*: against the challenge's own baseline, 0.500, of the averages as printed, as in the "
    "paper. The paper's 0.425 and 0.274 do not follow from its Table 1, which gives 0.426 and 0.281.",
    "Figure 3: the architectures": "Hollow: the paper's, from its Table 1.",
}
NOTES_ON_OTHERS = {
    "Table 2: averages": "The challenge's baseline is of another corpus: there is no change against it.",
    "What the paper's text says": "The last column is of another corpus: it confirms and refutes nothing that the "
    "paper says of its own.",
}


def _read_sections():
    """The page's template in its parts, by heading; the part above the first has none."""
    head, *sections = (Path(__file__).parent / "report.md").read_text(encoding="utf-8").split("\n## ")
    return {"": head.strip()} | {part.partition("\n")[0]: f"## {part.strip()}" for part in sections}


SECTIONS = _read_sections()


def write_report(folder, title, dataset, cells, failed, splits, labels):
    """
    Writes `results.csv`, `README.md`, and `figures/*.png` and `*.svg` of a grid. Cells that are not done are listed;
    the page is made of the others.

    Args:
        folder (`Path`): for the report; made if it is not there.
        title: of the page.
        dataset: as `train.py --dataset`.
        cells: all `Cell`s of the grid.
        failed: a line on what went wrong, by the name of a failed cell's folder.
        splits: `datasets.DatasetDict` with `train`, `devel` and, where there is one, `test`.
        labels: label names.

    Raises:
        FileNotFoundError, ValueError: naming the file, if a finished cell's results or devel predictions are missing or
            not of this corpus.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    runs = [read_run(cell, labels) for cell in cells if cell.is_done]
    write_results(folder / "results.csv", runs)
    page = _Page(folder / "figures", title, dataset, cells, failed, splits, labels, runs)
    (folder / "README.md").write_text("\n\n".join(page.sections()) + "\n", encoding="utf-8")


class _Page:
    """The sections of `README.md`; each writes its figure. Those that there is nothing for are empty."""

    def __init__(self, figures, title, dataset, cells, failed, splits, labels, runs):
        self.figures = figures
        self.title = title
        self.dataset = dataset
        self.corpus = CORPORA.get(dataset, dataset)
        self.is_papers = dataset == COMPARE2023
        self.cells, self.failed = cells, failed
        self.splits, self.labels = splits, labels
        self.shares = {split: known_shares(splits[split], labels) for split in ("train", "devel")}
        self.runs = runs
        self.systems = systems_of(runs)
        ranked = [run for run in runs if not math.isnan(run.scores[MEAN].rho)]
        self.best = max(ranked, key=lambda run: run.scores[MEAN].rho, default=None)

    def sections(self):
        sections = [self.head()]
        if self.runs:
            sections += [self.table_1(), self.table_2()]
        if self.best:
            sections += [self.figure_2(), self.figure_3(), self.layers(), self.significance(), self.claims()]
            sections += [self.training()]
        sections += [self.distribution(), self.submission(), self.settings(), self.failures(), self.missing()]
        return [section for section in sections if section]

    def section(self, heading, **slots):
        notes = NOTES_ON_PAPERS_CORPUS if self.is_papers else NOTES_ON_OTHERS
        text = Template(SECTIONS[heading]).substitute(slots, note=notes.get(heading, ""))
        return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.strip())

    def head(self):
        sizes = {split: len(clips) for split, clips in self.splits.items()}
        caution = Template(CAUTIONS.get(self.dataset, OTHER_CAUTION)).substitute(corpus=self.corpus)
        expected = corpora.CORPORA[COMPARE2023].split_sizes
        if self.is_papers and sizes != expected:
            caution += "\n\n" + Template(OTHER_SIZES).substitute(expected=_sizes(expected))
        counts = {"finished": len(self.runs), "planned": len(self.cells)}
        return self.section("", title=self.title, caution=caution, clips=_sizes(sizes), **counts)

    def table_1(self):
        return self.section("Table 1: each emotion", table=table_1(self.systems, self.labels, self.is_papers))

    def table_2(self):
        return self.section("Table 2: averages", table=table_2(self.systems, self.labels, self.is_papers))

    def figure_2(self):
        stem, predictions = self.figures / "shares", self.devel_predictions(self.best)
        title = f"True and predicted share on devel\n{_name(self.best.cell)}\n{self.corpus}"
        plot_best_shares(stem, self.best, self.shares["devel"], predictions, self.labels, title)
        return self.section(
            "Figure 2: true and predicted share",
            rho=number(self.best.scores[MEAN].rho),
            cell=_name(self.best.cell),
            figure=_image("shares", "Predicted against true share, a panel for each emotion"),
        )

    def figure_3(self):
        published, baseline = {}, None
        if self.is_papers:
            baseline = mean(PAPER["baseline"])
            of_paper = {(system.row, system.architecture): paper_rhos(system) for system in self.systems}
            published = {names: rhos[MEAN] for names, rhos in of_paper.items() if rhos is not None}
        have_last = {system.features for system in self.systems if system.layer == "-1"}
        shown = [system for system in self.systems if system.layer == "-1" or system.features not in have_last]
        title = f"Mean ρ of the architectures\n{self.corpus}"
        plot_architectures(self.figures / "architectures", shown, title, published, baseline)
        figure = _image("architectures", "Mean ρ of each architecture, by features")
        return self.section("Figure 3: the architectures", figure=figure)

    def layers(self):
        layers = {}
        for system in self.systems:
            layers.setdefault(system.features, set()).add(system.layer)
        swept = [system for system in self.systems if len(layers[system.features]) > 1]
        if not swept:
            return ""
        plot_layers(self.figures / "layers", swept, f"Mean ρ by layer of the backbone\n{self.corpus}")
        rows = []
        for names in dict.fromkeys((system.features, system.architecture) for system in swept):
            members = [system for system in swept if (system.features, system.architecture) == names]
            best = max(members, key=lambda system: np.nan_to_num(system.rho(), nan=-np.inf))
            rows.append(
                [names[0], architecture_name(names[1]), LAYER_NAMES.get(best.layer, best.layer), number(best.rho())]
            )
        table = markdown_table(["features", "architecture", "best layer on devel", "mean ρ"], rows)
        return self.section("Layers", figure=_image("layers", "Mean ρ by layer of the backbone"), table=table)

    def significance(self):
        rows = []
        for name in dict.fromkeys(system.row for system in self.systems):
            of_architecture = {system.architecture: system for system in self.systems if system.row == name}
            compared = [of_architecture.get(architecture) for architecture in PAPER_ARCHITECTURES]
            if all(system is not None and not math.isnan(system.rho()) for system in compared):
                rows.append(self.compare(*compared))
        if not rows:
            return ""
        table = markdown_table(["features", "seeds", "difference of mean ρ", "95 % interval", ""], rows)
        devel = f"{len(self.shares['devel']):,}"
        return self.section("Architecture 2 against 1", resamples=f"{RESAMPLES:,}", devel=devel, table=table)

    def compare(self, first, second):
        """The table's row on two `System`s of the same features."""
        predictions = [np.array([self.devel_predictions(run) for run in system.runs]) for system in (first, second)]
        difference = paired_difference(*predictions, self.shares["devel"], RESAMPLES)
        seeds = " and ".join(str(count) for count in dict.fromkeys(map(len, predictions)))
        interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
        return [first.row, seeds, f"{difference.value:+.4f}", interval, _verdict(difference)]

    def claims(self):
        table = claims_table(self.systems, self.labels, self.corpus, has_baseline=self.is_papers)
        return self.section("What the paper's text says", table=table)

    def training(self):
        row = row_name(self.best.cell)
        runs = [run for run in self.runs if row_name(run.cell) == row]
        histories = [read_history(run.cell) for run in runs]
        if not any(histories):
            return ""
        plot_training_loss(self.figures / "training_loss", runs, histories, f"Training loss: {row}\n{self.corpus}")
        return self.section("Training", row=row, figure=_image("training_loss", "Training loss over epochs"))

    def distribution(self):
        title = f"Distribution of the true shares, with medians of train\n{self.corpus}"
        plot_label_distribution(self.figures / "labels", self.shares, self.labels, title)
        rows = []
        for label, shares in zip(self.labels, self.shares["train"].T, strict=True):
            known = shares[~np.isnan(shares)]
            values = [number(np.mean(known)), number(np.median(known))] if len(known) else [NONE, NONE]
            parts = [f"{100 * np.mean(part):.0f} %" if len(known) else NONE for part in (known <= 0.1, known > 0.5)]
            rows.append([label, *values, *parts])
        table = markdown_table(["", "mean share", "median", "clips of at most 0.1", "clips above 0.5"], rows)
        return self.section("Labels", table=table, figure=_image("labels", "Distribution of the true shares"))

    def submission(self):
        if "test" not in self.splits or not self.runs:
            return ""
        problems = []
        for run in self.runs:
            path = run.cell.folder / "predictions_test.csv"
            try:
                read_submission(path, self.splits["test"][FILENAME], self.labels)
            except (OSError, ValueError) as error:
                problems.append(f"- `{run.cell.folder.name}`: {_one_line(str(error).replace(str(path), path.name))}")
        counts = {"fit": len(self.runs) - len(problems), "finished": len(self.runs)}
        return self.section("Test predictions", problems="\n".join(problems), **counts)

    def settings(self):
        """A flag's value, or its values; with the features that have each, where it is the features that decide it."""
        rows = []
        for name in dict.fromkeys(name for cell in self.cells for name in cell.flags if name not in UNTOLD):
            features = {}
            for cell in self.cells:
                if cell.flags.get(name) is not None:
                    features.setdefault(_told(name, cell.flags[name]), {})[cell.features] = None
            members = [row for rows_of_value in features.values() for row in rows_of_value]
            if len(features) > 1 and len(set(members)) == len(members):
                rows.append([name, "; ".join(f"{value} ({', '.join(having)})" for value, having in features.items())])
            elif features:
                rows.append([name, ", ".join(features)])
        return self.section("Settings", table=markdown_table(["setting", "value"], rows))

    def failures(self):
        lines = [f"- `{name}`: {_one_line(error)}" for name, error in self.failed.items()]
        return self.section("Cells that failed", cells="\n".join(lines)) if lines else ""

    def missing(self):
        missing = [cell for cell in self.cells if not cell.is_done and cell.folder.name not in self.failed]
        lines = [f"- `{cell.folder.name}`: {_name(cell)}" for cell in missing]
        return self.section("Cells that are not done", cells="\n".join(lines)) if lines else ""

    def devel_predictions(self, run):
        path = run.cell.folder / "predictions_devel.csv"
        return read_predictions(path, self.splits["devel"][FILENAME], self.labels)


def _verdict(difference):
    if difference.low > 0:
        return "Architecture 2 is better on these clips"
    if difference.high < 0:
        return "Architecture 1 is better on these clips"
    return "no difference that this devel set can show"


def _name(cell):
    return f"{row_name(cell)}, {architecture_name(cell.architecture)}, seed {cell.seed}"


def _sizes(sizes):
    return ", ".join(f"{size:,} {split}" for split, size in sizes.items())


def _told(name, value):
    """A flag's value; a backbone's folder by its name alone, as where it lies is nobody's business."""
    return Path(value).name if name == "backbone" and Path(value).exists() else str(value)


def _one_line(text):
    return " ".join(text.split())


def _image(name, alternative_text):
    return f"![{alternative_text}](figures/{name}.png)\n\n[As SVG](figures/{name}.svg)"
