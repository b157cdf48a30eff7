"""How long audio is cut into windows, and how the shares of a clip's windows are averaged: one rule for all code."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np


def cut(num_samples, longest, shortest):
    """
    Cuts a clip into consecutive windows of equal length; the last one holds what is left. If that would be too short,
    the last cut moves back.

    Args:
        num_samples: length of the clip in samples.
        longest: length of a window in samples; at least twice `shortest`.
        shortest: least number of samples in the last of several windows.

    Returns:
        `list[tuple[int, int]]`: first sample and end of each window. The windows cover the clip without overlap.
    """
    cuts = [*range(0, max(num_samples, 1), longest), num_samples]
    if len(cuts) > 2 and num_samples - cuts[-2] < shortest:
        cuts[-2] = num_samples - shortest
    return list(pairwise(cuts))


class Window(NamedTuple):
    """
    Attributes:
        waveform: (samples,) float32, what the model hears.
        first: the clip's sample that `waveform` begins with.
        start, end: the part of the clip that the window counts for, in samples of the clip.
        is_last: whether it is the clip's last window.
    """

    waveform: np.ndarray
    first: int
    start: int
    end: int
    is_last: bool


def stream_windows(blocks, longest, shortest, stride=0):
    """
    Cuts a clip by the rule of `cut` while it is read, so that a long clip never lies in memory as a whole.

    Args:
        blocks: iterable of (samples,) float32, the clip from its beginning to its end.
        longest: the most samples that the model hears at once.
        shortest: least number of samples in the last of several windows.
        stride: samples at either end of a window that are heard but not counted, except at the ends of the clip. What
            is left, `longest - 2 * stride`, must be at least twice `shortest`.

    Yields:
        `Window`: those of one clip count for all of it, without overlap.
    """
    clip = _Reader(blocks)
    # A clip of one window is heard as a whole, and leaves nothing out.
    step = longest if clip.read_to(longest + 1) <= longest else longest - 2 * stride
    start, is_last = 0, False
    while not is_last:
        # With this many samples after the window, its end does not depend on what follows.
        num_samples = clip.read_to(start + step + max(shortest, stride))
        end = start + cut(num_samples - start, step, shortest)[0][1]
        first, last, is_last = max(start - stride, 0), min(end + stride, num_samples), end == num_samples
        yield Window(clip.take(first, last), first, start, end, is_last)
        start = end


class _Reader:
    """A clip that is read as far as needed, and forgotten up to where it is no longer needed."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)
        self.samples = np.zeros(0, dtype=np.float32)
        self.start = 0  # of `samples` in the clip

    def read_to(self, end):
        """Reads up to the sample `end`, or to the end of the clip; returns how many samples have been read so far."""
        blocks, missing = [self.samples], end - self.start - len(self.samples)
        while missing > 0 and (block := next(self.blocks, None)) is not None:
            blocks.append(block)
            missing -= len(block)
        if len(blocks) > 1:
            self.samples = np.concatenate(blocks)
        return self.start + len(self.samples)

    def take(self, first, last):
        """Samples `first` to `last` of the clip; those before `first` are forgotten."""
        self.samples = self.samples[first - self.start :]
        self.start = first
        return self.samples[: last - first]


def average_by_duration(shares, durations, clips=None, num_clips=1):
    """
    The shares of clips: the average of their windows' shares, each weighted by its duration.

    Args:
        shares: (windows, labels).
        durations: (windows,) in samples, or any other unit.
        clips: (windows,) index of each window's clip; `None` if all are of one clip.
        num_clips: number of clips.

    Returns:
        `np.ndarray`: (clips, labels) float64.
    """
    durations = np.asarray(durations, dtype=np.float64)[:, None]
    clips = np.zeros(len(shares), dtype=int) if clips is None else clips
    sums, totals = np.zeros((num_clips, shares.shape[1])), np.zeros((num_clips, 1))
    np.add.at(sums, clips, shares * durations)
    np.add.at(totals, clips, durations)
    return sums / totals
