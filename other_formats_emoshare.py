"""Audio that libsndfile does not decode: AAC, WMA, AMR, the sound of videos. torchcodec does, where it is installed."""

import os
import shlex
from contextlib import nullcontext
from functools import lru_cache

RAW_SUFFIXES = {".pcm", ".raw"}  # samples without a header, whose rate nobody can know
# Files with sound, of other formats than libsndfile's, by their suffixes.
SOUND = "3gp 3gpp aac ac3 amr ape asf awb dff dsf dts gsm m4a m4b mka mpc ra rm spx tta weba wma wv"
VIDEO = "3g2 avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogm ogv vob webm wmv"
OTHER_SUFFIXES = RAW_SUFFIXES | {f".{name}" for name in f"{SOUND} {VIDEO}".split()}
MAX_SECONDS = 3600  # torchcodec decodes a file as a whole: an hour at 16 kHz takes 230 MB for each channel


def decode_other_format(file, name, sampling_rate, error):
    """
    Decodes a file that libsndfile cannot, if torchcodec can.

    Args:
        file: path, or binary file object that can seek.
        name: of the file, for messages.
        sampling_rate (`int`): wanted sampling rate in Hz; FFmpeg resamples.
        error: what libsndfile said.

    Returns:
        `torch.Tensor`: (channels, samples) float32.

    Raises:
        ValueError: if the file cannot be decoded, or is longer than an hour; names it, and says how to convert it.
    """
    decoder_class = _decoder_class()
    if decoder_class is None:
        raise ValueError(f"{name}: not an audio file that can be decoded ({error}){_advice(name)}")
    try:
        with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
            opened.seek(0)
            decoder = decoder_class(opened, sample_rate=sampling_rate)
            seconds = decoder.metadata.duration_seconds or 0
            if seconds <= MAX_SECONDS:
                return decoder.get_all_samples().data
    except (RuntimeError, ValueError) as failure:
        raise ValueError(
            f"{name}: not an audio file that can be decoded ({error} torchcodec: {_reason(failure)})"
        ) from failure
    raise ValueError(
        f"{name}: lasts {seconds / 60:.0f} minutes; of this format, up to {MAX_SECONDS // 60} can be decoded; "
        f"{_conversion(name)}"
    )


@lru_cache
def _decoder_class():
    """torchcodec's `AudioDecoder`; None if it is not installed, or finds no FFmpeg (then it raises RuntimeError)."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return AudioDecoder


def _advice(name):
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in OTHER_SUFFIXES - RAW_SUFFIXES:
        return ""
    return f"; {_conversion(name)}, or install torchcodec and FFmpeg"


def _conversion(name):
    return f"convert it, for example with: ffmpeg -i {shlex.quote(name)} {shlex.quote(os.path.splitext(name)[0])}.wav"


def _reason(error):
    """What torchcodec says, without the line of its source code that says so, and without its advice."""
    return str(error).partition("\n")[0].split(", ", 2)[-1].strip()
