"""Mel bands and their cosine transform, by torchaudio."""

from contextlib import contextmanager
from functools import lru_cache
from threading import Lock

import torch

from .fields_emoshare import ACOUSTIC_BANDS

ACOUSTIC_MAX_HZ = 8000.0
_lock = Lock()  # on torch's default dtype, which all threads share


@lru_cache
def mel_spectrogram(sampling_rate, frame_length, hop_length):
    """Module that computes the power in `ACOUSTIC_BANDS` mel bands of each whole window; lengths in samples."""
    torchaudio = _torchaudio()
    with on_cpu_in_float32():
        return torchaudio.transforms.MelSpectrogram(
            sampling_rate,
            n_fft=frame_length,
            hop_length=hop_length,
            f_min=0.0,
            f_max=ACOUSTIC_MAX_HZ,
            n_mels=ACOUSTIC_BANDS,
            center=False,
        )


@lru_cache
def cosine_transform():
    """Matrix from log-mels to cepstral coefficients, (bands, coefficients) float32."""
    torchaudio = _torchaudio()
    with on_cpu_in_float32():
        return torchaudio.functional.create_dct(ACOUSTIC_BANDS, ACOUSTIC_BANDS, norm="ortho").numpy()


@contextmanager
def on_cpu_in_float32():
    """While open, tensors are created on the CPU in float32, whatever torch's default dtype and device are."""
    with _lock:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                yield
        finally:
            torch.set_default_dtype(dtype)


def _torchaudio():
    # Waveforms do not need torchaudio, and Transformers requires remote code to import optional packages inside `try`.
    try:
        import torchaudio
    except ImportError as error:
        raise ImportError("acoustic features (feature_type 'mel', 'mfcc' and 'descriptors') need torchaudio") from error
    return torchaudio
