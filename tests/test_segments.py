"""Turns of a conversation: each as the clip cut out of the recording, in one pass and in flat memory."""

import tracemalloc
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import small_model, speech
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from emoshare import (
    EMOTIONS,
    EmoShareFeatureExtractor,
    EmoShareOutput,
    EmotionSharePipeline,
    audio_emoshare,
    load_audio,
)
from emoshare.segments_emoshare import checked_turns, turn_windows

# Overlapping, touching, out of order, longer than two windows, and to the end.
TURNS = [
    (5.0, 6.5, "Ada"),
    (0.25, 19.9, "Bo"),
    (6.5, 7.123456, "Ada"),
    (1.0, 9.5, None),
    (5.5, 6.0, "Cy"),
    (18.0, 20.0, "Bo"),
]


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


@pytest.fixture(scope="module")
def meeting(tmp_path_factory):
    """A recording of 20 s at 22,050 Hz, in stereo."""
    path = tmp_path_factory.mktemp("meeting") / "meeting.wav"
    voice = speech(20.0, sampling_rate=22050)
    soundfile.write(path, np.stack([voice, 0.5 * voice], axis=1), 22050)
    return str(path)


def segments(turns):
    return [{"start": start, "end": end, "speaker": speaker} for start, end, speaker in turns]


def scores(shares):
    return {share["label"]: share["score"] for share in shares}


def cut_out(waveform, start, end):
    return waveform[round(start * 16000) : round(end * 16000)]


def checked(emotion_share, turns):
    return checked_turns(segments(turns), 16000, emotion_share.feature_extractor.min_samples)


def average(shares, weights):
    return {label: np.average([scores(own)[label] for own in shares], weights=weights) for label in EMOTIONS}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_turn_has_the_shares_of_the_clip_cut_out(batch_size, emotion_share, meeting, monkeypatch):
    monkeypatch.setattr(audio_emoshare, "BLOCK_S", 3)
    waveform = load_audio(meeting)
    result = emotion_share(meeting, segments=segments(TURNS), batch_size=batch_size)
    assert [(turn["start"], turn["end"], turn["speaker"]) for turn in result["turns"]] == TURNS
    alone = [emotion_share(cut_out(waveform, start, end)) for start, end, _ in TURNS]
    for turn, expected in zip(result["turns"], alone, strict=True):
        assert scores(turn["shares"]) == pytest.approx(scores(expected), abs=1e-5)
        assert [share["score"] for share in turn["shares"]] == sorted(scores(turn["shares"]).values(), reverse=True)
    durations = np.array([end - start for start, end, _ in TURNS])
    assert list(result["speakers"]) == ["Ada", "Bo", "Cy"]
    for speaker, shares in result["speakers"].items():
        own = [number for number, (*_, name) in enumerate(TURNS) if name == speaker]
        expected = average([alone[number] for number in own], durations[own])
        assert scores(shares) == pytest.approx(expected, abs=1e-5)
    assert scores(result["shares"]) == pytest.approx(average(alone, durations), abs=1e-5)


def test_turns_go_through_the_model_together_by_length(emotion_share, meeting, monkeypatch):
    expected = emotion_share(meeting, segments=segments([(0, 1, "A"), (1, 4, "A"), (2, 3, "B"), (4, 7, "B")]))
    shapes, forward = [], emotion_share.model.forward
    monkeypatch.setattr(
        emotion_share.model,
        "forward",
        lambda **inputs: shapes.append(tuple(inputs["input_values"].shape)) or forward(**inputs),
    )
    turns = segments([(0, 1, "A"), (1, 4, "A"), (2, 3, "B"), (4, 7, "B")])
    result = emotion_share(meeting, segments=turns, batch_size=2)
    assert shapes == [(2, 16000), (2, 48000)]
    assert scores(result["shares"]) == pytest.approx(scores(expected["shares"]), abs=1e-5)


def test_what_a_clip_may_have_a_turn_has_too_in_the_times_of_the_recording(emotion_share, meeting):
    options = {"return_timeline": True, "return_attention": True, "return_embedding": True, "top_k": 2}
    result = emotion_share(meeting, segments=segments([(1.0, 11.0, "A")]), **options)
    (turn,) = result["turns"]
    expected = emotion_share(cut_out(load_audio(meeting), 1.0, 11.0), **options)
    assert [(window["start"], window["end"]) for window in turn["timeline"]] == [(1.0, 9.0), (9.0, 11.0)]
    assert turn["attention"]["time"] == pytest.approx([time + 1 for time in expected["attention"]["time"]])
    for label in EMOTIONS:
        np.testing.assert_allclose(turn["embedding"][label], expected["embedding"][label], atol=1e-5)
    assert len(turn["shares"]) == len(result["shares"]) == len(result["speakers"]["A"]) == 2
    assert set(result) == {"turns", "speakers", "shares"}


