"""
Reads CREMA-D in a clone of its repository, https://github.com/CheyneyComputerScience/CREMA-D: acted English speech, and
how many listeners heard each of six emotions in the voice alone.
"""

import math
import re

from .facts import LISTENERS, is_known
from .tables import (
    SHOWN_LEFT_OUT,
    SPLITS,
    ClipTable,
    CorpusTables,
    Problems,
    check_layout,
    check_no_split_is_empty,
    number_in,
    read_records,
)

AUDIO_FOLDER = "AudioWAV"
VOTES = "processedResults/tabulatedVotes.csv"
ACTORS = "VideoDemographics.csv"
LAYOUT = f"{AUDIO_FOLDER}/*.wav, {VOTES} and {ACTORS}"

VOICE_ONLY = "1"  # first character of a row's name in the votes; 2: the face alone, 3: both
LABELS = {"A": "Anger", "D": "Disgust", "F": "Fear", "H": "Happiness", "N": "Neutral", "S": "Sadness"}  # by column
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": None}  # intensity of the emotion that was asked for
CLIP = re.compile(r"(\d{4})_([A-Z]{3})_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX)")

# The splits, which never change. The actors of each sex, in the order of their numbers, are assigned in turn to train,
# devel, test, train, train. That gives 53, 19 and 19 actors; in each split 53 % are male, and the mean age is 36 or 37.
DEVEL = (
    *("1003", "1005", "1009", "1017", "1020", "1027", "1029", "1035", "1041", "1047"),
    *("1050", "1055", "1063", "1064", "1069", "1076", "1081", "1088", "1089"),
)
TEST = (
    *("1004", "1010", "1011", "1019", "1021", "1030", "1031", "1036", "1042", "1049"),
    *("1051", "1056", "1065", "1070", "1072", "1078", "1083", "1090", "1091"),
)

# From "Audio Files" in the README of the repository. Listeners heard the MP3 files.
BROKEN = {
    "1076_MTI_SAD_XX": "its audio is very short, and silent",
    "1076_MTI_NEU_XX": "what its listeners heard was very short, and silent; the WAV file is not",
    "1064_TIE_SAD_XX": "what its listeners heard had no duration",
    "1064_IEO_DIS_MD": "what its listeners heard was a minute long, with all emotions",
}

# First bytes of a file whose content git-lfs has not fetched.
POINTER = b"version https://git-lfs.github.com/"


def load_crema_d(info, data_dir, cache_dir):
    """
    `CorpusInfo.loader`; `cache_dir` is not used. Shares are votes divided by the listeners who heard the voice alone.
    Clips of `BROKEN`, clips with votes but without audio, and clips with audio but without votes are left out, with
    warnings that list them.
    """
    check_layout(info, data_dir, AUDIO_FOLDER, VOTES, ACTORS)
    audio = {path.stem: path for path in sorted((data_dir / AUDIO_FOLDER).glob("*.wav"))}
    _check_content_is_there(data_dir, audio.values())
    problems, broken, left_out = Problems(data_dir), Problems(data_dir), Problems(data_dir, shown=SHOWN_LEFT_OUT)
    actors = _read_actors(data_dir, problems)
    splits = {split: ClipTable() for split in SPLITS}
    for row, name, fields in _read_votes(data_dir, problems):
        path = audio.pop(name, None)
        if name in BROKEN:
            broken.add(VOTES, row, f"{name}: {BROKEN[name]}")
        elif path is None:
            left_out.add(VOTES, row, f"{name} has votes, but no {AUDIO_FOLDER}/{name}.wav")
        else:
            _add_clip(path, row, fields, actors, splits, problems)
    for name in audio:
        left_out.add(AUDIO_FOLDER, None, f"{name}.wav has no row with votes on the voice alone in {VOTES}")
    problems.raise_if_any()
    check_no_split_is_empty(info, data_dir, splits)
    broken.warn_if_any("clip(s) left out that are known to be broken")
    left_out.warn_if_any("clip(s) left out that have no votes or no audio")
    return CorpusTables(list(LABELS.values()), splits)


def _check_content_is_there(data_dir, paths):
    pointers = []
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                pointers.append(path)
    if pointers:
        raise ValueError(
            f"{data_dir}: {len(pointers)} of {len(paths)} WAV files, {AUDIO_FOLDER}/{pointers[0].name} the first, are "
            "pointers of git-lfs and hold no audio; `git lfs pull` in this folder fetches it"
        )


def _read_actors(data_dir, problems):
    """The facts about each actor: {actor: {fact: value}}."""
    actors = {}
    for row, fields in read_records(
        data_dir / ACTORS, ACTORS, ("ActorID", "Age", "Sex", "Race", "Ethnicity"), problems
    ):
        actor = fields["ActorID"]
        age = number_in(fields["Age"])
        if is_known(fields["Age"]) and not (math.isfinite(age) and age > 0):
            problems.add(ACTORS, row, f"Age is {fields['Age']!r}; expected a positive number")
        if actor in actors:
            problems.add(ACTORS, row, f"actor {actor} is listed again")
        actors[actor] = {
            "sex": _known(fields["Sex"].lower()),
            "age": age if is_known(fields["Age"]) else None,
            "race": _known(fields["Race"]),
            "ethnicity": _known(fields["Ethnicity"]),
        }
    return actors


def _known(text):
    return text if is_known(text) and text.lower() != "unknown" else None


def _read_votes(data_dir, problems):
    """Yields row number, clip and fields of each row with votes on the voice alone."""
    first_seen = {}
    for row, fields in read_records(data_dir / VOTES, VOTES, ("", "fileName", "numResponses", *LABELS), problems):
        name = fields["fileName"]
        if not fields[""].startswith(VOICE_ONLY):
            continue
        if (first := first_seen.setdefault(name, row)) != row:
            problems.add(VOTES, row, f"{name} is listed again for the voice alone; first in row {first}")
        else:
            yield row, name, fields


def _add_clip(path, row, fields, actors, splits, problems):
    """Adds a clip to its split, or what is wrong with it to `problems`."""
    match = CLIP.fullmatch(path.stem)
    if match is None:
        problems.add(VOTES, row, f"fileName is {path.stem!r}; expected a name such as 1001_DFA_ANG_XX")
        return
    actor, sentence, emotion, level = match.groups()
    if actor not in actors:
        problems.add(VOTES, row, f"{path.stem}: actor {actor} is not in {ACTORS}")
        return
    votes, listeners = [number_in(fields[column]) for column in LABELS], number_in(fields["numResponses"])
    if not (all(vote >= 0 and vote.is_integer() for vote in votes) and 0 < listeners == sum(votes)):
        shown = ", ".join(f"{column} {fields[column]!r}" for column in (*LABELS, "numResponses"))
        problems.add(VOTES, row, f"{path.stem}: got {shown}; expected whole numbers of votes that sum to numResponses")
        return
    split = "devel" if actor in DEVEL else "test" if actor in TEST else "train"
    facts = {"speaker": actor, **actors[actor], "sentence": sentence, "emotion": LABELS[emotion[0]]}
    facts |= {"level": LEVELS[level], LISTENERS: listeners}
    splits[split].add(path, [vote / listeners for vote in votes], facts)
