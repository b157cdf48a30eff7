"""Predictions for conversations, written to files and read again."""

import io
import json

import numpy as np
import parselmouth
import pytest
import soundfile
from conftest import speech

from emoshare.conversations.segment_files import read_segments
from emoshare.conversations.turn_files import TURN_WRITERS

LABELS = ["calm", "tired", "bored", "keen"]


def shares(*scores):
    labelled = [{"label": label, "score": score} for label, score in zip(LABELS, scores, strict=True)]
    return sorted(labelled, key=lambda share: -share["score"])


RESULT = {
    "turns": [
        {"start": 3600.0001234, "end": 3601.5, "speaker": 'Bö, "B"', "shares": shares(0.125, 0.5, 0.25, 0.75)},
        {"start": 0.25, "end": 1.0, "speaker": "Ada", "shares": shares(0.1, 0.2, 0.3, 0.4)},
        {"start": 0.5, "end": 2.0, "speaker": "Ada", "shares": shares(0.4, 0.3, 0.2, 0.1)},
        {"start": 1.0, "end": 1.01, "speaker": "Ada", "shares": None},
        {"start": 1 / 3, "end": 2 / 3, "speaker": None, "shares": shares(0, 0, 0, 1)},
    ],
    "speakers": {'Bö, "B"': shares(0.125, 0.5, 0.25, 0.75), "Ada": shares(0.3, 0.2, 0.2, 0.1)},
    "shares": shares(0.2, 0.3, 0.2, 0.4),
}


def write(path, result=RESULT, filename="missing/meeting.wav"):
    with path.open("w", newline="", encoding="utf-8") as file:
        TURN_WRITERS[path.suffix.lower()](file, LABELS).write(filename, result)
    return path


@pytest.fixture
def recording(tmp_path):
    soundfile.write(tmp_path / "meeting.wav", speech(3.0, sampling_rate=22050), 22050)
    return str(tmp_path / "meeting.wav")


@pytest.mark.parametrize("suffix", [".csv", ".TextGrid", ".txt"])
def test_turns_come_back_within_a_millisecond(suffix, recording, tmp_path):
    found = read_segments(write(tmp_path / f"turns{suffix}", filename=recording), recording)
    expected = {(turn["start"], turn["end"], turn["speaker"]) for turn in RESULT["turns"]}
    assert len(found) == len(expected)
    for segment in found:
        (same,) = (
            turn for turn in expected if turn[2] == segment["speaker"] and abs(turn[0] - segment["start"]) < 1e-3
        )
        assert abs(same[1] - segment["end"]) < 1e-3


def test_the_turns_of_each_recording_come_back_from_one_csv(tmp_path):
    with (tmp_path / "turns.csv").open("w", newline="", encoding="utf-8") as file:
        turns = TURN_WRITERS[".csv"](file, LABELS)
        for number, name in enumerate(("a/one.wav", "a/two, or not.wav", "b/one.wav")):
            turns.write(name, {**RESULT, "turns": RESULT["turns"][number : number + 1]})
    for number, name in enumerate(("a/one.wav", "elsewhere/two, or not.wav", "b/one.wav")):
        (found,) = read_segments(tmp_path / "turns.csv", name)
        assert found["start"] == pytest.approx(RESULT["turns"][number]["start"], abs=1e-6)


def test_csv_has_a_row_for_each_turn_speaker_and_recording(tmp_path):
    assert write(tmp_path / "turns.csv").read_text(encoding="utf-8").splitlines() == [
        "filename,unit,start,end,speaker,calm,tired,bored,keen",
        'missing/meeting.wav,turn,3600.000123,3601.500000,"Bö, ""B""",0.125,0.5,0.25,0.75',
        "missing/meeting.wav,turn,0.250000,1.000000,Ada,0.1,0.2,0.3,0.4",
        "missing/meeting.wav,turn,0.500000,2.000000,Ada,0.4,0.3,0.2,0.1",
        "missing/meeting.wav,turn,1.000000,1.010000,Ada,,,,",
        "missing/meeting.wav,turn,0.333333,0.666667,,0,0,0,1",
        'missing/meeting.wav,speaker,,,"Bö, ""B""",0.125,0.5,0.25,0.75',
        "missing/meeting.wav,speaker,,,Ada,0.3,0.2,0.2,0.1",
        "missing/meeting.wav,recording,,,,0.2,0.3,0.2,0.4",
    ]


def test_no_label_has_the_name_of_another_column():
    file = io.StringIO()
    with pytest.raises(ValueError, match=r"the labels \['speaker', 'start'\], and a CSV of turns has other columns"):
        TURN_WRITERS[".csv"](file, ["calm", "speaker", "start"])
    assert file.getvalue() == ""


