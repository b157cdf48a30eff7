"""Spearman's ρ per emotion and its mean: the score of the ComParE 2023 Emotion Share sub-challenge."""

import datasets
import evaluate

from .spearman import spearman_scores

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
    groups (list): the group of each clip, such as its speaker, to resample whole groups, because clips of a group are
        not independent. Single clips are resampled if not given.
    within_clips (bool): whether to also return `within_clip_spearman`.

Returns:
    spearman (float): mean ρ over the labels that have one.
    spearman_<label> (float): ρ of one label. Ties get their mean rank, as in SciPy. A constant prediction counts as 0,
        with a warning. Constant references, or fewer than two, give no ρ: NaN, with a warning, left out of the mean.
    spearman_ci95, spearman_<label>_ci95 (list of float): with bootstrap, lower and upper end of the interval. A
        resample in which a label's references are constant is left out of the intervals of that label and of the mean,
        with a warning. If all clips belong to one group, the ends are NaN, with a warning.
    within_clip_spearman (float): with within_clips, ρ over the labels of one clip (which of its emotions are stronger
        than others), averaged over the clips. It is not the challenge's score and cannot be compared with it. It can be
        high for a model that predicts the average shares for every clip. A clip with constant predictions counts as 0;
        one with constant references, or fewer than two, is left out. With bootstrap, also within_clip_spearman_ci95.

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

    def _compute(self, predictions, references, **options):
        return spearman_scores(predictions, references, **options)
