import itertools
import json

import numpy as np
import pytest
import torch
import torchaudio
from conftest import backbone_config, small_model, speech
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor

from emoshare import EmoShareFeatureExtractor, load_audio, resampling_emoshare
from emoshare.backbone_emoshare import family_of
from emoshare.feature_extraction_emoshare import LOG_FLOORS
from emoshare.fields_emoshare import ACOUSTIC_FEATURES
from emoshare.mel_emoshare import cosine_transform, mel_spectrogram

HUBERT = AutoConfig.for_model("hubert")


@pytest.mark.parametrize("do_normalize", [True, False])
def test_waveforms_are_prepared_as_transformers_does(do_normalize):
    clips = [speech(1.0), speech(0.6, seed=1)]
    extractor = EmoShareFeatureExtractor(do_normalize=do_normalize, floor="absolute")
    ours = extractor(clips, sampling_rate=16000, return_tensors="pt")
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


LEVELS_DB = (-60, -40, -20, -6, 20)


def at_level(waveform, decibels):
    return (waveform * 10 ** (decibels / 20)).astype(np.float32)


@pytest.mark.parametrize("feature_type", ["waveform", "mel", "mfcc"])
def test_shares_do_not_depend_on_the_recording_level(feature_type):
    """Of whole windows, as a model hears them: normalised waveforms through a backbone, log-mels and MFCC."""
    fields = {"backbone_config": backbone_config()} if feature_type == "waveform" else {}
    model = small_model(**fields)
    for head in model.heads:
        head.output.weight.data *= 20  # untrained heads hardly tell clips apart
    extractor = EmoShareFeatureExtractor(feature_type)
    clips = [speech(1.0), speech(0.7, seed=1) + 0.1, np.concatenate([np.zeros(4000, np.float32), speech(0.5, seed=2)])]
    clips[2][100] = 0.9  # a click

    def shares(clip):
        with torch.no_grad():
            return model(**extractor(clip, sampling_rate=16000, return_tensors="pt")).logits[0]

    of_clips = [shares(clip) for clip in clips]
    assert max((of_clips[0] - other).abs().max() for other in of_clips[1:]) > 5e-3
    for clip, expected in zip(clips, of_clips, strict=True):
        for decibels in LEVELS_DB:
            torch.testing.assert_close(shares(at_level(clip, decibels)), expected, atol=1e-4, rtol=0)


def test_waveforms_at_any_level_are_prepared_as_transformers_does_loud_ones():
    """Transformers adds 1e-7 to the variance, which vanishes next to the variance of a clip that is loud enough."""
    clip = speech(1.0)
    theirs = Wav2Vec2FeatureExtractor()(at_level(clip, 40), sampling_rate=16000)["input_values"][0]
    for decibels in LEVELS_DB:
        ours = EmoShareFeatureExtractor()(at_level(clip, decibels), sampling_rate=16000)["input_values"][0]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_log_mels_at_an_ordinary_level_are_those_of_the_absolute_floor():
    clip = speech(1.0, seed=3)
    clip = ((clip - clip.mean()) * 10 ** (-30 / 20) / clip.std()).astype(np.float32)
    by_floor = [EmoShareFeatureExtractor("mel", floor=floor)(clip, sampling_rate=16000) for floor in LOG_FLOORS]
    relative, absolute = (features["input_features"][0] for features in by_floor)
    np.testing.assert_allclose(relative, absolute, atol=1e-4)


@pytest.mark.parametrize("feature_type", ["waveform", "mel", "mfcc"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 1e-30])
def test_equal_samples_are_silence_at_any_value(feature_type, value):
    clip = np.full(16000, value, np.float32)
    extractor = EmoShareFeatureExtractor(feature_type)
    features = extractor(clip, sampling_rate=16000)[extractor.model_input_names[0]][0]
    assert np.abs(features).max() < 0.01


@pytest.mark.parametrize("feature_type", ["waveform", "mel"])
@pytest.mark.parametrize("decibels", [-300, 300])
def test_no_level_is_too_low_or_too_high_for_float32(feature_type, decibels):
    extractor, clip = EmoShareFeatureExtractor(feature_type), speech(0.5)
    name = extractor.model_input_names[0]
    expected = extractor(clip, sampling_rate=16000)[name][0]
    np.testing.assert_allclose(extractor(at_level(clip, decibels), sampling_rate=16000)[name][0], expected, atol=2e-3)


def test_a_preprocessor_config_of_an_earlier_version_keeps_its_features(tmp_path):
    """It has no field `floor`: a constant is added to the mel energies then."""
    EmoShareFeatureExtractor("mel", floor="absolute").save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("floor") == "absolute"
    path.write_text(json.dumps(fields))
    clip = at_level(speech(0.5), -40)
    transform = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=400, hop_length=160, f_min=0, f_max=8000, n_mels=40, center=False
    )
    expected = (transform(torch.from_numpy(clip)) + 1e-6).log().T.numpy()
    expected = (expected - expected.mean()) / expected.std()
    for loaded in (
        AutoFeatureExtractor.from_pretrained(tmp_path),
        EmoShareFeatureExtractor.from_pretrained(tmp_path),
        EmoShareFeatureExtractor.from_json_file(path),
    ):
        assert loaded.floor == "absolute"
        features = loaded(clip, sampling_rate=16000)["input_features"][0]
        np.testing.assert_allclose(features, expected, atol=1e-4)
        assert loaded.to_dict()["floor"] == "absolute"  # saved again, it stays so
    assert EmoShareFeatureExtractor.from_pretrained(tmp_path, floor="relative").floor == "relative"
    EmoShareFeatureExtractor("mel").save_pretrained(tmp_path)
    assert json.loads(path.read_text())["floor"] == "relative"
    assert AutoFeatureExtractor.from_pretrained(tmp_path).floor == "relative"


