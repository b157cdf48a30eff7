"""
Low-level descriptors of speech, as classical systems such as openSMILE use them: a short description of the spectrum's
envelope and of the voice, which a network has to learn by itself from log-mels.
"""

from functools import lru_cache

import numpy as np
import torch

MFCCS = 14  # the envelope of the spectrum, including the level of the frame (the first one)
PITCH_WINDOW_S = 0.040  # two periods of the lowest voices
LOWEST_PITCH_HZ, HIGHEST_PITCH_HZ = 62.0, 500.0
VOICED = 0.45  # a frame with a higher autocorrelation counts as voiced
OCTAVE_COST = 0.02  # how much higher the autocorrelation at twice the period must be for the lower pitch to be chosen
FLOOR = 1e-3  # of energies of a clip at unit variance
SMOOTHED_FRAMES = 3

# Location and scale of each descriptor over speech, roughly, so that all of them are of the order of 1.
DESCRIPTORS = {
    "log energy": (-2.0, 3.0),
    "spectral centroid (kHz)": (1.0, 1.3),
    "spectral spread (kHz)": (0.7, 0.6),
    "roll-off 25 % (kHz)": (0.6, 1.2),
    "roll-off 50 % (kHz)": (0.9, 1.4),
    "roll-off 75 % (kHz)": (1.2, 1.7),
    "roll-off 90 % (kHz)": (1.7, 2.0),
    "spectral flux": (0.26, 0.28),
    "zero crossings": (0.13, 0.16),
    "sharpness (Bark)": (19.5, 5.5),
    "spectral entropy": (2.5, 1.0),
    "log energy at 1 to 4 kHz less that at 250 to 650 Hz": (-0.9, 2.9),
    "log pitch of voiced frames": (0.0, 0.9),
    "voiced": (0.65, 0.48),
    "autocorrelation at the pitch period": (0.7, 0.29),
    "log ratio of harmonics to noise": (1.4, 1.9),
}
NUM_DESCRIPTORS = MFCCS + len(DESCRIPTORS)


