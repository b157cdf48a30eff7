"""How long audio is cut into windows, whole or as a stream, and how their shares are averaged."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emoshare.windows_emoshare import WindowCutter, average_by_duration, cut, num_heard, stream_windows


def waveform_of(num_samples):
    """Samples that name themselves, (samples,) float32."""
    return np.arange(num_samples, dtype=np.float32)


def in_blocks(waveform, sizes):
    """Blocks of these sizes, over and over, until the waveform ends."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(waveform):
            return
        yield waveform[start : start + size]
        start += size


@given(num_samples=st.integers(1, 500), shortest=st.integers(1, 20), longest=st.integers(0, 80))
def test_windows_cover_a_clip_and_are_as_long_as_they_may_be(num_samples, shortest, longest):
    longest += 2 * shortest
    windows = cut(num_samples, longest, shortest)
    assert [start for start, _ in windows] == [0, *(end for _, end in windows[:-1])]
    assert windows[-1][1] == num_samples
    lengths = [end - start for start, end in windows]
    assert max(lengths) <= longest
    assert len(windows) == -(-num_samples // longest)
    # All but the last two are of the greatest length, and the last cut moves no farther than it must.
    assert lengths[:-2] == [longest] * (len(windows) - 2)
    if len(windows) > 1:
        assert lengths[-1] == max(num_samples - (len(windows) - 1) * longest, shortest)


@given(
    num_samples=st.integers(1, 500),
    shortest=st.integers(1, 20),
    stride=st.integers(0, 30),
    longest=st.integers(0, 80),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5).filter(any),
)
@settings(max_examples=300)
@example(num_samples=30, shortest=5, stride=3, longest=14, sizes=[30])  # one window, just
@example(num_samples=31, shortest=5, stride=3, longest=14, sizes=[30])
def test_a_stream_is_cut_as_the_whole_clip_is(num_samples, shortest, stride, longest, sizes):
    longest += 2 * stride + 2 * shortest
    waveform = waveform_of(num_samples)
    windows = list(stream_windows(in_blocks(waveform, sizes), longest, shortest, stride))
    counted = [(0, num_samples)] if num_samples <= longest else cut(num_samples, longest - 2 * stride, shortest)
    assert [(window.start, window.end) for window in windows] == counted
    assert [window.is_last for window in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        assert window.first == max(window.start - stride, 0)
        heard = waveform[window.first : min(window.end + stride, num_samples)]
        np.testing.assert_array_equal(window.waveform, heard)
        assert len(heard) <= longest
    assert sum(len(window.waveform) for window in windows) == num_heard(num_samples, longest, shortest, stride)


@given(
    num_samples=st.integers(1, 500),
    shortest=st.integers(1, 20),
    hop=st.integers(0, 40),
    more=st.integers(0, 100),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5).filter(any),
)
@settings(max_examples=200)
def test_with_a_hop_a_window_hears_what_was_before_and_is_complete_at_its_end(num_samples, shortest, hop, more, sizes):
    hop += 2 * shortest
    waveform, cutter, windows, read = waveform_of(num_samples), WindowCutter(hop + more, shortest, hop=hop), [], 0
    for block in in_blocks(waveform, sizes):
        read += len(block)
        windows += cutter.push(block)
        assert len(windows) == max(read - shortest, 0) // hop  # not later, and not earlier
        assert sum(map(len, cutter.blocks)) <= more + hop + shortest  # no more is kept
    windows += cutter.finish()
    assert [(window.start, window.end) for window in windows] == cut(num_samples, hop, shortest)
    assert [window.is_last for window in windows] == [False] * (len(windows) - 1) + [True]
    for window in windows:
        assert window.first == max(window.start - more, 0)
        np.testing.assert_array_equal(window.waveform, waveform[window.first : window.end])
    assert sum(len(window.waveform) for window in windows) == num_heard(num_samples, hop + more, shortest, hop=hop)


def test_a_stream_is_read_no_further_than_a_window_needs():
    read = []
    blocks = (read.append(number) or waveform_of(10) for number in range(1000))
    windows = stream_windows(blocks, longest=100, shortest=20, stride=15)
    for end in range(70, 700, 70):  # 70 samples of each window count
        assert next(windows).end == end
        # One sample more than a window decides whether there are several; then, 20 more decide where each ends.
        assert 10 * len(read) <= max(101, end + 20) + 9


def test_the_shares_of_windows_are_averaged_by_duration():
    shares = np.array([[0.2, 0.4], [0.8, 1.0]], dtype=np.float32)
    average = average_by_duration(shares, [48000, 16000])
    assert average.dtype == np.float64
    np.testing.assert_allclose(average, [[0.35, 0.55]], atol=1e-7)


@given(data=st.data(), num_clips=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_the_windows_of_several_clips_may_come_in_any_order(data, num_clips, seed):
    clips = data.draw(st.permutations([*range(num_clips), *data.draw(st.lists(st.integers(0, num_clips - 1)))]))
    rng = np.random.default_rng(seed)
    shares, durations = rng.random((len(clips), 3), dtype=np.float32), rng.integers(1, 128000, len(clips))
    averages = average_by_duration(shares, durations, clips, num_clips)
    assert averages.shape == (num_clips, 3)
    for clip, average in enumerate(averages):
        own = np.array(clips) == clip
        np.testing.assert_allclose(average, np.average(shares[own], axis=0, weights=durations[own]), atol=1e-12)


def test_an_average_keeps_what_one_window_says():
    shares = np.array([[0.1, 0.7]], dtype=np.float32)
    assert average_by_duration(shares, [127999])[0] == pytest.approx(shares[0], abs=1e-12)
