"""
Bootstraps over clips or groups of clips, for the intervals of a system's scores and of the difference of two systems.
"""

from dataclasses import dataclass

import numpy as np

from ..evaluation.scores import bootstrapped_scores
from ..metrics.emotion_share_spearman.spearman import (
    ResampledSpearman,
    mean_of_same,
    percentile_interval,
    resampled_counts,
)


@dataclass(frozen=True)
class Difference:
    """The difference of two mean ρ, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_scores(predictions, references, labels, groups=None, resamples=0, seed=0):
    """
    The scores of a system, averaged over its runs, with intervals.

    Args:
        predictions: predicted shares (runs, clips, labels).
        references: (clips, labels) true shares, NaN where unknown.
        labels: label names.
        groups, seed: as in `resampled_counts`.
        resamples: number of resamples; 0 for no intervals.

    Returns:
        `dict[str | None, Score]`: scores of `MEAN` and of each label, NaN where there is no ρ.
    """
    rhos_of = ResampledSpearman(predictions, references)
    return bootstrapped_scores(rhos_of, labels, groups=groups, bootstrap=resamples, seed=seed)


def paired_difference(first, second, references, resamples, seed=0, groups=None):
    """
    Bootstraps the difference of two systems' scores. A system's score is the mean over its runs of the mean ρ over
    labels; in each resample, all runs of both are scored on the same clips.

    Args:
        first, second: predicted shares (runs, clips, labels) of each system; they may have different numbers of runs.
        references: (clips, labels) true shares, NaN where unknown.
        resamples: number of resamples.
        seed, groups: as in `resampled_counts`.

    Returns:
        `Difference`: second minus first, with percentiles over the resamples, except those in which a label has no ρ
        that has one on all clips. NaN if no label has a ρ; the interval is NaN if all clips are in one group.
    """
    of_runs = ResampledSpearman(np.concatenate([first, second]), references)
    averaged = ~np.isnan(of_runs()[0])  # a label has a ρ for all runs or for none

    def difference(counts=1):
        rhos = mean_of_same(of_runs(counts=counts), averaged)
        return rhos[len(first) :].mean() - rhos[: len(first)].mean()

    value = difference()
    if np.isnan(value):
        return Difference(np.nan, np.nan, np.nan)
    draws = resampled_counts(len(references), groups, resamples, seed)
    return Difference(float(value), *percentile_interval([difference(counts) for counts in draws]))
