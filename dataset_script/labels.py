"""Reads and checks the label files of a corpus in the ComParE 2023 layout: `DIR/wav/*.wav`, `DIR/lab/SPLIT.csv`."""

import csv
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FILENAME = "filename"
UNKNOWN = ("", "?")
SPLITS = ("train", "devel", "test")
SHOWN_PROBLEMS = 5


@dataclass
class LabelTable:
    """
    The labels of one split.

    Attributes:
        filenames: clip names, relative to `DIR/wav`, in the order of the CSV.
        rows: each clip's row in the CSV, counted as in a spreadsheet: the header is row 1.
        shares: per clip its shares in [0, 1], in the order of the labels; `None` where a share is not known.
    """

    filenames: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    shares: list[list[float | None]] = field(default_factory=list)


class Problems:
    """Collects everything wrong with a corpus, so that one error can tell all of it."""

    def __init__(self, corpus):
        self.corpus = corpus
        self.found = []

    def add(self, table, row, message):
        self.found.append(f"{table}, row {row}: {message}")

    def raise_if_any(self):
        if not self.found:
            return
        shown = "".join(f"\n  {problem}" for problem in self.found[:SHOWN_PROBLEMS])
        rest = len(self.found) - SHOWN_PROBLEMS
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(f"{self.corpus}: {len(self.found)} problem(s) in the labels{shown}{more}")


def read_labels(data_dir, expected_labels=None, test_is_optional=False):
    """
    Args:
        data_dir (`Path`): the corpus, with `lab/train.csv`, `lab/devel.csv`, `lab/test.csv` and the folder `wav`.
        expected_labels: the labels that there must be, in their order; `None` takes those of `lab/train.csv`.
        test_is_optional: whether there may be no `lab/test.csv`.

    Returns:
        The labels (`list[str]`) and the splits (`dict[str, LabelTable]`).

    Raises:
        FileNotFoundError: if a folder or label file is missing.
        ValueError: if anything is wrong with the labels or a clip is missing; counts all problems, shows the first.
    """
    for folder in (data_dir, data_dir / "wav", data_dir / "lab"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected DIR/wav/*.wav, DIR/lab/*.csv")
    problems = Problems(data_dir)
    labels, tables = expected_labels, {}
    for split in SPLITS:
        path = data_dir / "lab" / f"{split}.csv"
        if split == "test" and test_is_optional and not path.is_file():
            continue
        labels, tables[split] = _read_table(path, labels, problems, may_be_unknown=split == "test")
    _check_clips(data_dir, tables, problems)
    problems.raise_if_any()
    return list(labels), tables


def _read_table(path, labels, problems, may_be_unknown):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.reader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    header = [column.strip() for column in rows[0]] if rows else []
    labels = _check_header(path, header, labels, may_be_unknown)
    columns = {column: index for index, column in enumerate(header)}
    table = LabelTable()
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header):
            problems.add(f"lab/{path.name}", number, f"has {len(row)} fields; expected {len(header)}, as in the header")
            continue
        filename = row[columns[FILENAME]].strip()
        if not filename or Path(filename).is_absolute() or ".." in Path(filename).parts:
            problems.add(f"lab/{path.name}", number, f"filename is {filename!r}; expected a file in the folder wav")
            continue
        table.filenames.append(filename)
        table.rows.append(number)
        cells = [(label, row[columns[label]].strip() if label in columns else "") for label in labels]
        table.shares.append([_share(path, number, cell, problems, may_be_unknown) for cell in cells])
    if not table.filenames:
        problems.add(f"lab/{path.name}", 1, "is followed by no clip; a split must not be empty")
    return labels, table


def _check_header(path, header, labels, labels_may_be_absent):
    """Returns the labels; a wrong header makes every row meaningless, so it raises at once."""
    if FILENAME not in header:
        raise ValueError(f"{path}, row 1: got the columns {header}; expected a column {FILENAME!r}")
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, row 1: got the columns {twice} more than once")
    found = [column for column in header if column != FILENAME]
    if labels is None:
        if not found:
            raise ValueError(f"{path}, row 1: got no label columns beside {FILENAME!r}")
        if "" in found or "audio" in found:
            raise ValueError(f"{path}, row 1: got the columns {found}; a label cannot be called 'audio' or nothing")
        return found
    unknown = [label for label in found if label not in labels]
    missing = [label for label in labels if label not in found]
    if unknown or (missing and not (labels_may_be_absent and not found)):
        raise ValueError(
            f"{path}, row 1: got the labels {found}; expected {list(labels)}"
            f"{f'; missing: {missing}' if missing else ''}{f'; unknown: {unknown}' if unknown else ''}"
        )
    return labels


def _share(path, number, cell, problems, may_be_unknown):
    label, text = cell
    if text in UNKNOWN and may_be_unknown:
        return None
    try:
        share = float(text.replace("_", "?"))  # Python takes 0_5 for 5
    except ValueError:
        problems.add(f"lab/{path.name}", number, f"{label} is {text!r}; expected a number in [0, 1]")
        return None
    if not (math.isfinite(share) and 0 <= share <= 1):
        problems.add(f"lab/{path.name}", number, f"{label} is {text}; expected a number in [0, 1]")
    return share


def _check_clips(data_dir, tables, problems):
    first_seen = {}
    for split, table in tables.items():
        path = data_dir / "lab" / f"{split}.csv"
        for row, filename in zip(table.rows, table.filenames, strict=True):
            clip = Path(filename)  # ./a.wav is a.wav
            if clip in first_seen:
                problems.add(f"lab/{path.name}", row, f"{filename} is listed again; first in {first_seen[clip]}")
                continue
            first_seen[clip] = f"{split}.csv, row {row}"
            if not (data_dir / "wav" / filename).is_file():
                problems.add(f"lab/{path.name}", row, f"wav/{filename}: no such file")
