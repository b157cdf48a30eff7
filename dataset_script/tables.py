"""
What corpora and predictions have in common: CSV files with a row per clip, how their fields are read and checked, and
the tables that a corpus is made of.
"""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

FILENAME = "filename"
AUDIO = "audio"
UNKNOWN = ("", "?")  # what stands in a CSV field whose value is not known
SPLITS = ("train", "devel", "test")
SHOWN_PROBLEMS = 5


@dataclass
class ClipTable:
    """
    The clips of one split.

    Attributes:
        filenames: the clips' names, each once in the corpus.
        paths: each clip's audio file.
        shares: for each clip its shares in [0, 1], in the order of the corpus's labels; `None` where one is not known.
        facts: for each fact (speaker, age, ...) a value per clip: text, a number, or `None` where it is not known. All
            splits have the same facts. One whose known values are all numbers becomes a float64 column, another text.
        rows: each clip's row in `lab/SPLIT.csv`, for messages; empty if the clips come from elsewhere.
    """

    filenames: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    shares: list[list[float | None]] = field(default_factory=list)
    facts: dict[str, list[str | float | None]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)


@dataclass
class CorpusTables:
    """
    A whole corpus, as the function that reads it gives it.

    Attributes:
        labels: label names.
        splits: `train`, `devel` and, where there is one, `test`.
    """

    labels: list[str]
    splits: dict[str, ClipTable]

    @property
    def facts(self):
        """Names of the facts about the clips."""
        return list(self.splits["train"].facts)


class Problems:
    """
    Collects everything that is wrong with a corpus or a file, so that one error can report all of it.

    Args:
        source: what the error names first: the corpus's folder or name, or the file.
        shown: how many the error lists, the first ones; `None` for all.
    """

    def __init__(self, source, shown=SHOWN_PROBLEMS):
        self.source = source
        self.shown = shown
        self.found = []

    def add(self, table, row, message):
        """`table`: the file or split that the row belongs to; `None` if the source is the file itself."""
        self.found.append(f"{f'{table}, ' if table else ''}row {row}: {message}")

    def raise_if_any(self):
        """Raises a ValueError that counts all problems and lists those that are to be shown."""
        if not self.found:
            return
        listed = self.found[: self.shown]
        lines = "".join(f"\n  {problem}" for problem in listed)
        rest = len(self.found) - len(listed)
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        raise ValueError(f"{self.source}: {len(self.found)} problem(s){lines}{more}")


@dataclass(frozen=True)
class Interval:
    """The numbers that a field may hold, and what messages call them."""

    name: str
    low: float
    high: float

    def contains(self, number):
        """Whether it is finite and from `low` to `high`, both included; NaN is not."""
        return math.isfinite(number) and self.low <= number <= self.high


SHARE = Interval("a number in [0, 1]", 0, 1)
ANY_NUMBER = Interval("a finite number", -math.inf, math.inf)


def check_label_names(where, labels):
    """
    Raises:
        ValueError: beginning with `where`, on labels whose score would have the name of another score's interval.
    """
    intervals = [label for label in labels if label == "ci95" or label.endswith("_ci95")]
    if intervals:
        raise ValueError(f"{where}: got the labels {intervals}; such names are those of confidence intervals")


def read_rows(path, table, problems):
    """
    Reads a CSV file in UTF-8, with or without a byte order mark. Blank lines are skipped.

    Args:
        path (`Path`): the file.
        table: its name in problems, see `Problems.add`.
        problems: `Problems`; rows that do not have as many fields as the header are added, and left out.

    Returns:
        The header (`list[str]`; empty for an empty file) and a list of (row number, fields). Rows are counted as in a
        spreadsheet: the header is row 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a CSV file in UTF-8.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            header, *rows = list(csv.reader(file)) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    complete = []
    for number, row in enumerate(rows, start=2):
        if row and len(row) != len(header):
            problems.add(table, number, f"has {len(row)} fields; expected {len(header)}, as in the header")
        elif row:
            complete.append((number, row))
    return header, complete


def number_in(text):
    """The number that a field holds; NaN if it holds none."""
    try:
        return float(text.replace("_", "?"))  # Python takes 0_5 for 5
    except ValueError:
        return math.nan


def share_in(text, label, allowed, table, row, problems):
    """The share that a field holds; one that is not in `allowed`, an `Interval`, is added to `problems`."""
    number = number_in(text)
    if not allowed.contains(number):
        shown = text if math.isfinite(number) else repr(text)
        problems.add(table, row, f"{label} is {shown}; expected {allowed.name}")
    return number
