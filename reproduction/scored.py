"""The clips that the runs of a grid are scored on: the devel split, or all test folds together."""

import numpy as np

from ..dataset_script.facts import LANGUAGE
from ..dataset_script.folds import divide
from ..evaluation.groups import resampled_units
from ..evaluation.predictions import read_predictions
from .results import Run, read_run
from .significance import mean_scores


def scored_on(grid, corpus):
    """
    Args:
        grid: `Grid`.
        corpus: the `Corpus` of its first cell.

    Returns:
        `Folds` if the grid has folds, otherwise `Devel`.
    """
    arguments = grid.cells[0].arguments
    if arguments.data.folds is None:
        return Devel(corpus, arguments.run.resample)
    return Folds(corpus.as_stored, arguments.data, arguments.run.resample)


class Devel:
    """
    Scores runs, each of one cell, on devel.

    Args:
        corpus: `Corpus`.
        resample: `--resample` of the cells.

    Attributes:
        name: name of the scored clips, for headings and figures.
        references: (clips, labels) true shares of the scored clips, NaN where unknown.
        groups: (clips,) the group of each clip, if whole groups are resampled; `None` if clips are.
        units: describes what is resampled for intervals.
        languages: language of each scored clip, `None` where unknown; `None` if the corpus has no such fact.
        shares: true shares by the name of the set of clips, for the figure of their distribution.
        sizes: describes the numbers of clips.
    """

    name = "devel"

    def __init__(self, corpus, resample=None):
        self.corpus = corpus
        self.filenames = corpus.filenames("devel")
        self.references = corpus.shares("devel")
        self.shares = {"train": corpus.shares("train"), "devel": self.references}
        self.groups = resampled_units(corpus, "devel", resample)
        self.units = _units(self.groups, resample) or f"{len(self.references):,} devel clips"
        self.languages = _languages(corpus, ["devel"])
        self.sizes = ", ".join(f"{len(clips):,} {split}" for split, clips in corpus.splits.items())

    def runs(self, cells):
        """The `Run`s of the finished cells."""
        return [read_run(cell, self.corpus.labels) for cell in cells if cell.is_done]

    def predictions(self, run):
        """(clips, labels) predicted shares of the scored clips."""
        path = run.cell.folder / "predictions_devel.csv"
        return read_predictions(path, self.filenames, self.corpus.labels)


class Folds:
    """
    Scores runs, each of one cell per fold, on the predictions of all test folds together.

    Args:
        corpus: `Corpus` with its own splits.
        data: `DataArguments` of a cell.
        resample: `--resample` of the cells; without it, the groups of `--group_by` are resampled.

    Attributes:
        splits: the folds, a `datasets.DatasetDict`.
        group_by: the fact whose values are each in one fold, or `None`.
        of_groups: these values as text, for each fold; `None` if clips were not grouped.
        title: describes the folds.
        name, references, groups, units, languages, shares, sizes: as in `Devel`, for the clips of all folds in order.
    """

    name = "the test folds"

    def __init__(self, corpus, data, resample=None):
        folds = divide(corpus, data.num_folds, data.group_by)
        corpus = corpus.resplit({f"fold {number}": clips for number, clips in enumerate(folds)})
        self.labels, self.splits, self.group_by = corpus.labels, corpus.splits, data.group_by
        self.filenames = [corpus.filenames(split) for split in corpus.splits]  # of each fold
        self.of_fold = [corpus.shares(split) for split in corpus.splits]
        self.references = np.concatenate(self.of_fold)
        self.shares = {"all folds": self.references}
        units = resample or data.group_by
        of_units = [resampled_units(corpus, split, units) for split in corpus.splits]
        self.groups = None if units is None else np.concatenate(of_units)
        self.units = _units(self.groups, units) or f"{len(self.references):,} clips"
        self.languages = _languages(corpus, corpus.splits)
        self.of_groups, by = None, ""
        if data.group_by is not None:
            values = [facts[data.group_by] for facts in corpus.metadata.values()]
            self.of_groups = [[_text(value) for value in np.unique(of_fold)] for of_fold in values]
            by = f" by {data.group_by}"
        self.title = f"{len(folds)} folds{by}"
        fewest, most = min(map(len, folds)), max(map(len, folds))
        each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
        self.sizes = f"{len(self.references):,} in {self.title}, {each} each"

    def runs(self, cells):
        """The `Run`s whose cells are finished for all folds."""
        of_run = {}
        for cell in cells:
            if cell.is_done:
                of_run.setdefault((cell.feature_set, cell.layer, cell.architecture, cell.seed), []).append(cell)
        return [self._run(tuple(own)) for own in of_run.values() if len(own) == len(self.splits)]

    def _run(self, cells):
        predictions, settings = self._of_folds(cells), cells[0].arguments.run
        scores = mean_scores(
            np.concatenate(predictions)[None],
            self.references,
            self.labels,
            self.groups,
            settings.bootstrap,
            settings.seed,
        )
        of_folds = [
            mean_scores(of_fold[None], true, self.labels)
            for of_fold, true in zip(predictions, self.of_fold, strict=True)
        ]
        return Run(cells, scores, tuple(of_folds))

    def predictions(self, run):
        """(clips, labels) predicted shares of the scored clips."""
        return np.concatenate(self._of_folds(run.cells))

    def _of_folds(self, cells):
        return [
            read_predictions(cell.folder / "predictions_test.csv", filenames, self.labels)
            for cell, filenames in zip(cells, self.filenames, strict=True)
        ]


def _units(groups, fact):
    """Describes the groups that are resampled; `None` if clips are."""
    return None if groups is None else f"{len(set(groups)):,} groups by {fact}"


def _languages(corpus, splits):
    if LANGUAGE not in corpus.facts:
        return None
    return [language for split in splits for language in corpus.metadata[split][LANGUAGE]]


def _text(value):
    return value if isinstance(value, str) else f"{value:g}"
