"""Resamples a waveform block by block, with the result that torchaudio gives for the whole waveform."""

import math
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
import torchaudio

from .mel_emoshare import on_cpu_in_float32

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
# torchaudio's kernel has an entry for each pair of old and new samples within one common period of the two rates,
# nearly all of them zero: 22,050 Hz to 16 kHz takes 1.5e5 entries, but 22,051 Hz takes 3.5e8. Above this number, only
# the entries that are not zero are used.
MAX_KERNEL = 1 << 20
# As torchaudio's default: a sinc with 6 zeros on either side, in a Hann window, that cuts off at 99 %.
ZEROS, ROLLOFF = 6, 0.99
VALUES_AT_A_TIME = 1 << 20


def checked_rate(rate, name):
    """
    Returns:
        `int`: the sampling rate in Hz. It may be given as a float, or as a scalar tensor or array.

    Raises:
        ValueError: if it is not a whole number from 1,000 to 768,000 Hz; the message begins with `name`.
    """
    rate = rate.item() if getattr(rate, "ndim", None) == 0 else rate
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not is_number or rate % 1 != 0 or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"{name}: got the sampling rate {rate!r}; expected a whole number of Hz, {MIN_RATE:,} to {MAX_RATE:,}"
        )
    return int(rate)


def resampled(blocks, from_rate, to_rate):
    """
    Args:
        blocks: an iterator of at least one `np.ndarray`, (samples,) float32.
        from_rate, to_rate (`int`): in Hz, as `checked_rate` returns them.

    Yields:
        `np.ndarray`: (samples,) float32. Together they equal `torchaudio.transforms.Resample` of all blocks, to 1e-6 of
        full scale, whatever the blocks' lengths.
    """
    if from_rate == to_rate:
        yield from blocks
        return
    resampler = resampler_between(from_rate, to_rate)
    blocks = iter(blocks)
    block = next(blocks)
    while block is not None:
        following = next(blocks, None)
        yield resampler.push(block, is_last=following is None)
        block = following


def resampler_between(from_rate, to_rate):
    """
    Args:
        from_rate, to_rate (`int`): in Hz, as `checked_rate` returns them.

    Returns:
        An object whose `push(samples, is_last=False)` takes the next samples of a waveform, (samples,) float32, and
        returns the resampled ones that do not depend on what follows, or all of the rest if `is_last`.
    """
    divisor = math.gcd(from_rate, to_rate)
    period, new_period = from_rate // divisor, to_rate // divisor
    if period == new_period:
        return _Unchanged()
    if new_period * (2 * _width(period, new_period) + period) <= MAX_KERNEL:
        return _ByTorchaudio(_resampler(from_rate, to_rate), period, new_period)
    return _ByTaps(period, new_period)


class _Unchanged:
    def push(self, samples, is_last=False):
        return samples


class _ByTorchaudio:
    """
    Resamples with torchaudio's filter, which reaches `margin` samples to either side and repeats every `period`
    samples. So a cut changes nothing if it is at a multiple of `period`, and `margin` samples beyond it are resampled
    too and dropped.
    """

    def __init__(self, resample, period, new_period):
        self.resample, self.period, self.new_period = resample, period, new_period
        self.margin = -(-resample.width // period) * period
        # `kept` is the end of the previous samples. Its first `done` samples have been resampled, and serve as margin.
        self.kept, self.done = np.zeros(0, np.float32), 0

    def push(self, samples, is_last=False):
        samples, done = np.concatenate([self.kept, samples]), self.done
        end = len(samples) if is_last else max((len(samples) - self.margin) // self.period * self.period, done)
        first = max(end - self.margin, 0)
        self.kept, self.done = samples[first:], end - first
        if end == done:
            return np.zeros(0, np.float32)
        new = self._resampled(samples[: end + self.margin])
        return new[done // self.period * self.new_period : None if is_last else end // self.period * self.new_period]

    def _resampled(self, samples):
        """As `self.resample`, which would round the number of new samples to torch's default dtype."""
        padded = np.pad(samples, (self.resample.width, self.resample.width + self.period))
        new = torch.nn.functional.conv1d(torch.from_numpy(padded)[None, None], self.resample.kernel, stride=self.period)
        return new[0].T.reshape(-1)[: -(-len(samples) * self.new_period // self.period)].numpy()


@lru_cache(maxsize=16)
def _resampler(from_rate, to_rate):
    with on_cpu_in_float32():
        return torchaudio.transforms.Resample(from_rate, to_rate)


class _ByTaps:
    """New sample j lies at j * period / new_period, and is computed from the samples within `width` of this place."""

    def __init__(self, period, new_period):
        self.period, self.new_period = period, new_period
        self.taps, self.width = _taps(period, new_period), _width(period, new_period)
        self.samples, self.first = np.zeros(self.width, np.float32), -self.width  # `first`: position of the first one
        self.done = self.length = 0  # number of new samples returned, and of samples received

    def push(self, samples, is_last=False):
        self.length += len(samples)
        end = np.zeros(self.width + 1 if is_last else 0, np.float32)
        self.samples = np.concatenate([self.samples, samples, end])
        known = self.length if is_last else self.length - self.width
        ready = max(-(-known * self.new_period // self.period), self.done)  # new samples whose taps have all arrived
        new = _apply_taps(self.samples, self.first, self.done, ready, self.taps, self.period)
        self.done = ready
        unused = max(self.done * self.period // self.new_period - self.width - self.first, 0)
        self.samples, self.first = self.samples[unused:], self.first + unused
        return new


def _apply_taps(samples, first, start, end, taps, period):
    """Computes the new samples from `start` to before `end`."""
    new_period, num_taps = taps.shape
    new = np.empty(end - start, np.float32)
    at_a_time = max(VALUES_AT_A_TIME // num_taps, 1)
    if len(new):
        windows = np.lib.stride_tricks.sliding_window_view(samples, num_taps)
    for done in range(0, len(new), at_a_time):
        numbers = np.arange(start + done, min(start + done + at_a_time, end))
        begins = numbers * period // new_period - num_taps // 2 + 1 - first
        new[done : done + at_a_time] = np.einsum("nt,nt->n", windows[begins], taps[numbers % new_period])
    return new


def _width(period, new_period):
    """Number of samples that the filter reaches to either side."""
    return math.ceil(ZEROS * period / (min(period, new_period) * ROLLOFF))


@lru_cache(maxsize=4)  # up to 40 MB each
def _taps(period, new_period):
    """
    The filter's weights, (new_period, 2 * width) float32: for each of the `new_period` places that a new sample can
    have between two samples, the weights of the samples from `width - 1` before it to `width` after it.
    """
    width, cutoff = _width(period, new_period), min(period, new_period) * ROLLOFF / period  # zeros per sample
    taps = np.empty((new_period, 2 * width), np.float32)
    offsets = np.arange(1 - width, width + 1)
    for start in range(0, new_period, max(VALUES_AT_A_TIME // (2 * width), 1)):
        places = np.arange(start, min(start + max(VALUES_AT_A_TIME // (2 * width), 1), new_period))
        # torchaudio rounds a place to float32. With exact places, results at rates like 12,345 Hz would differ by 1e-4.
        rounded = -places.astype(np.float32) / np.float32(new_period)
        numbers = (places * period // new_period)[:, None] + offsets
        times = (numbers / period + rounded[:, None].astype(np.float64)) * (cutoff * period)
        times = times.clip(-ZEROS, ZEROS)
        window = np.cos(times * np.pi / ZEROS / 2) ** 2
        taps[places] = np.sinc(times) * window * cutoff
    return taps
