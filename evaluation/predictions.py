"""Predicted shares: computed by a model, written as the challenge takes them, read back and checked."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..dataset_script.tables import ANY_NUMBER, FILENAME, SHARE, Problems, read_rows, share_in
from ..dataset_script.whole_files import whole_file
from ..windows_emoshare import average_by_duration


def predict(model, loader, accelerator):
    """
    Predicts every clip of a store in float32, on all processes together; windows of a clip are averaged by duration.

    Args:
        model: `EmoShareModel`, which need not have its backbone; its `trained_part`, if more than heads were trained.
        loader: `FeatureLoader` without a seed.
        accelerator: `accelerate.Accelerator`.

    Returns:
        `np.ndarray`: (clips, labels) float64, in the order of the clips; the same on each process.
    """
    return predict_votes(model, loader, accelerator).shares


class VotePredictions(NamedTuple):
    """
    Attributes:
        shares: (clips, labels) float64.
        concentrations: (clips, labels) float64; `None` if the model has none.
    """

    shares: np.ndarray
    concentrations: np.ndarray | None


def predict_votes(model, loader, accelerator):
    """`predict`, and the concentrations as well, averaged as shares are; returns `VotePredictions`."""
    store = loader.store
    columns = model.config.num_labels * (2 if model.config.has_concentrations else 1)
    predicted = np.zeros((len(store), columns))  # of windows: shares, and to their right concentrations
    model.eval()
    for batch in loader:
        with torch.no_grad():
            inputs = {store.input_name: batch[store.input_name].float()}
            output = model(**inputs, attention_mask=batch["attention_mask"])
        outputs = [output.logits] if output.concentrations is None else [output.logits, output.concentrations]
        predicted[batch["window"].cpu().numpy()] = torch.cat(outputs, dim=1).cpu().numpy()
    if accelerator.num_processes > 1:  # each window was predicted on one of them
        predicted = accelerator.reduce(torch.from_numpy(predicted).to(accelerator.device)).cpu().numpy()
    predicted = average_by_duration(predicted, store.num_samples, store.clip_of_window, len(store.clips))
    shares, concentrations = np.split(predicted, [model.config.num_labels], axis=1)
    return VotePredictions(shares, concentrations if model.config.has_concentrations else None)


class PredictionsCsv:
    """
    Predicted shares as the challenge wants them: `filename`, a column per label, a row per clip.

    Args:
        file: text file, opened with `newline=""`; the header is written at once.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow([FILENAME, *labels])

    def write(self, filename, shares):
        """Adds a clip's row; `shares` in the order of the labels."""
        self.writer.writerow([filename, *(f"{share:.9g}" for share in shares)])


class PredictionsJsonLines:
    """
    Predicted shares as JSON lines: `{"filename": ..., "shares": {label: share}}` for each clip.

    Args:
        file: text file.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.file = file
        self.labels = labels

    def write(self, filename, shares):
        """Adds a clip's line; `shares` in the order of the labels."""
        self.file.write(json_line({FILENAME: filename, "shares": dict(zip(self.labels, shares, strict=True))}))


def json_line(row):
    """A row of JSON lines."""
    line = json.dumps(row, ensure_ascii=False)
    if not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line):
        line = json.dumps(row)  # what is not UTF-8 in a name, Python holds as lone surrogates: JSON can escape them
    return line + "\n"


def write_predictions(path, filenames, shares, labels):
    """Writes predicted shares (clips, labels) as `PredictionsCsv`, rows in the given order."""
    with whole_file(path, newline="", encoding="utf-8") as file:
        predictions = PredictionsCsv(file, labels)
        for filename, row in zip(filenames, shares, strict=True):
            predictions.write(filename, row)


def read_predictions(path, filenames, labels, allowed=ANY_NUMBER):
    """
    Args:
        path: CSV file as `write_predictions` makes it.
        filenames: the clips of the split, in their order.
        labels: label names, in their order.
        allowed: `Interval` of the numbers that may be predicted.

    Returns:
        `np.ndarray`: (clips, labels) float64 predicted shares.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and row, if the columns are others, a clip is missing, there twice, not of this split or
            in another place, or a share is not an allowed number. Counts all problems, and shows the first.
    """
    path, filenames = Path(path), list(filenames)
    problems = Problems(path)
    header, rows = read_rows(path, None, problems)
    expected = [FILENAME, *labels]
    if header != expected:
        raise ValueError(f"{path}, row 1: got the columns {header}; expected {expected}")
    problems.raise_if_any()
    _check_clips([(number, filename) for number, (filename, *_) in rows], filenames, problems)
    shares = [
        [share_in(text, label, allowed, None, number, problems) for label, text in zip(labels, texts, strict=True)]
        for number, (_, *texts) in rows
    ]
    problems.raise_if_any()
    return np.array(shares, dtype=np.float64).reshape(len(rows), len(labels))


def read_submission(path, filenames, labels):
    """`read_predictions` of shares in [0, 1]: what a head that ends in a ReLU predicts may be above 1."""
    return read_predictions(path, filenames, labels, SHARE)


def read_members(folders, corpus):
    """
    Args:
        folders: of the runs, each with `predictions_devel.csv` and, if there is a test split, `predictions_test.csv`.
        corpus: `Corpus` that they were trained on.

    Returns:
        The members' predictions, `dict` from split to (members, clips, labels) float64. Their mean over the members is
        the ensemble's prediction.

    Raises:
        FileNotFoundError, ValueError: as `read_submission` does.
    """
    return {
        split: np.array(
            [
                read_submission(Path(folder) / f"predictions_{split}.csv", corpus.filenames(split), corpus.labels)
                for folder in folders
            ]
        )
        for split in ("devel", "test")
        if split in corpus.splits
    }


def _check_clips(rows, expected, problems):
    """Adds what is wrong with the clips of the rows; only if each is there once can their order be wrong."""
    known, first_seen = set(expected), {}
    for number, filename in rows:
        first = first_seen.setdefault(filename, number)
        if filename not in known:
            problems.add(None, number, f"{filename!r} is no clip of this split")
        elif first != number:
            problems.add(None, number, f"{filename} is listed again; first in row {first}")
    missing = [filename for filename in expected if filename not in first_seen]
    problems.found += [f"{filename} of this split is missing" for filename in missing]
    if problems.found:
        return
    for (number, filename), wanted in zip(rows, expected, strict=True):
        if filename != wanted:
            problems.add(None, number, f"got {filename}; expected {wanted}, the order of the split's list")
            return