def test_mfcc_are_the_cosine_transform_of_the_log_mels():
    waveform = speech(0.5)
    mel = EmoShareFeatureExtractor("mel")(waveform, sampling_rate=16000)["input_features"][0]
    mfcc = EmoShareFeatureExtractor("mfcc")(waveform, sampling_rate=16000)["input_features"][0]
    assert mfcc.shape == mel.shape
    np.testing.assert_allclose(mfcc[:, 0], mel.sum(axis=1) / np.sqrt(40), atol=1e-4)
    np.testing.assert_allclose((mfcc**2).sum(axis=1), (mel**2).sum(axis=1), rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_device("meta")],
    ids=["dtype", "device"],
)
def test_torchs_defaults_change_nothing(change):
    def made():
        for cached in (mel_spectrogram, cosine_transform, resampling_emoshare._resampler):
            cached.cache_clear()
        audio = load_audio((22050, speech(0.777, sampling_rate=22050)))
        extractors = [EmoShareFeatureExtractor(feature_type) for feature_type in ACOUSTIC_FEATURES]
        return [audio, *(extractor(audio, sampling_rate=16000)["input_features"][0] for extractor in extractors)]

    expected = made()
    change()
    try:
        for features, unchanged in zip(made(), expected, strict=True):
            np.testing.assert_array_equal(features, unchanged)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


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


def test_what_float32_cannot_hold_is_refused():
    waveform = speech(0.3).astype(np.float64)
    waveform[5] = 1e39
    with pytest.raises(ValueError, match="1 of 4800 samples are not finite"):
        EmoShareFeatureExtractor()(waveform, sampling_rate=16000)


def test_bfloat16_is_a_floating_point_type():
    waveform = torch.from_numpy(speech(0.3)).bfloat16()
    (features,) = EmoShareFeatureExtractor()(waveform, sampling_rate=16000)["input_values"]
    (expected,) = EmoShareFeatureExtractor()(waveform.float(), sampling_rate=16000)["input_values"]
    np.testing.assert_array_equal(features, expected)


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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature_type", "spectrogram", "feature_type: got 'spectrogram'; expected one of waveform, mel, mfcc"),
        ("feature_type", ["mel"], r"feature_type: got \['mel'\]"),
        ("floor", "none", "floor: got 'none'; expected one of relative, absolute"),
        ("floor", None, "floor: got None"),
        ("chunk_length_s", 0.08, "chunk_length_s: got 0.08 s; expected at least 0.090 s"),
        ("chunk_length_s", float("nan"), "chunk_length_s: got nan s"),
        ("chunk_length_s", "8", "chunk_length_s: got '8'; expected a number"),
        ("sampling_rate", "16000", "sampling_rate: got '16000'; expected a whole number, 1 or more"),
        ("sampling_rate", 0, "sampling_rate: got 0"),
        ("sampling_rate", 16000.0, "sampling_rate: got 16000.0"),
        ("do_normalize", "no", "do_normalize: got 'no'; expected True or False"),
        ("do_normalize", None, "do_normalize: got None"),
        ("frame_length", 0, "frame_length: got 0; expected a whole number, 1 or more"),
        ("hop_length", -320, "hop_length: got -320"),
        ("hop_length", True, "hop_length: got True"),
        ("min_frames", 0, "min_frames: got 0"),
        ("padding_value", "0", "padding_value: got '0'; expected a number"),
        ("chunk_length", 8.0, "chunk_length: EmoShareFeatureExtractor has no such field"),
        ("token", "hf_secret", "token: EmoShareFeatureExtractor has no such field"),
    ],
)
def test_unknown_fields_and_illegal_values_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        EmoShareFeatureExtractor(**{field: value})


def test_access_to_the_hub_is_not_saved(backbone_folder, tmp_path):
    extractor = EmoShareFeatureExtractor.for_backbone(
        backbone_folder, backbone_config(), token="hf_secret", cache_dir=tmp_path / "cache", local_files_only=True
    )
    extractor.save_pretrained(tmp_path)
    saved = (tmp_path / "preprocessor_config.json").read_text()
    assert "hf_secret" not in saved
    assert str(tmp_path) not in saved


@pytest.mark.parametrize("floor", ["relative", "absolute"])
@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("feature_type", ["waveform", *ACOUSTIC_FEATURES])
def test_its_module_makes_the_same_of_padded_waveforms(feature_type, do_normalize, floor):
    """As exported models need it. The values of the input's padding do not matter."""
    if feature_type == "descriptors" and (floor == "absolute" or not do_normalize):
        pytest.skip("not allowed")
    extractor = EmoShareFeatureExtractor(feature_type, do_normalize=do_normalize, floor=floor)
    clips = [
        speech(0.6),
        speech(0.4, seed=1)[: extractor.min_samples],
        1e-3 * speech(0.9, seed=2),
        np.zeros(4000, np.float32),
    ]
    clips = [clip + np.float32(0.01) for clip in clips]
    lengths = torch.tensor([len(clip) for clip in clips])
    waveforms = torch.full((len(clips), int(lengths.max())), 7.0)
    for row, clip in zip(waveforms, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    module = extractor.as_module()
    features, num_frames = module(waveforms, lengths)
    for clip, own, count in zip(clips, features, num_frames, strict=True):
        expected = extractor(clip, sampling_rate=16000, return_tensors="pt")[extractor.model_input_names[0]][0]
        assert len(expected) == count
        torch.testing.assert_close(own[:count], expected, rtol=0, atol=2e-4)
        alone, _ = module(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
        torch.testing.assert_close(alone[0], own[:count], rtol=0, atol=1e-5)
