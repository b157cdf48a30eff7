"""From audio in any form to waveforms: mono, float32, at one sampling rate, whole or block by block."""

import io
import math
import os
import shutil
import tempfile
from functools import lru_cache
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import soundfile
import torch
import torchaudio

from .other_formats_emoshare import decode_other_format

SAMPLING_RATE = 16000
BLOCK_S = 60  # seconds of a file that are decoded at a time
DOWNLOAD_TIMEOUT_S = 60  # seconds without a byte after which a download fails


def load_audio(audio, sampling_rate=SAMPLING_RATE):
    """
    Reads audio in any of the forms that users of Hugging Face libraries have it in.

    Args:
        audio: one of
            - a path or URL (http, https) of an audio file, its content as `bytes`, or a binary file object: whatever
              libsndfile decodes (WAV, FLAC, OGG, MP3, ...), any sampling rate, channels averaged; with torchcodec and
              FFmpeg installed, also other formats (M4A, AAC, WMA, AMR, videos, ...), up to an hour;
            - a 1D floating-point array, tensor or list of numbers at `sampling_rate`;
            - `{"array" or "raw": waveform, "sampling_rate": int}`;
            - `{"bytes": bytes or None, "path": str or None}`, as `datasets` stores audio that is not decoded;
            - torchcodec's `AudioDecoder`, as `datasets` gives audio that is decoded;
            - `{"audio": ...}`: a row of a dataset, with any of these in its column `audio`.
        sampling_rate (`int`): wanted sampling rate in Hz.

    Returns:
        `np.ndarray`: (samples,) float32, mono, at `sampling_rate`.

    Raises:
        ValueError: if the audio is empty, broken or not finite, or an array is not 1D floating point; the message
            names the file.
        FileNotFoundError: if there is no such file.
        OSError: if a URL cannot be fetched.
        TypeError: on anything else.
    """
    return np.concatenate(list(audio_blocks(audio, sampling_rate)))


def audio_blocks(audio, sampling_rate=SAMPLING_RATE):
    """
    What `load_audio` returns, block by block, so that a long file never lies in memory as a whole.

    Arguments and errors are those of `load_audio`; an error is raised when the block that causes it is read.

    Yields:
        `np.ndarray`: (samples,) float32.
    """
    if isinstance(audio, dict):
        yield from _dict_blocks(audio, sampling_rate)
    elif isinstance(audio, str) and audio.startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:
            _download(audio, file)
            yield from _decoded_blocks(file, audio, sampling_rate)
    elif isinstance(audio, str | os.PathLike):
        path = os.fspath(audio)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such audio file")
        yield from _decoded_blocks(path, path, sampling_rate)
    elif isinstance(audio, bytes | bytearray):
        yield from _decoded_blocks(io.BytesIO(audio), "audio bytes", sampling_rate)
    elif hasattr(audio, "read"):
        yield from _decoded_blocks(audio, getattr(audio, "name", "audio file object"), sampling_rate)
    elif hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, or its subclass in `datasets`
        samples = audio.get_all_samples()
        yield from _resampled([_checked(samples.data.mean(dim=0), "audio")], samples.sample_rate, sampling_rate)
    elif isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
        yield _checked(audio, "audio array")
    else:
        raise TypeError(
            f"got audio as {type(audio).__name__}; expected a path, URL, bytes, a file object, an array or a dict"
        )


def _dict_blocks(audio, sampling_rate):
    if "audio" in audio:
        return audio_blocks(audio["audio"], sampling_rate)
    waveform = audio["array"] if audio.get("array") is not None else audio.get("raw")
    if waveform is not None and "sampling_rate" in audio:
        return _resampled([_checked(waveform, "audio array")], audio["sampling_rate"], sampling_rate)
    if audio.get("bytes") is not None:
        return _decoded_blocks(io.BytesIO(audio["bytes"]), audio.get("path") or "audio bytes", sampling_rate)
    if audio.get("path") is not None:
        return audio_blocks(audio["path"], sampling_rate)
    raise ValueError(
        f"got audio as a dict with the keys {sorted(audio)}; expected 'array' (or 'raw') and 'sampling_rate', or "
        "'bytes' or 'path'"
    )


def _download(url, file):
    """Downloads a URL into a file object, and rewinds that."""
    try:
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
    except (URLError, OSError) as error:
        raise OSError(f"{url}: cannot be fetched ({error})") from error
    if expected is not None and file.tell() != int(expected):
        raise OSError(f"{url}: the download broke off after {file.tell()} of {expected} bytes")
    file.seek(0)


def _decoded_blocks(file, name, sampling_rate):
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: raw samples, without a header
        samples = decode_other_format(file, name, sampling_rate, error)
        yield _checked(samples.mean(dim=0), name)
        return
    with sound:
        yield from _resampled(_sound_blocks(sound, name), sound.samplerate, sampling_rate)


def _sound_blocks(sound, name):
    is_first = True
    while True:
        try:
            samples = sound.read(BLOCK_S * sound.samplerate, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{name}: cannot be decoded to its end ({error})") from error
        if len(samples) == 0 and not is_first:
            return
        yield _checked(samples.mean(axis=1), name)
        is_first = False


def _checked(waveform, name):
    waveform = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if waveform.size == 0:
        raise ValueError(f"{name}: holds no samples")
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"{name}: got shape {waveform.shape} of {waveform.dtype}; expected a mono waveform, 1D, floating point in "
            "[-1, 1]"
        )
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name}: {int((~np.isfinite(waveform)).sum())} of {waveform.size} samples are not finite")
    return waveform.astype(np.float32)


def _resampled(blocks, from_rate, to_rate):
    """
    Resamples a waveform block by block, to what torchaudio makes of it as a whole. Its filter reaches `margin` samples
    to either side and repeats every `period` samples, so a cut changes nothing if it is at a multiple of `period`, and
    `margin` samples on the other side of it are resampled too and dropped.
    """
    if from_rate == to_rate:
        yield from blocks
        return
    resample = _resampler(from_rate, to_rate)
    period = from_rate // math.gcd(from_rate, to_rate)
    new_period = to_rate // math.gcd(from_rate, to_rate)
    margin = -(-resample.width // period) * period
    blocks = iter(blocks)
    # `kept` is the end of the previous block; its first `done` samples have been resampled, and are margin now.
    block, kept, done = next(blocks), np.zeros(0, np.float32), 0
    while block is not None:
        following = next(blocks, None)
        samples = np.concatenate([kept, block])
        end = len(samples) if following is None else max((len(samples) - margin) // period * period, done)
        new = resample(torch.from_numpy(samples[: end + margin])).numpy()
        yield new[done // period * new_period : None if following is None else end // period * new_period]
        first = max(end - margin, 0)
        kept, done, block = samples[first:], end - first, following


@lru_cache(maxsize=16)
def _resampler(from_rate, to_rate):
    return torchaudio.transforms.Resample(from_rate, to_rate)
