"""The runtime of exported models: the package's rules, and clear errors. `test_onnx_export` runs it without PyTorch."""

import io
import json
import re
import warnings
from collections import UserDict

import numpy as np
import onnx
import pytest
import soundfile
import torch
from conftest import speech
from onnx import TensorProto, helper
from test_audio import Unseekable, at_its_end
from test_containers import FORMATS, encoded, mp3_of_changing_frames, with_bytes

from emoshare import containers_emoshare, emoshare_runtime
from emoshare import load_audio as load_audio_of_package
from emoshare.emoshare_runtime import EmotionShareRuntime, batches, cut, load_audio, resampled
from emoshare.passes_emoshare import passes
from emoshare.pipeline_emoshare import MOST_PADDING
from emoshare.resampling_emoshare import resampled as resampled_in_blocks
from emoshare.windows_emoshare import cut as cut_of_package

SHORTEST, LONGEST = 400, 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose share of "sum" is a window's sum, and whose share of "loud" is its largest sample."""
    waveforms = helper.make_tensor_value_info("waveforms", TensorProto.FLOAT, ["batch", "samples"])
    lengths = helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"])
    shares = helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["batch", 2])
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("ReduceSum", ["waveforms", "axis"], ["sum"], keepdims=1),
        helper.make_node("ReduceMax", ["waveforms", "axis"], ["loud"], keepdims=1),
        helper.make_node("Concat", ["sum", "loud"], ["shares"], axis=1),
    ]
    graph = helper.make_graph(nodes, "two", [waveforms, lengths], [shares], [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    metadata = {
        "labels": ["sum", "loud"],
        "sampling_rate": 16000,
        "max_window_samples": LONGEST,
        "min_samples": SHORTEST,
    }
    folder = tmp_path_factory.mktemp("runtime")
    onnx.save(model, folder / "other.onnx")
    helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def runtime(folder):
    return EmotionShareRuntime(folder)


def test_windows_count_by_their_duration(runtime):
    clip = np.zeros(3000, np.float32)
    clip[100], clip[2500], clip[2600] = 0.5, 0.25, 0.25  # two windows, of 2,000 and 1,000 samples
    result = runtime(clip, return_timeline=True)
    assert result["shares"] == [
        {"label": "sum", "score": pytest.approx(0.5)},
        {"label": "loud", "score": pytest.approx((2 * 0.5 + 0.25) / 3)},
    ]
    assert result["timeline"] == [
        {"start": 0.0, "end": 0.125, "shares": {"sum": 0.5, "loud": 0.5}},
        {"start": 0.125, "end": 0.1875, "shares": {"sum": 0.5, "loud": 0.25}},
    ]
    assert runtime(clip, top_k=1) == result["shares"][:1]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_lists_and_generators_in_any_batch(batch_size, runtime):
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 8, length).astype(np.float32) / 8 for length in (500, 7000, 400, 2000, 2100, 900)]
    alone = [runtime(clip) for clip in clips]
    assert runtime(clips, batch_size=batch_size) == alone
    results = runtime((clip for clip in clips), batch_size=batch_size)
    assert not isinstance(results, list)
    assert list(results) == alone
    assert runtime([]) == []


@pytest.mark.parametrize("num_samples", [400, 1999, 2000, 2001, 2399, 2400, 4000, 4100, 9000])
def test_windows_are_those_of_the_package(num_samples):
    assert cut(num_samples, LONGEST, SHORTEST) == cut_of_package(num_samples, LONGEST, SHORTEST)


