"""
Shared by corpora and predictions: reads and checks CSV files with a row per clip, and defines the tables of a corpus.
"""

import csv
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from ..fields_emoshare import BACKBONE, TIME

FILENAME = "filename"
AUDIO = "audio"
UNKNOWN = ("", "?")  # CSV fields whose value is not known
SPLITS = ("train", "devel", "test")
SHOWN_PROBLEMS = 5
SHOWN_LEFT_OUT = 100  # an incomplete corpus may have thousands


@dataclass
class ClipTable:
    """
    The clips of one split.

    Attributes:
        filenames: the clips' names, unique in the corpus.
        paths: each clip's audio file.
        shares: for each clip its shares in [0, 1], in the order of the corpus's labels; `None` where one is not known.
        facts: for each fact (speaker, age, ...) a value per clip: text, a number, or `None` where it is not known. All
            splits have the same facts. A fact whose known values are all numbers becomes a float64 column, any other a
            text column.
        rows: each clip's row in `lab/SPLIT.csv`, for messages; empty if the clips come from elsewhere.
    """

    filenames: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    shares: list[list[float | None]] = field(default_factory=list)
    facts: dict[str, list[str | float | None]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    def add(self, path, shares, facts):
        """Adds a clip under its file's name; `facts`: values by name, with the same names for each clip."""
        self.filenames.append(path.name)
        self.paths.append(path)
        self.shares.append(shares)
        for fact, value in facts.items():
            self.facts.setdefault(fact, []).append(value)


@dataclass
class CorpusTables:
    """
    A whole corpus, as its reading function returns it.

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
        source: what the error begins with: the corpus's folder or name, or the file.
        shown: how many of the first problems the error lists; `None` for all.
    """

    def __init__(self, source, shown=SHOWN_PROBLEMS):
        self.source = source
        self.shown = shown
        self.found = []

    def add(self, table, row, message):
        """
        Args:
            table: the file, folder or split with the problem; `None` if that is the source itself.
            row: the row of the problem; `None` if there are no rows.
            message: what is wrong.
        """
        place = [*([table] if table else []), *([] if row is None else [f"row {row}"])]
        self.found.append(f"{', '.join(place)}: {message}")

    def raise_if_any(self):
        """Raises a ValueError that counts all problems and lists the first ones."""
        if self.found:
            raise ValueError(self._listing("problem(s)"))

    def warn_if_any(self, what):
        """Warns instead of raising; `what`: noun for the problems, in the plural."""
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
    """The numbers that a field may hold, and their name in messages."""

    name: str
    low: float
    high: float

    def contains(self, number):
        """Whether the number is finite and from `low` to `high`, both included."""
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
        problems: `Problems`. Rows with another number of fields than the header are added to it and left out.
        encoding: encoding of the file; by default UTF-8, with or without a byte order mark.
        delimiter: separator of fields.

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
    Reads a CSV file that must have certain columns, and may have others.

    Args:
        path, table, problems, options: as in `read_rows`.
        columns: names of the required columns.

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
        FileNotFoundError: if `data_dir` (`Path`) does not have this folder and these files; says what it must have.
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
    """The number in a field; NaN if it is not a number."""
    try:
        return float(text.replace("_", "?"))  # Python reads 0_5 as 5
    except ValueError:
        return math.nan


def share_in(text, label, allowed, table, row, problems):
    """The share in a field; adds it to `problems` if it is not in `allowed`, an `Interval`."""
    number = number_in(text)
    if not allowed.contains(number):
        shown = text if math.isfinite(number) else repr(text)
        problems.add(table, row, f"{label} is {shown}; expected {allowed.name}")
    return number