def test_json_lines_have_the_same_rows(tmp_path):
    rows = [json.loads(line) for line in write(tmp_path / "turns.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["unit"] for row in rows] == ["turn"] * 5 + ["speaker"] * 2 + ["recording"]
    assert [(row["start"], row["end"], row["speaker"]) for row in rows[:5]] == [
        (turn["start"], turn["end"], turn["speaker"]) for turn in RESULT["turns"]
    ]
    assert list(rows[0]["shares"].items()) == [("calm", 0.125), ("tired", 0.5), ("bored", 0.25), ("keen", 0.75)]
    assert rows[3]["shares"] is None
    assert rows[-1] == {
        "filename": "missing/meeting.wav",
        "unit": "recording",
        "start": None,
        "end": None,
        "speaker": None,
        "shares": {"calm": 0.2, "tired": 0.3, "bored": 0.2, "keen": 0.4},
    }


def test_a_textgrid_has_a_tier_for_each_speaker_and_the_recordings_length(recording, tmp_path):
    """Overlapping turns of one speaker are on two tiers, because the intervals of a tier cannot overlap."""
    turns = [turn for turn in RESULT["turns"] if turn["end"] < 3]
    path = write(tmp_path / "turns.TextGrid", {**RESULT, "turns": turns}, recording)
    grid, call = parselmouth.read(str(path)), parselmouth.praat.call
    assert grid.xmax == pytest.approx(3.0)
    assert grid.xmax == parselmouth.Sound(recording).xmax
    names = [call(grid, "Get tier name", number) for number in range(1, call(grid, "Get number of tiers") + 1)]
    assert names == ["Ada", "", "Ada"]
    assert (
        call(grid, "Get label of interval", 1, call(grid, "Get interval at time", 1, 0.6))
        == "keen 0.40, bored 0.30, tired 0.20"
    )
    assert call(grid, "Get label of interval", 1, call(grid, "Get interval at time", 1, 1.005)) == "?"
    assert (
        call(grid, "Get label of interval", 3, call(grid, "Get interval at time", 3, 1.5))
        == "calm 0.40, tired 0.30, bored 0.20"
    )


def test_a_textgrid_of_a_recording_without_speech_or_length_is_one(recording, tmp_path):
    nothing = {"turns": [], "speakers": {}, "shares": None}
    assert parselmouth.read(str(write(tmp_path / "none.TextGrid", nothing, recording))).xmax == pytest.approx(3.0)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "meeting.wav").read_bytes()[:60_000])
    grid = parselmouth.read(str(write(tmp_path / "cut.TextGrid", filename=str(tmp_path / "cut.wav"))))
    assert grid.xmax == 3601.5  # the end of the last turn, where the file does not say how long it is


def test_audacitys_labels_are_one_line_each(tmp_path):
    turn = {"start": 1.0, "end": 2.0, "speaker": "Ada\tL.\n", "shares": shares(0.1, 0.2, 0.3, 0.4)}
    lines = write(tmp_path / "turns.txt", {**RESULT, "turns": [turn, RESULT["turns"][4]]}).read_text().splitlines()
    assert lines == [
        "1.000000\t2.000000\tAda L.: keen 0.40, bored 0.30, tired 0.20",
        "0.333333\t0.666667\tkeen 1.00, calm 0.00, tired 0.00",
    ]


def test_names_of_recordings_need_not_be_utf_8():
    file = io.StringIO()
    TURN_WRITERS[".jsonl"](file, LABELS).write("M\udcfcller.wav", RESULT)
    assert json.loads(file.getvalue().splitlines()[0])["filename"] == "M\udcfcller.wav"
    file.getvalue().encode("utf-8")


def test_times_of_many_turns_come_back(tmp_path, recording):
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 3000, 200)
    turns = [
        {
            "start": float(start),
            "end": float(start + rng.exponential(5) + 0.1),
            "speaker": "ABC"[rng.integers(3)],
            "shares": RESULT["shares"],
        }
        for start in starts
    ]
    for suffix in (".csv", ".TextGrid", ".txt"):
        found = read_segments(write(tmp_path / f"many{suffix}", {**RESULT, "turns": turns}, recording), recording)
        key = lambda turn: (turn["speaker"], turn["start"])  # noqa: E731
        for segment, turn in zip(sorted(found, key=key), sorted(turns, key=key), strict=True):
            assert segment["start"] == pytest.approx(turn["start"], abs=1e-3)
            assert segment["end"] == pytest.approx(turn["end"], abs=1e-3)
            assert segment["speaker"] == turn["speaker"]
