"""From audio in any form to waveforms: mono, float32, at one sampling rate, whole or block by block."""

import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import urlopen

import numpy as np
import soundfile
import torch

from .containers_emoshare import Patched, contents
from .other_formats_emoshare import OtherSound
from .resampling_emoshare import checked_rate, resampled

SAMPLING_RATE = 16000
BLOCK_S = 60  # seconds of a file that are decoded at a time
UNKNOWN_FRAMES = 1 << 62  # libsndfile reports more than this for FLAC of unknown length
MAX_BLOCK = 1 << 24  # values of all channels that are decoded at a time, whatever rate and channels the header claims
DOWNLOAD_TIMEOUT_S = 60  # seconds without a byte after which a download fails

# Thresholds of warnings. None of the 535 clips of Emo-DB comes near any of them.
INTEGER_SCALE = 16  # floating-point audio has no peak above this: full scale is 1, and codecs overshoot it slightly
SILENCE = 2.0**-17  # of full scale: half of the smallest step of 16-bit audio
CANCELLED = 1e-3  # channels cancel out if the peak of their average is below this fraction of their own peak
FULL_SCALE = 0.98  # the maximum of G.711; two equal consecutive samples of at least this count as clipped
CLIPPED = 1e-3  # fraction of all samples


def load_audio(audio, sampling_rate=SAMPLING_RATE, strict=True):
    """
    Reads audio in any form that is common with Hugging Face libraries.

    Warns once, naming the audio, if it can be read but is probably wrong: floating-point samples at the scale of
    integers (a peak above 16, where full scale is 1); digital silence; channels that cancel each other out when they
    are averaged; clipping (more than one sample in 1,000 at full scale, next to one of the same value).

    Args:
        audio: one of
            - a path or URL (http, https) of an audio file, its content as `bytes`, or a binary file object, which is
              read from its start: whatever libsndfile decodes (WAV, FLAC, OGG, MP3, ...), any sampling rate from 1,000
              to 768,000 Hz, channels averaged; with torchcodec and FFmpeg installed, also other formats (M4A, AAC, WMA,
              AMR, videos, ...), up to an hour;
            - a 1D floating-point array, tensor or list of numbers in [-1, 1] at `sampling_rate`;
            - `(sampling rate, samples)`, as Gradio gives it: samples (samples,) or (samples, channels), floating point
              in [-1, 1], or int8, int16 or int32, which are divided by their full scale;
            - `{"array", "raw" or "audio": waveform, "sampling_rate": int}`;
            - `{"bytes": bytes or None, "path": str or None}`, as `datasets` stores audio that is not decoded;
            - torchcodec's `AudioDecoder`, as `datasets` gives audio that is decoded;
            - `{"audio": ...}`: a row of a dataset, or another mapping, with any of these in its column `audio`.
        sampling_rate (`int`): wanted sampling rate in Hz, 1,000 to 768,000.
        strict (`bool`): refuse a file that holds less than its header promises, because it was cut off or is damaged.
            If `False`, the part that can be decoded is read, with a warning that names the file; such FLAC is always
            refused, because libsndfile decodes none of it. Detection relies on `containers_emoshare.contents` and the
            decoder: an MP3 without a Xing header that was cut between two frames, and files whose writer could not
            know their length, look whole.

    Returns:
        `np.ndarray`: (samples,) float32, mono, at `sampling_rate`.

    Raises:
        ValueError: if the audio is empty, broken, cut off (see `strict`) or not finite, a sampling rate is not valid,
            or an array is not 1D floating point; the message names the file.
        FileNotFoundError: if there is no such file.
        OSError: if a file cannot be read, or a URL cannot be fetched.
        TypeError: on anything else.
    """
    return np.concatenate(list(audio_blocks(audio, sampling_rate, strict)))


