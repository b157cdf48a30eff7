"""Calibration of a model that predicts how certain its shares are."""

from dataclasses import dataclass

import numpy as np

from ..votes_emoshare import log_likelihood
from .intervals import clip_intervals

LEVELS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
BINS = 10


@dataclass(frozen=True)
class Calibration:
    """
    Calibration over all labels and all clips of a split whose shares and number of listeners are known.

    Attributes:
        predicted, true: (bins,) mean predicted and mean true share in each of ten bins. Bins are quantiles of the
            predicted share and hold equally many shares.
        error: the mean of their absolute differences, the expected calibration error.
        stated: (levels,) nominal coverage of intervals of 10 %, 20 %, ..., 90 %. A small panel can only show a few
            different shares, so the nominal coverage is not always the level itself.
        held: (levels,) empirical coverage: the fraction of the true shares inside these intervals.
        log_likelihood: mean log-likelihood of the votes for a clip and label, in nats.
    """

    predicted: list[float]
    true: list[float]
    error: float
    stated: list[float]
    held: list[float]
    log_likelihood: float

    def as_dict(self):
        """A dict for JSON: the error, the likelihood, and for each level the nominal and the empirical coverage."""
        levels = zip(LEVELS, self.stated, self.held, strict=True)
        intervals = {f"{level:.0%}": {"stated": stated, "held": held} for level, stated, held in levels}
        return {"error": self.error, "log_likelihood": self.log_likelihood, "intervals": intervals}


def calibration_of(predictions, references, listeners):
    """
    Args:
        predictions: `VotePredictions` of the clips.
        references: (clips, labels) true shares, NaN where unknown.
        listeners: (clips,) number of listeners of each clip, NaN where unknown.

    Returns:
        `Calibration`; `None` if the number of listeners is unknown for every share.
    """
    known = ~np.isnan(references) & ~np.isnan(listeners)[:, None]
    if not known.any():
        return None
    shares, true = predictions.shares[known], references[known]
    bins = [part for part in np.array_split(np.argsort(shares, kind="stable"), BINS) if len(part)]
    mean_predicted, mean_true = (np.array([values[part].mean() for part in bins]) for values in (shares, true))
    stated, held = zip(*(_coverage(predictions, references, listeners, known, level) for level in LEVELS), strict=True)
    panel = np.broadcast_to(listeners[:, None], known.shape)[known]
    likelihood = log_likelihood(true * panel, panel, shares, predictions.concentrations[known])
    return Calibration(
        predicted=mean_predicted.tolist(),
        true=mean_true.tolist(),
        error=float(np.average(np.abs(mean_predicted - mean_true), weights=list(map(len, bins)))),
        stated=list(stated),
        held=list(held),
        log_likelihood=float(likelihood.mean()),
    )


def _coverage(predictions, references, listeners, known, level):
    """Nominal and empirical coverage of intervals of this level, over the known shares."""
    panels = np.nan_to_num(listeners, nan=1)
    low, high, stated = clip_intervals(predictions, panels, level)
    half_a_vote = 0.5 / panels[:, None]  # true shares may have been rounded to a few digits
    with np.errstate(invalid="ignore"):
        held = (low - half_a_vote < references) & (references < high + half_a_vote)
    return float(stated[known].mean()), float(held[known].mean())
