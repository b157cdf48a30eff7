"""Reads and checks a corpus in the ComParE 2023 layout: `DIR/wav/*.wav`, `DIR/lab/SPLIT.csv`, `DIR/lab/clips.csv`."""

from collections import Counter
from os.path import isabs, isfile, join, normpath
from pathlib import Path

from .facts import read_facts
from .tables import (
    AUDIO,
    FILENAME,
    SHARE,
    SPLITS,
    UNKNOWN,
    ClipTable,
    CorpusTables,
    Problems,
    check_label_names,
    read_rows,
    share_in,
)


def load_folder(info, data_dir, cache_dir):
    """`CorpusInfo.loader` of corpora in this layout; `cache_dir` is not used."""
    return read_folder(data_dir, info.labels, info.test_is_optional)


def read_folder(data_dir, expected_labels=None, test_is_optional=False):
    """
    Args:
        data_dir (`Path`): the corpus, with `lab/train.csv`, `lab/devel.csv`, `lab/test.csv`, the folder `wav` and, if
            facts about the clips are known, `lab/clips.csv`.
        expected_labels: required labels, in their order; `None` takes those of `lab/train.csv`.
        test_is_optional: whether `lab/test.csv` may be missing.

    Returns:
        `CorpusTables` with clips in the order of the label files.

    Raises:
        FileNotFoundError: if a folder or label file is missing.
        ValueError: if anything is wrong with labels or facts, or a clip is missing; counts all problems, shows the
            first.
    """
    for folder in (data_dir, data_dir / "wav", data_dir / "lab"):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected DIR/wav/*.wav, DIR/lab/*.csv")
    problems = Problems(data_dir)
    labels, splits = expected_labels, {}
    for split in SPLITS:
        path = data_dir / "lab" / f"{split}.csv"
        if split == "test" and test_is_optional and not path.is_file():
            continue
        labels, splits[split] = _read_labels(path, labels, problems, may_be_unknown=split == "test")
    clips = _check_clips(data_dir, splits, problems)
    facts = read_facts(data_dir, labels, clips, problems)
    problems.raise_if_any()
    folder = data_dir / "wav"
    for table in splits.values():
        table.paths = [folder / filename for filename in table.filenames]
        clips = list(map(normpath, table.filenames))
        table.facts = {fact: list(map(values.get, clips)) for fact, values in facts.items()}
    return CorpusTables(list(labels), splits)


def _read_labels(path, labels, problems, may_be_unknown):
    """Returns the labels and the `ClipTable` of a label file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file")
    name = f"lab/{path.name}"
    header, rows = read_rows(path, name, problems)
    header = [column.strip() for column in header]
    labels = _check_header(path, header, labels, may_be_unknown)
    table = ClipTable()
    for number, row in rows:
        fields = dict(zip(header, map(str.strip, row), strict=True))
        filename = fields[FILENAME]
        if not filename or isabs(filename) or ".." in Path(filename).parts:
            problems.add(name, number, f"filename is {filename!r}; expected a file in the folder wav")
            continue
        table.filenames.append(filename)
        table.rows.append(number)
        texts = [(label, fields.get(label, "")) for label in labels]
        table.shares.append(
            [
                None if may_be_unknown and text in UNKNOWN else share_in(text, label, SHARE, name, number, problems)
                for label, text in texts
            ]
        )
    if not table.filenames:
        problems.add(name, 1, "is followed by no clip; a split must not be empty")
    return labels, table


def _check_header(path, header, labels, labels_may_be_absent):
    """Returns the labels. A wrong header makes every row meaningless, so it raises at once."""
    if FILENAME not in header:
        raise ValueError(f"{path}, row 1: got the columns {header}; expected a column {FILENAME!r}")
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise ValueError(f"{path}, row 1: got the columns {twice} more than once")
    found = [column for column in header if column != FILENAME]
    if labels is None:
        if not found:
            raise ValueError(f"{path}, row 1: got no label columns, only {FILENAME!r}")
        if "" in found or AUDIO in found:
            raise ValueError(f"{path}, row 1: got the columns {found}; a label cannot be called 'audio' or nothing")
        check_label_names(f"{path}, row 1", found)
        return found
    unknown = [label for label in found if label not in labels]
    missing = [label for label in labels if label not in found]
    if unknown or (missing and not (labels_may_be_absent and not found)):
        raise ValueError(
            f"{path}, row 1: got the labels {found}; expected {list(labels)}"
            f"{f'; missing: {missing}' if missing else ''}{f'; unknown: {unknown}' if unknown else ''}"
        )
    return labels


def _check_clips(data_dir, splits, problems):
    """Checks that each clip is listed once and exists. Returns the set of all clips' `normpath`s."""
    first_seen = {}
    for split, table in splits.items():
        for row, filename in zip(table.rows, table.filenames, strict=True):
            clip, place = normpath(filename), f"{split}.csv, row {row}"  # ./a.wav is a.wav
            first = first_seen.setdefault(clip, place)
            if first != place:
                problems.add(f"lab/{split}.csv", row, f"{filename} is listed again; first in {first}")
            elif not isfile(join(data_dir, "wav", filename)):
                problems.add(f"lab/{split}.csv", row, f"wav/{filename}: no such file")
    return set(first_seen)
