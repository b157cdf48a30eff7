"""Spearman's ρ of predicted shares: computed as in the metric, printed, and written to the files of a run."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dataset_script.whole_files import whole_file
from ..metrics.emotion_share_spearman.spearman import INTERVAL, bootstrapped, percentile_interval, spearman_scores
from .selections import SELECTIONS

RESULTS = "eval_results.json"  # written last: its presence marks a finished run
HISTORY = "training_history.csv"

MEAN = None  # key of the mean over the labels; not a string, because a label may have any name

PREFIX = "eval_"  # of the metric's names in eval_results.json
MADE_FROM = "made_from"
LEFT_OUT = "clips_left_out"
CALIBRATION = "calibration"
CEILING = "noise_ceiling"
GROUPS = "groups"
OF_FOLD = "test"

# Shares that are closer than this differ only by float32 rounding. Those of an untrained head that is not dead may
# be as close as 1e-5.
CONSTANT_SPREAD = 1e-7


@dataclass(frozen=True)
class Score:
    """Spearman's ρ and the ends of its 95 % interval; NaN if it does not exist."""

    rho: float
    low: float = math.nan
    high: float = math.nan


class Scorer:
    """
    The challenge's score of predicted shares against a split's true shares, with the code of
    `metrics/emotion_share_spearman`, but without the metric's copy of its inputs to Arrow.

    Args:
        references: (clips, labels) true shares, NaN where unknown.
        labels: label names.
    """

    def __init__(self, references, labels):
        self.references = references
        self.labels = labels

    def scores(self, predictions, bootstrap=0, seed=0, groups=None):
        """
        Args:
            predictions: (clips, labels) predicted shares.
            bootstrap: number of resamples for the intervals; 0 for none.
            seed: seed of the resampling.
            groups: (clips,) the group of each clip, such as its speaker, to resample whole groups; `None` resamples
                clips.

        Returns:
            `dict[str | None, Score]`: scores of `MEAN` and of each label.
        """
        values = spearman_scores(predictions, self.references, self.labels, bootstrap, seed, groups)
        return {label: _score(values, metric_name(label)) for label in (MEAN, *self.labels)}

    def rhos(self, predictions, labels):
        """Spearman's ρ (n,) of predictions (clips, n) for the labels with these n indices."""
        names = [self.labels[index] for index in labels]
        values = spearman_scores(predictions, self.references[:, labels], names)
        return np.array([values[metric_name(name)] for name in names])


def bootstrapped_scores(rhos_of, labels, *resampling, **options):
    """
    Scores as of `Scorer.scores`, averaged over the runs of a `ResampledSpearman`, without checks and warnings.

    Args:
        rhos_of: `ResampledSpearman`.
        labels: label names.
        resampling, options: further arguments of `bootstrapped`.

    Returns:
        `dict[str | None, Score]`: scores of `MEAN` and of each label.
    """
    rhos, resampled = bootstrapped(rhos_of, *resampling, **options)
    columns = zip((MEAN, *labels), rhos, resampled.T, strict=True)
    return {label: Score(float(rho), *percentile_interval(column)) for label, rho, column in columns}


def metric_name(label):
    """The name of a label's ρ, or that of the mean, in the metric's result."""
    return "spearman" if label is MEAN else f"spearman_{label}"


def _score(values, name):
    """The `Score` of this name in a result of the metric, or in JSON, where NaN is `None`."""
    numbers = (values[name], *values.get(name + INTERVAL, ()))
    return Score(*(math.nan if number is None else number for number in numbers))


def write_scores(path, scores, made_from=None, left_out=0, ceiling=None, groups=None, calibrations=None, of_fold=None):
    """
    Writes scores as JSON, under the metric's names with the prefix `eval_`. A score that does not exist (NaN) becomes
    null. If no score has an interval, none is written; an argument that is `None`, 0 or empty adds no key.

    Args:
        path: path of the file.
        scores: what `Scorer.scores` returned.
        made_from: what `Corpus.fingerprints` returned, under `made_from`.
        left_out: number of clips that could not be predicted and are not in the scores, under `clips_left_out`.
        ceiling: `NoiseCeiling`, under `noise_ceiling`, by the metric's names.
        groups: what `groups.as_json` returned, by fact, under `groups`.
        calibrations: `Calibration`s by split, of a model that predicts concentrations, under `calibration`.
        of_fold: what `Scorer.scores` returned on test, if test is a fold, under `test`, by the metric's names.
    """
    has_intervals = any(not math.isnan(end) for score in scores.values() for end in (score.low, score.high))
    values = {}
    for label, score in scores.items():
        values[PREFIX + metric_name(label)] = number_or_null(score.rho)
        if has_intervals:
            values[PREFIX + metric_name(label) + INTERVAL] = [number_or_null(score.low), number_or_null(score.high)]
    if made_from is not None:
        values[MADE_FROM] = made_from
    if left_out:
        values[LEFT_OUT] = left_out
    if ceiling is not None and ceiling.rhos:
        values[CEILING] = {metric_name(label): rho for label, rho in ceiling.rhos.items()}
    if groups:
        values[GROUPS] = groups
    if calibrations:
        values[CALIBRATION] = {split: calibration.as_dict() for split, calibration in calibrations.items()}
    if of_fold is not None:
        values[OF_FOLD] = {metric_name(label): number_or_null(score.rho) for label, score in of_fold.items()}
    with whole_file(path, encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def number_or_null(number):
    """The number, or `None` for NaN, which JSON does not have."""
    return None if math.isnan(number) else number


def read_scores(path, labels):
    """
    Args:
        path: JSON file that `write_scores` wrote.
        labels: label names.

    Returns:
        `dict[str | None, Score]`: scores of `MEAN` and of each label.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it does not contain the scores of these labels.
    """
    values = _read_results(path)
    for label in (MEAN, *labels):
        if PREFIX + metric_name(label) not in values:
            raise ValueError(
                f"{path}: has no {PREFIX + metric_name(label)!r}; expected the scores of {', '.join(labels)}"
            )
        _check_numbers(path, values, PREFIX + metric_name(label))
    return {label: _score(values, PREFIX + metric_name(label)) for label in (MEAN, *labels)}


def _check_numbers(path, values, name):
    """Raises ValueError if a score or its interval in a JSON file is not in the form that `write_scores` gives it."""
    rho, interval = values[name], values.get(name + INTERVAL, [None, None])
    if not _is_number_or_null(rho):
        raise ValueError(f"{path}: {name} is {rho!r}; expected a number or null")
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number_or_null, interval))):
        raise ValueError(f"{path}: {name + INTERVAL} is {interval!r}; expected two numbers, or [null, null]")


