"""Cells of a grid as `train.py` leaves them, with random shares instead of trained ones."""

import numpy as np
from datasets import Dataset, DatasetDict

from emoshare.dataset_script import Corpus
from emoshare.evaluation.predictions import write_predictions
from emoshare.evaluation.scores import HISTORY, MEAN, RESULTS, Score, Scorer, write_history
from emoshare.evaluation.scores import write_scores as write_results
from emoshare.reproduction.grid import Cell, Grid, with_folds
from emoshare.training.arguments import arguments_of
from emoshare.training.corpus import corpus_of_run


def fabricated_corpus(labels, sizes=None, unknown=(), name="csv", speakers=0, languages=()):
    """
    A `Corpus` of shares in steps of 1/20; those of `unknown` labels, and of all in test, are not known. With
    `speakers`, each clip has one of so many, who speak in turn; with `languages`, one of these, in turn too.
    """
    rng = np.random.default_rng(0)
    splits = {}
    for split, size in (sizes or {"train": 60, "devel": 40, "test": 10}).items():
        columns = {"filename": [f"{split}_{number}.wav" for number in range(size)]}
        for label in labels:
            shares = rng.binomial(20, rng.beta(0.6, 2.5, size=size)) / 20
            columns[label] = [None] * size if split == "test" or label in unknown else shares.tolist()
        if speakers:
            columns["speaker"] = [f"s{number % speakers}" for number in range(size)]
        if languages:
            columns["language"] = [languages[number % len(languages)] for number in range(size)]
        splits[split] = Dataset.from_dict(columns)
    facts = [fact for fact, given in {"speaker": speakers, "language": languages}.items() if given]
    return Corpus(name, DatasetDict(splits), list(labels), facts)


def plan_cell(folder, features, architecture="cnn_lstm", seed=0, layer="-1", backbone="acoustic", **flags):
    """A `Cell` that is not done."""
    name = f"{features}-{layer}-{architecture}-{seed}".replace(" ", "_")
    own = {"backbone": backbone, "architecture": architecture, "seed": seed, "backbone_layer": layer}
    return Cell(features, arguments_of({**own, "output_dir": str(folder / name), **flags}, "test"))


def cells_of_folds(folder, corpus, num_folds, *args, noise=0.2, group_by="speaker", **flags):
    """Finished cells, one for each fold; `args` and `flags` as in `plan_cell`."""
    first = plan_cell(folder, *args, folds=num_folds, fold=0, group_by=group_by, **flags)
    cells = with_folds(Grid("A grid", folder, [first], {}), corpus).cells
    return [finish_cell(cell, corpus_of_run(corpus, cell.arguments.data), noise) for cell in cells]


def finish_cell(cell, corpus, noise=0.2, epochs=3):
    """Writes what a finished cell has: predictions near the true shares, and their scores."""
    seed = [len(cell.feature_set), cell.seed, len(cell.architecture), int(100 * noise)]
    rng = np.random.default_rng(seed if cell.fold is None else [*seed, cell.fold])
    cell.folder.mkdir(parents=True)
    for split in ("devel", "test"):
        if split in corpus.splits:
            true = np.nan_to_num(corpus.shares(split), nan=0.3)
            shares = np.clip(true + rng.normal(0, noise, true.shape), 0, 1)
            filenames = corpus.filenames(split)
            write_predictions(cell.folder / f"predictions_{split}.csv", filenames, shares, corpus.labels)
            if split == "devel":
                scores = Scorer(corpus.shares(split), corpus.labels).scores(shares, bootstrap=20)
    history = [
        (epoch, label, 0.1 / epoch, np.nan)
        for epoch in range(1, epochs + 1)
        for label in range(len(corpus.labels))
        if not (label == 0 and epoch == epochs)  # the first label's training ends early
    ]
    write_history(cell.folder / HISTORY, history, corpus.labels)
    write_results(cell.folder / RESULTS, scores)
    return cell


def write_scores(cell, labels, rhos):
    """Writes a finished cell with only these scores, one for each label; `None` where there is no ρ."""
    cell.folder.mkdir(parents=True)
    known = [rho for rho in rhos if rho is not None]
    of_label = {label: np.nan if rho is None else rho for label, rho in zip(labels, rhos, strict=True)}
    scores = {label: Score(rho) for label, rho in {MEAN: float(np.mean(known)), **of_label}.items()}
    write_results(cell.folder / RESULTS, scores)
    return cell
