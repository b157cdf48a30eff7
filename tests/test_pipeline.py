import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import small_model, speech
from datasets import Audio, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from emoshare import EMOTIONS, EmoShareFeatureExtractor, EmotionSharePipeline, audio_emoshare, load_audio
from emoshare.votes_emoshare import share_intervals


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


def scores(shares):
    return {share["label"]: share["score"] for share in shares}


def assert_same(shares, expected, tolerance=1e-5):
    assert scores(shares) == pytest.approx(scores(expected), abs=tolerance)


# the pipeline


def test_all_emotions_highest_share_first(emotion_share, wav):
    assert isinstance(emotion_share, EmotionSharePipeline)
    shares = emotion_share(str(wav))
    assert sorted(scores(shares)) == sorted(EMOTIONS)
    values = [share["score"] for share in shares]
    assert values == sorted(values, reverse=True)
    highest = emotion_share(str(wav), top_k=2)
    assert [share["label"] for share in highest] == [share["label"] for share in shares[:2]]
    assert_same(highest, shares[:2], tolerance=1e-6)


def test_shares_are_those_of_the_model(emotion_share, wav):
    waveform = torch.from_numpy(load_audio(wav))  # the backbone's preprocessor config says: not normalised
    with torch.no_grad():
        logits = emotion_share.model(input_values=waveform[None]).logits[0]
    assert scores(emotion_share(wav.read_bytes())) == pytest.approx(dict(zip(EMOTIONS, logits.tolist(), strict=True)))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_lists_generators_and_datasets_change_nothing(batch_size, emotion_share, tmp_path):
    paths = [str(tmp_path / f"{index}.wav") for index in range(5)]
    for index, path in enumerate(paths):
        soundfile.write(path, speech(0.3 + 0.4 * index, seed=index), 16000)
    one_by_one = [emotion_share(path) for path in paths]
    rows = Dataset.from_dict({"audio": paths}).cast_column("audio", Audio(decode=False))
    for outputs in (
        emotion_share(paths, batch_size=batch_size),
        list(emotion_share((path for path in paths), batch_size=batch_size)),
        list(emotion_share(KeyDataset(rows, "audio"), batch_size=batch_size)),
    ):
        assert len(outputs) == 5
        for shares, expected in zip(outputs, one_by_one, strict=True):
            assert_same(shares, expected)


def test_batches_are_of_like_length_and_results_in_order(emotion_share, monkeypatch):
    """Long and short clips in turn: together in a batch, half of it would be padding."""
    clips = [speech(seconds, seed) for seed, seconds in enumerate([0.2, 1.0] * 4)]
    expected = [emotion_share(clip) for clip in clips]
    masks = []
    forward = emotion_share.model.forward
    monkeypatch.setattr(
        emotion_share.model, "forward", lambda **inputs: masks.append(inputs["attention_mask"]) or forward(**inputs)
    )
    for shares, alone in zip(emotion_share(clips, batch_size=4), expected, strict=True):
        assert_same(shares, alone)
    assert [tuple(mask.shape) for mask in masks] == [(4, 3200), (4, 16000)]
    assert all(mask.all() for mask in masks)


def test_no_batch_is_padded_much_however_large_it_may_be(emotion_share, monkeypatch):
    clips = [speech(seconds, seed) for seed, seconds in enumerate([1.0, 0.2, 0.5, 0.9, 0.21])]
    expected = [emotion_share(clip) for clip in clips]
    sizes = []
    forward = emotion_share.model.forward
    monkeypatch.setattr(
        emotion_share.model, "forward", lambda **inputs: sizes.append(len(inputs["input_values"])) or forward(**inputs)
    )
    for shares, alone in zip(emotion_share(clips, batch_size=64), expected, strict=True):
        assert_same(shares, alone)
    assert sizes == [2, 3]


