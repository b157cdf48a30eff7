"""Spearman's ρ per emotion and its mean: the score of the ComParE 2023 Emotion Share sub-challenge."""

import warnings

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

INTERVAL = "_ci95"  # ends the name of an interval
WITHIN_CLIPS = "within_clip_spearman"

_DESCRIPTION = """
Spearman's rank correlation ρ between predicted and true shares, per label and averaged over labels: the score of the
ACM Multimedia 2023 Computational Paralinguistics Challenge (ComParE), Emotion Share sub-challenge.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (array-like of shape (n, labels)): predicted shares; must be finite.
    references (array-like of shape (n, labels)): true shares; `None` or NaN where a share is not known, which leaves
        that clip out for that label.
    label_names (list of str): names of the labels; "0", "1", ... if not given.
    bootstrap (int): number of resamples of the clips for 95 % confidence intervals (percentiles); 0 for none.
    seed (int): seed of the resampling.
    groups (list): what each clip belongs to, such as its speaker; the resamples are then of whole groups, for clips of
        a group are not independent of each other. Resamples of single clips if not given.
    within_clips (bool): whether to return `within_clip_spearman`, too.

Returns:
    spearman (float): mean ρ over the labels that have one.
    spearman_<label> (float): ρ of one label. Ties get their mean rank, as in SciPy. A constant prediction counts as 0,
        with a warning. Constant references, or fewer than two, give no ρ: NaN, with a warning, left out of the mean.
    spearman_ci95, spearman_<label>_ci95 (list of float): with bootstrap, lower and upper end of the interval.
    within_clip_spearman (float): with within_clips, another figure, which is not the challenge's and cannot be compared
        with it: ρ between the labels of one clip (which emotions are stronger in it than others), mean over the clips.
        It can be high for a model that gives every clip the same shares, if they are the average ones. A clip with
        constant predictions counts as 0; one with constant references, or fewer than two, is left out. With bootstrap,
        within_clip_spearman_ci95.

Examples:
    >>> metric = evaluate.load("metrics/emotion_share_spearman")
    >>> metric.compute(predictions=[[0.1, 0.9], [0.2, 0.8], [0.3, 0.1]], references=[[0, 1], [0.5, 0.2], [1, 0]])
    {'spearman': 1.0, 'spearman_0': 1.0, 'spearman_1': 1.0}
    >>> metric.compute(predictions=[[0.1, 0.9], [0.2, 0.8]], references=[[0, 1], [1, 0]], within_clips=True)
    {'spearman': 1.0, 'spearman_0': 1.0, 'spearman_1': 1.0, 'within_clip_spearman': 0.0}
"""

