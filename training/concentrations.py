"""What is left to do with concentrations after training: heads are too sure of clips that they were not trained on."""

import numpy as np
from scipy.optimize import brentq, minimize

from ..evaluation.predictions import predict_votes
from ..votes_emoshare import log_likelihood

LARGEST_LOG_FACTOR = 4.0
# Shares nearer to 0 or 1 count as this when errors are compared: there, one vote would outweigh all others.
LEAST_SHARE = 0.01


def fit_concentrations(model, loader, accelerator):
    """
    Fits the concentrations of a trained model to devel: two numbers for all labels, so that a small devel split will
    do. Shares stay as they are. Without a clip of at least two listeners, nothing happens.

    First the exponent, from 0 to 1, with which the votes of devel are most likely: it brings concentrations nearer to
    each other, as far as they differ by chance. Then the factor with which squared errors are as large, on average, as
    the concentrations say. (The likelihood would choose a factor, too, but intervals then hold too few shares where
    predicted shares are wrong: it has to give all its attention to the few that are far off.)

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
