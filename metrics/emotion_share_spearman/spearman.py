"""
Spearman's ρ of predicted shares, as in the challenge, with bootstrapped intervals. The metric calls this module, which
needs only NumPy and can be used directly, without the metric's copy of its inputs to Arrow and back.
"""

import warnings

import numpy as np

INTERVAL = "_ci95"  # suffix of the names of intervals
WITHIN_CLIPS = "within_clip_spearman"
VALUES_AT_ONCE = 1 << 17  # predicted and true shares, whose intermediate results fit into a processor's cache


def spearman_scores(predictions, references, label_names=None, bootstrap=0, seed=0, groups=None, within_clips=False):
    """
    The scores that `EmotionShareSpearman.compute` returns; see its description for the arguments.

    Raises:
        ValueError: if an argument is invalid.
    """
    predictions, references = _matrix(predictions, "predictions"), _matrix(references, "references")
    if label_names is None:
        label_names = [str(index) for index in range(predictions.shape[1])]
    names = ["spearman", *(f"spearman_{label}" for label in label_names)]
    _check(predictions, references, label_names, names, bootstrap, groups)

    rhos_of = ResampledSpearman(predictions[None], references)
    rhos, resampled = bootstrapped(rhos_of, groups=groups, bootstrap=bootstrap, seed=seed)
    _warn(predictions, references, rhos[1:], label_names)
    if bootstrap:
        _warn_of_resamples(resampled, rhos, label_names)
    scores = {}
    for index, (name, rho) in enumerate(zip(names, rhos, strict=True)):
        scores[name] = float(rho)
        if bootstrap:
            scores[name + INTERVAL] = percentile_interval(resampled[:, index])
    if within_clips:
        (of_clips,) = ResampledSpearman(predictions.T[None], references.T)()
        scores[WITHIN_CLIPS] = float(mean_rho(of_clips))
        if bootstrap:
            draws = resamples(len(predictions), groups, bootstrap, seed)
            scores[WITHIN_CLIPS + INTERVAL] = percentile_interval(
                np.array([mean_rho(of_clips[draw]) for draw in draws])
            )
    return scores


def _matrix(rows, name):
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or widths == [0]:
        raise ValueError(f"{name} have rows of {widths} values; expected the same number in each row, at least one")
    return np.array(rows, dtype=np.float64)  # None becomes NaN


def _check(predictions, references, label_names, names, bootstrap, groups):
    if predictions.shape != references.shape:
        raise ValueError(f"predictions have shape {predictions.shape}, references {references.shape}")
    if not np.isfinite(predictions).all():
        raise ValueError(f"{int((~np.isfinite(predictions)).sum())} predictions are NaN or infinite")
    if len(set(label_names)) != predictions.shape[1]:
        raise ValueError(f"label_names has {len(set(label_names))} names for {predictions.shape[1]} labels")
    clashing = [name for name in names if name.endswith(INTERVAL) and name.removesuffix(INTERVAL) in names]
    if clashing:
        raise ValueError(f"label_names: {clashing} would be both a score and the interval of another one")
    if bootstrap < 0:
        raise ValueError(f"bootstrap is {bootstrap}; expected a number of resamples")
    if groups is not None and len(groups) != len(predictions):
        raise ValueError(f"groups has {len(groups)} entries for {len(predictions)} clips")