_CITATION = """
@inproceedings{schuller2023compare,
  title = {The {ACM} Multimedia 2023 Computational Paralinguistics Challenge: Emotion Share & Requests},
  author = {Schuller, Bj{\\"o}rn W. and Batliner, Anton and Amiriparian, Shahin and others},
  year = {2023},
  note = {arXiv:2304.14882},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EmotionShareSpearman(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references, label_names=None, bootstrap=0, seed=0, groups=None, within_clips=False):
        predictions, references = _matrix(predictions, "predictions"), _matrix(references, "references")
        if predictions.shape != references.shape:
            raise ValueError(f"predictions have shape {predictions.shape}, references {references.shape}")
        if not np.isfinite(predictions).all():
            raise ValueError(f"{int((~np.isfinite(predictions)).sum())} predictions are NaN or infinite")
        if label_names is None:
            label_names = [str(index) for index in range(predictions.shape[1])]
        if len(set(label_names)) != predictions.shape[1]:
            raise ValueError(f"label_names has {len(set(label_names))} names for {predictions.shape[1]} labels")
        names = ["spearman", *(f"spearman_{label}" for label in label_names)]
        clashing = [name for name in names if name.endswith(INTERVAL) and name.removesuffix(INTERVAL) in names]
        if clashing:
            raise ValueError(f"label_names: {clashing} would be both a score and the interval of another one")
        if bootstrap < 0:
            raise ValueError(f"bootstrap is {bootstrap}; expected a number of resamples")

        if groups is not None and len(groups) != len(predictions):
            raise ValueError(f"groups has {len(groups)} entries for {len(predictions)} clips")

        rhos = _spearman(predictions, references)
        _warn(predictions, references, rhos, label_names)
        intervals = None
        if bootstrap:
            draws = resamples(len(predictions), groups, bootstrap, seed)
            resampled = [_spearman(predictions[draw], references[draw]) for draw in draws]
            resampled = np.array(resampled).reshape(-1, len(rhos))
            _warn_of_resamples(resampled, rhos, label_names)
            intervals = [
                percentile_interval(_mean(resampled)),
                *(percentile_interval(column) for column in resampled.T),
            ]

        scores = {}
        for index, (name, rho) in enumerate(zip(names, [_mean(rhos), *rhos], strict=True)):
            scores[name] = float(rho)
            if intervals is not None:
                scores[name + INTERVAL] = intervals[index]
        if within_clips:
            of_clips = _spearman(predictions.T, references.T)
            scores[WITHIN_CLIPS] = float(_mean(of_clips))
            if bootstrap:
                draws = resamples(len(predictions), groups, bootstrap, seed)
                scores[WITHIN_CLIPS + INTERVAL] = percentile_interval(
                    np.array([_mean(of_clips[draw]) for draw in draws])
                )
        return scores


def _matrix(rows, name):
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or widths == [0]:
        raise ValueError(f"{name} have rows of {widths} values; expected as many in each row, at least one")
    return np.array(rows, dtype=np.float64)  # None becomes NaN


def resamples(clips, groups, bootstrap, seed):
    """
    The indices of the clips in each of `bootstrap` resamples: of clips, or of whole groups. There are none of a single
    group, which says nothing about others.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        for _ in range(bootstrap):
            yield rng.integers(clips, size=clips)
        return
    members = {}
    for clip, group in enumerate(groups):
        members.setdefault(group, []).append(clip)
    members = list(members.values())
    for _ in range(bootstrap if len(members) > 1 else 0):
        yield np.concatenate([members[group] for group in rng.integers(len(members), size=len(members))])


def _spearman(predictions, references):
    """ρ per label (labels,): NaN without ρ (references constant or fewer than two), 0 for a constant prediction."""
    known = ~np.isnan(references)
    if known.all():
        return _correlate(rankdata(predictions, axis=0), rankdata(references, axis=0))
    return np.array(
        [
            _spearman(predictions[rows, label, None], references[rows, label, None])[0] if rows.sum() > 1 else np.nan
            for label, rows in enumerate(known.T)
        ]
    )


def _correlate(predicted, true):
    """Pearson's r of the ranks, column by column."""
    predicted = predicted - predicted.mean(axis=0)
    true = true - true.mean(axis=0)
    spread = np.sqrt((predicted**2).sum(axis=0) * (true**2).sum(axis=0))
    with np.errstate(invalid="ignore"):
        rho = np.where(spread > 0, (predicted * true).sum(axis=0) / spread, 0.0)
    return np.where((true**2).sum(axis=0) > 0, np.clip(rho, -1, 1), np.nan)


def _mean(rhos):
    """Mean over the labels that have a ρ; NaN if none has."""
    known = ~np.isnan(rhos)
    counts = known.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return np.where(known, rhos, 0).sum(axis=-1) / counts


def percentile_interval(rhos):
    """The ends of the 95 % interval, from ρ in resamples; NaN where no resample has one."""
    if np.isnan(rhos).all():
        return [float("nan"), float("nan")]
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
    for index, label in enumerate(label_names):
        without = int(np.isnan(resampled[:, index]).sum())
        if without and not np.isnan(rhos[index]):
            warnings.warn(
                f"{label}: {without} of {len(resampled)} resamples have constant references and are left out",
                stacklevel=2,
            )
