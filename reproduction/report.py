"""The report of a grid: the results of its finished cells, and the paper's values if the corpus is the paper's."""

import math
from pathlib import Path
from string import Template

import numpy as np

from ..dataset_script.corpora import CORPORA, is_published
from ..dataset_script.whole_files import whole_file
from ..evaluation.card import shown_settings
from ..evaluation.groups import MIN_CLIPS, groups_of
from ..evaluation.markdown import markdown_table
from ..evaluation.paper import PAPER, PAPER_ARCHITECTURES, rhos_of
from ..evaluation.predictions import read_submission
from ..evaluation.scores import HISTORY, MEAN, read_history
from ..evaluation.selections import SELECTIONS
from .figures import (
    LAYER_NAMES,
    plot_architectures,
    plot_best_shares,
    plot_folds,
    plot_label_distribution,
    plot_layers,
    plot_training_loss,
)
from .results import cell_name, row_name, run_name, systems_of, write_results
from .scored import scored_on
from .significance import mean_scores, paired_difference
from .tables import NONE, claims_table, mean, number, table_1, table_2

RESAMPLES = 1000
SHOWN_GROUPS = 6  # most groups of a fold that are listed by name
PAPERS_CORPUS = next(info for info in CORPORA.values() if info.is_papers)
NOT_THE_PAPERS = "**These are not the paper's results.**"
OTHER_SIZES = "**The splits are not the challenge's**, which have $expected, so differences from the paper mean little."
NOTES_ON_PAPERS_CORPUS = {
    "Table 1: each emotion": "Below each row: the paper's values, each from one run, and the differences. The backbone "
    "of HuBERT (Large) is known from the authors' code; the backbones of the paper's other rows are inferred. The "
    "paper's row MFCC Features is shown below MFCCs, although its section 2.3 describes a mel filterbank.",
    "Table 2: averages": "*Change*: relative to the challenge's own baseline, 0.500, computed from rounded averages, "
    "as in the paper. The paper's 0.425 and 0.274 do not follow from its Table 1, which gives 0.426 and 0.281.",
    "Figure 3: the architectures": "Hollow marks: the paper's values, from its Table 1.",
}
NOTES_ON_OTHERS = {
    "Table 2: averages": "The challenge's baseline is on another corpus, so no change relative to it is given.",
    "What the paper's text says": "The last column is on another corpus, so it neither confirms nor refutes the "
    "paper's statements about its own.",
}


def _read_sections(name):
    """A template's sections by heading; the part before the first heading is under `""`."""
    head, *sections = (Path(__file__).parent / name).read_text(encoding="utf-8").split("\n## ")
    return {"": head.strip()} | {part.partition("\n")[0]: f"## {part.strip()}" for part in sections}


SECTIONS = _read_sections("report.md")
SECTIONS_WITH_FOLDS = {**SECTIONS, **_read_sections("report_folds.md")}


def write_report(grid, corpus, failed):
    """
    Writes `results.csv`, `README.md`, and `figures/*.png` and `*.svg` of a grid to its `output_dir`. The report covers
    the finished cells, and lists the others.

    Args:
        grid: `Grid`.
        corpus: the `Corpus` of the first cell.
        failed: the last line of the error, by the name of a failed cell's folder.

    Raises:
        FileNotFoundError, ValueError: naming the file, if a finished cell's results or predictions are missing or
            belong to another corpus.
    """
    (grid.output_dir / "figures").mkdir(parents=True, exist_ok=True)
    scored = scored_on(grid, corpus)
    runs = scored.runs(grid.cells)
    write_results(grid.output_dir / "results.csv", runs)
    page = _Page(grid, corpus, failed, scored, runs)
    text = "\n\n".join(page.sections()) + "\n"
    with whole_file(grid.output_dir / "README.md", encoding="utf-8") as file:
        file.write(text)


