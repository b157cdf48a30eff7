"""Conversations: the turns of a recording, their windows in one pass over it, and the shares of each speaker."""

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

import numpy as np

from .audio_emoshare import SILENCE
from .windows_emoshare import WindowCutter

# A turn may end this much after the audio: segment files round times, and detectors count whole frames.
END_TOLERANCE_S = 0.01


class Turn(NamedTuple):
    """
    Attributes:
        start, end: in seconds, as they were given.
        speaker: `None` if it is not known.
        first, last: its first sample, and the sample after its last one.
        place: its name in messages.
        is_heard: whether it is long enough for the model.
    """

    start: float
    end: float
    speaker: str | None
    first: int
    last: int
    place: str
    is_heard: bool


def checked_turns(segments, sampling_rate, min_samples):
    """
    Args:
        segments: `list[dict]` with `"start"` and `"end"` in seconds and, if known, `"speaker"`. `"place"`, where it was
            found, names the segment in messages; otherwise its number does.
        sampling_rate: in Hz, by which times are converted to samples.
        min_samples: the shortest turn that the model can hear; shorter ones cause a warning.

    Returns:
        `list[Turn]`

    Raises:
        ValueError: naming the segment, if it is not such a dict, or its times are not 0 <= start < end.
    """
    if isinstance(segments, str | Mapping) or not hasattr(segments, "__iter__"):
        raise ValueError(f"segments: got {type(segments).__name__}; expected a list of dicts with 'start' and 'end'")
    turns = []
    for number, segment in enumerate(segments):
        start, end, speaker, place = checked_segment(segment, f"segments[{number}]")
        first, last = round(start * sampling_rate), round(end * sampling_rate)
        is_heard = last - first >= min_samples
        if not is_heard:
            _warn_of_length(place, start, end, min_samples / sampling_rate)
        turns.append(Turn(start, end, speaker, first, last, place, is_heard))
    return turns


def _warn_of_length(place, start, end, shortest):
    warnings.warn(
        f"{place}: {start:.3f} to {end:.3f} s is too short, and gets no shares; the model needs {shortest:.3f} s",
        stacklevel=3,
    )


def checked_segment(segment, place):
    """
    Returns start, end, speaker and place of a segment; `place` is used if it has none of its own.

    Raises:
        ValueError: as `checked_turns`.
    """
    keys = set(segment) if isinstance(segment, Mapping) else set()
    if not {"start", "end"} <= keys <= {"start", "end", "speaker", "place"}:
        shown = sorted(map(str, keys)) if isinstance(segment, Mapping) else type(segment).__name__
        raise ValueError(f"{place}: got {shown}; expected a dict with 'start', 'end' and, if known, 'speaker'")
    place, speaker = segment.get("place", place), segment.get("speaker")
    for name in ("start", "end"):
        time = segment[name]
        if not isinstance(time, Real) or isinstance(time, bool) or not 0 <= time < math.inf:
            raise ValueError(f"{place}: {name} is {time!r}; expected seconds, 0 or more")
    if segment["start"] >= segment["end"]:
        raise ValueError(f"{place}: starts at {segment['start']:.3f} s and ends at {segment['end']:.3f} s")
    if not (speaker is None or isinstance(speaker, str)):
        raise ValueError(f"{place}: speaker is {speaker!r}; expected text, or None if it is not known")
    return float(segment["start"]), float(segment["end"]), speaker, place


def turn_windows(blocks, turns, sampling_rate, cutting):
    """
    Reads a recording once, and cuts each turn into the windows that it would have as a separate clip.

    Args:
        blocks: iterable of (samples,) float32, the recording from its beginning to its end.
        turns: `list[Turn]` in any order; they may overlap. Turns that are too short are left out, with a warning if a
            turn becomes too short because the recording ends before the turn does.
        sampling_rate: in Hz.
        cutting: the arguments of `WindowCutter`.

    Yields:
        (index of the turn, `Window` with times in the recording); `is_last` is true for the last window of the
        recording. The windows of a turn come in order.

    Raises:
        ValueError: naming the turn, if it ends more than 10 ms after the recording.
    """
    last = None
    for index, window in _in_one_pass(blocks, turns, sampling_rate, cutting):
        if last is not None:
            yield last
        first, start, end = (turns[index].first + time for time in (window.first, window.start, window.end))
        last = index, window._replace(first=first, start=start, end=end, is_last=False)
    if last is not None:
        yield last[0], last[1]._replace(is_last=True)


def _in_one_pass(blocks, turns, sampling_rate, cutting):
    to_come = sorted(
        (index for index, turn in enumerate(turns) if turn.is_heard), key=lambda index: -turns[index].first
    )
    heard, position = {}, 0
    for block in blocks:
        end = position + len(block)
        while to_come and turns[to_come[-1]].first < end:
            index = to_come.pop()
            heard[index] = _Hearing(turns[index], cutting)
        for index in list(heard):
            yield from ((index, window) for window in heard[index].push(block, position))
            if turns[index].last <= end:
                yield from ((index, window) for window in heard.pop(index).finish())
        position = end
    for turn in turns:
        if turn.last > position + END_TOLERANCE_S * sampling_rate:
            raise ValueError(
                f"{turn.place}: {turn.start:.3f} to {turn.end:.3f} s is past the end of the audio, "
                f"{position / sampling_rate:.3f} s"
            )
    for index, hearing in heard.items():
        turn, shortest = turns[index], hearing.cutter.shortest
        if position - turn.first >= shortest:
            yield from ((index, window) for window in hearing.finish())
        else:
            _warn_of_length(turn.place, turn.start, position / sampling_rate, shortest / sampling_rate)


class _Hearing:
    """Collects the windows and the peak of one turn while the recording is read."""

    def __init__(self, turn, cutting):
        self.turn, self.cutter, self.peak = turn, WindowCutter(*cutting), 0.0

    def push(self, block, position):
        """Takes the turn's part of a block that begins at the sample `position` of the recording."""
        samples = block[max(self.turn.first - position, 0) : self.turn.last - position]
        self.peak = max(self.peak, float(np.abs(samples).max(initial=0)))
        return self.cutter.push(samples)

    def finish(self):
        if self.peak < SILENCE:
            warnings.warn(f"{self.turn.place}: is digital silence", stacklevel=2)
        return self.cutter.finish()


def conversation(windows, turns, result_of):
    """
    Args:
        windows: the model's outputs for each window, with the index of its `"turn"`.
        turns: `list[Turn]`.
        result_of: function that makes a dict with `"shares"` from the windows of a clip and the pipeline's options.

    Returns:
        `dict`: `"turns"`, `"speakers"` and `"shares"`, as in `EmotionSharePipeline.__call__`.
    """
    of_turn = [[] for _ in turns]
    for window in windows:
        of_turn[window["turn"]].append(window)

    def shares_of(numbers):
        chosen = [window for number in numbers for window in of_turn[number]]
        options = dict.fromkeys(("return_timeline", "return_attention", "return_embedding"), False)
        return result_of(chosen, **options)["shares"] if chosen else None

    by_speaker = {}
    for number, turn in enumerate(turns):
        if turn.speaker is not None:
            by_speaker.setdefault(turn.speaker, []).append(number)
    return {
        "turns": [
            {
                "start": turn.start,
                "end": turn.end,
                "speaker": turn.speaker,
                **(result_of(own) if own else {"shares": None}),
            }
            for turn, own in zip(turns, of_turn, strict=True)
        ],
        "speakers": {speaker: shares_of(numbers) for speaker, numbers in by_speaker.items()},
        "shares": shares_of(range(len(turns))),
    }