def _is_number_or_null(value):
    return value is None or type(value) in (int, float)


def read_made_from(path):
    """
    Args:
        path: JSON file that `write_scores` wrote.

    Returns:
        `Corpus.fingerprints` of the corpus that the results were made from; `None` in results of earlier versions,
        which did not record it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not JSON or is cut off.
    """
    return _read_results(path).get(MADE_FROM)


def _read_results(path):
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not results: {values!r}")
    return values


def is_constant(shares):
    """
    Which labels have the same share for every clip, (labels,) bool, from shares (clips, labels). With a single clip,
    none of them.
    """
    return (np.ptp(shares, axis=0) < CONSTANT_SPREAD) & (len(shares) > 1)


def score_table(scores, notes=None, ceiling=None):
    """
    Args:
        scores: what `Scorer.scores` returned.
        notes: text to add after a label's score, by label.
        ceiling: `NoiseCeiling`, shown after the interval of each label that has one.

    Returns:
        `str`: a line for the mean and one for each label, with 95 % intervals if there are any.
    """
    lines = []
    for label, score in scores.items():
        interval = "" if math.isnan(score.low) else f"   95 % CI {score.low:.3f} to {score.high:.3f}"
        name = "mean" if label is MEAN else label
        highest = f"   ceiling {ceiling.rhos[label]:.3f}" if ceiling is not None and label in ceiling.rhos else ""
        lines.append(f"  {name:<15} {score.rho:.3f}{interval}{highest}{(notes or {}).get(label, '')}")
    return "\n".join(lines)


def report(scores, shares, best_epochs, ceiling, accelerator, selection="best_epoch"):
    """
    Prints the devel scores of a run, the noise ceiling, the epoch of each emotion's weights, and the dead heads.

    Args:
        scores: what `Scorer.scores` returned.
        shares: (clips, labels) predicted devel shares.
        best_epochs: the epoch of each label's weights, 0 if there was no ρ to select by.
        ceiling: `NoiseCeiling` of devel.
        accelerator: `accelerate.Accelerator`.
        selection: the run's `--selection`.
    """
    labels = [label for label in scores if label is not MEAN]
    dead = [label for label, is_dead in zip(labels, is_constant(shares), strict=True) if is_dead]
    notes = {
        label: (f"   epoch {epoch}" if epoch else "   last epoch: no rho to select by")
        + ("   dead" if label in dead else "")
        for label, epoch in zip(labels, best_epochs, strict=True)
    }
    accelerator.print(f"\nSpearman's rho on devel ({SELECTIONS[selection].note})")
    accelerator.print(score_table(scores, notes, ceiling))
    if ceiling.text:
        accelerator.print(ceiling.text)
    if dead:
        accelerator.print(
            f"\nDead: {', '.join(dead)}. The head gives the same share for every clip, which counts as a rho of 0. If "
            "its last ReLU is always 0, a new run with --restart_dead_heads N re-initialises it with another seed, at "
            "most N times; with --output_activation sigmoid a head cannot die in this way."
        )


def write_history(path, history, labels, selected=None):
    """
    Writes the history of a training run as CSV.

    Args:
        path: path of the file.
        history: a tuple (epoch, index of the label, training loss of its head, ρ on devel) per epoch and label, as in
            `training.trainer.Progress`. A ρ that does not exist (NaN) is left empty.
        labels: label names.
        selected: the epoch of each label's weights, for a column `selected` that is 1 in this epoch and 0 in others;
            `None` leaves the column out.
    """
    with whole_file(path, newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", "label", "train_loss", "devel_spearman", *([] if selected is None else ["selected"])])
        for epoch, label, loss, rho in history:
            row = [epoch, labels[label], f"{loss:.6g}", "" if math.isnan(rho) else f"{rho:.6f}"]
            writer.writerow(row if selected is None else [*row, int(epoch == selected[label])])


def read_history(path):
    """
    Args:
        path: CSV file that `write_history` wrote.

    Returns:
        `dict[str, tuple[list[int], list[float]]]`: each label's epochs and their training losses; empty if there is no
        such file.
    """
    if not Path(path).is_file():
        return {}
    losses = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epochs, values = losses.setdefault(row["label"], ([], []))
            if row["train_loss"]:
                epochs.append(int(row["epoch"]))
                values.append(float(row["train_loss"]))
    return losses