def test_batches_are_those_of_the_pipeline():
    lengths = np.random.default_rng(0).integers(400, 2000, 40).tolist()
    assert batches(lengths, 4) == passes(lengths, 4, MOST_PADDING)


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 16001, 22050, 44100, 48000, 96000, 768000])
def test_resampling_is_that_of_the_package(rate):
    waveform = np.random.default_rng(0).uniform(-1, 1, 3 * rate // 10).astype(np.float32)
    expected = np.concatenate(list(resampled_in_blocks(iter([waveform]), rate, 16000)))
    np.testing.assert_allclose(resampled(waveform, rate, 16000), expected, rtol=0, atol=1e-5)


def test_audio_in_every_form(wav):
    samples, _ = soundfile.read(wav, dtype="int16")
    waveform = soundfile.read(wav, dtype="float32")[0]
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([samples, samples], axis=1), 16000, format="FLAC")
    forms = [
        (wav, str(wav)),
        (str(wav), str(wav)),
        (wav.read_bytes(), "audio bytes"),
        (io.BytesIO(stereo.getvalue()), "audio bytes"),
        (at_its_end(wav.read_bytes()), "audio bytes"),
        (Unseekable(wav.read_bytes()), "audio bytes"),
        (waveform, "audio array"),
        (torch.from_numpy(waveform), "audio array"),
        ((16000, samples), "audio array"),
        ((16000, np.stack([waveform, waveform], axis=1)), "audio array"),
        ((np.array(16000), waveform.tolist()), "audio array"),
        ({"raw": waveform.tolist(), "sampling_rate": np.array(16000)}, "audio array"),
        ({"array": None, "raw": waveform, "sampling_rate": torch.tensor(16000.0)}, "audio array"),
        ({"array": waveform, "sampling_rate": np.float32(16000), "path": "a.wav"}, "a.wav"),
        ({"array": None, "sampling_rate": 16000, "path": str(wav)}, str(wav)),
        ({"audio": torch.from_numpy(waveform), "sampling_rate": 16000, "path": "c.wav"}, "c.wav"),
        ({"audio": str(wav), "sampling_rate": 8000}, str(wav)),  # a column of its own: the file says its rate
        ({"bytes": wav.read_bytes(), "path": "b.wav"}, "b.wav"),
        ({"audio": {"bytes": None, "path": str(wav)}, "label": 3}, str(wav)),
    ]
    for audio, name in forms:
        found, found_name = load_audio(audio, 16000)
        assert (found.dtype, found_name) == (np.float32, name)
        np.testing.assert_allclose(found, waveform, rtol=0, atol=1e-6, err_msg=name)
    with wav.open("rb") as file:
        assert load_audio(file, 16000)[1] == str(wav)


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_a_waveform_has_the_rate_that_stands_next_to_it(form):
    """As Transformers' text-to-speech returns it."""
    waveform = speech(0.3, sampling_rate=24000)
    expected = load_audio({"array": waveform, "sampling_rate": 24000}, 16000)[0]
    for mapping in (dict, UserDict):
        audio = mapping(audio=form(waveform), sampling_rate=24000)
        np.testing.assert_array_equal(load_audio(audio, 16000)[0], expected)


def test_names_that_are_not_utf_8_are_opened(wav, wav_not_in_utf_8):
    path = wav_not_in_utf_8
    for audio in (path, {"bytes": None, "path": path}):
        np.testing.assert_array_equal(load_audio(audio, 16000)[0], load_audio(wav, 16000)[0])


