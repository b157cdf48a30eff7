import io
import os
import threading
import tracemalloc
import warnings
from collections import UserDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import speech
from hypothesis import given, settings
from hypothesis import strategies as st

from emoshare import audio_emoshare, load_audio
from emoshare.audio_emoshare import AudioInfo, audio_blocks, audio_info
from emoshare.resampling_emoshare import resampled


def as_file(waveform, sampling_rate=16000, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, waveform, sampling_rate, format=format)
    return file


def at_its_end(content):
    file = io.BytesIO(content)
    file.seek(0, io.SEEK_END)
    return file


class Unseekable(io.BytesIO):
    """Like a pipe, or the result of `urlopen`."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation


class Decoder:
    """As torchcodec's `AudioDecoder`."""

    def __init__(self, samples, sample_rate):
        self.samples, self.sample_rate = samples, sample_rate

    def get_all_samples(self):
        if self.samples is None:
            raise RuntimeError("Could not push packet to decoder")
        return SimpleNamespace(data=self.samples, sample_rate=self.sample_rate)


@pytest.mark.parametrize(
    "form",
    [
        str,
        lambda path: path,
        lambda path: path.read_bytes(),
        lambda path: path.open("rb"),
        lambda path: soundfile.read(path, dtype="float32")[0],
        lambda path: torch.from_numpy(soundfile.read(path, dtype="float32")[0]),
        lambda path: soundfile.read(path)[0].tolist(),
        lambda path: {"array": soundfile.read(path)[0], "sampling_rate": 16000},
        lambda path: {"raw": soundfile.read(path)[0], "sampling_rate": 16000, "path": None},
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: {"array": None, "path": str(path)},
        lambda path: {"filename": "clip.wav", "audio": {"bytes": None, "path": str(path)}, "Anger": 0.5},
        lambda path: UserDict(audio=UserDict(bytes=path.read_bytes(), path=None)),
        lambda path: {"audio": {"array": soundfile.read(path)[0], "sampling_rate": 16000.0}},
        lambda path: {"audio": str(path), "sampling_rate": 8000},  # a column of its own: the file says its rate
        lambda path: memoryview(path.read_bytes()),
        lambda path: at_its_end(path.read_bytes()),
        lambda path: Unseekable(path.read_bytes()),
        lambda path: soundfile.read(path, dtype="int16")[::-1],  # (rate, samples), as Gradio gives them
        lambda path: (16000, soundfile.read(path, dtype="int32")[0]),
        lambda path: (16000.0, soundfile.read(path)[0].tolist()),
        lambda path: (16000, torch.from_numpy(soundfile.read(path, always_2d=True)[0])),
    ],
)
def test_every_form_of_audio_gives_the_same_waveform(form, wav):
    expected = soundfile.read(wav, dtype="float32")[0]
    waveform = load_audio(form(wav))
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, expected, atol=1e-7)


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_a_waveform_has_the_rate_that_stands_next_to_it(form):
    """As Transformers' text-to-speech returns it."""
    waveform = speech(0.3, sampling_rate=24000)
    expected = load_audio({"array": waveform, "sampling_rate": 24000})
    for mapping in (dict, UserDict):
        audio = mapping(audio=form(waveform), sampling_rate=24000)
        np.testing.assert_array_equal(load_audio(audio), expected)
    for rate in (None, "16000"):
        with pytest.raises(ValueError, match=rf"a\.wav: got the sampling rate {rate!r}; expected a whole number of Hz"):
            load_audio({"audio": form(waveform), "sampling_rate": rate, "path": "a.wav"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_precision_are_read(dtype):
    waveform = torch.from_numpy(speech(0.3)).to(dtype).requires_grad_()
    np.testing.assert_array_equal(load_audio(waveform), waveform.detach().float().numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_tensors_on_an_accelerator_are_read():
    np.testing.assert_array_equal(load_audio(torch.from_numpy(speech(0.3)).cuda()), speech(0.3))


def test_decoders_are_read_wherever_they_lie():
    samples = torch.from_numpy(np.stack([speech(0.3), speech(0.3, seed=1)]))
    for audio in (Decoder(samples, 16000), {"audio": Decoder(samples, 16000.0)}):
        np.testing.assert_allclose(load_audio(audio), samples.mean(dim=0).numpy(), atol=1e-7)
    with pytest.raises(ValueError, match=r"cannot be decoded \(Could not push packet"):
        load_audio(Decoder(None, 16000))


def test_channels_of_gradios_samples_are_averaged():
    left, right = (speech(0.3) * 32767).astype(np.int16), (speech(0.3, seed=1) * 32767).astype(np.int16)
    waveform = load_audio((16000, np.stack([left, right], axis=1)))
    np.testing.assert_allclose(waveform, (left.astype(float) + right) / 65536, atol=1e-7)


@pytest.mark.parametrize("sampling_rate", [8000, 22050, 44100, 48000])
def test_audio_is_resampled_to_16_khz(sampling_rate):
    seconds = np.arange(sampling_rate) / sampling_rate
    waveform = load_audio(as_file(0.5 * np.sin(2 * np.pi * 440 * seconds), sampling_rate).getvalue())
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(waveform) == 16000
    np.testing.assert_allclose(waveform[500:-500], expected[500:-500], atol=2e-3)


def test_channels_are_averaged():
    left, right = speech(0.3), speech(0.3, seed=1)
    waveform = load_audio(as_file(np.stack([left, right], axis=1)).getvalue())
    np.testing.assert_allclose(waveform, (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_compressed_formats_are_decoded(format):
    waveform = speech(0.5)
    decoded = load_audio(as_file(waveform, format=format).getvalue())
    assert np.corrcoef(decoded[: len(waveform)], waveform[: len(decoded)])[0, 1] > 0.9


def test_a_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF, but not really")
    with pytest.raises(ValueError, match=r"broken\.wav: not an audio file"):
        load_audio(broken)
    with pytest.raises(ValueError, match=r"broken\.wav"):
        load_audio({"bytes": broken.read_bytes(), "path": "broken.wav"})


def test_empty_files_are_named(tmp_path):
    nothing, silence = tmp_path / "nothing.wav", tmp_path / "no_samples.wav"
    nothing.touch()
    soundfile.write(silence, np.zeros(0), 16000)
    for path in (nothing, silence):
        with pytest.raises(ValueError, match=path.name):
            load_audio(path)


@pytest.mark.parametrize("suffix", ["gsm", "vox", "au", "snd", "raw", "mp3", "wav"])
def test_a_file_is_recognised_by_its_content_alone(suffix, wav, tmp_path):
    page, clip = tmp_path / f"page.{suffix}", tmp_path / f"clip.{suffix}"
    page.write_bytes(b"<html>404 Not Found</html>" * 100)
    clip.write_bytes(wav.read_bytes())
    for read in (load_audio, audio_info):
        with pytest.raises(ValueError, match=rf"page\.{suffix}: not an audio file that can be decoded"):
            read(page)
    np.testing.assert_array_equal(load_audio(clip), load_audio(wav))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_files_are_closed(wav, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    opened = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_audio(wav)
        with pytest.raises(ValueError, match="not an audio file"):
            load_audio(broken)
        next(audio_blocks(wav))
    assert set(os.listdir("/proc/self/fd")) == opened


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        load_audio(tmp_path / "missing.wav")


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        (np.zeros((2, 16000)), ValueError, "shape \\(2, 16000\\)"),
        (np.zeros(16000, np.int16), ValueError, "int16"),
        (np.full(16000, np.nan), ValueError, "not finite"),
        ([], ValueError, "no samples"),
        ({"array": np.zeros(16000)}, ValueError, "sampling_rate"),
        (16000, TypeError, "int"),
        (None, TypeError, "NoneType"),
        ((16000, np.zeros((2, 16000))), ValueError, "shape \\(2, 16000\\) .* expected \\(samples,\\)"),
        ((16000, np.zeros(16000, np.int64)), ValueError, "int64"),
        ((16000, []), ValueError, "no samples"),
        ((torch.zeros(1, 16000), 16000), ValueError, "expected \\(sampling rate, samples\\)"),
        ([[0.1], [0.1, 0.2]], ValueError, "audio array: got lists of different lengths"),
        (np.full(16000, 1e300), ValueError, "16000 of 16000 samples are not finite"),
        (torch.zeros(16000, device="meta"), ValueError, "meta"),
        (io.StringIO("RIFF"), TypeError, "opened as text"),
        ({"bytes": None, "path": None}, ValueError, "keys \\['bytes', 'path'\\]"),
        ({1: 2, "path": 3}, ValueError, "keys \\['1', 'path'\\]"),
        (b"", ValueError, "audio bytes: not an audio file"),
    ],
)
def test_other_audio_is_refused(audio, error, message):
    with pytest.raises(error, match=message):
        load_audio(audio)


def test_names_that_are_not_utf_8_are_opened(wav, wav_not_in_utf_8):
    path = wav_not_in_utf_8
    for audio in (path, Path(path), {"bytes": None, "path": path}):
        np.testing.assert_array_equal(load_audio(audio), load_audio(wav))
        assert audio_info(audio).seconds == soundfile.info(wav).duration
    with pytest.warns(UserWarning, match="caf"):
        load_audio({"bytes": as_file(np.zeros(1000)).getvalue(), "path": path})


# Headers alone


def test_a_header_says_length_and_rate_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "clip.flac"
    soundfile.write(path, speech(1.0, sampling_rate=22050), 22050)
    content = path.read_bytes()
    expected = AudioInfo(22050, 22050)
    monkeypatch.setattr(audio_emoshare, "_read", None)
    for audio in (path, str(path), content, {"bytes": content, "path": "x"}, {"audio": {"bytes": None, "path": path}}):
        assert audio_info(audio) == expected
    assert expected.seconds == 1.0


def test_a_header_that_cannot_be_right_is_named(tmp_path):
    missing, broken, empty = (tmp_path / name for name in ("missing.wav", "broken.wav", "empty.wav"))
    broken.write_bytes(b"RIFF, but not really")
    soundfile.write(empty, np.zeros(0), 16000)
    cases = [(missing, FileNotFoundError), (broken, ValueError), (empty, ValueError), (tmp_path, FileNotFoundError)]
    for path, error in cases:
        with pytest.raises(error, match=path.name):
            audio_info(path)
    with pytest.raises(TypeError, match="ndarray"):
        audio_info(np.zeros(1000))


# Levels


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (speech(2.5) * 32767, r"its samples reach \d,\d+; expected floating point in \[-1, 1\]"),
        (np.zeros(40000), "is digital silence"),
        (np.stack([speech(2.5), -speech(2.5)], axis=1), "its channels cancel each other out"),
        (np.clip(speech(2.5) * 50, -1, 1), r"is clipped: \d+\.\d% of its samples are at full scale"),
    ],
    ids=["integers", "silence", "antiphase", "clipping"],
)
def test_strange_levels_are_reported_once(waveform, message, tmp_path, monkeypatch):
    path = tmp_path / "strange.wav"
    soundfile.write(path, waveform, 16000, "FLOAT")
    monkeypatch.setattr(audio_emoshare, "BLOCK_S", 1)
    with pytest.warns(UserWarning, match=rf"strange\.wav: {message}") as warned:
        load_audio(path)
    assert len(warned) == 1


@pytest.mark.parametrize("encoding", ["PCM_U8", "PCM_16", "PCM_24", "ULAW", "ALAW", "FLOAT"])
def test_clipping_is_reported_in_every_encoding(encoding):
    file = io.BytesIO()
    soundfile.write(file, np.clip(speech(0.5) * 50, -1, 1), 16000, encoding, format="WAV")
    with pytest.warns(UserWarning, match="is clipped"):
        load_audio(file)


@pytest.mark.parametrize(
    ("waveform", "encoding"),
    [
        (speech(0.5) / np.abs(speech(0.5)).max(), "PCM_16"),
        (speech(0.5) / np.abs(speech(0.5)).max() * 1.5, "FLOAT"),  # which has room above full scale
        (speech(0.5) * 1e-3, "PCM_16"),
        (np.sin(2 * np.pi * 220 * np.arange(8000) / 16000), "PCM_16"),
        (np.sign(np.sin(2 * np.pi * 220 * np.arange(8000) / 16000)) / 2, "PCM_16"),
        (np.stack([speech(0.5), np.zeros(8000)], axis=1), "PCM_16"),
        (np.stack([speech(0.5), -0.9 * speech(0.5)], axis=1), "PCM_16"),
    ],
    ids=["at full scale", "above full scale", "quiet", "sine", "square", "one channel", "nearly antiphase"],
)
def test_levels_that_happen_are_not_reported(waveform, encoding):
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, encoding, format="WAV")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(file)


# Blocks


@pytest.mark.parametrize("sampling_rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.3])
def test_a_file_in_blocks_is_what_it_is_as_a_whole(sampling_rate, seconds, monkeypatch):
    waveform = np.random.default_rng(0).standard_normal((round(seconds * sampling_rate), 2)).astype(np.float32) / 8
    file = as_file(waveform, sampling_rate, "FLAC")
    stored = torch.from_numpy(soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0].mean(axis=1))
    whole = torchaudio.transforms.Resample(sampling_rate, 16000)(stored).numpy()
    monkeypatch.setattr(audio_emoshare, "BLOCK_S", 1)
    blocks = list(audio_blocks(file.getvalue()))
    assert len(blocks) == -(-len(waveform) // sampling_rate)
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)


@given(
    rates=st.sampled_from([(8000, 16000), (16000, 8000), (44100, 16000), (11025, 16000)]),
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
)
@settings(max_examples=50, deadline=None)
def test_blocks_of_any_length_are_resampled_as_one(rates, lengths):
    blocks = np.split(np.random.default_rng(1).standard_normal(sum(lengths)).astype(np.float32), np.cumsum(lengths))
    whole = torchaudio.transforms.Resample(*rates)(torch.from_numpy(np.concatenate(blocks))).numpy()
    together = np.concatenate(list(resampled(iter(blocks[:-1]), *rates)))
    np.testing.assert_allclose(together, whole, atol=1e-5)


@pytest.mark.slow
def test_an_hour_is_read_in_flat_memory(tmp_path):
    path = tmp_path / "hour.wav"
    minute = speech(60.0)
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for _ in range(120):  # an hour, at 8 kHz
            file.write(minute[: 30 * 8000])
    tracemalloc.start()
    samples = sum(len(block) for block in audio_blocks(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert samples == 3600 * 16000
    assert peak < 20e6  # bytes, of 230e6 in all


# URLs


@pytest.fixture(scope="module")
def server(wav):
    """Serves the file /clip.wav, also as /moved, and /broken, of which half arrives."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = wav.read_bytes()
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/clip.wav")
                self.end_headers()
            elif self.path in ("/clip.wav", "/broken", "/a%20clip%20%C3%A4.wav?n=%C3%BC"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // (2 if self.path == "/broken" else 1)])
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/clip.wav", "/moved", "/a clip ä.wav?n=ü", "/a%20clip%20%C3%A4.wav?n=ü#part"])
def test_urls_are_fetched(path, server, wav):
    np.testing.assert_array_equal(load_audio(server + path), load_audio(wav))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/other.wav", "/other.wav: cannot be fetched .*404"),
        ("{}/broken", "/broken: the download broke off after"),
        ("http://127.0.0.1:9/clip.wav", "127.0.0.1:9/clip.wav: cannot be fetched"),
        ("http://127.0.0.1:9/a clip.wav", "127.0.0.1:9/a clip.wav: cannot be fetched"),
        ("http://a host/clip.wav", "http://a host/clip.wav: cannot be fetched"),
        ("http://[::1/clip.wav", "cannot be fetched .*IPv6"),
    ],
)
def test_a_url_that_cannot_be_fetched_is_named(url, message, server):
    with pytest.raises(OSError, match=message):
        load_audio(url.format(server))


@pytest.mark.parametrize("scheme", ["ftp://", "s3://", "file://", "hf://"])
def test_other_schemes_are_refused(scheme):
    with pytest.raises(ValueError, match=f"got a URL with {scheme}; expected http://, https:// or the path of a file"):
        load_audio(f"{scheme}host/clip.wav")


def test_torchcodecs_decoder_is_read(wav, tmp_path):
    decoders = pytest.importorskip(
        "torchcodec.decoders", reason="torchcodec or FFmpeg is not installed", exc_type=Exception
    )
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([speech(0.5), speech(0.5, 1)], axis=1), 8000)
    for path in (wav, stereo):
        np.testing.assert_allclose(load_audio(decoders.AudioDecoder(str(path))), load_audio(path), atol=1e-4)


@pytest.mark.parametrize("fork", [b"", b"\x00\x05\x16\x07" + bytes(4092)])
def test_an_mp3_that_macos_has_copied_is_read(fork, tmp_path):
    soundfile.write(tmp_path / "clip.mp3", 0.5 * speech(1.0), 16000)
    (tmp_path / "._clip.mp3").write_bytes(fork)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(tmp_path / "clip.mp3")
    assert audio_info(tmp_path / "clip.mp3").num_samples == len(load_audio(tmp_path / "clip.mp3")) == 16000
