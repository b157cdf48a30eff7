"""Audio that torchcodec, if installed, decodes and libsndfile does not: AAC, WMA, AMR, the sound of videos."""

import os
import shlex
from functools import lru_cache

RAW_SUFFIXES = {".pcm", ".raw"}  # samples without a header, so that their rate is unknown
# Suffixes of files with sound in formats that libsndfile does not decode.
SOUND = "3gp 3gpp aac ac3 amr ape asf awb dff dsf dts gsm m4a m4b mka mpc ra rm spx tta weba wma wv"
VIDEO = "3g2 avi flv m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogm ogv vob webm wmv"
OTHER_SUFFIXES = RAW_SUFFIXES | {f".{name}" for name in f"{SOUND} {VIDEO}".split()}

SAMPLING_RATE = 16000  # that FFmpeg resamples to
MAX_SECONDS = 3600  # torchcodec decodes a file as a whole: an hour takes 230 MB per channel
MISSING = 0.05  # tolerated fraction of the promised length: headers are not exact, and raw AAC only has an estimate


class OtherSound:
    """
    The samples of a file that libsndfile cannot decode, with the part of `soundfile.SoundFile`'s interface that is
    needed to read a file from beginning to end.

    Args:
        file: binary file object that can seek.
        name: of the file, for messages.
        reason: why libsndfile cannot decode it.

    Attributes:
        fault (`str` or `None`): what is missing from the file, if anything.

    Raises:
        ValueError: if the file cannot be decoded, or is longer than an hour; names it, and says how to convert it.
    """

    format = "other"
    samplerate = SAMPLING_RATE

    def __init__(self, file, name, reason):
        decoder_class = _decoder_class()
        if decoder_class is None:
            raise ValueError(f"{name}: not an audio file that can be decoded ({reason}){_advice(name)}")
        file.seek(0)
        try:
            decoder = decoder_class(file, sample_rate=SAMPLING_RATE)
            promised = decoder.metadata.duration_seconds or 0
            is_too_long = promised > MAX_SECONDS
            if not is_too_long:  # the promised length may be unknown or wrong
                samples = decoder.get_samples_played_in_range(0.0, MAX_SECONDS + 1.0).data
                is_too_long = samples.shape[1] > MAX_SECONDS * SAMPLING_RATE
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name}: not an audio file that can be decoded ({reason} torchcodec: {_message(error)})"
            ) from error
        if is_too_long:
            raise ValueError(
                f"{name}: lasts more than {MAX_SECONDS // 60} minutes, the most that can be decoded of this format; "
                f"{_conversion(name)}"
            )
        self.samples = samples.numpy().T  # (samples, channels)
        self.frames, self.channels = self.samples.shape
        self.position = 0
        seconds = self.frames / SAMPLING_RATE
        is_whole = seconds >= (1 - MISSING) * promised
        self.fault = None if is_whole else f"promises {promised:.1f} s, and {seconds:.1f} s can be decoded"

    def read(self, frames, dtype, always_2d):
        """The next (frames, channels) float32."""
        start, self.position = self.position, self.position + frames
        return self.samples[start : self.position]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@lru_cache
def _decoder_class():
    """torchcodec's `AudioDecoder`; `None` if it is not installed or, by its RuntimeError, finds no FFmpeg."""
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


def _message(error):
    """torchcodec's error message without the source line and the advice that come with it."""
    return str(error).partition("\n")[0].split(", ", 2)[-1].strip()
