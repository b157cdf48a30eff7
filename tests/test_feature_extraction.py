import itertools

import numpy as np
import pytest
import torch
import torchaudio
from conftest import backbone_config, speech
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor

from emoshare import EmoShareFeatureExtractor
from emoshare.backbone_emoshare import family_of

HUBERT = AutoConfig.for_model("hubert")


@pytest.mark.parametrize("do_normalize", [True, False])
def test_waveforms_are_prepared_as_transformers_does(do_normalize):
    clips = [speech(1.0), speech(0.6, seed=1)]
    ours = EmoShareFeatureExtractor(do_normalize=do_normalize)(clips, sampling_rate=16000, return_tensors="pt")
    theirs = Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)(
        clips, sampling_rate=16000, padding=True, return_tensors="pt"
    )
    torch.testing.assert_close(ours["input_values"], theirs["input_values"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["attention_mask"], theirs["attention_mask"])


def test_a_clip_is_normalised_before_it_is_padded():
    extractor = EmoShareFeatureExtractor()
    short, long = speech(0.5) + 0.1, speech(1.0, seed=1)
    alone = extractor(short, sampling_rate=16000)["input_values"][0]
    together = extractor([short, long], sampling_rate=16000)
    np.testing.assert_array_equal(together["input_values"][0][: len(short)], alone)
    assert (together["input_values"][0][len(short) :] == 0).all()
    assert together["attention_mask"][0].sum() == len(short)
    assert alone.mean() == pytest.approx(0, abs=1e-5)
    assert alone.std() == pytest.approx(1, abs=1e-3)


def test_log_mels_are_torchaudios():
    waveform = speech(1.0)
    features = EmoShareFeatureExtractor("mel", do_normalize=False)(waveform, sampling_rate=16000)["input_features"][0]
    transform = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=400, win_length=400, hop_length=160, f_min=0, f_max=8000, n_mels=40, center=False
    )
    expected = (transform(torch.from_numpy(waveform)) + 1e-6).log().T.numpy()
    assert features.shape == (98, 40)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("band", [3, 10, 25, 39])
def test_mel_bands_lie_where_they_should(band):
    """A tone in the middle of a band, by the mel scale's formula, is strongest there."""
    highest = 2595 * np.log10(1 + 8000 / 700)
    hertz = 700 * (10 ** (highest * (band + 1) / 41 / 2595) - 1)
    tone = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000)
    assert EmoShareFeatureExtractor("mel")(tone, sampling_rate=16000)["input_features"][0].mean(axis=0).argmax() == band


def test_normalised_log_mels_do_not_depend_on_the_recording_level():
    extractor = EmoShareFeatureExtractor("mel")
    waveform = speech(1.0)
    loud = extractor(waveform, sampling_rate=16000)["input_features"][0]
    quiet = extractor(waveform * 0.5, sampling_rate=16000)["input_features"][0]
    assert np.abs(loud - quiet).mean() < 0.02  # the logarithm's floor is felt in the quietest bands alone
    assert loud.mean() == pytest.approx(0, abs=1e-5)


def test_mfcc_are_the_cosine_transform_of_the_log_mels():
    waveform = speech(0.5)
    mel = EmoShareFeatureExtractor("mel")(waveform, sampling_rate=16000)["input_features"][0]
    mfcc = EmoShareFeatureExtractor("mfcc")(waveform, sampling_rate=16000)["input_features"][0]
    assert mfcc.shape == mel.shape
    np.testing.assert_allclose(mfcc[:, 0], mel.sum(axis=1) / np.sqrt(40), atol=1e-4)
    np.testing.assert_allclose((mfcc**2).sum(axis=1), (mel**2).sum(axis=1), rtol=1e-3)


@pytest.mark.parametrize("feature_type", ["waveform", "mel", "mfcc"])
def test_padding_is_zero_and_masked(feature_type):
    batch = EmoShareFeatureExtractor(feature_type)([speech(0.5), speech(1.0)], sampling_rate=16000, return_tensors="pt")
    inputs = batch["input_values" if feature_type == "waveform" else "input_features"]
    assert batch["attention_mask"].shape == inputs.shape[:2]
    length = batch["attention_mask"][0].sum()
    assert 0 < length < inputs.shape[1]
    assert (inputs[0, length:] == 0).all()


@pytest.mark.parametrize(
    ("waveform", "sampling_rate", "message"),
    [
        (np.zeros(16000, np.float32), 8000, "got 8000 Hz, expected 16000 Hz"),
        (np.zeros(0, np.float32), 16000, "empty"),
        (np.full(16000, np.nan, np.float32), 16000, "16000 of 16000 samples are not finite"),
        (np.full(16000, np.inf, np.float32), 16000, "not finite"),
        (np.zeros(719, np.float32), 16000, "got 719 samples .* at least 720"),
        (np.zeros((2, 16000), np.float32), 16000, "shape \\(2, 16000\\); expected mono"),
        (np.zeros(16000, np.int16), 16000, "got int16 samples; expected floating point"),
        ([], 16000, "empty list"),
    ],
)
def test_wrong_waveforms_are_refused(waveform, sampling_rate, message):
    with pytest.raises(ValueError, match=message):
        EmoShareFeatureExtractor()(waveform, sampling_rate=sampling_rate)