def audio_blocks(audio, sampling_rate=SAMPLING_RATE, strict=True):
    """
    Yields what `load_audio` returns block by block, so that a long file is never in memory as a whole.

    Arguments, warnings and errors are those of `load_audio`. An error is raised when the block that causes it is read,
    and a warning is given with the last block.

    Yields:
        `np.ndarray`: (samples,) float32.
    """
    sampling_rate = checked_rate(sampling_rate, "sampling_rate")
    source = _source(audio)
    if source.is_file:
        with _decoders(source) as (sounds, fault, min_samples):
            first = next(sounds)
            blocks = _sound_blocks(chain([first], sounds), source.name, fault, strict, min_samples)
            yield from resampled(_mono(blocks, source.name), first.samplerate, sampling_rate)
    else:
        samples, from_rate = _samples(source, sampling_rate)
        yield from resampled(_mono(iter([samples]), source.name), from_rate, sampling_rate)


@dataclass(frozen=True)
class AudioInfo:
    """
    Args:
        num_samples (`int`): samples per channel, at the file's own rate.
        sampling_rate (`int`): the file's rate in Hz.
    """

    num_samples: int
    sampling_rate: int

    @property
    def seconds(self):
        return self.num_samples / self.sampling_rate


def audio_info(audio):
    """
    Returns the length and sampling rate of an audio file, and checks that it is whole as far as possible without
    decoding it, which takes about a millisecond whatever its length. Ogg files are read completely to verify their
    checksums, and MP3 files frame by frame. FLAC of unknown length and formats that need torchcodec are decoded.

    Damaged bytes in the middle of a file, samples that are not finite, and what `load_audio` warns of are not found.

    Args:
        audio: a path, the content of a file as `bytes`, a file object, `{"bytes": bytes or None, "path": str or None}`,
            or a row of a dataset with any of these in its column `audio`.

    Returns:
        `AudioInfo`.

    Raises:
        ValueError: if the file is not audio, or holds no samples or fewer than it promises; the message names it.
        FileNotFoundError: if there is no such file.
        OSError: if the file cannot be read.
        TypeError: if the audio is not a file.
    """
    source = _source(audio)
    if not source.is_file:
        raise TypeError(f"got audio as {type(source.audio).__name__}; expected a path, bytes or a file object")
    with _decoders(source) as (sounds, fault, _):
        if fault is not None:
            raise ValueError(f"{source.name}: {fault}")
        num_samples = 0
        for sound in sounds:
            sampling_rate = sound.samplerate
            if sound.frames >= UNKNOWN_FRAMES:
                num_samples += sum(len(block) for block in _sound_blocks([sound], source.name, None, True))
            else:
                num_samples += sound.frames
                if sound.format == "FLAC" and sound.frames > 0:
                    _decode_last_sample(sound, source.name)
    if num_samples == 0:
        raise ValueError(f"{source.name}: holds no samples")
    return AudioInfo(num_samples, sampling_rate)


def _decode_last_sample(sound, name):
    try:
        sound.seek(sound.frames - 1)
        sound.read(1)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name}: its header promises {sound.frames:,} samples, and the last one cannot be decoded"
        ) from error


# Where audio comes from


@dataclass(frozen=True)
class Source:
    """
    Args:
        audio: the audio itself, unwrapped from any mapping: a path, URL, bytes, file object, decoder, array, tensor or
            list.
        name (`str`): for messages.
        sampling_rate (`int`, *optional*): in Hz, if one was given with an array.
    """

    audio: object
    name: str
    sampling_rate: int | None = None

    @property
    def is_file(self):
        forms = str | os.PathLike | bytes | bytearray | memoryview
        return self.sampling_rate is None and (isinstance(self.audio, forms) or hasattr(self.audio, "read"))


def audio_name(audio):
    """The name of audio in messages: its path or URL, if it has one."""
    return _source(audio).name