def test_intervals_of_a_speaker_come_from_all_turns():
    torch.manual_seed(0)
    sure = EmotionSharePipeline(
        model=small_model(loss="beta_binomial"), feature_extractor=EmoShareFeatureExtractor("mel"), device="cpu"
    )
    turns = segments([(0.0, 1.0, "A"), (2.0, 4.0, "A")])
    result = sure(speech(4.0), segments=turns, return_interval=True, listeners=10)
    for shares in (result["turns"][0]["shares"], result["speakers"]["A"], result["shares"]):
        assert all(0 <= share["interval"][0] <= share["interval"][1] <= 1 for share in shares)


def test_too_short_a_turn_is_warned_of_by_name_and_has_no_shares(emotion_share, meeting):
    turns = [*segments([(1.0, 2.0, "A")]), {"start": 3.0, "end": 3.01, "speaker": "B", "place": "turns.csv, row 3"}]
    with pytest.warns(
        UserWarning, match=r"^turns.csv, row 3: 3.000 to 3.010 s is too short, .* the model needs 0.045 s"
    ):
        result = emotion_share(meeting, segments=turns)
    assert result["turns"][1] == {"start": 3.0, "end": 3.01, "speaker": "B", "shares": None}
    assert result["speakers"]["B"] is None
    assert scores(result["shares"]) == pytest.approx(scores(result["turns"][0]["shares"]))


def test_where_nothing_is_to_be_heard_the_recording_is_read_all_the_same(emotion_share, meeting):
    assert emotion_share(meeting, segments=[], batch_size=4) == {"turns": [], "speakers": {}, "shares": None}
    short = [{"start": 1.0, "end": 1.001}]
    with pytest.warns(UserWarning, match=r"^segments\[0\]: .* too short"):
        assert emotion_share(meeting, segments=short)["shares"] is None
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        emotion_share("missing.wav", segments=[])
    with pytest.raises(ValueError, match="top_k: got 0"):
        emotion_share(meeting, segments=[], top_k=0)