class _Page:
    """The sections of `README.md`, which also write their figures. A section without content is empty."""

    def __init__(self, grid, corpus, failed, scored, runs):
        self.grid, self.failed, self.scored = grid, failed, scored
        self.figures = grid.output_dir / "figures"
        self.splits, self.labels, self.info = corpus.splits, corpus.labels, corpus.info
        self.filenames = corpus.filenames
        self.corpus = _corpus_title(corpus.info, grid.cells[0].arguments)
        self.has_folds = corpus.whole is not None
        if self.has_folds:
            self.corpus = f"{self.corpus}, {scored.title}"
        self.is_papers = corpus.info.is_papers
        self.runs = runs
        self.systems = systems_of(runs)
        ranked = [run for run in runs if not math.isnan(run.scores[MEAN].rho)]
        self.best = max(ranked, key=lambda run: run.scores[MEAN].rho, default=None)

    def sections(self):
        sections = [self.head()]
        if self.runs:
            sections += [self.table_1(), self.table_2(), self.languages(), self.folds()]
        if self.best:
            sections += [self.figure_2(), self.figure_3(), self.layers(), self.significance(), self.claims()]
            sections += [self.training()]
        sections += [self.distribution(), self.submission(), self.settings(), self.failures(), self.missing()]
        return [section for section in sections if section]

    def section(self, heading, **slots):
        notes = NOTES_ON_PAPERS_CORPUS if self.is_papers else NOTES_ON_OTHERS
        template = (SECTIONS_WITH_FOLDS if self.has_folds else SECTIONS)[heading]
        text = Template(template).substitute(slots, note=notes.get(heading, ""), units=self.scored.units)
        return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.strip())

    def head(self):
        sizes = {split: len(clips) for split, clips in self.splits.items()}
        counts = {"finished": sum(cell.is_done for cell in self.grid.cells), "planned": len(self.grid.cells)}
        return self.section("", title=self.grid.title, caution=self.caution(sizes), clips=self.scored.sizes, **counts)

    def caution(self, sizes):
        if self.is_papers:
            caution = f"The corpus is the paper's, {self.info.title}, so the paper's values are given too."
            if sizes != self.info.split_sizes:
                caution += "\n\n" + Template(OTHER_SIZES).substitute(expected=_sizes(self.info.split_sizes))
            return caution
        if self.info.caution:
            return f"{NOT_THE_PAPERS} {self.info.caution}"
        of_others = "clips" if self.has_folds else "corpora"
        return (
            f"{NOT_THE_PAPERS} They are on {self.corpus}; the paper's are on {PAPERS_CORPUS.title}. ρ on different "
            f"{of_others} cannot be compared, so the paper's values are not given."
        )

    def table_1(self):
        table = table_1(self.systems, self.labels, self.is_papers)
        selections = dict.fromkeys(run.cell.arguments.run.selection for run in self.runs)
        selection = " ".join(SELECTIONS[name].results for name in selections)
        return self.section("Table 1: each emotion", table=table, selection=selection)

    def table_2(self):
        return self.section("Table 2: averages", table=table_2(self.systems, self.labels, self.is_papers))

    def languages(self):
        """ρ by language; empty unless the scored clips are in several known languages."""
        if self.scored.languages is None:
            return ""
        names, language_of_clip = groups_of(self.scored.languages, are_names=True)
        clips = {name: np.flatnonzero(language_of_clip == number) for number, name in enumerate(names)}
        clips = {name: own for name, own in clips.items() if len(own) >= MIN_CLIPS}
        if len(clips) < 2:
            return ""
        header = ["features", "architecture", *(f"{name}, {len(own):,} clips" for name, own in clips.items())]
        rows = []
        for system in self.systems:
            predictions = self.predictions(system)
            scores = [self.mean_score(predictions, own) for own in clips.values()]
            rows.append([system.row, system.title, *map(_with_interval, scores)])
        left_out = len(self.scored.references) - sum(map(len, clips.values()))
        return self.section(
            "Languages",
            resamples=f"{RESAMPLES:,}",
            left_out=f"{left_out:,}",
            fewest=str(MIN_CLIPS),
            table=markdown_table(header, rows),
        )

    def predictions(self, system):
        """(runs, clips, labels) predicted shares of the scored clips."""
        return np.array([self.scored.predictions(run) for run in system.runs])

    def mean_score(self, predictions, clips=slice(None)):
        """The `Score`, averaged over emotions and runs, of `predictions` for these clips, with its interval."""
        groups = None if self.scored.groups is None else np.asarray(self.scored.groups)[clips]
        return mean_scores(predictions[:, clips], self.scored.references[clips], self.labels, groups, RESAMPLES)[MEAN]

    def folds(self):
        if not self.has_folds:
            return ""
        pooled = [self.mean_score(self.predictions(system)) for system in self.systems]
        columns = [self.column_of_folds(*pair) for pair in zip(self.systems, pooled, strict=True)]
        rows = []
        for fold, clips in enumerate(self.scored.splits.values()):
            rows.append([str(fold), f"{len(clips):,}", *self.groups_of(fold), *(column[fold] for column in columns)])
        nothing = [""] * (len(rows[0]) - len(columns) - 1)
        rows.append(["mean ± deviation", *nothing, *(column[-2] for column in columns)])
        rows.append(["**pooled**, 95 % interval", *nothing, *(column[-1] for column in columns)])
        header = ["fold", "clips", *([] if self.scored.of_groups is None else [self.scored.group_by])]
        header += [f"{system.row}, {system.title}" for system in self.systems]
        plot_folds(
            self.figures / "folds",
            self.systems,
            pooled,
            f"Mean ρ on each fold, and on all of them pooled\n{self.corpus}",
        )
        figure = _image("folds", "Mean ρ on each test fold, and on all of them together")
        return self.section("Folds", table=markdown_table(header, rows), resamples=f"{RESAMPLES:,}", figure=figure)

    def column_of_folds(self, system, pooled):
        """ρ on each fold, their mean and standard deviation, and the pooled ρ with its interval, as text."""
        rhos = system.rhos_of_folds()
        known = rhos[~np.isnan(rhos)]
        deviation = np.std(known, ddof=1) if len(known) > 1 else math.nan
        return [*map(number, rhos), f"{number(mean(rhos))} ± {number(deviation)}", _with_interval(pooled)]

    def groups_of(self, fold):
        """The column for a fold's groups: their names, or their number if there are many; no column without groups."""
        if self.scored.of_groups is None:
            return []
        groups = self.scored.of_groups[fold]
        return [", ".join(groups) if len(groups) <= SHOWN_GROUPS else f"{len(groups):,} of them"]

    def figure_2(self):
        stem, predictions = self.figures / "shares", self.scored.predictions(self.best)
        title = f"True and predicted share on {self.scored.name}\n{run_name(self.best.cell)}\n{self.corpus}"
        plot_best_shares(stem, self.best, self.scored.references, predictions, title)
        return self.section(
            "Figure 2: true and predicted share",
            rho=number(self.best.scores[MEAN].rho),
            cell=run_name(self.best.cell),
            figure=_image("shares", "Predicted against true share, a panel for each emotion"),
        )

    def figure_3(self):
        published, baseline = {}, None
        if self.is_papers:
            baseline = mean(PAPER["baseline"])
            for system in self.systems:
                rhos = rhos_of(system.paper_row, system.architecture)
                if rhos:
                    published[system.row, system.architecture] = rhos[MEAN]
        have_last = {system.feature_set for system in self.systems if system.layer == -1}
        shown = [system for system in self.systems if system.layer == -1 or system.feature_set not in have_last]
        title = f"Mean ρ of the architectures\n{self.corpus}"
        plot_architectures(self.figures / "architectures", shown, title, self.scored.name, published, baseline)
        figure = _image("architectures", "Mean ρ of each architecture, by features")
        return self.section("Figure 3: the architectures", figure=figure)

    def layers(self):
        layers = {}
        for system in self.systems:
            layers.setdefault(system.feature_set, set()).add(system.layer)
        swept = [system for system in self.systems if len(layers[system.feature_set]) > 1]
        if not swept:
            return ""
        title = f"Mean ρ by layer of the backbone\n{self.corpus}"
        plot_layers(self.figures / "layers", swept, title, self.scored.name)
        rows = []
        for names in dict.fromkeys((system.feature_set, system.architecture) for system in swept):
            members = [system for system in swept if (system.feature_set, system.architecture) == names]
            best = max(members, key=lambda system: np.nan_to_num(system.rho(), nan=-np.inf))
            layer = str(LAYER_NAMES.get(best.layer, best.layer))
            rows.append([best.feature_set, best.title, layer, number(best.rho())])
        table = markdown_table(["features", "architecture", f"best layer on {self.scored.name}", "mean ρ"], rows)
        return self.section("Layers", figure=_image("layers", "Mean ρ by layer of the backbone"), table=table)

    def significance(self):
        rows = []
        for name in dict.fromkeys(system.row for system in self.systems):
            of_architecture = {system.architecture: system for system in self.systems if system.row == name}
            first, second = (of_architecture.get(architecture) for architecture in PAPER_ARCHITECTURES)
            if all(system is not None and not math.isnan(system.rho()) for system in (first, second)):
                rows.append(self.compare(first, second))
        if not rows:
            return ""
        table = markdown_table(["features", "seeds", "difference of mean ρ", "95 % interval", ""], rows)
        return self.section("Architecture 2 against 1", resamples=f"{RESAMPLES:,}", table=table)

    def compare(self, first, second):
        """The table's row for two `System`s with the same features."""
        predictions = [self.predictions(system) for system in (first, second)]
        difference = paired_difference(*predictions, self.scored.references, RESAMPLES, groups=self.scored.groups)
        seeds = " and ".join(str(count) for count in dict.fromkeys(map(len, predictions)))
        interval = NONE if math.isnan(difference.low) else f"{difference.low:+.4f} to {difference.high:+.4f}"
        return [first.row, seeds, f"{difference.value:+.4f}", interval, self.verdict(difference, first, second)]

    def verdict(self, difference, first, second):
        if math.isnan(difference.low):
            return "one group: no interval"
        if difference.low > 0:
            return f"{second.title} is better on these clips"
        if difference.high < 0:
            return f"{first.title} is better on these clips"
        return f"no difference that {'these folds' if self.has_folds else 'this devel set'} can show"

    def claims(self):
        table = claims_table(self.systems, self.labels, self.corpus, has_baseline=self.is_papers)
        return self.section("What the paper's text says", table=table)

    def training(self):
        row = row_name(self.best.cell)
        runs = [run for run in self.runs if row_name(run.cell) == row]
        histories = [read_history(run.cell.folder / HISTORY) for run in runs]
        if not any(histories):
            return ""
        plot_training_loss(self.figures / "training_loss", runs, histories, f"Training loss: {row}\n{self.corpus}")
        return self.section("Training", row=row, figure=_image("training_loss", "Training loss over epochs"))

    def distribution(self):
        name, all_shares = next(iter(self.scored.shares.items()))
        title = f"Distribution of the true shares, with medians of {name}\n{self.corpus}"
        plot_label_distribution(self.figures / "labels", self.scored.shares, self.labels, title)
        rows = []
        for label, shares in zip(self.labels, all_shares.T, strict=True):
            known = shares[~np.isnan(shares)]
            values = [number(np.mean(known)), number(np.median(known))] if len(known) else [NONE, NONE]
            parts = [f"{100 * np.mean(part):.0f} %" if len(known) else NONE for part in (known <= 0.1, known > 0.5)]
            rows.append([label, *values, *parts])
        table = markdown_table(["", "mean share", "median", "clips of at most 0.1", "clips above 0.5"], rows)
        return self.section("Labels", table=table, figure=_image("labels", "Distribution of the true shares"))

    def submission(self):
        if "test" not in self.splits or not self.runs or self.has_folds:
            return ""
        problems, filenames = [], self.filenames("test")
        for run in self.runs:
            path = run.cell.folder / "predictions_test.csv"
            try:
                read_submission(path, filenames, self.labels)
            except (OSError, ValueError) as error:
                problems.append(f"- `{run.cell.folder.name}`: {_one_line(str(error).replace(str(path), path.name))}")
        counts = {"fit": len(self.runs) - len(problems), "finished": len(self.runs)}
        return self.section("Test predictions", problems="\n".join(problems), **counts)

    def settings(self):
        """Each flag's values; if each row of features has only one of them, with the names of these rows."""
        features = {}  # by flag and value, the rows with this value
        for cell in self.grid.cells:
            settings = shown_settings(cell.arguments)
            settings.pop("fold", None)  # each cell has its own
            for name, value in settings.items():
                features.setdefault(name, {}).setdefault(str(value), {})[cell.feature_set] = None
        rows = []
        for name, by_value in features.items():
            members = [row for having in by_value.values() for row in having]
            if len(by_value) > 1 and len(set(members)) == len(members):
                rows.append([name, "; ".join(f"{value} ({', '.join(having)})" for value, having in by_value.items())])
            else:
                rows.append([name, ", ".join(by_value)])
        return self.section("Settings", table=markdown_table(["setting", "value"], rows))

    def failures(self):
        lines = [f"- `{name}`: {_one_line(error)}" for name, error in self.failed.items()]
        return self.section("Cells that failed", cells="\n".join(lines)) if lines else ""

    def missing(self):
        missing = [cell for cell in self.grid.cells if not cell.is_done and cell.folder.name not in self.failed]
        lines = [f"- `{cell.folder.name}`: {cell_name(cell)}" for cell in missing]
        return self.section("Cells that are not done", cells="\n".join(lines)) if lines else ""


def _corpus_title(info, arguments):
    """Name of the corpus in the report; for a published dataset that is not in `CORPORA`, the dataset's own name."""
    is_known = info.is_named or not is_published(arguments.data.dataset)
    return info.title if is_known else shown_settings(arguments)["dataset"]


def _sizes(sizes):
    return ", ".join(f"{size:,} {split}" for split, size in sizes.items())


def _with_interval(score):
    """A score as text with its interval, if it has one."""
    interval = "" if math.isnan(score.low) else f" ({number(score.low)} to {number(score.high)})"
    return f"{number(score.rho)}{interval}"


def _one_line(text):
    return " ".join(text.split())


def _image(name, alternative_text):
    return f"![{alternative_text}](figures/{name}.png)\n\n[As SVG](figures/{name}.svg)"
