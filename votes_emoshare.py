"""The votes of a panel of listeners, given the share and the concentration that a model predicts."""

import numpy as np
import torch

from .losses_emoshare import LEAST_PROBABILITY

LEVEL = 0.9
DEFAULT_LISTENERS = 20
MOST_LISTENERS = 10_000  # time and memory grow with the number of listeners


def log_likelihood(votes, listeners, shares, concentrations):
    """
    Logarithm of the beta-binomial probability of a number of votes. All arguments are arrays that broadcast.

    Args:
        votes: number of listeners who perceive the emotion; need not be whole.
        listeners: number of all listeners.
        shares: predicted shares.
        concentrations: as `EmoShareOutput.concentrations`.

    Returns:
        `np.ndarray`: float64.
    """
    shares = np.clip(shares, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    others, for_it, against = listeners - votes, shares * concentrations, (1 - shares) * concentrations
    log_ways = -np.log(listeners + 1) - _log_beta(votes + 1, others + 1)  # of choosing those who perceive it
    return log_ways + _log_beta(votes + for_it, others + against) - _log_beta(for_it, against)


def share_intervals(shares, concentrations, listeners, level=LEVEL):
    """
    Prediction intervals for the share that a panel of listeners shows.

    A panel of n listeners can only show the shares 0, 1/n, ..., 1, so no interval holds exactly 90 % of panels: the
    classical one, between quantiles on both sides, holds up to 99 %. Here, the most probable interval of each width is
    considered, and the width is chosen whose probability is nearest to `level`, above or below. Averaged over clips,
    the intervals then hold the shares of about `level` of all panels. Their ends are shares that the panel can show;
    the predicted share need not be one of these, and may lie outside the interval if there are few listeners.

    Args:
        shares: (...) predicted shares.
        concentrations: (...) as `EmoShareOutput.concentrations`.
        listeners: number of listeners, the same for all panels.
        level: wanted probability that an interval holds the share of a panel.

    Returns:
        The lower ends, the upper ends, and the actual probabilities: (...) float64.
    """
    votes = np.arange(listeners + 1)
    probabilities = np.exp(log_likelihood(votes, listeners, shares[..., None], concentrations[..., None]))
    below = np.concatenate([np.zeros_like(probabilities[..., :1]), probabilities.cumsum(axis=-1)], axis=-1)
    low, high, held = np.zeros(shares.shape, int), np.zeros(shares.shape, int), np.full(shares.shape, -np.inf)
    for width in votes:  # of the interval, in votes
        in_window = below[..., width + 1 :] - below[..., : listeners + 1 - width]
        first, most = in_window.argmax(axis=-1), in_window.max(axis=-1)
        nearer = np.abs(most - level) < np.abs(held - level)
        low, high, held = (np.where(nearer, *pair) for pair in ((first, low), (first + width, high), (most, held)))
        if (most >= level).all():
            break
    return low / listeners, high / listeners, held


def _log_beta(first, second):
    first, second = (torch.from_numpy(np.asarray(values, dtype=np.float64)) for values in (first, second))
    return (first.lgamma() + second.lgamma() - (first + second).lgamma()).numpy()
