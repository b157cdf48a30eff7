"""Cells of a grid as `train.py` leaves them, with shares that are drawn and not trained."""

import csv

import numpy as np
from datasets import Dataset, DatasetDict

from emoshare.dataset_script.corpus import known_shares
from emoshare.evaluation.predictions import write_predictions
from emoshare.reproduction.grid import Cell
from emoshare.training.evaluation import Scorer, write_results


def corpus(labels, sizes=None, unknown=()):
    """Splits with shares in steps of 1/20; those of `unknown` labels, and of all in test, are not known."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, size in (sizes or {"train": 60, "devel": 40, "test": 10}).items():
        columns = {"filename": [f"{split}_{number}.wav" for number in range(size)]}
        for label in labels:
            shares = rng.binomial(20, rng.beta(0.6, 2.5, size=size)) / 20
            columns[label] = [None] * size if split == "test" or label in unknown else shares.tolist()
        splits[split] = Dataset.from_dict(columns)
    return DatasetDict(splits)


def plan_cell(folder, features, architecture="cnn_lstm", seed=0, layer="-1", backbone="acoustic", **flags):
    """A `Cell` that is not done."""
    name = f"{features}-{layer}-{architecture}-{seed}".replace(" ", "_")
    flags = {"backbone": backbone, "architecture": architecture, "seed": seed, "backbone_layer": layer, **flags}
    return Cell(features, architecture, seed, layer, flags, folder / name)


def finish_cell(cell, splits, labels, noise=0.2, epochs=3):
    """Writes what a finished cell has: predictions near the true shares, and their scores."""
    rng = np.random.default_rng([len(cell.features), cell.seed, len(cell.architecture), int(100 * noise)])
    cell.folder.mkdir(parents=True)
    for split in ("devel", "test"):
        if split in splits:
            true = np.nan_to_num(known_shares(splits[split], labels), nan=0.3)
            shares = np.clip(true + rng.normal(0, noise, true.shape), 0, 1)
            write_predictions(cell.folder / f"predictions_{split}.csv", splits[split]["filename"], shares, labels)
            if split == "devel":
                results = Scorer(known_shares(splits[split], labels), labels).scores(shares, bootstrap=20)
    with (cell.folder / "training_history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "label", "train_loss", "devel_spearman"])
        for epoch in range(1, epochs + 1):
            for index, label in enumerate(labels):
                stopped = index == 0 and epoch == epochs  # the first label's training ends early
                writer.writerow([epoch, label, "" if stopped else 0.1 / epoch, ""])
    write_results(cell.folder / "eval_results.json", {f"eval_{name}": value for name, value in results.items()})
    return cell


def write_scores(cell, labels, rhos):
    """A finished cell that has nothing but these scores, one for each label; `None` where there is no ρ."""
    cell.folder.mkdir(parents=True)
    known = [rho for rho in rhos if rho is not None]
    results = {"eval_spearman": float(np.mean(known))}
    results |= {f"eval_spearman_{label}": rho for label, rho in zip(labels, rhos, strict=True)}
    write_results(cell.folder / "eval_results.json", results)
    return cell
