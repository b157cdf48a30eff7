"""Reads and checks facts about clips (speaker, language, sex, age, number of listeners, ...): `DIR/lab/clips.csv`."""

import math
import re
from collections import Counter
from os.path import normpath

from .tables import AUDIO, FILENAME, UNKNOWN, number_in, read_rows

CLIPS_CSV = "lab/clips.csv"
LISTENERS = "listeners"  # the number of listeners behind a clip's shares
LANGUAGE = "language"  # the fact by which a grid's report also gives scores
# Facts whose numbers are names, without an order.
NAMING = re.compile(r"speaker|actor|(^|[^a-z])id$", re.IGNORECASE)


def read_facts(data_dir, labels, clips, problems):
    """
    Reads the facts of a corpus, if it has any: a CSV file with the column `filename` and a column per fact.

    Args:
        data_dir (`Path`): the corpus.
        labels: label names, which no fact may have.
        clips: set of the `normpath`s of the clips of all splits, relative to the folder `wav`.
        problems: `Problems`, to which everything wrong with the facts is added.

    Returns:
        `dict` from a fact's name to a `dict` from clips to values: numbers if all known values of the fact are numbers,
        otherwise text. Clips whose value is not known are left out.

    Raises:
        ValueError: if the file is not CSV in UTF-8.
    """
    path = data_dir / CLIPS_CSV
    if not path.is_file():
        return {}
    header, rows = read_rows(path, CLIPS_CSV, problems)
    header = [column.strip() for column in header]
    if not _is_header_right(header, labels, problems):
        return {}
    if not rows:
        problems.add(CLIPS_CSV, 1, "is followed by no clip; a corpus without facts has no such file")
    texts = {column: {} for column in header if column != FILENAME}
    first_seen = {}
    for number, row in rows:
        fields = dict(zip(header, map(str.strip, row), strict=True))
        filename = fields.pop(FILENAME)
        clip = normpath(filename)  # ./a.wav is a.wav
        if clip not in clips:
            problems.add(CLIPS_CSV, number, f"{filename!r} is in no split")
        elif (first := first_seen.setdefault(clip, number)) != number:
            problems.add(CLIPS_CSV, number, f"{filename} is listed again; first in row {first}")
        else:
            for fact, text in fields.items():
                if is_known(text):
                    texts[fact][clip] = text
        check_listeners(fields.get(LISTENERS), CLIPS_CSV, number, problems)
    return {fact: _numbers_if_all_are(values) for fact, values in texts.items()}


def are_names(fact):
    """Whether values of a fact with this name are names even if they are numbers: speaker, actor_id, ..."""
    return NAMING.search(fact) is not None


def is_known(value):
    """Whether the value of a fact, text or a number, is known."""
    if isinstance(value, str):
        return value not in UNKNOWN
    return value is not None and not math.isnan(value)


def _is_header_right(header, labels, problems):
    """Whether rows can be read with this header; adds its problems to `problems`."""
    twice = [column for column, count in Counter(header).items() if count > 1]
    if FILENAME not in header:
        problems.add(CLIPS_CSV, 1, f"got the columns {header}; expected a column {FILENAME!r}")
    elif twice:
        problems.add(CLIPS_CSV, 1, f"got the columns {twice} more than once")
    else:
        if header == [FILENAME]:
            problems.add(CLIPS_CSV, 1, f"got no column but {FILENAME!r}; expected a column for each fact")
        for column in header:
            if column in labels:
                problems.add(CLIPS_CSV, 1, f"got the column {column!r}; a fact cannot be called as a label is")
            elif column in (AUDIO, ""):
                problems.add(CLIPS_CSV, 1, f"got the column {column!r}; a fact cannot be called {AUDIO!r} or nothing")
        return True
    return False


def check_listeners(value, table, row, problems):
    """Adds a number of listeners (text or a number) to `problems` if it is known but not a positive whole number."""
    if not is_known(value):
        return
    number = number_in(value) if isinstance(value, str) else value
    if not (math.isfinite(number) and number > 0 and number == int(number)):
        problems.add(table, row, f"{LISTENERS} is {value!r}; expected a positive whole number")


def _numbers_if_all_are(texts):
    """Converts texts to numbers if all are numbers. Texts such as the speaker 03 are not."""
    numbers = {text: number_in(text) for text in set(texts.values())}
    if any(re.match(r"0\d", text) for text in numbers) or not all(map(math.isfinite, numbers.values())):
        return texts
    return {clip: numbers[text] for clip, text in texts.items()}
