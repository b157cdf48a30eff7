"""
Reads Emo-DB, the Berlin Database of Emotional Speech: acted German speech, and how many listeners recognised the
emotion that was meant.
"""

import re

from .facts import LISTENERS
from .tables import (
    SHOWN_LEFT_OUT,
    SPLITS,
    ClipTable,
    CorpusTables,
    Interval,
    Problems,
    check_layout,
    check_no_split_is_empty,
    read_records,
    share_in,
)

AUDIO_FOLDER = "wav"
RECOGNITION = "erkennung.txt"
LAYOUT = f"{AUDIO_FOLDER}/*.wav and {RECOGNITION}"
CLIP, RECOGNISED, NATURAL = "Satz", "erkannt", "natuerlich"  # the columns; the last two are in percent
PERCENTAGE = Interval("a percentage from 0 to 100", 0, 100)

# By the letter in a clip's name, the first of the German word: W for Wut, L for Langeweile, E for Ekel, A for Angst, F
# for Freude, N for neutral, T for Trauer.
LABELS = {
    "W": "Anger",
    "L": "Boredom",
    "E": "Disgust",
    "A": "Fear",
    "F": "Happiness",
    "N": "Neutral",
    "T": "Sadness",
}
NAME = re.compile(r"(\d\d)([ab]\d\d)([A-Z])[a-z]\.wav")

# Sex and age of each actor. The split, by actors, never changes.
ACTORS = {
    "03": ("male", 31.0),
    "08": ("female", 34.0),
    "09": ("female", 21.0),
    "10": ("male", 32.0),
    "11": ("male", 26.0),
    "12": ("male", 30.0),
    "13": ("female", 32.0),
    "14": ("female", 35.0),
    "15": ("male", 25.0),
    "16": ("female", 31.0),
}
DEVEL, TEST = ("10", "13"), ("15", "16")

# Number of listeners per clip. The second one is that of sentence b03, whose percentages are multiples of 1/21.
PANELS = (20.0, 21.0)


def load_emodb(info, data_dir, cache_dir):
    """
    `CorpusInfo.loader`; `cache_dir` is not used. The share of the emotion that was meant is the fraction of listeners
    who recognised it. What the others heard was not published: the rest is spread evenly over the other six emotions.
    `RECOGNITION` also lists recordings that were not published, which are ignored. Clips without a row in it are
    left out, with a warning that lists them.
    """
    check_layout(info, data_dir, AUDIO_FOLDER, RECOGNITION)
    audio = {path.name: path for path in sorted((data_dir / AUDIO_FOLDER).glob("*.wav"))}
    problems, left_out = Problems(data_dir), Problems(data_dir, shown=SHOWN_LEFT_OUT)
    columns, form = (CLIP, RECOGNISED, NATURAL), {"encoding": "Latin-1", "delimiter": "\t"}
    splits, first_seen = {split: ClipTable() for split in SPLITS}, {}
    for row, fields in read_records(data_dir / RECOGNITION, RECOGNITION, columns, problems, **form):
        name = fields[CLIP]
        if (first := first_seen.setdefault(name, row)) != row:
            problems.add(RECOGNITION, row, f"{name} is listed again; first in row {first}")
        elif name in audio:
            _add_clip(audio[name], row, fields, splits, problems)
    for name in sorted(audio.keys() - first_seen.keys()):
        left_out.add(AUDIO_FOLDER, None, f"{name} has no row in {RECOGNITION}")
    problems.raise_if_any()
    check_no_split_is_empty(info, data_dir, splits)
    left_out.warn_if_any("clip(s) left out that are not listed")
    return CorpusTables(list(LABELS.values()), splits)


def _add_clip(path, row, fields, splits, problems):
    """Adds a clip to its split, or what is wrong with it to `problems`."""
    match = NAME.fullmatch(path.name)
    if match is None or match[1] not in ACTORS or match[3] not in LABELS:
        problems.add(RECOGNITION, row, f"{CLIP} is {path.name!r}; expected an actor's clip such as 03a01Fa.wav")
        return
    actor, sentence, emotion = match.groups()
    percentages = [
        share_in(fields[column].replace(",", "."), column, PERCENTAGE, RECOGNITION, row, problems)
        for column in (RECOGNISED, NATURAL)
    ]
    if not all(map(PERCENTAGE.contains, percentages)):
        return
    recognised, natural = (percentage / 100 for percentage in percentages)
    sex, age = ACTORS[actor]
    facts = {"speaker": actor, "sex": sex, "age": age, "sentence": sentence, "emotion": LABELS[emotion]}
    facts |= {"naturalness": natural, LISTENERS: _panel(recognised, natural)}
    rest = (1 - recognised) / (len(LABELS) - 1)
    shares = [recognised if letter == emotion else rest for letter in LABELS]
    splits["devel" if actor in DEVEL else "test" if actor in TEST else "train"].add(path, shares, facts)


def _panel(*fractions):
    """The size of the panel that gives these fractions, which are rounded to four digits."""
    fitting = (panel for panel in PANELS if all(abs(panel * part - round(panel * part)) < 1e-2 for part in fractions))
    return next(fitting, PANELS[0])
