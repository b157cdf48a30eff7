"""Weights of shares in the loss, for labels whose shares are mostly similar."""

import numpy as np

BINS = 100
# Standard deviation of the Gaussian kernel, in shares: the distance of two neighbouring shares of twenty listeners.
KERNEL_WIDTH = 0.05


def smoothed_weights(shares):
    """
    Label distribution smoothing (Yang et al., "Delving into Deep Imbalanced Regression", ICML 2021): the weight of a
    share is the inverse of the density of the label's shares around it. The density is a histogram, smoothed by a
    Gaussian kernel, so that a share counts as rare only if those near it are rare, too.

    Args:
        shares: (clips, labels), NaN where unknown.

    Returns:
        `np.ndarray`: (clips, labels) float32, with a mean of 1 over the known shares of each label; 1 where unknown.
    """
    weights = np.ones_like(shares, dtype=np.float32)
    distances = np.arange(-BINS, BINS + 1) / BINS
    kernel = np.exp(-0.5 * (distances / KERNEL_WIDTH) ** 2)
    for label, of_label in enumerate(shares.T):
        known = ~np.isnan(of_label)
        if not known.any():
            continue
        bins = np.rint(of_label[known] * BINS).astype(int)
        density = np.convolve(np.bincount(bins, minlength=BINS + 1), kernel)[BINS : 2 * BINS + 1]
        inverse = 1 / density[bins]
        weights[known, label] = inverse / inverse.mean()
    return weights
