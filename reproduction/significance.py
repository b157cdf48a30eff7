"""
Bootstraps over clips, or over groups of clips: intervals of a system's scores, and whether one system is better than
another.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..evaluation.scores import MEAN, Score
from ..metrics.emotion_share_spearman.emotion_share_spearman import percentile_interval
from ..metrics.emotion_share_spearman.emotion_share_spearman import resamples as drawn_clips


@dataclass(frozen=True)
class Difference:
    """Difference of two mean ρ, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean_scores(predictions, references, labels, groups=None, resamples=0, seed=0):
    """
    The scores of a system, each the mean over its runs, with intervals.

    Args:
        predictions: predicted shares (runs, clips, labels).
        references: (clips, labels) true shares, NaN where one is not known.
        labels: label names.
        groups, seed: as in `resampled_counts`.
        resamples: number of resamples; 0 for no intervals.

    Returns:
        `dict[str | None, Score]`: of `MEAN`, and of each label; NaN where there is no ρ.
    """
    of_label = [ResampledSpearman(predictions[:, :, index], true) for index, true in enumerate(references.T)]

    def rhos(counts):
        values = np.array([label.rhos(counts).mean() for label in of_label])
        known = values[~np.isnan(values)]
        return [known.mean() if len(known) else np.nan, *values]

    resampled = np.array(
        [rhos(counts) for counts in resampled_counts(len(references), groups, resamples, seed)]
    ).reshape(resamples, 1 + len(labels))
    scores = {}
    for name, rho, column in zip((MEAN, *labels), rhos(np.ones(len(references))), resampled.T, strict=True):
        ends = (math.nan, math.nan) if np.isnan(rho) else percentile_interval(column)
        scores[name] = Score(float(rho), *ends)
    return scores


def resampled_counts(clips, groups, resamples, seed=0):
    """
    Args:
        clips: number of clips.
        groups: (clips,) the group of each; as many groups as there are are drawn, each with all of its clips. `None`
            draws clips.
        resamples: number of resamples.
        seed: of the resampling.

    Yields:
        (clips,) how often each clip is in a resample.
    """
    for draw in drawn_clips(clips, groups, resamples, seed):
        yield np.bincount(draw, minlength=clips)


def paired_difference(first, second, references, resamples, seed=0, groups=None):
    """
    Bootstraps the difference of two systems' scores. A system's score is the mean over its runs of the mean ρ over
    labels; in each resample, all runs of both are scored on the same clips.

    Args:
        first, second: predicted shares (runs, clips, labels) of each system; they may have different numbers of runs.
        references: (clips, labels) true shares, NaN where one is not known.
        resamples: number of resamples.
        seed, groups: as in `resampled_counts`.

    Returns:
        `Difference`: second minus first, with percentiles over the resamples. NaN where no label has a ρ.
    """
    clips = len(references)
    draws = resampled_counts(clips, groups, resamples, seed)
    predictions = np.concatenate([first, second])
    labels = [ResampledSpearman(predictions[:, :, index], true) for index, true in enumerate(references.T)]

    def difference(counts):
        rhos = np.array([label.rhos(counts) for label in labels])
        rhos = rhos[~np.isnan(rhos[:, 0])]  # a label has a ρ for all runs or for none
        if not len(rhos):
            return np.nan
        return rhos[:, len(first) :].mean() - rhos[:, : len(first)].mean()

    value = difference(np.ones(clips))
    if np.isnan(value):
        return Difference(np.nan, np.nan, np.nan)
    return Difference(float(value), *percentile_interval([difference(counts) for counts in draws]))


class ResampledSpearman:
    """
    Spearman's ρ in resamples of the clips, by the rules of `metrics/emotion_share_spearman`: ties get their mean rank,
    a constant prediction counts as 0, and constant references give no ρ. Clips are sorted once for all resamples.

    Args:
        predictions: (runs, clips) of one label.
        references: (clips,) its true shares, NaN where one is not known.
    """

    def __init__(self, predictions, references):
        self.known = np.flatnonzero(~np.isnan(references))
        self.references = _Ranking(references[self.known])
        self.predictions = [_Ranking(prediction[self.known]) for prediction in predictions]

    def rhos(self, counts):
        """
        Args:
            counts: (clips,) how often each clip is in the resample.

        Returns:
            ρ (runs,) in the resample; NaN where there is none.
        """
        counts = counts[self.known].astype(np.float64)
        true = self.references.ranks(counts)
        true_spread = counts @ true**2
        if not true_spread > 0:
            return np.full(len(self.predictions), np.nan)
        return np.array([self._rho(ranking.ranks(counts), counts, true, true_spread) for ranking in self.predictions])

    @staticmethod
    def _rho(predicted, counts, true, true_spread):
        weighted = counts * predicted
        spread = weighted @ predicted
        return weighted @ true / np.sqrt(spread * true_spread) if spread > 0 else 0.0


class _Ranking:
    """The order of values (clips,), from which the ranks in each resample follow."""

    def __init__(self, values):
        self.order = np.argsort(values)
        is_last = np.diff(values[self.order], append=np.inf) > 0
        self.ends = np.flatnonzero(is_last)  # of the clips with the same value
        self.positions = np.empty(len(values), dtype=np.intp)  # of each clip's value among those that differ
        self.positions[self.order] = np.cumsum(is_last) - is_last

    def ranks(self, counts):
        """Mean ranks (clips,) within a resample, minus the mean of all its ranks."""
        if not len(counts):
            return counts
        up_to_value = np.cumsum(counts[self.order])[self.ends]
        of_value = np.diff(up_to_value, prepend=0)
        return (up_to_value - (of_value + up_to_value[-1]) / 2)[self.positions]