def descriptors(waveforms, cepstra, num_frames, sampling_rate, frame_length, hop_length):
    """
    Computes the descriptors of clips, each averaged over three neighbouring frames.

    Args:
        waveforms: (..., samples) float32, at zero mean and unit variance; zero past a clip's last sample.
        cepstra: (..., frames, at least `MFCCS`) float32, their mel-frequency cepstral coefficients.
        num_frames: (...) int64, number of frames of each clip.
        sampling_rate: in Hz.
        frame_length, hop_length: in samples.

    Returns:
        (..., frames, `NUM_DESCRIPTORS`) float32: the first cepstral coefficients, then what `DESCRIPTORS` names;
        arbitrary past a clip's last frame.
    """
    frames = waveforms.unfold(-1, frame_length, hop_length)
    spectral = _spectral(frames, sampling_rate)
    voice = _voice(waveforms, frames, num_frames, sampling_rate, hop_length)
    location, scale = torch.tensor(list(DESCRIPTORS.values()), **_like(waveforms)).T
    values = (torch.stack([*spectral, *voice], dim=-1) - location) / scale
    values = torch.cat([cepstra[..., :MFCCS] / 8, values], dim=-1)
    return sum(_neighbours(values, num_frames, SMOOTHED_FRAMES // 2)) / SMOOTHED_FRAMES


def _spectral(frames, sampling_rate):
    """Returns the spectral descriptors in their order, (..., frames) each."""
    length = frames.shape[-1]
    power = _power(frames * torch.hann_window(length, **_like(frames)), _fft_length(length))
    hertz = torch.linspace(0, sampling_rate / 2, power.shape[-1], **_like(frames))
    density = power / (power.sum(dim=-1, keepdim=True) + FLOOR)
    centroid = density @ hertz
    spread = (density * (hertz - centroid[..., None]).square()).sum(dim=-1).sqrt()
    below, whole = power.cumsum(dim=-1), power.sum(dim=-1, keepdim=True)
    rolloffs = [hertz[(below < part * whole).sum(dim=-1).clamp(max=len(hertz) - 1)] for part in (0.25, 0.5, 0.75, 0.9)]
    amplitude = power.sqrt()
    amplitude = amplitude / amplitude.norm(dim=-1, keepdim=True).clamp(min=FLOOR)
    change = amplitude[..., 1:, :] - amplitude[..., :-1, :]
    flux = torch.nn.functional.pad(change.square().sum(dim=-1), (1, 0))
    loudness, bark = power.pow(0.23), 26.81 * hertz / (1960 + hertz) - 0.53  # Zwicker's exponent, Traunmüller's scale
    sharpness = (loudness * bark * (0.171 * (bark - 15).clamp(min=0)).exp()).sum(dim=-1)
    sharpness = sharpness / loudness.sum(dim=-1).clamp(min=1e-9)
    entropy = -(density * (density + 1e-9).log()).sum(dim=-1)
    low, high = (
        (power[..., _bins(*band, sampling_rate, power.shape[-1])].sum(dim=-1) + FLOOR).log()
        for band in [(250, 650), (1000, 4000)]
    )
    crossings = ((frames[..., 1:] * frames[..., :-1]) < 0).float().mean(dim=-1)
    energy = (frames.square().mean(dim=-1) + FLOOR / 10).log()
    kilohertz = [value / 1000 for value in (centroid, spread, *rolloffs)]
    return [energy, *kilohertz, flux, crossings, sharpness, entropy, high - low]


def _voice(waveforms, frames, num_frames, sampling_rate, hop_length):
    """
    Returns the descriptors of the voice in their order, (..., frames) each. They come from the highest peak of the
    autocorrelation of the samples around each frame, divided by that of the window.
    """
    length = round(PITCH_WINDOW_S * sampling_rate)
    margin = (length - frames.shape[-1]) // 2
    around = torch.nn.functional.pad(waveforms, (margin, length)).unfold(-1, length, hop_length)
    around = around[..., : frames.shape[-2], :]
    window = torch.hann_window(length, **_like(waveforms))
    longest = round(sampling_rate / LOWEST_PITCH_HZ)
    correlation = _autocorrelation((around - around.mean(dim=-1, keepdim=True)) * window, longest)
    of_window = _autocorrelation(window, longest)
    correlation = correlation / (correlation[..., :1] + 1e-4) / (of_window / of_window[0]).clamp(min=1e-3)
    shortest = round(sampling_rate / HIGHEST_PITCH_HZ)
    before, at, after = (correlation[..., shortest + step : longest + step - 1] for step in (-1, 0, 1))
    # Vertices of parabolas through three lags, because a period need not be a whole number of samples.
    slope, bend = (after - before) / 2, 2 * at - before - after
    is_peak = (at >= before) & (at > after)
    shift = torch.where(is_peak, slope / bend.clamp(min=1e-9), 0).clamp(-0.5, 0.5)
    heights = at + slope * shift / 2
    # Among peaks of about the same height, the one at the shortest period is the pitch; the others are its multiples.
    lags = torch.arange(shortest, longest - 1, **_like(waveforms))
    best = (heights - OCTAVE_COST * lags.log2()).argmax(dim=-1, keepdim=True)
    lag = (lags + shift).gather(-1, best)[..., 0]
    peak = heights.gather(-1, best)[..., 0].clamp(0.0, 0.999)
    is_voiced = ((peak > VOICED) & (frames.square().mean(dim=-1) > 0.01)).float()
    log_pitch = (sampling_rate / lag).log() - np.log(180)
    neighbours = torch.cat(_neighbours(log_pitch[..., None], num_frames, 2), dim=-1)
    log_pitch = neighbours.sort(dim=-1).values[..., 2]  # the median removes octave jumps that last a frame or two
    harmonics = (peak.clamp(min=0.05) / (1 - peak).clamp(min=0.01)).log()
    return [2.5 * log_pitch * is_voiced, is_voiced, peak, harmonics]


def _like(tensor):
    """Dtype and device for new tensors, which torch's defaults must not decide."""
    return {"dtype": tensor.dtype, "device": tensor.device}


def _autocorrelation(signals, lags):
    """(..., samples) -> (..., lags), from lag 0."""
    length = _fft_length(signals.shape[-1] + lags)
    return torch.fft.irfft(_power(signals, length))[..., :lags]


def _power(signals, length):
    """(..., samples) -> (..., length / 2 + 1): the power in each bin of an FFT of this length."""
    spectrum = torch.fft.rfft(signals, n=length)
    return spectrum.real.square() + spectrum.imag.square()


@lru_cache
def _fft_length(length):
    return 2 ** (length - 1).bit_length()


@lru_cache
def _bins(start, end, sampling_rate, num_bins):
    """Slice of the bins from frequency `start` to below `end`, in Hz."""
    hertz = np.linspace(0, sampling_rate / 2, num_bins)
    return slice(*np.searchsorted(hertz, (start, end)).tolist())


def _neighbours(values, num_frames, reach):
    """
    Each frame's neighbours, from `reach` frames before it to `reach` after it: a list of tensors shaped like `values`,
    (..., frames, width). Beyond the ends of a clip, its first and last frames are repeated.
    """
    places = torch.arange(values.shape[-2], device=values.device)
    last = num_frames[..., None] - 1
    shifted = [(places + step).clamp(min=0).minimum(last) for step in range(-reach, reach + 1)]
    return [values.gather(-2, index[..., None].expand(values.shape)) for index in shifted]
