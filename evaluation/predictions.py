"""Predicted shares: computed by a model, written in the challenge's format, read back and checked."""

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
    Predicts every clip of a store in float32, distributed over all processes. The shares of a clip's windows are
    averaged, weighted by duration.

    Args:
        model: `EmoShareModel` with or without its backbone; its `trained_part`, if more than the heads was trained.
        loader: `FeatureLoader` without a seed.
        accelerator: `accelerate.Accelerator`.

    Returns:
        `np.ndarray`: predicted shares (clips, labels) float64, in the order of the clips; the same on each process.
    """
    return predict_votes(model, loader, accelerator).shares


class VotePredictions(NamedTuple):
    """
    Attributes:
        shares: (clips, labels) float64.
        concentrations: (clips, labels) float64; `None` if the model does not predict them.
    """

    shares: np.ndarray
    concentrations: np.ndarray | None


def predict_votes(model, loader, accelerator):
    """Like `predict`, but returns `VotePredictions`, with concentrations averaged in the same way as shares."""
    store = loader.store
    columns = model.config.num_labels * (2 if model.config.has_concentrations else 1)
    predicted = np.zeros((len(store), columns))  # by window: shares, then concentrations
    model.eval()
    for batch in loader:
        with torch.no_grad():
            inputs = {store.input_name: batch[store.input_name].float()}
            output = model(**inputs, attention_mask=batch["attention_mask"])
        outputs = [output.logits] if output.concentrations is None else [output.logits, output.concentrations]
        predicted[batch["window"].cpu().numpy()] = torch.cat(outputs, dim=1).cpu().numpy()
    if accelerator.num_processes > 1:  # each window was predicted on one process
        predicted = accelerator.reduce(torch.from_numpy(predicted).to(accelerator.device)).cpu().numpy()
    predicted = average_by_duration(predicted, store.num_samples, store.clip_of_window, len(store.clips))
    shares, concentrations = np.split(predicted, [model.config.num_labels], axis=1)
    return VotePredictions(shares, concentrations if model.config.has_concentrations else None)


class PredictionsCsv:
    """
    Writes predicted shares in the challenge's format: `filename` and a column per label, with a row per clip.

    Args:
        file: text file, opened with `newline=""`; the header is written immediately.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow([FILENAME, *labels])

    def write(self, filename, shares):
        """Writes a clip's row, with `shares` in the order of the labels."""
        self.writer.writerow([filename, *(f"{share:.9g}" for share in shares)])


class PredictionsJsonLines:
    """
    Writes predicted shares as JSON lines: `{"filename": ..., "shares": {label: share}}` for each clip.

    Args:
        file: text file.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.file = file
        self.labels = labels

    def write(self, filename, shares):
        """Writes a clip's line, with `shares` in the order of the labels."""
        self.file.write(json_line({FILENAME: filename, "shares": dict(zip(self.labels, shares, strict=True))}))


def json_line(row):
    """A dict as a line of JSON lines."""
    line = json.dumps(row, ensure_ascii=False)
    if not line.isascii() and any("\ud800" <= char <= "\udfff" for char in line):
        line = json.dumps(row)  # escapes lone surrogates, which stand for bytes that are not UTF-8 in file names
    return line + "\n"


def write_predictions(path, filenames, shares, labels):
    """Writes predicted shares (clips, labels) with `PredictionsCsv`, in the given order."""
    with whole_file(path, newline="", encoding="utf-8") as file:
        predictions = PredictionsCsv(file, labels)
        for filename, row in zip(filenames, shares, strict=True):
            predictions.write(filename, row)


def read_predictions(path, filenames, labels, allowed=ANY_NUMBER):
    """
    Args:
        path: CSV file in the format of `write_predictions`.
        filenames: names of the split's clips, in order.
        labels: label names, in order.
        allowed: `Interval` of allowed shares.

    Returns:
        `np.ndarray`: (clips, labels) float64 predicted shares.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the columns differ, a clip is missing, listed twice, not in this split or out of order, or a
            share is not an allowed number. The message names file and row, counts all problems and shows the first.
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
    """`read_predictions` that only allows shares in [0, 1]; heads that end in a ReLU may predict more than 1."""
    return read_predictions(path, filenames, labels, SHARE)


def read_members(folders, corpus):
    """
    Args:
        folders: output folders of runs, each with `predictions_devel.csv` and, if there is a test split,
            `predictions_test.csv`.
        corpus: `Corpus` that the members were trained on.

    Returns:
        The members' predictions, a `dict` from split to (members, clips, labels) float64. The mean over the members is
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
    """Adds problems with the clips of the rows. The order is only checked if each clip is listed once."""
    known, first_seen = set(expected), {}
    for number, filename in rows:
        first = first_seen.setdefault(filename, number)
        if filename not in known:
            problems.add(None, number, f"{filename!r} is not a clip of this split")
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
