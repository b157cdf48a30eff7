"""Speech is found where Silero's detector finds it in the whole recording at once."""

import sys

import numpy as np
import pytest
import silero_vad
import soundfile
import torch
from conftest import speech, torch_threads

from emoshare import audio_emoshare, load_audio
from emoshare.conversations.voice_activity import SpeechDetector


@pytest.fixture(scope="module")
def find_speech():
    return SpeechDetector()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "recording.wav"
    pauses = np.random.default_rng(0).normal(0, 1e-4, (2, 24_123)).astype(np.float32)
    soundfile.write(path, np.concatenate([pauses[0], speech(2.0), pauses[1]]), 16000)
    return path


def test_read_in_blocks_it_finds_what_it_finds_in_the_whole(find_speech, recording, monkeypatch):
    expected = silero_vad.get_speech_timestamps(torch.from_numpy(load_audio(recording)), find_speech.model)
    assert expected
    for block_s in (60, 1):
        monkeypatch.setattr(audio_emoshare, "BLOCK_S", block_s)
        found = find_speech(str(recording))
        assert [(speech["start"] * 16000, speech["end"] * 16000) for speech in found] == [
            (speech["start"], speech["end"]) for speech in expected
        ]
        assert found[0]["place"] == f"{recording}, speech 1"
    assert 24_123 / 16000 < found[0]["start"] + 0.05 < found[0]["end"] < 24_123 / 16000 + 2


def test_silence_has_no_speech(find_speech):
    assert find_speech(np.full(40_000, 1e-4, np.float32)) == []


def test_torchs_threads_stay_as_they_were(monkeypatch):
    """Importing silero-vad sets the number of threads to one."""
    monkeypatch.delitem(sys.modules, "silero_vad")
    monkeypatch.delitem(sys.modules, "silero_vad.model")
    with torch_threads(2):
        SpeechDetector()
        assert torch.get_num_threads() == 2


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(ValueError, match=r"^--vad: needs the package silero-vad; `pip install silero-vad`") as raised:
        SpeechDetector()
    assert "\n" not in str(raised.value)
