"""Features of padded waveforms, made with PyTorch's operators alone, so that an exported model can make them itself."""

import math

import torch
from torch import nn

from .frames_emoshare import length_mask


class BatchedWaveforms(nn.Module):
    """
    Waveforms as `EmoShareFeatureExtractor` prepares them for a backbone, a padded batch at a time.

    Args:
        do_normalize: whether each clip gets zero mean and unit variance.
        variance_floor: added to the variance; with `None`, the level of a clip has no effect at all.
    """

    def __init__(self, do_normalize, variance_floor):
        super().__init__()
        self.do_normalize = do_normalize
        self.variance_floor = variance_floor

    def forward(self, waveforms, lengths):
        """
        Args:
            waveforms: (batch, samples) float32, arbitrary past a clip's last sample.
            lengths: (batch,) int64, each clip's number of samples.

        Returns:
            (batch, samples) float32, zero past a clip's last sample, and the lengths as they are.
        """
        mask = length_mask(lengths, waveforms.shape[1])
        if self.do_normalize:
            waveforms = _standardized(waveforms, mask, self.variance_floor)
        return waveforms.masked_fill(~mask, 0), lengths


class BatchedSpectra(nn.Module):
    """
    The acoustic features of waveforms as `EmoShareFeatureExtractor` makes them, of a padded batch.

    Args:
        waveforms: `BatchedWaveforms`, from whose output the spectra are computed.
        window: (frame length,) float32.
        mel_filters: (bins, bands) float32.
        hop_length: samples from one frame to the next.
        log_floor: added to a band's energy before the logarithm.
        variance_floor: added to the variance when a clip's log-mels are standardised; `None` does not standardise them.
        cosine_transform: (bands, coefficients) float32; `None` for log-mels.
        describe: function that computes the features from waveforms, cepstral coefficients and numbers of frames;
            `None` if the coefficients are the features.
    """

    def __init__(
        self, waveforms, window, mel_filters, hop_length, log_floor, variance_floor, cosine_transform, describe
    ):
        super().__init__()
        self.waveforms = waveforms
        self.hop_length = hop_length
        self.log_floor = log_floor
        self.variance_floor = variance_floor
        self.describe = describe
        # In float64: a sum of 400 products in float32 is less accurate than the fast Fourier transform it replaces.
        angles = torch.outer(torch.arange(len(window)), torch.arange(len(mel_filters))) % len(window)
        angles = 2 * math.pi / len(window) * angles.double()
        basis = window[:, None].double() * torch.cat([angles.cos(), angles.sin()], dim=1)
        self.register_buffer("basis", basis)  # (frame length, 2 * bins)
        self.register_buffer("mel_filters", mel_filters.double())
        self.register_buffer("cosine_transform", cosine_transform)

    def forward(self, waveforms, lengths):
        """
        Args:
            waveforms: (batch, samples) float32, arbitrary past a clip's last sample.
            lengths: (batch,) int64, each clip's number of samples.

        Returns:
            (batch, frames, width) float32, and each clip's number of frames, (batch,) int64.
        """
        waveforms, lengths = self.waveforms(waveforms, lengths)
        frame_length = self.basis.shape[0]
        num_frames = (waveforms.shape[1] - frame_length) // self.hop_length + 1
        starts = self.hop_length * torch.arange(num_frames, device=waveforms.device)
        frames = waveforms[:, starts[:, None] + torch.arange(frame_length, device=waveforms.device)]
        cosines, sines = (frames.double() @ self.basis).chunk(2, dim=-1)
        features = ((cosines.square() + sines.square()) @ self.mel_filters + self.log_floor).log().float()
        lengths = (lengths - frame_length) // self.hop_length + 1
        if self.variance_floor is not None:
            features = _standardized(features, length_mask(lengths, num_frames)[..., None], self.variance_floor)
        if self.cosine_transform is not None:
            features = features @ self.cosine_transform
        if self.describe is not None:
            features = self.describe(waveforms, features, lengths)
        return features, lengths


def _standardized(values, mask, variance_floor):
    """
    Brings each clip's values to zero mean and unit variance over the places where `mask` is true.

    Args:
        values: (batch, length) or (batch, length, width) float32.
        mask: (batch, length) or (batch, length, 1) bool.
        variance_floor: added to the variance; with `None`, constant values become zeros.
    """
    dims = tuple(range(1, values.dim()))
    count = mask.sum(dim=dims, keepdim=True) * values.shape[2:].numel()
    values = values.double()
    centred = values - values.masked_fill(~mask, 0).sum(dim=dims, keepdim=True) / count
    variance = centred.masked_fill(~mask, 0).square().sum(dim=dims, keepdim=True) / count
    variance = torch.where(variance > 0, variance, 1) if variance_floor is None else variance + variance_floor
    return (centred / variance.sqrt()).float()
