"""Writes the predictions for conversations: as tables, and as annotations for Praat and Audacity."""

import csv

from ..audio_emoshare import audio_info
from ..dataset_script.tables import FILENAME
from ..evaluation.predictions import json_line
from .segment_files import TURN
from .textgrid import write_textgrid

SHOWN_EMOTIONS = 3  # a label shows this many, the highest
TOO_SHORT = "?"  # the label of a turn without shares


class TurnsCsv:
    """
    A row for each turn, then one for each speaker and one for the recording: `filename`, `unit` (turn, speaker or
    recording), `start` and `end` in seconds, `speaker`, and a column for each label. Unknown values are empty.

    Args:
        file: text file, opened with `newline=""`; the constructor writes the header.
        labels: label names.

    Raises:
        ValueError: if a label has the name of another column.
    """

    def __init__(self, file, labels):
        columns = [FILENAME, "unit", "start", "end", "speaker"]
        taken = [label for label in labels if label in columns]
        if taken:
            raise ValueError(
                f"the model has the labels {taken}, and a CSV of turns has other columns of these names; expected "
                "FILE.jsonl, which keeps them apart"
            )
        self.writer = csv.writer(file, lineterminator="\n")
        self.writer.writerow([*columns, *labels])
        self.labels = labels

    def write(self, filename, result):
        """Adds the rows of a recording; `result` is what the pipeline returns."""
        for row in _rows(result, self.labels):
            times = ["" if row[name] is None else f"{row[name]:.6f}" for name in ("start", "end")]
            shares = [""] * len(self.labels) if row["shares"] is None else map("{:.9g}".format, row["shares"].values())
            self.writer.writerow([filename, row["unit"], *times, row["speaker"], *shares])


class TurnsJsonLines:
    """
    The rows of `TurnsCsv` as JSON lines: `{"filename", "unit", "start", "end", "speaker", "shares": {label: share}}`,
    with null for unknown values.

    Args:
        file: text file.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.file = file
        self.labels = labels

    def write(self, filename, result):
        """As `TurnsCsv.write`."""
        for row in _rows(result, self.labels):
            self.file.write(json_line({FILENAME: filename, **row}))


class TurnsTextGrid:
    """
    A TextGrid with a tier for each speaker, named after the speaker; the tier of turns without a speaker has an empty
    name. If turns of one speaker overlap, there are more tiers with the same name. The text of a turn is its highest
    shares.

    Args:
        file: text file, for one recording.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.file = file

    def write(self, filename, result):
        """As `TurnsCsv.write`."""
        tiers = []
        for turn in sorted(result["turns"], key=lambda turn: turn["start"]):
            name, interval = turn["speaker"] or "", (turn["start"], turn["end"], _highest(turn["shares"]))
            free = (own for other, own in tiers if other == name and own[-1][1] <= interval[0])
            own = next(free, None)
            if own is None:
                tiers.append((name, [interval]))
            else:
                own.append(interval)
        ends = [turn["end"] for turn in result["turns"]]
        write_textgrid(self.file, tiers or [("", [])], max([_seconds_of(filename), *ends]))


class TurnsLabels:
    """
    A label track for Audacity: a line for each turn, whose text is the speaker and the highest shares.

    Args:
        file: text file, for one recording.
        labels: label names.
    """

    def __init__(self, file, labels):
        self.file = file

    def write(self, filename, result):
        """As `TurnsCsv.write`."""
        for turn in result["turns"]:
            speaker = "" if turn["speaker"] is None else f"{' '.join(turn['speaker'].split())}: "
            self.file.write(f"{turn['start']:.6f}\t{turn['end']:.6f}\t{speaker}{_highest(turn['shares'])}\n")


# By the suffix of the file.
TURN_WRITERS = {".csv": TurnsCsv, ".jsonl": TurnsJsonLines, ".textgrid": TurnsTextGrid, ".txt": TurnsLabels}
OF_ONE_RECORDING = (".textgrid", ".txt")


def _rows(result, labels):
    nobody = {"start": None, "end": None, "speaker": None}
    units = [(TURN, turn) for turn in result["turns"]]
    units += [("speaker", {**nobody, "speaker": name, "shares": own}) for name, own in result["speakers"].items()]
    units.append(("recording", {**nobody, "shares": result["shares"]}))
    for unit, found in units:
        scores = found["shares"] and {share["label"]: share["score"] for share in found["shares"]}
        shares = scores and {label: scores[label] for label in labels}
        yield {"unit": unit, **{name: found[name] for name in nobody}, "shares": shares}


def _highest(shares):
    if shares is None:
        return TOO_SHORT
    return ", ".join(f"{share['label']} {share['score']:.2f}" for share in shares[:SHOWN_EMOTIONS])


def _seconds_of(path):
    """Duration of an audio file; 0 if the file is damaged and does not give it."""
    try:
        return audio_info(path).seconds
    except ValueError:
        return 0.0
