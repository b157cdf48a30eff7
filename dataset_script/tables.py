"""
What corpora and predictions have in common: CSV files with a row per clip, how their fields are read and checked, and
the tables that a corpus is made of.
"""

import csv
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from ..fields_emoshare import BACKBONE, TIME

FILENAME = "filename"
AUDIO = "audio"
UNKNOWN = ("", "?")  # what stands in a CSV field whose value is not known
SPLITS = ("train", "devel", "test")
SHOWN_PROBLEMS = 5
SHOWN_LEFT_OUT = 100  # a corpus that is not whole may have thousands


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

    def add(self, path, shares, facts):
        """Adds a clip under its file's name; `facts`: a value by name, of the same names for each clip."""
        self.filenames.append(path.name)
        self.paths.append(path)
        self.shares.append(shares)
        for fact, value in facts.items():
            self.facts.setdefault(fact, []).append(value)


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
        """
        Args:
            table: the file, folder or split with the problem; `None` if it is the source itself.
            row: the row in it; `None` if it has no rows.
            message: what is wrong.
        """
        place = [*([table] if table else []), *([] if row is None else [f"row {row}"])]
        self.found.append(f"{', '.join(place)}: {message}")

    def raise_if_any(self):
        """Raises a ValueError that counts all problems and lists those that are to be shown."""
        if self.found:
            raise ValueError(self._listing("problem(s)"))

    def warn_if_any(self, what):
        """Warns instead; `what` the problems are, in the plural."""
        if self.found:
            warnings.warn(self._listing(what), stacklevel=2)

    def _listing(self, what):
        listed = self.found[: self.shown]
        lines = "".join(f"\n  {problem}" for problem in listed)
        rest = len(self.found) - len(listed)
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        return f"{self.source}: {len(self.found)} {what}{lines}{more}"


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
        ValueError: beginning with `where`, on labels whose name results need for something else.
    """
    intervals = [label for label in labels if label == "ci95" or label.endswith("_ci95")]
    if intervals:
        raise ValueError(f"{where}: got the labels {intervals}; such names are those of confidence intervals")
    taken = [label for label in labels if label in (TIME, BACKBONE)]
    if taken:
        raise ValueError(f"{where}: got the labels {taken}; results have something else under these names")


def read_rows(path, table, problems, encoding="UTF-8-sig", delimiter=","):
    """
    Reads a CSV file. Blank lines are skipped.

    Args:
        path (`Path`): the file.
        table: its name in problems, see `Problems.add`.
        problems: `Problems`; rows that do not have as many fields as the header are added, and left out.
        encoding: of the file; by default UTF-8, with or without a byte order mark.
        delimiter: what is between two fields.

    Returns:
        The header (`list[str]`; empty for an empty file) and a list of (row number, fields). Rows are counted as in a
        spreadsheet: the header is row 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a CSV file in this encoding.
    """
    with path.open(newline="", encoding=encoding) as file:
        try:
            header, *rows = list(csv.reader(file, delimiter=delimiter)) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in {encoding.removesuffix('-sig')} ({error})") from error
    complete = []
    for number, row in enumerate(rows, start=2):
        if row and len(row) != len(header):
            problems.add(table, number, f"has {len(row)} fields; expected {len(header)}, as in the header")
        elif row:
            complete.append((number, row))
    return header, complete


def read_records(path, table, columns, problems, **options):
    """
    Reads a CSV file that has certain columns, and may have others.

    Args:
        path, table, problems, options: as in `read_rows`.
        columns: names of the columns that it must have.

    Returns:
        A list of (row number, {column: text without spaces around it}).

    Raises:
        FileNotFoundError, ValueError: as `read_rows`, and if a column is missing.
    """
    header, rows = read_rows(path, table, problems, **options)
    header = [column.strip() for column in header]
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path}, row 1: got the columns {header}; missing: {missing}")
    return [(number, dict(zip(header, map(str.strip, row), strict=True))) for number, row in rows]


def check_layout(info, data_dir, folder, *files):
    """
    Raises:
        FileNotFoundError: if `data_dir` (`Path`) does not hold this folder and these files; says what it must hold.
    """
    folders = [path for path in (data_dir, data_dir / folder) if not path.is_dir()]
    for path in [*folders, *(data_dir / file for file in files if not (data_dir / file).is_file())]:
        raise FileNotFoundError(f"{path}: not found; {info.title} is a folder with {info.layout}")


def check_no_split_is_empty(info, data_dir, splits):
    """
    Raises:
        ValueError: if one of `splits`, {name: `ClipTable`}, has no clip.
    """
    sizes = {split: len(table.filenames) for split, table in splits.items()}
    if not all(sizes.values()):
        raise ValueError(
            f"{data_dir}: the splits, which are by actor, have {sizes} clips; expected clips in each; {info.title} has "
            f"{info.split_sizes}"
        )


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