def test_on_a_cpu_a_list_goes_through_in_passes_without_being_asked(emotion_share, monkeypatch):
    clips = [speech(0.2, seed) for seed in range(10)]
    expected = [emotion_share(clip) for clip in clips]
    sizes = []
    forward = emotion_share.model.forward
    monkeypatch.setattr(
        emotion_share.model, "forward", lambda **inputs: sizes.append(len(inputs["input_values"])) or forward(**inputs)
    )
    for shares, alone in zip(emotion_share(clips), expected, strict=True):
        assert_same(shares, alone)
    assert sizes == [8, 2]
    list(emotion_share(clip for clip in clips))
    assert sizes[2:] == [1] * 10  # a generator's results come one by one


def test_a_generator_is_read_no_further_ahead_than_eight_batches(emotion_share):
    read = []
    clips = (read.append(seed) or speech(0.1, seed) for seed in range(40))
    results = iter(emotion_share(clips, batch_size=2))
    for number in range(40):
        next(results)
        assert number < len(read) <= (number // 16 + 1) * 16
    assert next(results, None) is None


def test_nothing_is_recorded_for_gradients(emotion_share, wav):
    modes = []
    hook = emotion_share.model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    emotion_share(str(wav))
    hook.remove()
    assert modes == [True]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_long_clip_is_the_average_of_its_windows_by_duration(batch_size, emotion_share):
    waveform = speech(2.5)
    short, chunk = emotion_share(waveform[:8000]), emotion_share.feature_extractor.chunk_length_s
    emotion_share.feature_extractor.chunk_length_s = 1.0
    windows = [emotion_share(waveform[start : start + 16000]) for start in (0, 16000, 32000)]
    together = emotion_share([waveform, waveform[:8000]], batch_size=batch_size)
    emotion_share.feature_extractor.chunk_length_s = chunk
    expected = {
        label: (
            16000 * scores(windows[0])[label] + 16000 * scores(windows[1])[label] + 8000 * scores(windows[2])[label]
        )
        / 40000
        for label in EMOTIONS
    }
    assert scores(together[0]) == pytest.approx(expected, abs=1e-5)
    assert_same(together[1], short)


@pytest.fixture(scope="module")
def sure_of_itself(tmp_path_factory):
    """The pipeline of a model with concentrations, whose windows have 1 s."""
    torch.manual_seed(0)
    model, extractor = small_model(loss="beta_binomial"), EmoShareFeatureExtractor("mel", chunk_length_s=1.0)
    folder = tmp_path_factory.mktemp("sure")
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return pipeline("emotion-share", model=str(folder))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_interval_comes_from_the_average_concentration_of_the_windows(batch_size, sure_of_itself):
    waveform, model, extractor = speech(1.5), sure_of_itself.model, sure_of_itself.feature_extractor
    outputs = []
    for start, end in extractor.windows(len(waveform)):
        with torch.no_grad():
            outputs.append(model(**extractor(waveform[start:end], sampling_rate=16000, return_tensors="pt")))
    shares, concentrations = (
        (16000 * getattr(outputs[0], name)[0] + 8000 * getattr(outputs[1], name)[0]).numpy() / 24000
        for name in ("logits", "concentrations")
    )
    for listeners in (3, 1000):
        low, high, _ = share_intervals(shares, concentrations, listeners)
        expected = {label: [*map(float, ends)] for label, *ends in zip(EMOTIONS, low, high, strict=True)}
        (found,) = sure_of_itself([waveform], return_interval=True, listeners=listeners, batch_size=batch_size)
        assert {share["label"]: share["interval"] for share in found} == expected
        assert_same(found, sure_of_itself(waveform))
    assert sure_of_itself(waveform, return_interval=True) == sure_of_itself(
        waveform, return_interval=True, listeners=20
    )
    with_timeline = sure_of_itself(waveform, return_interval=True, return_timeline=True)
    assert all(len(share["interval"]) == 2 for share in with_timeline["shares"])
    assert "interval" not in sure_of_itself(waveform)[0]


def test_a_longer_window_has_more_say_in_an_interval(sure_of_itself):
    windows = [
        {"logits": torch.full((1, 9), 0.3), "concentrations": torch.full((1, 9), concentration), "part": part}
        for concentration, part in ((4.0, (0, 16000)), (100.0, (16000, 24000)))
    ]
    for share in sure_of_itself.postprocess(windows, return_interval=True, listeners=500):
        low, high, _ = share_intervals(np.array(0.3), np.array((2 * 4 + 100) / 3), 500)
        assert share["interval"] == [low, high]


def test_intervals_that_cannot_be_given_are_refused(emotion_share, sure_of_itself, wav):
    with pytest.raises(ValueError, match=r"^return_interval: .* loss='mse', .* loss='beta_binomial'$"):
        emotion_share(str(wav), return_interval=True)
    for listeners in (0, 2.5, 10_001):
        with pytest.raises(ValueError, match=rf"^listeners: got {listeners}; expected a whole number from 1 to 10000"):
            sure_of_itself(str(wav), return_interval=True, listeners=listeners)


def test_no_window_is_shorter_than_the_model_can_take(tmp_path):
    """8 s and a little more than two frames, with a model that needs four."""
    model = small_model(pool_size=4)
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor("mel", min_frames=4))
    assert len(emotion_share(np.concatenate([speech(8.0), speech(0.5)[:600]]))) == 9