@pytest.mark.parametrize("form", [list, tuple, torch.from_numpy, lambda waveform: waveform.astype(np.float64)])
def test_forms_of_a_waveform(form):
    waveform = speech(0.3)
    expected = EmoShareFeatureExtractor()(waveform, sampling_rate=16000)["input_values"][0]
    as_form = form(waveform.tolist()) if form in (list, tuple) else form(waveform)
    features = EmoShareFeatureExtractor()(as_form, sampling_rate=16000)["input_values"]
    assert len(features) == 1
    np.testing.assert_allclose(features[0], expected, atol=1e-6)


@pytest.mark.parametrize("feature_type", ["waveform", "mel", "mfcc"])
def test_auto_feature_extractor_loads_it(feature_type, tmp_path):
    extractor = EmoShareFeatureExtractor(feature_type, do_normalize=False, chunk_length_s=3.0)
    extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    waveform = speech(0.5)
    name = extractor.model_input_names[0]
    np.testing.assert_array_equal(
        loaded(waveform, sampling_rate=16000)[name][0], extractor(waveform, sampling_rate=16000)[name][0]
    )
    assert loaded.chunk_length_s == 3.0


@given(
    num_samples=st.integers(1, 60 * 16000), chunk=st.sampled_from([0.17, 0.5, 7.96, 8.0]), min_frames=st.integers(2, 4)
)
def test_windows_cover_a_clip_without_overlap(num_samples, chunk, min_frames):
    extractor = EmoShareFeatureExtractor(chunk_length_s=chunk, min_frames=min_frames)
    windows = extractor.windows(num_samples)
    longest = round(chunk * 16000)
    assert windows[0][0] == 0
    assert windows[-1][1] == num_samples
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(windows))
    assert all(end - start <= longest for start, end in windows)
    if num_samples >= extractor.min_samples:
        assert all(end - start >= extractor.min_samples for start, end in windows)


def test_windows_are_as_long_as_they_may_be():
    extractor = EmoShareFeatureExtractor(chunk_length_s=8.0)
    assert extractor.windows(128000) == [(0, 128000)]
    assert extractor.windows(300000) == [(0, 128000), (128000, 256000), (256000, 300000)]
    assert extractor.windows(128001) == [(0, 128001 - 720), (128001 - 720, 128001)]


@pytest.mark.parametrize("do_normalize", [True, False])
def test_a_backbones_own_preprocessor_config_decides(do_normalize, tmp_path):
    config = backbone_config()
    AutoModel.from_config(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(tmp_path)
    extractor = EmoShareFeatureExtractor.for_backbone(tmp_path, config)
    assert extractor.do_normalize is do_normalize
    assert (extractor.frame_length, extractor.hop_length) == (400, 320)


def test_a_backbone_without_preprocessor_config_is_normalised_with_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("emoshare.feature_extraction_emoshare.logger.warning", warnings.append)
    extractor = EmoShareFeatureExtractor.for_backbone(tmp_path, backbone_config())
    assert extractor.do_normalize is True
    assert "has no preprocessor config" in warnings[0]


def test_not_to_reach_the_backbones_repository_is_an_error():
    with pytest.raises(OSError, match=r"offline|connect|cached"):
        EmoShareFeatureExtractor.for_backbone("nobody/nothing-of-this-name", backbone_config())


@pytest.mark.parametrize("feature_type", ["mel", "waveform"])
def test_the_shortest_allowed_clip_has_two_frames(feature_type):
    extractor = EmoShareFeatureExtractor(feature_type)
    shortest = speech(1.0)[: extractor.min_samples]
    inputs = extractor(shortest, sampling_rate=16000)[extractor.model_input_names[0]][0]
    frames = family_of(HUBERT).num_frames(HUBERT, len(inputs)) if feature_type == "waveform" else len(inputs)
    assert frames == 2


def test_eight_seconds_have_as_many_frames_as_the_paper_pads_to_and_one_more():
    assert len(EmoShareFeatureExtractor("mel")(np.zeros(128000), sampling_rate=16000)["input_features"][0]) == 798
    assert family_of(HUBERT).num_frames(HUBERT, 128000) == 399


@given(
    layers=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 5)), min_size=1, max_size=7),
    num_samples=st.integers(0, 200000),
)
def test_frames_are_counted_as_the_backbone_counts_them(layers, num_samples):
    kernels, strides = zip(*layers, strict=True)
    config = backbone_config(conv_kernel=kernels, conv_stride=strides, conv_dim=(16,) * len(layers))
    family = family_of(config)
    frame_length, hop_length = family.frame_geometry(config)
    extractor = EmoShareFeatureExtractor(frame_length=frame_length, hop_length=hop_length, chunk_length_s=60.0)
    assert max(extractor.num_frames(num_samples), 0) == max(family.num_frames(config, num_samples), 0)
    assert family.num_frames(config, extractor.min_samples) == 2


def test_min_frames_is_the_shortest_clip(tmp_path):
    EmoShareFeatureExtractor("mel", min_frames=4).save_pretrained(tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    waveform = speech(0.1)
    assert len(extractor(waveform[:880], sampling_rate=16000)["input_features"][0]) == 4
    with pytest.raises(ValueError, match=r"got 879 samples .* at least 880 .* 4 frames"):
        extractor(waveform[:879], sampling_rate=16000)


def test_unknown_feature_type_and_too_short_a_chunk_are_refused():
    with pytest.raises(ValueError, match="feature_type"):
        EmoShareFeatureExtractor("spectrogram")
    with pytest.raises(ValueError, match="chunk_length_s"):
        EmoShareFeatureExtractor(chunk_length_s=0.08)
    with pytest.raises(ValueError, match="chunk_length_s"):
        EmoShareFeatureExtractor(chunk_length_s=float("nan"))