def _source(audio):
    name = None
    audio = getattr(audio, "_hf_encoded", None) or audio  # the file behind a decoder of `datasets`
    while isinstance(audio, Mapping):
        if "audio" in audio:
            row, audio = audio, getattr(audio["audio"], "_hf_encoded", None) or audio["audio"]
            if "sampling_rate" in row and isinstance(audio, np.ndarray | torch.Tensor | list):
                audio = {"path": row.get("path"), "array": audio, "sampling_rate": row["sampling_rate"]}
            continue
        path = audio.get("path")
        name = path or name
        waveform = audio["array"] if audio.get("array") is not None else audio.get("raw")
        if waveform is not None and "sampling_rate" in audio:
            name = os.fsdecode(name or "audio array")
            return Source(waveform, name, checked_rate(audio["sampling_rate"], name))
        keys, content = sorted(map(str, audio)), audio.get("bytes")  # once: each look-up in a corpus's clip reads it
        audio = path if content is None else content
        if not isinstance(audio, str | os.PathLike | bytes | bytearray | memoryview):
            raise ValueError(
                f"got audio as a dict with the keys {keys}; expected 'array' (or 'raw') and 'sampling_rate', or "
                "'bytes' or 'path'"
            )
    if isinstance(audio, str | os.PathLike):
        name = os.fsdecode(audio)
    elif isinstance(audio, bytes | bytearray | memoryview):
        name = os.fsdecode(name or "audio bytes")
    elif hasattr(audio, "read"):
        name = str(getattr(audio, "name", "audio file object"))
    elif isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
        name = "audio array"
    return Source(audio, name or "audio")


@contextmanager
def _decoders(source):
    """
    Yields the decoders of a file, in order; what is missing from the file, or `None`; and the least number of samples
    that decoding must give. There is one decoder per file, in Ogg one per stream: libsndfile's, or `OtherSound` for a
    file that libsndfile cannot decode.
    """
    with _opened(source) as (file, path):
        found = contents(file)
        # Not the path: libsndfile guesses a format from the name if it does not recognise the content. It reads a
        # descriptor faster than a file object, but cannot use Python's descriptors on Windows.
        if path is not None and not found.head and os.name == "posix":
            first = os.open(path, os.O_RDONLY)  # which libsndfile closes
        else:
            first = Patched(file, found.head, found.skipped)
        files = chain([first], (Patched(file, skipped=begin) for begin in found.following))
        with closing(_sounds(files, file, source.name, found.fault)) as sounds:
            first = next(sounds)
            yield chain([first], sounds), getattr(first, "fault", found.fault), found.min_samples


def _sounds(files, whole_file, name, fault):
    sampling_rate = None
    for file in files:
        try:
            sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError as error:
            sound = OtherSound(whole_file, name, fault or error.error_string)
        with sound:
            if sound.samplerate != (sampling_rate or sound.samplerate):
                raise ValueError(f"{name}: holds streams at {sampling_rate:,} and {sound.samplerate:,} Hz")
            sampling_rate = checked_rate(sound.samplerate, name)
            yield sound


@contextmanager
def _opened(source):
    """Yields a seekable binary file object, and the path if it is a local file, otherwise `None`."""
    audio, name = source.audio, source.name
    if isinstance(audio, bytes | bytearray | memoryview):
        yield io.BytesIO(audio), None
    elif hasattr(audio, "read"):
        if not isinstance(audio.read(0), bytes):
            raise TypeError(f"{name}: got a file object that is opened as text; expected one opened with 'rb'")
        if audio.seekable():
            yield audio, None
        else:
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(audio, file)
                yield file, None
    elif scheme := isinstance(audio, str) and re.match("([A-Za-z][A-Za-z0-9+.-]+)://", audio):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(f"{name}: got a URL with {scheme[0]}; expected http://, https:// or the path of a file")
        with tempfile.TemporaryFile() as file:
            _download(audio, file)
            yield file, None
    else:
        if not os.path.isfile(name):
            reason = "is not a regular file" if os.path.exists(name) else "no such audio file"
            raise FileNotFoundError(f"{name}: {reason}")
        with open(name, "rb") as file:
            yield file, name


