"""How long audio is cut into windows, and how the shares of a clip's windows are averaged: one rule for all code."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np


def cut(num_samples, longest, shortest):
    """
    Cuts a clip into consecutive windows of equal length; the last one holds the rest. If the rest would be too short,
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


def num_heard(num_samples, longest, shortest, stride=0, hop=None):
    """
    Total length of all windows of a clip in samples; overlaps are counted repeatedly.

    Args:
        num_samples: length of the clip.
        longest, shortest, stride, hop: as in `WindowCutter`.
    """
    before, after = _heard_beside(longest, stride, hop)
    is_one = hop is None and num_samples <= longest
    windows = cut(num_samples, longest if is_one else longest - before - after, shortest)
    return sum(min(end + after, num_samples) - max(start - before, 0) for start, end in windows)


def _heard_beside(longest, stride, hop):
    """Samples that a window hears before and after the part it counts for; arguments as in `WindowCutter`."""
    return (stride, stride) if hop is None else (longest - hop, 0)


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


def stream_windows(blocks, longest, shortest, stride=0, hop=None):
    """
    Cuts a clip while it is read, so that a long clip is never in memory as a whole.

    Args:
        blocks: iterable of (samples,) float32, the clip from its beginning to its end.
        longest, shortest, stride, hop: as in `WindowCutter`.

    Yields:
        `Window`: the parts that they count for cover the clip without overlap.
    """
    cutter = WindowCutter(longest, shortest, stride, hop)
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.finish()


class WindowCutter:
    """
    Cuts a clip by the rule of `cut` while its samples arrive. It keeps only what the next window may hear.

    Args:
        longest: the largest number of samples that the model hears at once.
        shortest: least number of samples in the last of several windows.
        stride: samples at either end of a window that are heard but not counted, except at the ends of the clip. What
            is left, `longest - 2 * stride`, must be at least twice `shortest`. A clip of up to `longest` samples is one
            window, which leaves nothing out.
        hop: instead of a stride: each window counts only for its last `hop` samples (from twice `shortest` to
            `longest`) and hears up to `longest`. So it is complete as soon as the part that it counts for ends, also at
            the beginning of a clip, where it hears little before that part.
    """

    def __init__(self, longest, shortest, stride=0, hop=None):
        self.longest, self.shortest = longest, shortest
        self.before, self.after = _heard_beside(longest, stride, hop)
        self.step = hop  # samples that a window counts for; `None` until the clip is known to have several windows
        self.blocks = []  # samples kept for the next window, and those that have arrived since
        self.first = 0  # the clip's sample that `blocks` begin with
        self.num_samples = 0  # length of the clip so far
        self.start = 0  # first sample that the next window counts for

    def push(self, samples):
        """
        Args:
            samples: (samples,) float32, the next of the clip.

        Returns:
            `list[Window]`: the new windows that are complete, whatever follows.
        """
        self.blocks.append(samples)
        self.num_samples += len(samples)
        if self.step is None and self.num_samples > self.longest:
            self.step = self.longest - self.before - self.after
        if self.step is None:
            return []
        windows, enough = [], self.step + max(self.shortest, self.after)
        while self.num_samples - self.start >= enough:
            windows.append(self._next(self.start + self.step))
        if windows:
            self.blocks = [block.copy() for block in self.blocks]  # a view would keep its whole base array in memory
        return windows

    def finish(self):
        """
        Returns:
            `list[Window]`: the remaining windows, as the clip has ended.
        """
        step = self.longest if self.step is None else self.step
        ends = [self.start + end for _, end in cut(self.num_samples - self.start, step, self.shortest)]
        return [self._next(end) for end in ends]

    def _next(self, end):
        """Returns the window that counts up to this sample, and drops the samples that later windows do not hear."""
        samples = self.blocks[0] if len(self.blocks) == 1 else np.concatenate(self.blocks)
        first, last = max(self.start - self.before, 0), min(end + self.after, self.num_samples)
        window = Window(
            samples[first - self.first : last - self.first], first, self.start, end, end == self.num_samples
        )
        self.start = end
        kept = max(end - self.before, 0)
        self.blocks, self.first = [samples[kept - self.first :]], kept
        return window


def average_by_duration(shares, durations, clips=None, num_clips=1):
    """
    Averages the shares of each clip's windows, weighted by their durations.

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