def test_too_short_a_file_is_named(emotion_share, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, speech(0.5)[:500], 16000)
    with pytest.raises(ValueError, match=r"short\.wav: .*got 500 samples"):
        emotion_share([str(path)])


def test_a_file_that_was_cut_is_heard_with_a_warning_or_refused(emotion_share, wav, tmp_path):
    path = tmp_path / "half.wav"
    path.write_bytes(wav.read_bytes()[: wav.stat().st_size // 2])
    with pytest.warns(
        UserWarning, match=r"half\.wav: its header promises .* bytes of samples, and .* are there"
    ) as warned:
        (shares,) = emotion_share([str(path)], chunk_length_s=0.1)
    assert len(warned) == 1
    assert len(shares) == 9
    for audio in (str(path), {"bytes": path.read_bytes(), "path": "half.wav"}):
        with pytest.raises(ValueError, match=r"half\.wav: its header promises"):
            emotion_share(audio, strict=True)
    assert_same(emotion_share(str(wav), strict=True), emotion_share(str(wav)))


def test_rows_of_datasets_and_gradios_tuples_are_clips(emotion_share, wav):
    expected = emotion_share(str(wav))
    rows = Dataset.from_dict({"audio": [str(wav)]}).cast_column("audio", Audio(decode=False))
    lazy = []
    rows.map(lambda row: lazy.append(emotion_share(row)))
    assert_same(lazy[0], expected)
    assert_same(emotion_share((16000, soundfile.read(wav, dtype="int16")[0])), expected)


def test_no_clips_give_no_shares(emotion_share):
    assert emotion_share([]) == []


def test_the_stock_pipeline_gives_the_same_scores_for_arrays(emotion_share, model_folder):
    waveform = speech(1.0)
    stock = pipeline("audio-classification", model=str(model_folder))
    assert_same(stock(waveform, top_k=9), emotion_share(waveform))


def test_bfloat16_is_close(emotion_share, model_folder, wav):
    half = pipeline("emotion-share", model=str(model_folder), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert half.model.heads[0].output.weight.dtype == torch.float32
    assert_same(half(str(wav)), emotion_share(str(wav)), tolerance=1e-3)


def test_another_model_is_refused(backbone_folder):
    with pytest.raises(ValueError, match="needs an EmoShare model; got 'hubert'"):
        pipeline("emotion-share", model=str(backbone_folder), feature_extractor=str(backbone_folder))


def test_top_k_must_be_positive(emotion_share, wav):
    with pytest.raises(ValueError, match="top_k"):
        emotion_share(str(wav), top_k=0)


def test_a_saved_pipeline_loads(emotion_share, tmp_path, wav):
    emotion_share.save_pretrained(tmp_path / "copy")
    assert_same(pipeline("emotion-share", model=str(tmp_path / "copy"))(str(wav)), emotion_share(str(wav)))


def test_a_card_goes_with_its_own_model_alone(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "README.md").write_text("# The card")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    for name, fields in (
        ("same", {}),
        ("other", {"id2label": {0: "joy", 1: "awe"}, "ignore_mismatched_sizes": True}),
    ):
        model = AutoModel.from_pretrained(folder, **fields)
        EmotionSharePipeline(model, extractor, device="cpu").save_pretrained(tmp_path / name)
    assert (tmp_path / "same" / "README.md").read_text() == "# The card"
    assert not (tmp_path / "other" / "README.md").exists()


# Long audio


def test_a_timeline_tells_the_shares_of_each_window_and_averages_to_the_clips(emotion_share):
    waveform = speech(20.0)
    result = emotion_share(waveform, return_timeline=True)
    assert [(part["start"], part["end"]) for part in result["timeline"]] == [(0, 8), (8, 16), (16, 20)]
    for part in result["timeline"]:
        window = waveform[round(part["start"] * 16000) : round(part["end"] * 16000)]
        assert part["shares"] == pytest.approx(scores(emotion_share(window)), abs=1e-6)
    durations = [part["end"] - part["start"] for part in result["timeline"]]
    for label, score in scores(result["shares"]).items():
        assert score == pytest.approx(np.average([p["shares"][label] for p in result["timeline"]], weights=durations))
    assert_same(result["shares"], emotion_share(waveform))


def test_strides_are_heard_and_not_counted(emotion_share):
    waveform = speech(10.0)
    timeline = emotion_share(waveform, chunk_length_s=4.0, stride_length_s=0.5, return_timeline=True)["timeline"]
    assert [(part["start"], part["end"]) for part in timeline] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    for part, (start, end) in zip(timeline, [(0, 3.5), (2.5, 6.5), (5.5, 9.5), (8.5, 10)], strict=True):
        heard = emotion_share(waveform[round(start * 16000) : round(end * 16000)])
        assert part["shares"] == pytest.approx(scores(heard), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_clip_of_one_window_gives_what_it_gave_without_strides(batch_size, emotion_share):
    waveform = speech(3.0)
    (result,) = emotion_share([waveform], stride_length_s=0.4, chunk_length_s=3.0, batch_size=batch_size)
    assert_same(result, emotion_share(waveform))


@given(
    seconds=st.floats(0.05, 3.0),
    chunk=st.floats(0.2, 1.0),
    stride=st.floats(0, 0.4),
)
@settings(max_examples=60, deadline=None)
def test_windows_of_any_length_cover_the_clip(seconds, chunk, stride, emotion_share):
    num_samples = round(seconds * 16000)
    try:
        windows = list(emotion_share.preprocess(np.full(num_samples, 0.5, np.float32), chunk, stride))
    except ValueError as error:
        assert "stride_length_s" in str(error)
        assert chunk - 2 * stride < 0.1
        return
    assert [window["is_last"] for window in windows] == [False] * (len(windows) - 1) + [True]
    cuts = [window["part"][0] for window in windows] + [windows[-1]["part"][1]]
    assert cuts[0] == 0
    assert cuts[-1] == num_samples
    assert [window["part"][1] for window in windows] == cuts[1:]
    for window in windows:
        start, end = window["part"]
        assert window["first"] <= start < end <= window["first"] + window["num_samples"]
        assert window["num_samples"] == window["input_values"].shape[1] <= round(chunk * 16000)


@pytest.mark.parametrize("stride", [0.0, 0.35])
@pytest.mark.parametrize("num_samples", [16000, 16001, 32000, 32100, 40000, 48000])
def test_a_file_in_blocks_gives_the_windows_of_the_whole_waveform(
    num_samples, stride, emotion_share, monkeypatch, tmp_path
):
    waveform = speech(3.0)[:num_samples]
    soundfile.write(tmp_path / "clip.wav", waveform, 16000, "FLOAT")
    expected = list(emotion_share.preprocess(waveform, 1.0, stride))
    monkeypatch.setattr(audio_emoshare, "BLOCK_S", 1)
    windows = list(emotion_share.preprocess(tmp_path / "clip.wav", 1.0, stride))
    assert len(windows) == len(expected)
    for window, other in zip(windows, expected, strict=True):
        assert torch.equal(window.pop("input_values"), other.pop("input_values"))
        assert torch.equal(window.pop("attention_mask"), other.pop("attention_mask"))
        assert window == other


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"chunk_length_s": 9.0}, "chunk_length_s: got 9.0; expected 0.09 to 8.0 s"),
        ({"chunk_length_s": 0.0}, "chunk_length_s: got 0.0"),
        ({"chunk_length_s": 1e305}, r"chunk_length_s: got 1e\+305; expected 0.09 to 8.0 s"),
        ({"chunk_length_s": 10**400}, r"chunk_length_s: got 10+; expected 0.09 to 8.0 s"),
        ({"stride_length_s": float("inf")}, "stride_length_s: got inf; expected 0 or more"),
        ({"hop_length_s": float("nan")}, "hop_length_s: got nan; expected 0.09 to chunk_length_s"),
        ({"stride_length_s": 4.0}, "stride_length_s: got 4.0; .* less than half of chunk_length_s, 8.0 s"),
        ({"stride_length_s": -1.0}, "stride_length_s: got -1.0"),
        ({"stride_length_s": (1, 1)}, r"stride_length_s: got \(1, 1\); expected a number of seconds"),
        ({"chunk_length_s": "4"}, "chunk_length_s: got '4'; expected a number of seconds"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, message, emotion_share, wav):
    with pytest.raises(ValueError, match=message):
        emotion_share(str(wav), **lengths)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_attention_tells_what_was_listened_to(batch_size, emotion_share):
    waveform = speech(2.0)
    _, result = emotion_share([speech(0.7), waveform], return_attention=True, batch_size=batch_size)
    attention = result["attention"]
    frames = (32000 - 400) // 320 + 1
    assert len(attention["time"]) == frames // 2
    # A step is two frames of 25 ms that are 20 ms apart.
    assert attention["time"][:2] == pytest.approx([0.0225, 0.0625])
    extractor, model = emotion_share.feature_extractor, emotion_share.model
    inputs = extractor(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions[0]
    for index, label in model.config.id2label.items():
        assert attention[label] == pytest.approx(expected[index].tolist(), abs=1e-5)
        assert sum(attention[label]) == pytest.approx(1, abs=1e-5)
    assert_same(result["shares"], emotion_share(waveform))


def test_attention_over_windows_is_weighted_by_their_durations(emotion_share):
    waveform = speech(10.0)
    attention = emotion_share(waveform, return_attention=True)["attention"]
    times = np.array(attention["time"])
    assert (np.diff(times) > 0).all()
    assert times[-1] < 10
    for label in EMOTIONS:
        weights = np.array(attention[label])
        assert weights[times < 8].sum() == pytest.approx(0.8, abs=1e-5)
        assert weights[times > 8].sum() == pytest.approx(0.2, abs=1e-5)
    strided = emotion_share(waveform, chunk_length_s=4.0, stride_length_s=0.5, return_attention=True)["attention"]
    assert (np.diff(strided["time"]) > 0).all()


def test_a_model_without_attention_says_so(backbone_folder):
    model = small_model(architecture="cnn_lstm")
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor("mel"))
    with pytest.raises(ValueError, match="'cnn_lstm' has no attention"):
        emotion_share(speech(0.5), return_attention=True)
