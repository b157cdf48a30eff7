"""Mel bands and their cosine transform, by torchaudio."""

from functools import lru_cache

from .fields_emoshare import ACOUSTIC_BANDS

ACOUSTIC_MAX_HZ = 8000.0


@lru_cache
def mel_spectrogram(sampling_rate, frame_length, hop_length):
    """Power in `ACOUSTIC_BANDS` mel bands of each whole window; lengths in samples."""
    return _torchaudio().transforms.MelSpectrogram(
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
    """From log-mels to cepstral coefficients: (bands, coefficients) float32."""
    return _torchaudio().functional.create_dct(ACOUSTIC_BANDS, ACOUSTIC_BANDS, norm="ortho").numpy()


def _torchaudio():
    # Waveforms do not need torchaudio, and Transformers wants remote code to import optional packages inside try.
    try:
        import torchaudio
    except ImportError as error:
        raise ImportError("acoustic features (feature_type 'mel', 'mfcc' and 'descriptors') need torchaudio") from error
    return torchaudio
