"""Audio that libsndfile does not decode, with and without torchcodec, of which a stand-in is installed here."""

import builtins
import io
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import speech

from emoshare import load_audio, other_formats_emoshare
from emoshare.audio_emoshare import audio_info

SOUND = b"\0\0\0\x20ftypM4A "  # how a file begins that libsndfile does not know


class AudioDecoder:
    """The parts of torchcodec's interface that are used: the samples of a stereo file, or its errors."""

    seconds = 2.0
    times = 1
    failure = None

    def __init__(self, source, sample_rate=None):
        assert source.read() == SOUND  # from its beginning, although libsndfile has read in it
        if self.failure is not None:
            raise self.failure
        self.metadata = SimpleNamespace(duration_seconds=self.seconds)
        self.sample_rate = sample_rate

    def get_samples_played_in_range(self, start_seconds, stop_seconds):
        assert start_seconds == 0
        left = torch.from_numpy(speech(2.0)).repeat(self.times)[: round(stop_seconds * self.sample_rate)]
        return SimpleNamespace(data=torch.stack([left, 0.5 * left]), sample_rate=self.sample_rate)


@pytest.fixture(autouse=True)
def _fresh():
    other_formats_emoshare._decoder_class.cache_clear()
    yield
    other_formats_emoshare._decoder_class.cache_clear()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a clip.m4a"
    path.write_bytes(SOUND)
    return path


@pytest.fixture
def decoder(monkeypatch):
    module = ModuleType("torchcodec.decoders")
    module.AudioDecoder = AudioDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    return AudioDecoder


@pytest.fixture(params=[ImportError("no module"), RuntimeError("Could not load libtorchcodec. Likely causes: ...")])
def _no_decoder(request, monkeypatch):
    """torchcodec is not installed, or it is and does not find FFmpeg."""
    real_import = builtins.__import__

    def fail(name, *arguments, **keywords):
        if name.startswith("torchcodec"):
            raise request.param
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("form", [str, lambda path: path.read_bytes(), lambda path: io.BytesIO(path.read_bytes())])
def test_torchcodec_decodes_it_where_it_is_installed(form, path):
    np.testing.assert_allclose(load_audio(form(path), 16000), 0.75 * speech(2.0), atol=1e-6)


@pytest.mark.usefixtures("_no_decoder")
def test_without_torchcodec_the_message_says_how_to_convert_it(path):
    expected = f"a clip.m4a: not an audio file that can be decoded .*ffmpeg -i '{path}' '{path.with_suffix('')}'.wav"
    with pytest.raises(ValueError, match=expected):
        load_audio(path)


@pytest.mark.usefixtures("_no_decoder")
@pytest.mark.parametrize("name", ["clip.wav", "clip.raw"])
def test_what_ffmpeg_would_not_help_with_is_not_sent_there(name, tmp_path):
    (tmp_path / name).write_bytes(b"no audio" * 100)
    with pytest.raises(ValueError, match="not an audio file that can be decoded") as raised:
        load_audio(tmp_path / name)
    assert "convert it" not in str(raised.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            RuntimeError("decodeAVFrame, /a/file.cpp:1397, Could not push packet to decoder: Invalid data"),
            r"Format not recognised. torchcodec: Could not push packet to decoder: Invalid data\)$",
        ),
        (ValueError("The best audio stream is unknown.\nThis should never happen."), r"stream is unknown.\)$"),
    ],
)
def test_what_torchcodec_cannot_decode_is_one_line_that_names_it(failure, message, decoder, path, monkeypatch):
    monkeypatch.setattr(decoder, "failure", failure)
    with pytest.raises(ValueError, match=message) as raised:
        load_audio(path)
    assert str(raised.value).startswith(f"{path}: not an audio file that can be decoded (")


@pytest.mark.parametrize(("seconds", "is_whole"), [(2.05, True), (None, True), (4.0, False)])
def test_less_sound_than_promised_is_found(seconds, is_whole, decoder, path, monkeypatch):
    monkeypatch.setattr(decoder, "seconds", seconds)
    if is_whole:
        assert audio_info(path).num_samples == len(load_audio(path)) == 32000
        return
    with pytest.raises(ValueError, match=r"a clip.m4a: promises 4.0 s, and 2.0 s can be decoded$"):
        load_audio(path)
    with pytest.warns(UserWarning, match="promises 4.0 s"):
        assert len(load_audio(path, strict=False)) == 32000


def test_hours_are_refused_because_they_would_be_in_memory_as_a_whole(decoder, path, monkeypatch):
    for promised, times in ((None, 1801), (5400.0, None)):
        monkeypatch.setattr(decoder, "seconds", promised)
        monkeypatch.setattr(decoder, "times", times)
        with pytest.raises(ValueError, match=r"lasts more than 60 minutes.* ffmpeg -i"):
            load_audio(path)
