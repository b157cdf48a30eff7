"""Calibrates concentrations after training: heads are overconfident about clips that they were not trained on."""

import numpy as np
from scipy.optimize import brentq, minimize

from ..evaluation.predictions import predict_votes
from ..votes_emoshare import log_likelihood

LARGEST_LOG_FACTOR = 4.0
# Shares are clipped to this distance from 0 and 1 when errors are compared, lest a single vote outweigh all others.
LEAST_SHARE = 0.01


def fit_concentrations(model, loader, accelerator):
    """
    Fits the concentrations of a trained model to devel by two numbers for all labels, so that a small devel split is
    enough. Shares do not change. Without a clip rated by at least two listeners, nothing happens.

    First comes the exponent, from 0 to 1, that maximises the likelihood of the devel votes: it brings concentrations
    closer together as far as they differ by chance. Then comes the factor with which squared errors are, on average, as
    large as the concentrations predict. (The likelihood has an optimal factor, too, but it is dominated by the few
    predicted shares that are far off, and intervals would hold too few shares.)

    Args:
        model: `EmoShareModel`; changed in place.
        loader: `FeatureLoader` of devel.
        accelerator: `accelerate.Accelerator`.
    """
    store = loader.store
    listeners = np.broadcast_to(store.listeners[:, None], store.shares.shape).astype(np.float64)
    known = ~np.isnan(store.shares) & (listeners > 1)
    if not known.any():
        accelerator.print(
            "Concentrations are not fitted to devel, where no clip is known to have several listeners: intervals will "
            "be too narrow"
        )
        return
    true, listeners = store.shares[known].astype(np.float64), listeners[known]
    exponent, factor = _most_likely(true, listeners, *_known(predict_votes(model, loader, accelerator), known))
    for head in model.heads:
        head.rescale_concentrations(factor, exponent)
    factor = _with_expected_errors(true, listeners, *_known(predict_votes(model, loader, accelerator), known))
    for head in model.heads:
        head.rescale_concentrations(factor)


def _known(predictions, known):
    return predictions.shares[known], predictions.concentrations[known]


def _most_likely(true, listeners, shares, concentrations):
    """The exponent and factor with which the votes are most likely."""
    logarithms = np.log(concentrations)
    middle = logarithms.mean()

    def loss(parameters):
        exponent, offset = parameters
        moved = np.exp(middle + offset + exponent * (logarithms - middle))
        return -log_likelihood(true * listeners, listeners, shares, moved).mean()

    bounds = [(0, 1), (-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR)]
    exponent, offset = minimize(loss, [1.0, 0.0], bounds=bounds, method="L-BFGS-B").x
    return float(exponent), float(np.exp(offset + (1 - exponent) * middle))


def _with_expected_errors(true, listeners, shares, concentrations):
    """The factor with which the mean of squared errors, each divided by the variance of the share, is 1."""
    of_one_vote = np.clip(shares, LEAST_SHARE, 1 - LEAST_SHARE)
    of_one_vote = of_one_vote * (1 - of_one_vote)

    def excess(log_factor):
        moved = concentrations * np.exp(log_factor)
        variance = of_one_vote / listeners * (1 + (listeners - 1) / (1 + moved))
        return ((true - shares) ** 2 / variance).mean() - 1

    lowest, highest = -LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR
    if excess(highest) <= 0:  # errors are smaller than independent votes would make them
        return float(np.exp(highest))
    return float(np.exp(lowest if excess(lowest) >= 0 else brentq(excess, lowest, highest)))
