"""Low-level descriptors: what they measure, checked on signals of known properties and by other code."""

import numpy as np
import pytest
import scipy.signal
from conftest import speech

from emoshare import EmoShareFeatureExtractor
from emoshare.descriptors_emoshare import DESCRIPTORS, MFCCS, NUM_DESCRIPTORS

RATE = 16000
NAMES = list(DESCRIPTORS)


def features_of(waveform, sampling_rate=RATE, **fields):
    extractor = EmoShareFeatureExtractor(feature_type="descriptors", sampling_rate=sampling_rate, **fields)
    return extractor(waveform, sampling_rate=sampling_rate)["input_features"][0]


def measured(waveform, name, sampling_rate=RATE):
    """A descriptor in its own unit, (frames,)."""
    location, scale = DESCRIPTORS[name]
    return features_of(waveform, sampling_rate)[:, MFCCS + NAMES.index(name)] * scale + location


def pulses(hertz, seconds=0.5, sampling_rate=RATE):
    """A vowel: glottal pulses without aliases at a pitch, through two formants."""
    times = np.arange(round(seconds * sampling_rate)) / sampling_rate
    source = sum(np.cos(2 * np.pi * hertz * number * times) for number in range(1, int(0.45 * sampling_rate / hertz)))
    for formant, bandwidth in [(600, 100), (1400, 150)]:
        radius, angle = np.exp(-np.pi * bandwidth / sampling_rate), 2 * np.pi * formant / sampling_rate
        source = scipy.signal.lfilter([1], [1, -2 * radius * np.cos(angle), radius**2], source)
    return 0.1 * source / np.abs(source).max()


