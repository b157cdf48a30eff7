"""Every rate resamples to what torchaudio makes of it, in little memory."""

import math
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from emoshare import load_audio, resampling_emoshare
from emoshare.resampling_emoshare import resampled


def in_blocks(waveform, num_blocks, from_rate, to_rate):
    return np.concatenate(list(resampled(iter(np.array_split(waveform, num_blocks)), from_rate, to_rate)))


def by_torchaudio(waveform, from_rate, to_rate):
    return torchaudio.transforms.Resample(from_rate, to_rate)(torch.from_numpy(waveform)).numpy()


@pytest.mark.parametrize("rates", [(12345, 16000), (47952, 16000), (16000, 3205), (1003, 1601)])
def test_rates_with_a_large_kernel_give_what_torchaudio_gives(rates):
    waveform = np.random.default_rng(0).uniform(-1, 1, rates[0] // 2 + 33).astype(np.float32)
    expected = by_torchaudio(waveform, *rates)
    for num_blocks in (1, 7):
        np.testing.assert_allclose(in_blocks(waveform, num_blocks, *rates), expected, atol=1e-6)


@given(
    rates=st.sampled_from([(441, 160), (160, 441), (1, 3), (3, 1), (7, 5), (481, 160)]),
    lengths=st.lists(st.integers(1, 800), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_by_taps_alone_blocks_of_any_length_are_resampled_as_one(rates, lengths):
    waveform = np.random.default_rng(1).uniform(-1, 1, sum(lengths)).astype(np.float32)
    blocks = np.split(waveform, np.cumsum(lengths)[:-1])
    resampler, last = resampling_emoshare._ByTaps(*rates), len(blocks) - 1
    new = np.concatenate([resampler.push(block, is_last=number == last) for number, block in enumerate(blocks)])
    np.testing.assert_allclose(new, by_torchaudio(waveform, *rates), atol=1e-6)


@pytest.mark.parametrize("rate", [1_001, 15_999, 22_051, 44_101, 767_999])
def test_no_rate_takes_more_memory_than_its_samples_and_100_mb(rate):
    """`tracemalloc` sees what NumPy takes; the next test is about torchaudio."""
    seconds = np.arange(rate) / rate
    waveform = (0.5 * np.sin(2 * np.pi * 220 * seconds)).astype(np.float32)
    resampling_emoshare._taps.cache_clear()
    tracemalloc.start()
    new = load_audio({"array": waveform, "sampling_rate": rate})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * waveform.nbytes + 100e6
    assert len(new) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 220 * np.arange(16000) / 16000)
    np.testing.assert_allclose(new[500:-500], expected[500:-500], atol=5e-3)


def test_torchaudio_makes_small_kernels_alone(monkeypatch):
    """Its kernel for 44,101 Hz has 7e8 entries of 8 bytes, several times."""
    by_torchaudio = []

    def recorded(from_rate, to_rate):
        by_torchaudio.append(from_rate)
        assert from_rate * to_rate / math.gcd(from_rate, to_rate) ** 2 <= 1e6, "would take too much memory"
        return torchaudio.transforms.Resample(from_rate, to_rate)

    monkeypatch.setattr(resampling_emoshare, "_resampler", recorded)
    common = [8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000]
    for rate in [*common, 1001, 4001, 12345, 16001, 22051, 44101, 767_999]:
        assert len(in_blocks(np.zeros(rate // 10, np.float32), 1, rate, 16000)) == -(-(rate // 10) * 16000 // rate)
    assert by_torchaudio == common


@pytest.mark.parametrize("rate", ["16000", 0, -16000, None, True, float("nan"), 16000.5, 999, 768_001, [16000]])
def test_what_is_no_sampling_rate_is_refused(rate):
    waveform = np.zeros(1000, np.float32)
    with pytest.raises(ValueError, match=r"audio array: got the sampling rate .* expected a whole number of Hz"):
        load_audio({"array": waveform, "sampling_rate": rate})
    with pytest.raises(ValueError, match="sampling_rate: got the sampling rate"):
        load_audio(waveform, sampling_rate=rate)


@pytest.mark.parametrize("rate", [44100.0, np.float32(44100), np.int16(22050), torch.tensor(8000)])
def test_whole_numbers_of_any_type_are_sampling_rates(rate):
    waveform = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    new = load_audio({"array": waveform, "sampling_rate": rate})
    np.testing.assert_array_equal(new, load_audio({"array": waveform, "sampling_rate": int(rate)}))


def test_a_file_of_an_absurd_rate_is_named(tmp_path):
    path = tmp_path / "slow.wav"
    soundfile.write(path, np.zeros(1000), 10)
    with pytest.raises(ValueError, match=r"slow\.wav: got the sampling rate 10; expected .* 1,000 to 768,000"):
        load_audio(path)