@pytest.mark.parametrize("num_samples", [0, 1 << 35], ids=["written into a pipe", "damaged"])
def test_flac_whose_header_does_not_say_its_length_is_read(num_samples, monkeypatch):
    flac = encoded("FLAC")
    flac = with_bytes(flac, 21, ((flac[21] & 0xF0) << 32 | num_samples).to_bytes(5, "big"))
    expected = load_audio_of_package(encoded("FLAC"))
    for block in (1 << 24, 3000):
        monkeypatch.setattr(emoshare_runtime, "BLOCK", block)
        np.testing.assert_array_equal(load_audio(flac, 16000)[0], expected)
    with pytest.raises(ValueError, match=r"cut\.flac: not an audio file that can be decoded"):
        load_audio({"bytes": flac[: len(flac) // 2], "path": "cut.flac"}, 16000)


def files_that_go_on():
    whole, without = mp3_of_changing_frames()
    streams = [encoded("OGG", encoding, 20000) + encoded("OGG", encoding, 900) for encoding in ("VORBIS", "OPUS")]
    return [without, with_bytes(whole, 21, bytes(4)), whole + whole, *streams]


@pytest.mark.parametrize("number", range(5))
def test_files_of_which_libsndfile_decodes_the_beginning_are_refused(number, runtime, tmp_path):
    file = files_that_go_on()[number]
    path = tmp_path / "clip.xyz"
    path.write_bytes(file)
    message = r"clip\.xyz: has more audio than the \d+\.\d\d s that libsndfile decodes of it, .* convert it to WAV"
    for audio in (path, {"bytes": file, "path": "clip.xyz"}):
        with pytest.raises(ValueError, match=message):
            runtime(audio)


def test_frames_are_as_long_as_in_the_package():
    of_package = containers_emoshare.KBPS
    assert ((0, *of_package[True, 3]), (0, *of_package[False, 3])) == emoshare_runtime.KBPS
    assert emoshare_runtime.MPEG_RATES == containers_emoshare.MPEG_RATES


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 24000, 44100, 48000])
def test_whole_mp3s_are_heard(rate, mode):
    """Also files with pictures, whose bytes look like a frame's header by chance, and files with half-empty frames."""
    rng = np.random.default_rng(rate)
    picture = rng.bytes(1 << 21)
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    noise = rng.standard_normal((rate, 2)) / 10 * np.repeat([1, 0], [rate // 2, rate - rate // 2])[:, None]
    for waveform in (noise, noise[:, 0], noise[: rate // 8], speech(3.0, sampling_rate=rate)):
        file = io.BytesIO()
        soundfile.write(file, waveform, rate, format="MP3", bitrate_mode=mode, compression_level=0.5)
        mp3, last = file.getvalue(), b"TAG" + bytes(125)
        with_apes_tag = mp3 + b"APETAGEX" + bytes(24) + picture + last
        for content in (mp3, mp3 + bytes(10), b"ID3\4\0\0" + size + picture + mp3 + last, with_apes_tag):
            assert len(load_audio(content, rate)[0]) >= len(waveform)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "MP3"])
def test_whole_files_of_other_formats_are_heard(format):
    for encoding in FORMATS[format]:
        for channels, num_samples in ((1, 20000), (2, 999)):
            file = encoded(format, encoding, num_samples, channels)
            if file is not None:
                np.testing.assert_allclose(load_audio(file, 16000)[0], load_audio_of_package(file), rtol=0, atol=1e-5)


def test_samples_at_the_scale_of_integers_are_reported():
    waveform = speech(0.5)
    for audio in (waveform * 32767, (16000, np.stack([waveform * 32767, waveform], axis=1))):
        with pytest.warns(UserWarning, match=r"audio array: its samples reach \d+,\d+; expected floating"):
            load_audio(audio, 16000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(waveform * 10, 16000)


@pytest.mark.parametrize(
    ("audio", "error", "message"),
    [
        ("missing.wav", FileNotFoundError, "missing.wav: no such audio file"),
        (b"not audio", ValueError, "audio bytes: not an audio file that can be decoded"),
        (np.zeros(0, np.float32), ValueError, "audio array: holds no samples"),
        (np.zeros((2, 500), np.float32), ValueError, "audio array: got shape (2, 500) of float32; expected a mono"),
        (np.zeros(500, np.int16), ValueError, "audio array: got shape (500,) of int16; expected a mono waveform"),
        (np.full(500, np.nan, np.float32), ValueError, "audio array: 500 of 500 samples are not finite"),
        (np.zeros(399, np.float32), ValueError, "audio array: got 399 samples (0.025 s); expected at least 400"),
        ((16000, np.zeros((2, 500))), ValueError, "audio array: got samples of shape (2, 500) and float64"),
        (
            (500, np.zeros(500)),
            ValueError,
            "audio array: got the sampling rate 500; expected a whole number of Hz, 1,000",
        ),
        (
            {"path": "a.wav", "raw": np.zeros(500), "sampling_rate": 16000.5},
            ValueError,
            "a.wav: got the sampling rate 1600",
        ),
        ({"raw": np.zeros(500), "sampling_rate": None}, ValueError, "audio array: got the sampling rate None; exp"),
        ({"path": "a.wav", "raw": np.zeros(500), "sampling_rate": "1"}, ValueError, "a.wav: got the sampling rate '1'"),
        ((np.zeros(500), 16000), ValueError, "audio array: got a tuple of 2; expected (sampling rate, samples)"),
        (io.StringIO("RIFF"), TypeError, "audio bytes: got a file object that is opened as text; expected one"),
        ({"sound": 1}, ValueError, "got audio as a dict with the keys ['sound']; expected 'array' (or 'raw')"),
        (3, TypeError, "got audio as int; expected a path, bytes, a file object, an array or a dict"),
    ],
)
def test_bad_audio_is_named(audio, error, message, runtime):
    for inputs in (audio, [audio]):
        with pytest.raises(error, match=re.escape(message)):
            runtime(inputs)


def test_a_file_is_recognised_by_its_content_alone(runtime, tmp_path):
    for suffix in ("gsm", "vox", "au", "snd"):
        page = tmp_path / f"page.{suffix}"
        page.write_bytes(b"<html>404 Not Found</html>" * 100)
        with pytest.raises(ValueError, match=rf"page\.{suffix}: not an audio file that can be decoded"):
            runtime(page)
    soundfile.write(tmp_path / "clip.wav", speech(0.5), 16000)
    expected = runtime(tmp_path / "clip.wav")
    assert runtime((tmp_path / "clip.wav").rename(tmp_path / "clip.raw")) == expected


def test_bad_arguments(folder, runtime):
    for value in (0, True, 1.5, "all"):
        for name in ("batch_size", "top_k"):
            with pytest.raises(ValueError, match=f"{name}: got {value!r}; expected a whole number, 1 or more"):
                runtime(speech(0.5), **{name: value})
    clips = [speech(0.5)] * 20
    assert runtime(clips, batch_size=np.int8(20), top_k=np.int64(1)) == runtime(clips, batch_size=20, top_k=1)
    with pytest.raises(FileNotFoundError, match=r"missing.onnx: no such file; expected the folder of an exported"):
        EmotionShareRuntime(folder, "missing.onnx")
    with pytest.raises(ValueError, match=r"other.onnx: is not an EmoShare model"):
        EmotionShareRuntime(folder, "other.onnx")
