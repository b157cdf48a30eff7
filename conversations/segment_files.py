"""Reads segment files (who speaks when) of diarization tools, annotation programs and subtitles."""

import csv
import re
from pathlib import Path

from ..dataset_script.tables import FILENAME, number_in
from ..segments_emoshare import checked_segment
from .textgrid import read_textgrid

TURN = "turn"  # value of the column `unit` for turns, in our own CSV files
UNKNOWN = "<NA>"  # RTTM's value for unknown fields
UNKNOWN_SPEAKERS = ("", UNKNOWN)
SUBTITLE_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})"
SUBTITLE_TIMES = re.compile(rf"\s*{SUBTITLE_TIME}\s*-->\s*{SUBTITLE_TIME}(\s|$)")
# `Ada: ...` and `[SPEAKER_00]: ...`; names have up to three words.
SPEAKER_PREFIX = re.compile(r"\s*\[?([^\s\[\]:]+(?: [^\s\[\]:]+){0,2})\]?:(\s|$)")


def read_segments(path, recording, tiers=None):
    """
    Args:
        path: path of the segment file; its suffix gives the format, see `SEGMENT_READERS`.
        recording: path of the recording. If the file covers several recordings, only this one's segments are read: in
            an RTTM file the lines with its name, in a CSV file the rows with its path, or else its name, in the column
            `filename`.
        tiers: names of the TextGrid tiers to read; by default all interval tiers.

    Returns:
        `list[dict]`: segments as `EmotionSharePipeline` takes them, with their `"place"`, in the order of the file.

    Raises:
        ValueError: naming file and row, if the file is not valid, holds no segments, or has a segment that does not
            start before it ends; or if it covers several recordings but not this one.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SEGMENT_READERS:
        raise ValueError(f"{path}: expected a segment file that ends in {', '.join(SEGMENT_READERS)}")
    if tiers is not None and suffix != ".textgrid":
        raise ValueError(f"--tier: is for a TextGrid; got {path}")
    options = {".rttm": [Path(recording).stem], ".textgrid": [tiers], ".csv": [str(recording)]}.get(suffix, [])
    segments = []
    for row, start, end, speaker in SEGMENT_READERS[suffix](path, *options):
        speaker = None if speaker in UNKNOWN_SPEAKERS else speaker
        segments.append({"start": start, "end": end, "speaker": speaker, "place": f"{path}, row {row}"})
        checked_segment(segments[-1], None)
    if not segments:
        raise ValueError(f"{path}: holds no segments")
    return segments


def _lines(path):
    """The (number, line) pairs of a text file."""
    try:
        return list(enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error


def _seconds(text, name, path, row):
    seconds = number_in(text)
    if seconds != seconds:
        raise ValueError(f"{path}, row {row}: {name} is {text!r}; expected seconds")
    return seconds


def _read_rttm(path, recording):
    turns = []
    for row, line in _lines(path):
        kind, *fields = line.split() or [";;"]
        if kind != "SPEAKER":  # a comment, or another kind of RTTM line
            continue
        if not 7 <= len(fields) <= 9:
            raise ValueError(
                f"{path}, row {row}: has {len(fields) + 1} fields; expected 8 to 10, as in RTTM, and no spaces in names"
            )
        name, channel, start, duration, _, _, speaker, *_ = fields
        if not channel.isdecimal() and channel != UNKNOWN:
            raise ValueError(
                f"{path}, row {row}: channel is {channel!r}; expected a number or {UNKNOWN}, and no spaces in names"
            )
        start = _seconds(start, "start", path, row)
        turns.append((name, (row, start, start + _seconds(duration, "duration", path, row), speaker)))
    names = dict.fromkeys(name for name, _ in turns)
    if len(names) > 1 and recording not in names:
        raise ValueError(
            f"{path}: has turns of {', '.join(names)}; expected turns of {recording}, the name of the audio file"
        )
    return [turn for name, turn in turns if len(names) == 1 or name == recording]


def _read_textgrid(path, names):
    """Intervals without text are pauses; the name of a tier is the speaker."""
    tiers = read_textgrid(path)
    missing = [name for name in names or () if name not in dict(tiers)]
    if missing:
        raise ValueError(f"{path}: has no interval tier {missing[0]!r}; it has {[name for name, _ in tiers]}")
    return [
        (row, start, end, name)
        for name, intervals in tiers
        if names is None or name in names
        for start, end, text, row in intervals
        if text.strip()
    ]


def _read_csv(path, recording):
    """
    Reads the columns `start`, `end` and, if there is one, `speaker`. In our own files, it reads this recording's turns,
    and skips the rows of its speakers and of the whole recording.
    """
    records = _csv_records(path)
    wanted = _name_of(recording, dict.fromkeys(record.get(FILENAME) for _, record in records), path)
    turns = []
    for row, record in records:
        if record.get("unit", TURN) == TURN and record.get(FILENAME) == wanted:
            start, end = (_seconds(record[name], name, path, row) for name in ("start", "end"))
            turns.append((row, start, end, record.get("speaker", "")))
    return turns


def _name_of(recording, names, path):
    """The recording's name in a CSV file: the only name, whatever it is, or the one that fits. `None`: no names."""
    if len(names) < 2:
        return next(iter(names), None)
    recording = recording.strip()  # like the fields
    fitting = [name for name in names if name == recording]
    fitting = fitting or [name for name in names if Path(name).name == Path(recording).name]
    if len(fitting) != 1:
        raise ValueError(f"{path}: has turns of {', '.join(names)}; expected turns of {recording}")
    return fitting[0]