def noise(seconds=0.5, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def smoothed(values):
    padded = np.pad(values, 1, mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def reference(waveform):
    """Descriptors of the spectrum by NumPy and SciPy in float64."""
    waveform = (waveform - waveform.mean()) / waveform.std()
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::160]
    power = np.abs(np.fft.rfft(frames * scipy.signal.get_window("hann", 400), n=512)) ** 2
    hertz = np.fft.rfftfreq(512, 1 / RATE)
    density = power / (power.sum(axis=1, keepdims=True) + 1e-3)
    centroid = density @ hertz
    spread = np.sqrt((density * (hertz - centroid[:, None]) ** 2).sum(axis=1))
    parts = np.cumsum(power, axis=1) / power.sum(axis=1, keepdims=True)
    values = {
        "log energy": np.log((frames**2).mean(axis=1) + 1e-4),
        "spectral centroid (kHz)": centroid / 1000,
        "spectral spread (kHz)": spread / 1000,
        "spectral entropy": -(density * np.log(density + 1e-9)).sum(axis=1),
        "zero crossings": (np.diff(np.signbit(frames), axis=1)).mean(axis=1),
    }
    for percent in (25, 50, 75, 90):
        values[f"roll-off {percent} % (kHz)"] = (
            np.array([hertz[np.searchsorted(row, percent / 100)] for row in parts]) / 1000
        )
    unit = np.sqrt(power / power.sum(axis=1, keepdims=True))
    values["spectral flux"] = np.concatenate([[0], (np.diff(unit, axis=0) ** 2).sum(axis=1)])
    bark = 26.81 * hertz / (1960 + hertz) - 0.53
    weight = np.where(bark > 15, np.exp(0.171 * (bark - 15)), 1)
    values["sharpness (Bark)"] = (power**0.23 @ (bark * weight)) / (power**0.23).sum(axis=1)
    low, high = (np.log(power[:, (hertz >= a) & (hertz < b)].sum(axis=1) + 1e-3) for a, b in [(250, 650), (1000, 4000)])
    values["log energy at 1 to 4 kHz less that at 250 to 650 Hz"] = high - low
    return {name: smoothed(value) for name, value in values.items()}


def test_the_spectrum_is_described_as_by_numpy():
    waveform = speech(1.0).astype(np.float64) + 1e-3 * noise(1.0)
    expected = reference(waveform)
    assert set(expected) == set(NAMES[: NAMES.index("log pitch of voiced frames")])
    for name, values in expected.items():
        np.testing.assert_allclose(measured(waveform, name), values, atol=2e-3, rtol=0, err_msg=name)


def test_the_envelope_is_that_of_the_mfccs():
    mel = EmoShareFeatureExtractor(feature_type="mfcc")
    waveform = speech(0.5)
    cepstrum = mel(waveform, sampling_rate=RATE)["input_features"][0]
    smooth = np.stack([smoothed(column) for column in cepstrum.T[:MFCCS]], axis=1)
    # MFCCs are standardised over the log-mel map: a shift of the first coefficient, and a scale.
    ours = features_of(waveform)[:, 1:MFCCS]
    scale = ours.std() / smooth[:, 1:].std()
    np.testing.assert_allclose(ours, scale * smooth[:, 1:], atol=1e-3)


# Most have periods of no whole number of samples, and multiples of them that have.
@pytest.mark.parametrize("hertz", [70, 120, 133, 220, 254, 330, 400, 450, 478])
@pytest.mark.parametrize("sampling_rate", [8000, 16000, 44100])
def test_the_pitch_of_a_vowel(sampling_rate, hertz):
    vowel = pulses(hertz, sampling_rate=sampling_rate)
    log_pitch = measured(vowel, "log pitch of voiced frames", sampling_rate)[3:-6] / 2.5
    assert np.abs(180 * np.exp(log_pitch) / hertz - 1).max() < 0.02
    assert measured(vowel, "voiced", sampling_rate)[3:-6].min() == pytest.approx(1, abs=1e-5)


def test_vowels_are_voiced_and_noise_is_not():
    vowel, hiss = pulses(150), noise()
    both = np.concatenate([vowel / vowel.std(), hiss / hiss.std()])
    middle = len(features_of(vowel))
    for name, least in [("voiced", 0.95), ("autocorrelation at the pitch period", 0.4)]:
        values = measured(both, name)
        assert values[3 : middle - 3].mean() - values[middle + 6 : -6].mean() > least
    harmonics = measured(both, "log ratio of harmonics to noise")
    assert harmonics[3 : middle - 3].min() > harmonics[middle + 6 : -6].max() + 1
    assert measured(noise(seed=1), "voiced").mean() < 0.1


@pytest.mark.parametrize("decibels", [-60, -20, 20])
def test_the_level_of_a_clip_does_not_matter(decibels):
    waveform = speech(1.0) + 1e-3 * noise(1.0)
    louder = 10 ** (decibels / 20) * waveform.astype(np.float64)
    np.testing.assert_allclose(features_of(louder), features_of(waveform), atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [0.0, 0.3, 1e-30])
def test_silence_is_described_by_small_numbers(level):
    features = features_of(np.full(8000, level))
    assert features.shape == (48, NUM_DESCRIPTORS)
    assert np.abs(features).max() < 10
    np.testing.assert_array_equal(features, np.broadcast_to(features[0], features.shape))
    np.testing.assert_allclose(measured(np.full(8000, level), "voiced"), 0, atol=1e-6)


def test_silence_within_a_clip_is_described_by_small_numbers():
    features = features_of(np.concatenate([np.zeros(8000), speech(0.5), np.zeros(8000)]))
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 10


@pytest.mark.parametrize("samples", [560, 720])
def test_the_shortest_clips(samples):
    features = features_of(noise()[:samples])
    assert features.shape == ((samples - 400) // 160 + 1, NUM_DESCRIPTORS)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_clips_are_described_alone():
    extractor = EmoShareFeatureExtractor(feature_type="descriptors")
    clips = [speech(0.5), speech(0.3, seed=1)]
    together = extractor(clips, sampling_rate=RATE, return_tensors="np")
    for clip, features, mask in zip(clips, together["input_features"], together["attention_mask"], strict=True):
        np.testing.assert_array_equal(features[mask == 1], features_of(clip))
        assert (features[mask == 0] == 0).all()


def test_speech_is_described_by_numbers_of_the_order_of_1():
    features = np.concatenate([features_of(speech(1.0, seed=seed)) for seed in range(4)])
    assert (np.abs(features.mean(axis=0)) < 3).all()
    assert (features.std(axis=0) < 3).all()


def test_the_preprocessor_config_comes_back(tmp_path):
    EmoShareFeatureExtractor(feature_type="descriptors").save_pretrained(tmp_path)
    loaded = EmoShareFeatureExtractor.from_pretrained(tmp_path)
    assert (tmp_path / "descriptors_emoshare.py").is_file()
    assert (loaded.feature_type, loaded.feature_size, loaded.floor) == ("descriptors", NUM_DESCRIPTORS, "relative")
    waveform = speech(0.5)
    np.testing.assert_array_equal(loaded(waveform, sampling_rate=RATE)["input_features"][0], features_of(waveform))


@pytest.mark.parametrize(("field", "value"), [("do_normalize", False), ("floor", "absolute")])
def test_clips_that_are_not_at_unit_variance_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: got {value!r}; feature_type='descriptors' "):
        features_of(speech(0.5), **{field: value})
