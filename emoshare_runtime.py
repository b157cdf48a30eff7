"""
Runs an EmoShare model that was exported to ONNX, without PyTorch and Transformers.

    pip install numpy soundfile onnxruntime

    >>> from emoshare_runtime import EmotionShareRuntime
    >>> emotion_share = EmotionShareRuntime("onnx")  # the folder of model.onnx
    >>> emotion_share("clip.wav")
    [{'label': 'Calmness', 'score': 0.41}, {'label': 'Interest', 'score': 0.22}, ...]

Nothing else of EmoShare is needed. The shares are those of the "emotion-share" pipeline, to 1e-4: this file reads and
resamples audio, and cuts it into windows, by the same rules. All other preprocessing is part of the ONNX file.
"""

import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice, pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import soundfile

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
ZEROS, ROLLOFF = 6, 0.99  # resampling filter: sinc with 6 zeros per side, Hann window, cutoff at 99 %
VALUES_AT_A_TIME = 1 << 20  # that resampling reads at a time
BLOCK = 1 << 24  # values, over all channels, decoded at a time, whatever the header claims
INTEGER_SCALE = 16  # a higher peak cannot be floating-point audio, whose full scale is 1
MPEG_RATES = (44100, 48000, 32000)  # Hz, for MPEG-1; half as much for MPEG-2, a quarter for MPEG-2.5
KBPS = (  # bit rates of layer III by their index in a frame's header: for MPEG-1, and for the others
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
SPARE_FRAMES = 10  # of an MP3, a quarter of a second or more; decoders may leave out some at either end
WINDOWS_READ_AHEAD = 8  # batches to read ahead, to find windows of similar length
MOST_PADDING = 0.35  # largest part of a batch that may be padding


class EmotionShareRuntime:
    """
    Predicts the share of listeners who would perceive each emotion in a speech clip.

    Args:
        folder: folder of the ONNX file.
        file_name: its name. `"model_int8.onnx"` is the model in 8 bits, if that was exported too.
        session_options: further arguments of `onnxruntime.InferenceSession`, such as
            `providers=["CUDAExecutionProvider"]`.

    Attributes:
        labels (`list[str]`): the emotions.
        sampling_rate (`int`): the model's, in Hz; audio at other rates is resampled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an EmoShare model.
    """

    def __init__(self, folder, file_name="model.onnx", **session_options):
        path = Path(folder) / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected the folder of an exported EmoShare model")
        options = onnxruntime.SessionOptions()
        # Convert weights that are stored in 8 bits but computed in float32 once, instead of at every call.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session_options = {"providers": ["CPUExecutionProvider"], "sess_options": options, **session_options}
        self.session = onnxruntime.InferenceSession(path, **session_options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "labels" not in metadata:
            raise ValueError(f"{path}: is not an EmoShare model exported by `emoshare export`")
        self.labels = json.loads(metadata["labels"])
        self.sampling_rate = json.loads(metadata["sampling_rate"])
        self.max_window_samples = json.loads(metadata["max_window_samples"])
        self.min_samples = json.loads(metadata["min_samples"])

    def __call__(self, inputs, batch_size=1, top_k=None, return_timeline=False):
        """
        Args:
            inputs: one clip, or a list or generator of clips. A clip is
                - the path of an audio file, its content as `bytes`, or a binary file object, which is read from its
                  start, in any format that libsndfile decodes (WAV, FLAC, OGG, MP3, ...); channels are averaged;
                - a 1D floating-point array in [-1, 1] at the model's sampling rate;
                - `(sampling rate, samples)`: (samples,) or (samples, channels), floating point, int8, int16 or int32;
                - `{"array", "raw" or "audio": waveform, "sampling_rate": int}`, `{"bytes": bytes or None, "path":
                  str or None}`, or `{"audio": ...}` with any of these.
            batch_size (`int`): most windows in a batch. It does not change the shares, except a little those of a
                model in 8 bits.
            top_k (`int`, *optional*): return only the `top_k` highest shares.
            return_timeline (`bool`): also return the shares of each window.

        Returns:
            `list[dict]`: `{"label": str, "score": float}` for every emotion, highest share first. With a timeline, a
            dict with this list as `"shares"`, and as `"timeline"` a list with `{"start": float, "end": float, "shares":
            {label: float}}` for each window, in seconds. A list of these for a list, an iterator for a generator.

        Raises:
            ValueError: if audio is empty, broken, too short or not finite, or an argument is not valid.
            FileNotFoundError, OSError: if a file cannot be read.
            TypeError: if `inputs` is anything else.

        Warns, naming the clip, if its peak is above 16: its samples are probably integers that were not scaled to
        [-1, 1].
        """
        for name, value in (("batch_size", batch_size), ("top_k", 1 if top_k is None else top_k)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected a whole number, 1 or more")
        batch_size = int(batch_size)
        is_several = isinstance(inputs, list) or (isinstance(inputs, Iterator) and not hasattr(inputs, "read"))
        results = self._predict(inputs if is_several else [inputs], batch_size, top_k, return_timeline)
        if not is_several:
            return next(results)
        return list(results) if isinstance(inputs, list) else results

    def _predict(self, clips, batch_size, top_k, return_timeline):
        """Yields the result of each clip, in order."""
        windows = chain.from_iterable(map(self._windows, clips))
        of_clip = []  # windows and shares of the current clip, until it is complete
        while pool := list(islice(windows, WINDOWS_READ_AHEAD * batch_size if batch_size > 1 else 1)):
            for window, shares in zip(pool, self._run(pool, batch_size), strict=True):
                of_clip.append((window, shares))
                if window.is_last:
                    yield self._result(of_clip, top_k, return_timeline)
                    of_clip = []

    def _windows(self, audio):
        waveform, name = load_audio(audio, self.sampling_rate)
        if len(waveform) < self.min_samples:
            seconds, least = len(waveform) / self.sampling_rate, self.min_samples / self.sampling_rate
            raise ValueError(
                f"{name}: got {len(waveform)} samples ({seconds:.3f} s); expected at least {self.min_samples} "
                f"({least:.3f} s)"
            )
        for start, end in cut(len(waveform), self.max_window_samples, self.min_samples):
            yield Window(waveform[start:end], start, end, end == len(waveform))

    def _run(self, windows, batch_size):
        """The shares of each window, (windows, labels) float32."""
        shares = np.empty((len(windows), len(self.labels)), np.float32)
        for rows in batches([len(window.waveform) for window in windows], batch_size):
            lengths = np.array([len(windows[row].waveform) for row in rows], np.int64)
            padded = np.zeros((len(rows), lengths.max()), np.float32)
            for row, waveform in zip(padded, (windows[row].waveform for row in rows), strict=True):
                row[: len(waveform)] = waveform
            (shares[rows],) = self.session.run(["shares"], {"waveforms": padded, "lengths": lengths})
        return shares

    def _result(self, of_clip, top_k, return_timeline):
        """The average of the windows' shares, weighted by duration."""
        durations = [window.end - window.start for window, _ in of_clip]
        average = np.average([shares for _, shares in of_clip], axis=0, weights=durations)
        labelled = [{"label": label, "score": float(share)} for label, share in zip(self.labels, average, strict=True)]
        highest = sorted(labelled, key=lambda share: -share["score"])[:top_k]
        if not return_timeline:
            return highest
        timeline = [
            {
                "start": window.start / self.sampling_rate,
                "end": window.end / self.sampling_rate,
                "shares": dict(zip(self.labels, map(float, shares), strict=True)),
            }
            for window, shares in of_clip
        ]
        return {"shares": highest, "timeline": timeline}


class Window(NamedTuple):
    """A window of a clip: its (samples,) float32, its first sample and end in the clip, and whether it is the last."""

    waveform: np.ndarray
    start: int
    end: int
    is_last: bool


def cut(num_samples, longest, shortest):
    """
    Returns (start, end) of each window of a clip, in samples. Windows follow one another and have `longest` samples,
    except that the last one has the rest. If the rest is less than `shortest`, the last window starts earlier.
    """
    cuts = [*range(0, num_samples, longest), num_samples]
    if len(cuts) > 2 and num_samples - cuts[-2] < shortest:
        cuts[-2] = num_samples - shortest
    return list(pairwise(cuts))


def batches(lengths, most):
    """Groups windows of similar length into batches, so that there is little padding. Returns the indices per batch."""
    found, total = [], 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        longest = lengths[index]
        total += longest
        if not found or len(found[-1]) == most or total < (1 - MOST_PADDING) * longest * (len(found[-1]) + 1):
            found.append([])
            total = longest
        found[-1].append(index)
    return found


def load_audio(audio, sampling_rate):
    """
    Args:
        audio: one clip, as in `EmotionShareRuntime.__call__`.
        sampling_rate: of the returned waveform, in Hz.

    Returns:
        The mono waveform, (samples,) float32, and the clip's name for messages.
    """
    name = None
    while isinstance(audio, Mapping):
        name = audio.get("path") or name
        waveform = next((audio[key] for key in ("audio", "array", "raw") if audio.get(key) is not None), None)
        if "audio" in audio and not ("sampling_rate" in audio and _is_array(waveform)):
            audio = audio["audio"]
        elif "sampling_rate" in audio and waveform is not None:
            audio = (audio["sampling_rate"], _checked_waveform(waveform, name or "audio array"))
        elif audio.get("bytes") is not None or audio.get("path") is not None:
            audio = audio["path"] if audio.get("bytes") is None else audio["bytes"]
        else:
            raise ValueError(
                f"got audio as a dict with the keys {sorted(map(str, audio))}; expected 'array' (or 'raw') and "
                "'sampling_rate', or 'bytes' or 'path'"
            )
    if isinstance(audio, str | os.PathLike):
        name = os.fsdecode(audio)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name}: no such audio file")
        samples, rate = _decoded(io.BytesIO(Path(name).read_bytes()), name)
    elif isinstance(audio, bytes | bytearray | memoryview) or hasattr(audio, "read"):
        name = str(name or getattr(audio, "name", "audio bytes"))
        samples, rate = _decoded(io.BytesIO(_content(audio, name) if hasattr(audio, "read") else audio), name)
    elif isinstance(audio, tuple):
        name = str(name or "audio array")
        if len(audio) != 2 or _is_array(audio[0]) or not _is_array(audio[1]):
            raise ValueError(f"{name}: got a tuple of {len(audio)}; expected (sampling rate, samples)")
        rate, samples = audio[0], _checked_samples(audio[1], name)
    elif hasattr(audio, "__array__"):
        name = "audio array"
        samples, rate = _checked_waveform(audio, name)[:, None], sampling_rate
    else:
        raise TypeError(
            f"got audio as {type(audio).__name__}; expected a path, bytes, a file object, an array or a dict"
        )
    rate = _checked_rate(rate, name)
    return resampled(_mono(samples, name), rate, sampling_rate), name


def _is_array(values):
    return isinstance(values, list) or getattr(values, "ndim", 0) > 0


def _content(file, name):
    """All bytes of a file object, from its start."""
    if not isinstance(file.read(0), bytes):
        raise TypeError(f"{name}: got a file object that is opened as text; expected one opened with 'rb'")
    if file.seekable():
        file.seek(0)
    return file.read()


def _decoded(file, name):
    """
    Samples (samples, channels) float32 and rate of an audio file, a `BytesIO`. Given a path, libsndfile would guess a
    format from the name where it does not recognise the content.
    """
    try:
        with soundfile.SoundFile(file) as sound:
            samples = np.concatenate(list(_blocks(sound)))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not an audio file that can be decoded ({error.error_string})") from error
    if sound.format in ("MP3", "OGG"):
        content = file.getvalue()
        goes_on = _mp3_goes_on(content, sound.samplerate, len(samples)) if sound.format == "MP3" else _is_chain(content)
        if goes_on:
            raise ValueError(
                f"{name}: has more audio than the {len(samples) / sound.samplerate:.2f} s that libsndfile decodes of "
                "it, because its header does not give its length, or files were joined; convert it to WAV"
            )
    return samples, sound.samplerate


def _blocks(sound):
    """Yields all samples in blocks, because the header may give no number of samples, or a wrong one."""
    sound.seekable = lambda: False  # soundfile asks for the position after each read, which fails without a length
    num_read, block = 0, None
    while block is None or len(block):
        most = min(BLOCK // sound.channels, max(sound.frames - num_read, 1))
        block = sound.read(most, dtype="float32", always_2d=True)
        num_read += len(block)
        yield block


def _is_chain(ogg):
    """Whether one stream follows another: if not, all pages that begin a stream come before all other pages."""
    begins = [flags[0] & 2 for flags in re.findall(rb"OggS\0([\0-\7])", ogg)]
    return begins != sorted(begins, reverse=True)


def _mp3_goes_on(mp3, rate, num_samples):
    """
    Whether the file has many more frames than the decoded samples need. libsndfile reads as many samples as the first
    frame gives as the count. Without a count, it assumes that all frames are as long as the first one.
    """
    halvings = int(rate <= 24000) + int(rate <= 12000)  # MPEG-1, MPEG-2 or MPEG-2.5
    samples_per_frame, kbps = (1152, KBPS[0]) if halvings == 0 else (576, KBPS[1])
    data = np.frombuffer(mp3, np.uint8)
    first, second, third = data[:-2], data[1:-1], data[2:]
    is_header = (first == 0xFF) & (second | 1 == (0xFB, 0xF3, 0xE3)[halvings])  # of layer III
    is_header &= (third >> 2 & 3 == MPEG_RATES.index(rate << halvings)) & ((third >> 4) % 15 > 0)
    begins = np.flatnonzero(is_header)
    ends = begins + samples_per_frame * 125 * np.array(kbps)[third[begins] >> 4] // rate + (third[begins] >> 1 & 1)
    num_frames = np.isin(ends, begins).sum()  # bytes that look like a header by chance have no header after them
    return num_frames > num_samples // samples_per_frame + SPARE_FRAMES


def _checked_waveform(values, name):
    waveform = np.asarray(values)
    if waveform.ndim != 1 or (waveform.size and not np.issubdtype(waveform.dtype, np.floating)):
        raise ValueError(
            f"{name}: got shape {waveform.shape} of {waveform.dtype}; expected a mono waveform, 1D, floating point in "
            "[-1, 1]"
        )
    return waveform


def _checked_samples(values, name):
    """Returns (samples, channels) in floating point; integers are divided by their full scale."""
    samples = np.asarray(values)
    if samples.dtype in (np.int8, np.int16, np.int32):
        samples = samples / np.float32(-int(np.iinfo(samples.dtype).min))
    samples = samples[:, None] if samples.ndim == 1 else samples
    is_of_channels = samples.ndim == 2 and samples.shape[0] >= samples.shape[1]
    if not is_of_channels or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{name}: got samples of shape {samples.shape} and {samples.dtype}; expected (samples,) or (samples, "
            "channels), floating point in [-1, 1], int8, int16 or int32"
        )
    return samples


def _checked_rate(rate, name):
    rate = rate.item() if getattr(rate, "ndim", None) == 0 else rate
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not is_number or rate % 1 != 0 or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"{name}: got the sampling rate {rate!r}; expected a whole number of Hz, {MIN_RATE:,} to {MAX_RATE:,}"
        )
    return int(rate)


def _mono(samples, name):
    """Averages the channels of (samples, channels)."""
    if len(samples) == 0:
        raise ValueError(f"{name}: holds no samples")
    with np.errstate(over="ignore"):  # values too large for float32 become infinite
        samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: {int((~np.isfinite(samples)).sum())} of {samples.size} samples are not finite")
    peak = max(samples.max(), -samples.min())
    if peak > INTEGER_SCALE:
        warnings.warn(
            f"{name}: its samples reach {peak:,.0f}; expected floating point in [-1, 1], not the scale of integers",
            stacklevel=2,
        )
    return samples.mean(axis=1)


def resampled(waveform, from_rate, to_rate):
    """Resamples (samples,) float32. The result equals that of torchaudio's `Resample` to 1e-6 of full scale."""
    if from_rate == to_rate:
        return waveform
    # `period` old samples last as long as `new_period` new ones.
    period, new_period = from_rate // math.gcd(from_rate, to_rate), to_rate // math.gcd(from_rate, to_rate)
    taps = _taps(period, new_period)
    num_taps = taps.shape[1]
    padded = np.pad(waveform, (num_taps // 2, num_taps // 2 + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, num_taps)
    new = np.empty(-(-len(waveform) * new_period // period), np.float32)
    at_a_time = max(VALUES_AT_A_TIME // num_taps, 1)
    for start in range(0, len(new), at_a_time):
        numbers = np.arange(start, min(start + at_a_time, len(new)))
        seen = windows[numbers * period // new_period + 1]
        new[numbers] = np.einsum("nt,nt->n", seen, taps[numbers % new_period])
    return new


@lru_cache(maxsize=4)
def _taps(period, new_period):
    """
    The filter's weights, (new_period, taps) float32: for each position that a new sample can have between two old ones,
    the weights of the old samples around it.
    """
    cutoff = min(period, new_period) * ROLLOFF
    width = math.ceil(ZEROS * period / cutoff)  # in samples, to either side
    offsets = np.arange(1 - width, width + 1)
    taps = np.empty((new_period, 2 * width), np.float32)
    at_a_time = max(VALUES_AT_A_TIME // (2 * width), 1)
    for start in range(0, new_period, at_a_time):
        places = np.arange(start, min(start + at_a_time, new_period))
        rounded = -places.astype(np.float32) / np.float32(new_period)  # as torchaudio does
        samples = (places * period // new_period)[:, None] + offsets
        times = ((samples / period + rounded[:, None].astype(np.float64)) * cutoff).clip(-ZEROS, ZEROS)
        taps[places] = np.sinc(times) * np.cos(times * np.pi / ZEROS / 2) ** 2 * cutoff / period
    return taps
