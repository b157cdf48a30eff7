import io
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import speech
from hypothesis import given, settings
from hypothesis import strategies as st

from emoshare import audio_emoshare, load_audio
from emoshare.audio_emoshare import audio_blocks
from emoshare.resampling_emoshare import resampled


def as_file(waveform, sampling_rate=16000, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, waveform, sampling_rate, format=format)
    return file


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
    ],
)
def test_every_form_of_audio_gives_the_same_waveform(form, wav):
    expected = soundfile.read(wav, dtype="float32")[0]
    waveform = load_audio(form(wav))
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, expected, atol=1e-7)


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


def test_samples_without_a_header_are_named(tmp_path):
    raw = tmp_path / "samples.raw"
    raw.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"samples\.raw"):
        load_audio(raw)


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
    ],
)
def test_other_audio_is_refused(audio, error, message):
    with pytest.raises(error, match=message):
        load_audio(audio)


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
            elif self.path in ("/clip.wav", "/broken"):
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


@pytest.mark.parametrize("path", ["/clip.wav", "/moved"])
def test_urls_are_fetched(path, server, wav):
    np.testing.assert_array_equal(load_audio(server + path), load_audio(wav))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/other.wav", "/other.wav: cannot be fetched .*404"),
        ("{}/broken", "/broken: the download broke off after"),
        ("http://127.0.0.1:9/clip.wav", "127.0.0.1:9/clip.wav: cannot be fetched"),
    ],
)
def test_a_url_that_cannot_be_fetched_is_named(url, message, server):
    with pytest.raises(OSError, match=message):
        load_audio(url.format(server))


def test_torchcodecs_decoder_is_read(wav, tmp_path):
    decoders = pytest.importorskip(
        "torchcodec.decoders", reason="torchcodec or FFmpeg is not installed", exc_type=Exception
    )
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([speech(0.5), speech(0.5, 1)], axis=1), 8000)
    for path in (wav, stereo):
        np.testing.assert_allclose(load_audio(decoders.AudioDecoder(str(path))), load_audio(path), atol=1e-4)
