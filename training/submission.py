"""Predictions as the challenge takes them: checked against the list of clips, and averaged over several runs."""

import csv
import math
from pathlib import Path

import numpy as np

from ..dataset_script.labels import FILENAME, SHOWN_PROBLEMS


def read_predictions(path, filenames, labels):
    """
    Args:
        path: CSV file as `write_predictions` makes it.
        filenames: the clips of the split, in their order.
        labels: label names, in their order.

    Returns:
        `np.ndarray`: (clips, labels) float64 predicted shares.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and row, if the columns are others, a clip is missing, there twice, not of this split or
            in another place, or a share is not a finite number. Counts all problems, and shows the first.
    """
    path, filenames = Path(path), list(filenames)
    with path.open(newline="", encoding="utf-8") as file:
        try:
            header, *rows = list(csv.reader(file)) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    expected = [FILENAME, *labels]
    if header != expected:
        raise ValueError(f"{path}, row 1: got the columns {header}; expected {expected}")
    problems = [
        f"row {number}: has {len(row)} fields; expected {len(expected)}, as in the header"
        for number, row in enumerate(rows, start=2)
        if len(row) != len(expected)
    ]
    _raise_if_any(path, problems)
    problems = _clip_problems([row[0] for row in rows], filenames)
    shares = np.array([[_number(text) for text in row[1:]] for row in rows]).reshape(len(rows), len(labels))
    for row, column in np.argwhere(~np.isfinite(shares)):
        text = rows[row][column + 1]
        problems.append(f"row {row + 2}: {labels[column]} is {text!r}; expected a finite number")
    _raise_if_any(path, problems)
    return shares


def read_submission(path, filenames, labels):
    """`read_predictions`, which must also lie in [0, 1], as shares do: a network that ends in a ReLU may leave it."""
    shares = read_predictions(path, filenames, labels)
    outside = np.argwhere((shares < 0) | (shares > 1))
    _raise_if_any(
        path,
        [
            f"row {row + 2}: {labels[column]} is {shares[row, column]:.9g}; expected a number in [0, 1]"
            for row, column in outside
        ],
    )
    return shares


def read_members(folders, splits, labels):
    """
    Args:
        folders: of the runs, each with `predictions_devel.csv` and, if there is a test split, `predictions_test.csv`.
        splits: `datasets.DatasetDict`.
        labels: label names.

    Returns:
        The members' predictions, `dict` from split to (members, clips, labels) float64. Their mean over the members is
        the ensemble's prediction.

    Raises:
        FileNotFoundError, ValueError: as `read_submission` does.
    """
    return {
        split: np.array(
            [
                read_submission(Path(folder) / f"predictions_{split}.csv", splits[split][FILENAME], labels)
                for folder in folders
            ]
        )
        for split in ("devel", "test")
        if split in splits
    }


def _number(text):
    """The number that a field holds, NaN if it holds none."""
    try:
        return float(text.replace("_", "?"))  # Python takes 0_5 for 5
    except ValueError:
        return math.nan


def _clip_problems(found, expected):
    """What is wrong with the clips; only if each is there once can their order be wrong."""
    known, problems, first_seen = set(expected), [], {}
    for number, filename in enumerate(found, start=2):
        if filename not in known:
            problems.append(f"row {number}: {filename!r} is no clip of this split")
        elif filename in first_seen:
            problems.append(f"row {number}: {filename} is listed again; first in row {first_seen[filename]}")
        first_seen.setdefault(filename, number)
    problems += [f"{filename} of this split is missing" for filename in expected if filename not in first_seen]
    if not problems:
        for number, (filename, wanted) in enumerate(zip(found, expected, strict=True), start=2):
            if filename != wanted:
                return [f"row {number}: got {filename}; expected {wanted}, the order of the split's list"]
    return problems


def _raise_if_any(path, problems):
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        rest = len(problems) - SHOWN_PROBLEMS
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(f"{path}: {len(problems)} problem(s){shown}{more}")
