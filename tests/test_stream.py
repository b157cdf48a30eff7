"""Audio that arrives in pieces has the windows and shares of the same audio as a whole."""

import warnings

import numpy as np
import pytest
import torch
from conftest import small_model, speech
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from emoshare import EmoShareFeatureExtractor, EmotionSharePipeline, EmotionShareStream


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


def pieces(samples, sizes):
    start = 0
    for size in [*sizes, len(samples)]:
        yield samples[start : start + size]
        start += size


def assert_same(windows, expected):
    assert [(window["start"], window["end"]) for window in windows] == [
        (window["start"], window["end"]) for window in expected
    ]
    for window, other in zip(windows, expected, strict=True):
        assert window["shares"] == pytest.approx(other["shares"], abs=1e-5)


@pytest.mark.parametrize("sampling_rate", [16000, 48000, 44100, 22051])
@pytest.mark.parametrize("hop_length_s", [1.0, 0.37])
def test_the_windows_are_those_of_the_whole_recording(sampling_rate, hop_length_s, emotion_share):
    waveform = speech(3.2, sampling_rate=sampling_rate)
    expected = emotion_share(
        {"array": waveform, "sampling_rate": sampling_rate},
        chunk_length_s=2.0,
        hop_length_s=hop_length_s,
        return_timeline=True,
    )["timeline"]
    assert len(expected) == -(-3.2 // hop_length_s)
    stream = EmotionShareStream(emotion_share, hop_length_s, chunk_length_s=2.0, sampling_rate=sampling_rate)
    sizes = np.random.default_rng(sampling_rate).integers(1, sampling_rate, 20)
    windows = [window for samples in pieces(waveform, sizes) for window in stream.push(samples)]
    assert_same(windows + stream.finish(), expected)


def test_a_window_is_what_the_model_says_of_the_last_seconds(emotion_share):
    waveform = speech(4.0)
    stream = emotion_share.stream(hop_length_s=0.5, chunk_length_s=2.0)
    windows = stream.push(waveform) + stream.finish()
    assert [window["end"] for window in windows] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    for window in windows:
        end = round(window["end"] * 16000)
        alone = emotion_share(waveform[max(end - 32000, 0) : end])
        assert window["shares"] == pytest.approx({share["label"]: share["score"] for share in alone}, abs=1e-5)


@given(
    sizes=st.lists(st.integers(0, 12_000), max_size=30),
    hop=st.integers(1600, 16000),
    sampling_rate=st.sampled_from([16000, 44100]),
)
@settings(max_examples=15, deadline=None)
def test_no_window_is_late_and_little_is_kept(sizes, hop, sampling_rate, emotion_share):
    """A window comes with the piece that has its end plus as many samples as the shortest clip."""
    stream = EmotionShareStream(emotion_share, hop / 16000, chunk_length_s=1.0, sampling_rate=sampling_rate)
    pushed, num_windows = 0, 0
    for size in sizes:
        pushed += size
        num_windows += len(stream.push(np.full(size, 0.1, np.float32)))
        seconds = pushed / sampling_rate - 0.045 - 0.02  # the resampler's filter reaches 10 ms ahead
        assert num_windows >= seconds * 16000 // hop
        assert sum(map(len, stream.cutter.blocks)) <= 16000 + hop + 720


def test_samples_may_be_integers_channels_tensors_and_lists(emotion_share):
    integers = (speech(1.3) * 32767).astype(np.int16)
    expected = None
    for samples in (
        integers,
        np.stack([integers, integers], axis=1),
        integers / np.float32(32768),
        integers / np.float64(32768),
        torch.from_numpy(integers / np.float32(32768)),
        (integers / np.float32(32768)).tolist(),
    ):
        stream = EmotionShareStream(emotion_share, hop_length_s=0.5)
        windows = stream.push(samples[:9000]) + stream.push(samples[:0]) + stream.push(samples[9000:]) + stream.finish()
        expected = expected or windows
        assert_same(windows, expected)
    assert len(expected) == 3


@pytest.mark.parametrize("sizes", [[1, 1, 2, 8000, 1], [2, 8000]])
def test_a_piece_may_have_fewer_samples_than_channels(sizes, emotion_share):
    waveform = speech(1.3)
    channels = np.stack([waveform, 0.5 * waveform, 0 * waveform], axis=1)
    expected, stream = (EmotionShareStream(emotion_share, hop_length_s=0.5) for _ in range(2))
    windows = [window for samples in pieces(channels, sizes) for window in stream.push(samples)]
    assert_same(windows + stream.finish(), expected.push(channels) + expected.finish())


def test_after_many_channels_a_piece_may_have_one_sample(emotion_share):
    stream = EmotionShareStream(emotion_share)
    stream.push(np.full((100, 16), 0.1))
    stream.push(np.full((1, 16), 0.1))
    assert stream.level.num_values == 101 * 16


@pytest.mark.parametrize(
    ("before", "shape", "message"),
    [
        (None, (2, 480), r"got samples of shape \(2, 480\) and float64; expected \(samples,\) or \(samples, chan"),
        ((480, 2), (2, 480), r"got samples of shape \(2, 480\) and float64; expected \(samples,\) or \(samples, chan"),
        ((480, 2), (480, 1), r"got samples of shape \(480, 1\); expected \(samples, 2\), as before"),
        ((480, 1), (480, 2), r"got samples of shape \(480, 2\); expected \(samples, 1\), as before"),
        ((480,), (1, 8), r"got samples of shape \(1, 8\) and float64; expected \(samples,\) or \(samples, channels\)"),
    ],
)
def test_channels_are_those_of_the_first_piece(before, shape, message, emotion_share):
    stream = EmotionShareStream(emotion_share)
    stream.push(np.full(before or (0, 2), 0.1))
    for _ in range(2):  # a piece that is refused changes nothing
        with pytest.raises(ValueError, match=f"^stream: {message}"):
            stream.push(np.full(shape, 0.1))


def test_what_was_pushed_may_be_overwritten(emotion_share):
    waveform = speech(1.0)
    expected = EmotionShareStream(emotion_share, hop_length_s=0.6)
    stream, buffer = EmotionShareStream(emotion_share, hop_length_s=0.6), np.empty(1000, np.float32)
    windows = []
    for start in range(0, 16000, 1000):
        buffer[:] = waveform[start : start + 1000]
        windows += stream.push(buffer)
    assert_same(windows + stream.finish(), expected.push(waveform) + expected.finish())


def test_a_stream_ends_once(emotion_share):
    stream = EmotionShareStream(emotion_share)
    assert stream.finish() == []
    stream = EmotionShareStream(emotion_share)
    stream.push(speech(0.5))
    assert len(stream.finish()) == 1
    assert stream.finish() == []
    with pytest.raises(ValueError, match=r"^stream: is finished"):
        stream.push(speech(0.5))


def test_what_a_stream_cannot_take_is_said(emotion_share):
    with pytest.raises(ValueError, match=r"hop_length_s: got 9.0; expected 0.09 to chunk_length_s, 8.0 s"):
        EmotionShareStream(emotion_share, hop_length_s=9.0)
    with pytest.raises(ValueError, match=r"hop_length_s: got '1'; expected a number of seconds"):
        EmotionShareStream(emotion_share, hop_length_s="1")
    with pytest.raises(ValueError, match="sampling_rate: got the sampling rate 10"):
        EmotionShareStream(emotion_share, sampling_rate=10)
    stream = EmotionShareStream(emotion_share)
    with pytest.raises(ValueError, match="stream: 1 of 100 samples are not finite"):
        stream.push(np.r_[np.zeros(99), np.nan])
    with pytest.raises(ValueError, match=r"stream: got samples of shape \(100, 1\) and uint8"):
        stream.push(np.zeros(100, np.uint8))
    stream.push(np.full(100, 0.1))
    with pytest.raises(ValueError, match=r"stream: .*got 100 samples"):
        stream.finish()


def test_silence_is_warned_of_at_the_end(emotion_share):
    stream = EmotionShareStream(emotion_share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.push(np.zeros(20000))
    with pytest.warns(UserWarning, match="^stream: is digital silence$"):
        stream.finish()


def test_a_hop_and_a_stride_exclude_each_other(emotion_share, wav):
    with pytest.raises(ValueError, match=r"hop_length_s: got 1.0; .* and no stride_length_s"):
        emotion_share(str(wav), hop_length_s=1.0, stride_length_s=0.5)


def test_acoustic_features_stream_alike():
    torch.manual_seed(0)
    emotion_share = EmotionSharePipeline(
        model=small_model(), feature_extractor=EmoShareFeatureExtractor("mel"), device="cpu"
    )
    waveform = speech(2.5)
    expected = emotion_share(waveform, hop_length_s=0.5, return_timeline=True)["timeline"]
    stream = emotion_share.stream(hop_length_s=0.5)
    windows = [window for samples in pieces(waveform, [7] * 500) for window in stream.push(samples)]
    assert_same(windows + stream.finish(), expected)
