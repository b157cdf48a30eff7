"""From one sampling rate to another, block by block: what torchaudio makes of a waveform as a whole."""

import math
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
import torchaudio

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
# torchaudio's kernel has an entry for each pair of samples within the shortest time after which the two rates meet
# again, nearly all of them zero: 22,050 Hz to 16 kHz takes 1.5e5 entries, but 22,051 Hz takes 3.5e8. Past this number,
# the entries that are not zero are used alone.
MAX_KERNEL = 1 << 20
# As in torchaudio's default, a sinc of 6 zeros to either side, in a Hann window, that cuts off at 99 %.
ZEROS, ROLLOFF = 6, 0.99
VALUES_AT_A_TIME = 1 << 20


def checked_rate(rate, name):
    """
    Returns:
        `int`: a sampling rate in Hz, which may be given as a float, or as a tensor or array of one.

    Raises:
        ValueError: if it is not a whole number from 1,000 to 768,000 Hz; `name` is what has this rate.
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
        `np.ndarray`: (samples,) float32. Together they are `torchaudio.transforms.Resample` of all blocks, to 1e-6 of
        full scale, whatever the blocks' lengths.
    """
    if from_rate == to_rate:
        return blocks
    divisor = math.gcd(from_rate, to_rate)
    period, new_period = from_rate // divisor, to_rate // divisor
    width = _width(period, new_period)
    if new_period * (2 * width + period) <= MAX_KERNEL:
        return _resampled_by_torchaudio(blocks, from_rate, to_rate)
    return _resampled_by_taps(blocks, period, new_period)


def _resampled_by_torchaudio(blocks, from_rate, to_rate):
    """
    Its filter reaches `margin` samples to either side and repeats every `period` samples, so a cut changes nothing if
    it is at a multiple of `period`, and `margin` samples on the other side of it are resampled too and dropped.
    """
    resample = _resampler(from_rate, to_rate)
    period = from_rate // math.gcd(from_rate, to_rate)
    new_period = to_rate // math.gcd(from_rate, to_rate)
    margin = -(-resample.width // period) * period
    blocks = iter(blocks)
    # `kept` is the end of the previous block; its first `done` samples have been resampled, and are margin now.
    block, kept, done = next(blocks), np.zeros(0, np.float32), 0
    while block is not None:
        following = next(blocks, None)
        samples = np.concatenate([kept, block])
        end = len(samples) if following is None else max((len(samples) - margin) // period * period, done)
        new = resample(torch.from_numpy(samples[: end + margin])).numpy()
        yield new[done // period * new_period : None if following is None else end // period * new_period]
        first = max(end - margin, 0)
        kept, done, block = samples[first:], end - first, following


@lru_cache(maxsize=16)
def _resampler(from_rate, to_rate):
    return torchaudio.transforms.Resample(from_rate, to_rate)


def _resampled_by_taps(blocks, period, new_period):
    """New sample j lies at j * period / new_period, and is made of the samples within `width` around that."""
    taps, width = _taps(period, new_period), _width(period, new_period)
    samples, first = np.zeros(width, np.float32), -width  # `first`: where `samples` begins in the waveform
    done = length = 0  # new samples that were yielded, and samples that were read
    for block in blocks:
        samples, length = np.concatenate([samples, block]), length + len(block)
        ready = max(-(-(length - width) * new_period // period), done)  # new samples whose taps have all been read
        yield _apply_taps(samples, first, done, ready, taps, period)
        done = ready
        unused = max(done * period // new_period - width - first, 0)
        samples, first = samples[unused:], first + unused
    samples = np.concatenate([samples, np.zeros(width + 1, np.float32)])
    yield _apply_taps(samples, first, done, -(-length * new_period // period), taps, period)


def _apply_taps(samples, first, start, end, taps, period):
    """The new samples `start` to `end`."""
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
    """Samples that the filter reaches to either side."""
    return math.ceil(ZEROS * period / (min(period, new_period) * ROLLOFF))


@lru_cache(maxsize=4)  # up to 40 MB each
def _taps(period, new_period):
    """
    The filter's weights, (new_period, 2 * width) float32, for each of the `new_period` places that a new sample can
    have between two samples: of the samples from `width - 1` before it to `width` behind it.
    """
    width, cutoff = _width(period, new_period), min(period, new_period) * ROLLOFF / period  # of a zero per sample
    taps = np.empty((new_period, 2 * width), np.float32)
    offsets = np.arange(1 - width, width + 1)
    for start in range(0, new_period, max(VALUES_AT_A_TIME // (2 * width), 1)):
        places = np.arange(start, min(start + max(VALUES_AT_A_TIME // (2 * width), 1), new_period))
        # torchaudio rounds a place to float32; with it exact, rates like 12,345 Hz would differ from it by 1e-4.
        rounded = -places.astype(np.float32) / np.float32(new_period)
        numbers = (places * period // new_period)[:, None] + offsets
        times = (numbers / period + rounded[:, None].astype(np.float64)) * (cutoff * period)
        times = times.clip(-ZEROS, ZEROS)
        window = np.cos(times * np.pi / ZEROS / 2) ** 2
        taps[places] = np.sinc(times) * window * cutoff
    return taps