class ResampledSpearman:
    """
    Spearman's ρ over any selection of the clips, in which a clip may occur several times, as in a resample. Ties get
    their mean rank, constant predictions count as 0, and constant references, or fewer than two, give NaN. All values
    are sorted once; ranks within a selection are then counted, without rounding.

    Args:
        predictions: (runs, clips, labels) predicted shares of one or more runs.
        references: (clips, labels) true shares, NaN where unknown, which leaves that clip out for that label.
    """

    def __init__(self, predictions, references):
        runs, clips, labels = predictions.shape
        self.clips = np.arange(clips)
        at_once = max(1, VALUES_AT_ONCE // max(1, (1 + runs) * clips))
        parts = [slice(first, first + at_once) for first in range(0, labels, at_once)]
        self.parts = [_LabelsAtOnce(predictions[..., own], references[:, own]) for own in parts]

    def __call__(self, clips=slice(None), counts=1):
        """
        Args:
            clips: indices of the selected clips, with repetitions; all clips by default.
            counts: (clips,) how often each of these occurs, instead of repetitions.

        Returns:
            ρ (runs, labels).
        """
        return np.concatenate([part.rhos(clips, counts) for part in self.parts], axis=1)

    def ranks(self, clips=slice(None), counts=1):
        """
        Args:
            clips, counts: as in `__call__`.

        Returns:
            Ranks minus their mean (1 + runs, labels, clips), with those of the references first, and the weight of each
            (labels, clips): how often the clip occurs, or 0 where its share is unknown and its ranks are meaningless.
        """
        ranks, weights = zip(*(part.ranks(clips, counts) for part in self.parts), strict=True)
        return np.concatenate(ranks, axis=1), np.concatenate(weights)


class _LabelsAtOnce:
    """Some labels of `ResampledSpearman`, which are computed together; it has the same arguments."""

    def __init__(self, predictions, references):
        self.runs, _, self.labels = predictions.shape
        self.known = (~np.isnan(references)).T.astype(np.float64, order="C")  # (labels, clips)
        # (columns, clips): the labels of the references, then those of each run.
        columns = np.concatenate([references[None], predictions]).swapaxes(1, 2).reshape(-1, len(references))
        order = np.argsort(columns, axis=1)
        in_order = np.take_along_axis(columns, order, axis=1)
        is_new = np.ones(columns.shape, dtype=bool)
        is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
        # The index of each value among the distinct values of all columns, which are numbered column after column.
        self.place = np.empty(columns.shape, dtype=np.intp)
        np.put_along_axis(self.place, order, np.cumsum(is_new).reshape(columns.shape) - 1, axis=1)
        self.num_places = int(is_new.sum())

    def rhos(self, clips, counts):
        ranks, weights = self.ranks(clips, counts)
        true, predicted = ranks[0], ranks[1:]
        weighted = weights * true
        products, true_spread = np.einsum("rlc,lc->rl", predicted, weighted), np.einsum("lc,lc->l", weighted, true)
        spread = np.einsum("rlc,rlc,lc->rl", predicted, predicted, weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            rhos = np.where(spread > 0, products / np.sqrt(spread * true_spread), 0.0)
        return np.where(true_spread > 0, np.clip(rhos, -1, 1), np.nan)

    def ranks(self, clips, counts):
        place, weights = self.place[:, clips], self.known[:, clips] * counts
        of_columns = np.concatenate([weights] * (1 + self.runs), axis=None)
        of_place = np.bincount(place.ravel(), of_columns, self.num_places)
        totals = np.concatenate([weights.sum(axis=1)] * (1 + self.runs))
        ranks = (np.cumsum(of_place) - of_place / 2)[place]
        ranks -= (np.cumsum(totals) - totals / 2)[:, None]
        return ranks.reshape(1 + self.runs, self.labels, -1), weights


def resamples(clips, groups, bootstrap, seed):
    """
    Yields the indices of the clips in each of `bootstrap` resamples of clips, or of whole groups. A single group has no
    resamples, because it shows no variation between groups.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        for _ in range(bootstrap):
            yield rng.integers(clips, size=clips)
        return
    members = {}
    for clip, group in enumerate(groups):
        members.setdefault(group, []).append(clip)
    members = [np.array(own) for own in members.values()]
    for _ in range(bootstrap if len(members) > 1 else 0):
        yield np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])


def resampled_counts(clips, groups, bootstrap, seed):
    """Yields how often each clip occurs, (clips,), in each of the `resamples`."""
    for draw in resamples(clips, groups, bootstrap, seed):
        yield np.bincount(draw, minlength=clips)


def bootstrapped(rhos_of, clips=slice(None), groups=None, bootstrap=0, seed=0, averaged=True):
    """
    ρ over some clips and over their resamples, averaged over the runs of `rhos_of`.

    Args:
        rhos_of: `ResampledSpearman`.
        clips: indices of the clips; all by default.
        groups: the group of each of these clips, to resample whole groups; `None` to resample clips.
        bootstrap, seed: number and seed of the resamples.
        averaged: (labels,) bool, the labels that the mean is over; all by default. Labels without a ρ are left out.

    Returns:
        ρ over the clips (1 + labels,), and over each resample (resamples, 1 + labels). The mean over the labels comes
        first; in resamples it is over the same labels as on the clips, or NaN, as in `mean_of_same`.
    """
    rhos = rhos_of(clips).mean(axis=0)
    draws = resampled_counts(len(rhos_of.clips[clips]), groups, bootstrap, seed)
    resampled = np.array([rhos_of(clips, counts).mean(axis=0) for counts in draws]).reshape(-1, len(rhos))
    averaged = averaged & ~np.isnan(rhos)
    means = mean_of_same(resampled, averaged)
    return np.append(mean_of_same(rhos, averaged), rhos), np.column_stack([means, resampled])


def mean_rho(rhos):
    """Mean over the labels, the last dimension, that have a ρ; NaN if none has."""
    known = ~np.isnan(rhos)
    counts = known.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return np.where(known, rhos, 0).sum(axis=-1) / counts


def mean_of_same(rhos, averaged):
    """
    Mean over the `averaged` labels, (labels,) bool, of the last dimension; NaN if any of them has no ρ, because means
    over different labels cannot be compared.
    """
    is_whole = (~np.isnan(rhos) | ~averaged).all(axis=-1)
    return np.where(is_whole, mean_rho(np.where(averaged, rhos, np.nan)), np.nan)


def percentile_interval(rhos):
    """The ends of the 95 % interval of ρ in resamples; NaN if no resample has a ρ."""
    if np.isnan(rhos).all():
        return [np.nan, np.nan]
    return [float(end) for end in np.nanpercentile(rhos, [2.5, 97.5])]


def _warn(predictions, references, rhos, label_names):
    for index, label in enumerate(label_names):
        known = ~np.isnan(references[:, index])
        if np.isnan(rhos[index]):
            warnings.warn(
                f"{label}: the references are constant or fewer than two; there is no Spearman's ρ for it", stacklevel=2
            )
        elif np.ptp(predictions[known, index]) == 0:
            warnings.warn(
                f"{label}: the prediction is the same for every clip; its Spearman's ρ counts as 0", stacklevel=2
            )


def _warn_of_resamples(resampled, rhos, label_names):
    if not len(resampled):
        warnings.warn("all clips belong to one group, so there is nothing to resample and no interval", stacklevel=2)
    reasons = ["have a label with constant references", *["have constant references"] * len(label_names)]
    for index, (label, reason) in enumerate(zip(["mean", *label_names], reasons, strict=True)):
        without = int(np.isnan(resampled[:, index]).sum())
        if without and not np.isnan(rhos[index]):
            warnings.warn(f"{label}: {without} of {len(resampled)} resamples {reason} and are left out", stacklevel=2)