def _download(url, file):
    """Downloads a URL into a file object."""
    try:
        with urlopen(_quoted(url), timeout=DOWNLOAD_TIMEOUT_S) as response:
            shutil.copyfileobj(response, file)
            expected = response.headers.get("Content-Length")
            num_bytes = file.tell() if expected is None else int(expected)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"{url}: cannot be fetched ({error})") from error
    if file.tell() != num_bytes:
        raise OSError(f"{url}: the download broke off after {file.tell()} of {num_bytes} bytes")


def _quoted(url):
    """Quotes spaces, umlauts and the like in a URL; what is already quoted stays as it is."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="/?%:@!$&'()*+,;=~") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host, path, query, ""))


# From there to samples


def _sound_blocks(sounds, name, fault, strict, min_samples=0):
    """Blocks of a file, (samples, channels) float32."""
    if fault is not None:
        _report(fault, name, strict)
    total = 0
    for sound in sounds:
        num_read = 0
        for samples in _read(sound, name):
            num_read += len(samples)
            yield samples
        total += num_read
        # libsndfile may only have estimated the number of samples of an MP3, so `contents` counts its frames.
        if fault is None and num_read < sound.frames < UNKNOWN_FRAMES and sound.format != "MP3":
            _report(f"its header promises {sound.frames:,} samples, and {num_read:,} can be decoded", name, strict)
    if total == 0:
        raise ValueError(f"{name}: holds no samples")
    if fault is None and total < min_samples:
        _report(f"its frames hold at least {min_samples:,} samples, and {total:,} can be decoded", name, strict)


def _read(sound, name):
    # soundfile looks up the position after each read of a seekable file, which fails in FLAC of unknown length.
    sound.seekable = lambda: False
    block = max(min(BLOCK_S * sound.samplerate, MAX_BLOCK // sound.channels), 1)
    num_read = 0
    while True:
        try:
            samples = sound.read(min(block, max(sound.frames - num_read, 1)), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            reason = error.error_string or f"after {num_read:,} samples"
            raise ValueError(f"{name}: cannot be decoded to its end ({reason})") from error
        if len(samples) == 0:
            return
        num_read += len(samples)
        yield samples


def _report(fault, name, strict):
    if strict:
        raise ValueError(f"{name}: {fault}")
    warnings.warn(f"{name}: {fault}; only the part that can be decoded is used", stacklevel=2)


def _samples(source, sampling_rate):
    """Returns (samples, channels) of audio that is not a file, and its rate: `sampling_rate` for bare arrays."""
    audio, name = source.audio, source.name
    if source.sampling_rate is not None:
        return _waveform(audio, name), source.sampling_rate
    if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, or its subclass in `datasets`
        try:
            decoded = audio.get_all_samples()
        except RuntimeError as error:
            raise ValueError(f"{name}: cannot be decoded ({error})") from error
        if decoded.data.numel() == 0:
            raise ValueError(f"{name}: holds no samples")
        return decoded.data.T.numpy(), checked_rate(decoded.sample_rate, name)
    if isinstance(audio, tuple) and any(isinstance(part, np.ndarray | torch.Tensor | list) for part in audio):
        if len(audio) != 2 or isinstance(audio[0], np.ndarray | torch.Tensor | list):
            raise ValueError(f"{name}: got a tuple of {len(audio)}; expected (sampling rate, samples)")
        return samples_with_channels(audio[1], name), checked_rate(audio[0], name)
    if isinstance(audio, np.ndarray | torch.Tensor | list | tuple):
        return _waveform(audio, name), sampling_rate
    raise TypeError(
        f"got audio as {type(audio).__name__}; expected a path, URL, bytes, a file object, an array or a dict"
    )


def _as_array(values, name):
    if isinstance(values, torch.Tensor):
        if values.is_meta:
            raise ValueError(f"{name}: got a tensor on the meta device, which holds no values")
        # NumPy has no bfloat16.
        values = (values.detach().float() if values.is_floating_point() else values.detach()).cpu().numpy()
    try:
        values = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: got lists of different lengths; expected a mono waveform, 1D") from error
    if values.size == 0:
        raise ValueError(f"{name}: holds no samples")
    return values


def _waveform(values, name):
    """(samples, 1)"""
    waveform = _as_array(values, name)
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"{name}: got shape {waveform.shape} of {waveform.dtype}; expected a mono waveform, 1D, floating point in "
            "[-1, 1]"
        )
    return waveform[:, None]


def samples_with_channels(values, name, most_channels=1):
    """
    Args:
        values, name: samples as Gradio gives them, see `load_audio`, and what messages call them.
        most_channels: how many channels there may be if there are fewer samples than channels. With more, the array is
            refused, as it is probably (channels, samples).

    Returns:
        `np.ndarray`: (samples, channels), floating point.

    Raises:
        ValueError: if there are no samples, or they have another shape or type.
    """
    samples = _as_array(values, name)
    if samples.dtype in (np.int8, np.int16, np.int32):
        samples = samples / np.float32(-int(np.iinfo(samples.dtype).min))
    samples = samples[:, None] if samples.ndim == 1 else samples
    is_of_channels = samples.ndim == 2 and samples.shape[1] <= max(samples.shape[0], most_channels)
    if not is_of_channels or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{name}: got samples of shape {samples.shape} and {samples.dtype}; expected (samples,) or (samples, "
            "channels), floating point in [-1, 1], int8, int16 or int32"
        )
    return samples


def _mono(blocks, name):
    """Averages the channels of blocks, (samples, channels), and warns if the level is suspicious."""
    level = Level()
    for block in blocks:
        yield mono_block(block, name, level)
    level.warn(name)


def mono_block(block, name, level):
    """
    Averages the channels of a block.

    Args:
        block: (samples, channels), floating point; at least one sample.
        name: for messages.
        level: `Level` of the whole audio, to which the block is added.

    Returns:
        `np.ndarray`: (samples,) float32.

    Raises:
        ValueError: if samples are not finite.
    """
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, and are refused below
        block = np.asarray(block, np.float32)
    if not np.isfinite(block).all():
        raise ValueError(f"{name}: {int((~np.isfinite(block)).sum())} of {block.size} samples are not finite")
    mono = block.mean(axis=1)
    level.add(block, mono)
    return mono


class Level:
    """Collects peaks and clipping of audio block by block."""

    def __init__(self):
        self.peak = self.mono_peak = 0.0
        self.num_values = self.num_clipped = 0

    def add(self, block, mono):
        """`block`: (samples, channels); `mono`: their average, (samples,)."""
        peak = float(np.abs(block).max())
        self.peak, self.mono_peak = max(self.peak, peak), max(self.mono_peak, float(np.abs(mono).max()))
        self.num_values += block.size
        if peak >= FULL_SCALE:
            self.num_clipped += int(((np.abs(block[1:]) >= FULL_SCALE) & (block[1:] == block[:-1])).sum())

    def warn(self, name):
        """Warns of the most likely problem, if there is one."""
        problem = self.problem()
        if problem is not None:
            warnings.warn(f"{name}: {problem}", stacklevel=3)

    def problem(self):
        """The most likely problem, or `None`."""
        if self.peak > INTEGER_SCALE:
            return f"its samples reach {self.peak:,.0f}; expected floating point in [-1, 1], not the scale of integers"
        if self.peak < SILENCE:
            return "is digital silence"
        if self.mono_peak < CANCELLED * self.peak:
            return "its channels cancel each other out, so that their average is silence"
        if self.num_clipped > CLIPPED * self.num_values:
            return f"is clipped: {self.num_clipped / self.num_values:.1%} of its samples are at full scale"
        return None