def test_silence_in_a_turn_is_named(emotion_share):
    waveform = np.concatenate([speech(1.0), np.zeros(16000, np.float32)])
    with pytest.warns(UserWarning, match=r"^segments\[1\]: is digital silence$") as warned:
        emotion_share(waveform, segments=segments([(0, 1, None), (1.2, 1.8, None)]))
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"start": 2.0, "end": 1.0}, r"^segments\[1\]: starts at 2.000 s and ends at 1.000 s$"),
        ({"start": 2.0, "end": 2.0}, r"^segments\[1\]: starts at 2.000 s and ends at 2.000 s$"),
        ({"start": -0.1, "end": 2.0}, r"^segments\[1\]: start is -0.1; expected seconds, 0 or more"),
        ({"start": 0, "end": float("nan")}, r"^segments\[1\]: end is nan; expected seconds"),
        ({"start": 0, "end": float("inf")}, r"^segments\[1\]: end is inf; expected seconds"),
        ({"start": "0", "end": 1}, r"^segments\[1\]: start is '0'; expected seconds"),
        ({"start": 0, "end": 1, "speaker": 3}, r"^segments\[1\]: speaker is 3; expected text, or None"),
        ({"start": 0, "end": 1, "speeker": "A"}, r"^segments\[1\]: got \['end', 'speeker', 'start'\]; expected a dict"),
        ((0, 1), r"^segments\[1\]: got tuple; expected a dict with 'start', 'end' and, if known, 'speaker'"),
        ({"start": 19, "end": 20.011}, r"^segments\[1\]: 19.000 to 20.011 s is past the end of the audio, 20.000 s"),
        ({"start": 30, "end": 31}, r"^segments\[1\]: 30.000 to 31.000 s is past the end of the audio"),
        ({"start": 30, "end": 30.001}, r"^segments\[1\]: 30.000 to 30.001 s is past the end of the audio"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*too short")
def test_a_turn_that_cannot_be_is_named(turn, message, emotion_share, meeting):
    with pytest.raises(ValueError, match=message):
        emotion_share(meeting, segments=[{"start": 0.0, "end": 1.0}, turn])


def test_an_end_that_was_rounded_up_is_the_end_of_the_recording(emotion_share, meeting):
    (turn,) = emotion_share(meeting, segments=[{"start": 18.5, "end": 20.009}])["turns"]
    assert scores(turn["shares"]) == pytest.approx(
        scores(emotion_share(load_audio(meeting)[18 * 16000 + 8000 :])), abs=1e-5
    )
    assert turn["end"] == 20.009


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_turn_that_the_end_of_the_recording_makes_too_short_has_no_shares(batch_size, emotion_share):
    waveform, last = speech(3.0), (2.957, 3.005, "B")
    too_short = r": 2.957 to 3.000 s is too short, and gets no shares; the model needs 0.045 s$"
    with pytest.warns(UserWarning, match=rf"^segments\[1\]{too_short}"):
        result = emotion_share(waveform, segments=segments([(0.0, 1.0, "A"), last]), batch_size=batch_size)
    assert result["turns"][1] == {"start": 2.957, "end": 3.005, "speaker": "B", "shares": None}
    assert result["speakers"]["B"] is None
    assert scores(result["shares"]) == pytest.approx(scores(emotion_share(waveform[:16000])), abs=1e-5)
    with pytest.warns(UserWarning, match=rf"^segments\[0\]{too_short}"):
        result = emotion_share(waveform, segments=segments([last]), batch_size=batch_size)
    assert (result["turns"][0]["shares"], result["speakers"], result["shares"]) == (None, {"B": None}, None)


def test_segments_are_those_of_one_recording(emotion_share, meeting):
    several = [meeting], (path for path in [meeting]), KeyDataset([{"audio": meeting}], "audio")
    for recordings in several:
        with pytest.raises(ValueError, match=r"^segments: expected one recording; got a \w+$"):
            emotion_share(recordings, segments=segments(TURNS))
    with pytest.raises(ValueError, match=r"^segments: got str; expected a list of dicts"):
        emotion_share(meeting, segments="turns.rttm")


@pytest.mark.slow
def test_an_hour_with_500_turns_takes_little_memory(tmp_path, monkeypatch):
    """As float32, the hour has 230 MB. What the model computes does not matter here."""
    minute = (speech(60.0) * 32767).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 16000, 1) as file:
        for _ in range(60):
            file.write(minute)
    emotion_share = EmotionSharePipeline(
        model=small_model(), feature_extractor=EmoShareFeatureExtractor("waveform", do_normalize=False)
    )
    sizes = []

    def forward(self, input_values, **further):
        sizes.append(len(input_values))
        return EmoShareOutput(logits=torch.zeros(len(input_values), 9))

    monkeypatch.setattr(type(emotion_share.model), "forward", forward)
    rng = np.random.default_rng(0)
    turns = [(start, start + rng.uniform(0.5, 9.0), "Ada") for start in rng.uniform(0, 3590, 500)]
    turns.append((0.0, 3600.0, None))  # beside all others, and no more in memory than they are
    tracemalloc.start()
    result = emotion_share(str(tmp_path / "hour.wav"), segments=segments(turns), batch_size=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 140e6  # as of ten minutes: 64 windows are read ahead
    assert len(result["turns"]) == 501
    assert sum(sizes) >= 500 + 450
    assert max(sizes) == 8  # as a CPU takes them


def test_only_the_windows_of_turns_are_made():
    """Only the turns of a recording are heard, and each sample goes to the turns that contain it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emotion_share = EmotionSharePipeline(model=small_model(), feature_extractor=EmoShareFeatureExtractor("mel"))
        turns = [(3.0, 3.5, None), (0.5, 1.0, None)]
        found = list(emotion_share.preprocess(speech(5.0), turns=checked(emotion_share, turns)))
    assert [(window["turn"], window["part"], window["is_last"]) for window in found] == [
        (1, (8000, 16000), False),
        (0, (48000, 56000), True),
    ]


def test_blocks_of_any_length_may_be_read(emotion_share):
    waveform = speech(4.0)
    turns = checked(emotion_share, [(0.5, 1.0, None), (0.7, 3.9, None), (1.0, 1.5, None)])

    def found(blocks):
        windows = list(turn_windows(blocks, turns, 16000, emotion_share.cutting(chunk_length_s=1.0)))
        assert [window.is_last for _, window in windows] == [False] * (len(windows) - 1) + [True]
        return sorted(windows, key=lambda pair: (pair[0], pair[1].start))

    expected = found([waveform])
    assert len(expected) == 6
    for size in (1000, 16000):
        blocks = np.split(waveform, range(size, len(waveform), size))
        for (turn, window), (other, whole) in zip(found([*blocks, blocks[0][:0]]), expected, strict=True):
            assert (turn, *window[1:4]) == (other, *whole[1:4])
            np.testing.assert_array_equal(window.waveform, whole.waveform)