def _csv_records(path):
    """The (row number, `{column: field}`) pairs of all rows that are not empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    header = [column.strip() for column in header]
    if not {"start", "end"} <= set(header):
        raise ValueError(f"{path}, row 1: got the columns {header}; expected start, end and, if known, speaker")
    records = []
    for row, fields in enumerate(rows, start=2):
        if len(fields) not in (0, len(header)):
            raise ValueError(f"{path}, row {row}: has {len(fields)} fields; expected {len(header)}, as in the header")
        if fields:
            records.append((row, dict(zip(header, map(str.strip, fields), strict=True))))
    return records


def _read_srt(path):
    turns, texts = [], []
    for row, line in _lines(path):
        times = SUBTITLE_TIMES.match(line)
        if times is None and "-->" in line:
            raise ValueError(f"{path}, row {row}: got {line!r}; expected times like 00:00:01,500 --> 00:00:04,000")
        if times is not None:
            numbers = [int(number) for number in times.groups()[:-1]]
            start, end = (
                3600 * hours + 60 * minutes + seconds + fraction / 10 ** len(digits)
                for (hours, minutes, seconds, fraction), digits in (
                    (numbers[:4], times[4]),
                    (numbers[4:], times[8]),
                )
            )
            turns.append((row, start, end))
            texts.append("")
        elif turns and not texts[-1]:
            texts[-1] = line  # the first line of text after the times
    return [(*turn, _speaker_of(text)) for turn, text in zip(turns, texts, strict=True)]


def _read_labels(path):
    """Reads Audacity's label tracks: start, end and text, separated by tabs."""
    turns = []
    for row, line in _lines(path):
        if not line.strip() or line.startswith("\\"):  # the frequencies of the previous label
            continue
        fields = line.split("\t", 2)
        if len(fields) < 2:
            raise ValueError(f"{path}, row {row}: got {line!r}; expected start, end and text, separated by tabs")
        start, end = (_seconds(text, name, path, row) for text, name in zip(fields, ("start", "end"), strict=False))
        turns.append((row, start, end, _speaker_of("".join(fields[2:]))))
    return turns


def _speaker_of(text):
    prefix = SPEAKER_PREFIX.match(text)
    return prefix[1] if prefix else ""


# Each returns a list of (row, start, end, speaker).
SEGMENT_READERS = {
    ".rttm": _read_rttm,
    ".textgrid": _read_textgrid,
    ".csv": _read_csv,
    ".srt": _read_srt,
    ".txt": _read_labels,
}
