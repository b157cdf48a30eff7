import math

import numpy as np
import pytest

from emoshare.evaluation.scores import MEAN, Scorer
from emoshare.reproduction.significance import mean_scores, paired_difference


def shares(rng, *shape, decimals=1):
    return np.round(rng.random(shape), decimals)


def test_an_interval_covers_the_difference_of_two_systems():
    """Two systems with many runs, so that only the clips vary: the interval covers the truth for 95 % of devel sets."""
    rng = np.random.default_rng(1)

    def devel(clips):
        signal = rng.standard_normal((clips, 1))
        references = signal + rng.standard_normal((clips, 1))
        first = signal + rng.standard_normal((1, clips, 1)) * 1.2
        second = signal + rng.standard_normal((1, clips, 1)) * 0.8
        return first, second, references

    truth = paired_difference(*devel(200_000), resamples=1).value
    covered = 0
    for seed in range(60):
        difference = paired_difference(*devel(150), resamples=200, seed=seed)
        covered += difference.low <= truth <= difference.high
    assert 51 <= covered <= 60


def test_clips_are_drawn_together_for_both():
    """Systems with the same errors differ by little, however much each one varies."""
    rng = np.random.default_rng(2)
    references = rng.standard_normal((200, 1))
    first = references + 2 * rng.standard_normal((1, 200, 1))
    second = first + 0.01 * rng.standard_normal((1, 200, 1))
    difference = paired_difference(first, second, references, resamples=200)
    assert difference.high - difference.low < 0.02
    swapped = paired_difference(second, first, references, resamples=200)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low)
    )


def test_systems_may_have_different_numbers_of_seeds():
    rng = np.random.default_rng(3)
    references, first, second = shares(rng, 80, 2), shares(rng, 3, 80, 2), shares(rng, 1, 80, 2)
    labels = ["joy", "awe"]
    scores = [[Scorer(references, labels).scores(run)[MEAN].rho for run in system] for system in (first, second)]
    difference = paired_difference(first, second, references, resamples=10)
    assert difference.value == pytest.approx(np.mean(scores[1]) - np.mean(scores[0]))


def test_a_label_without_rho_counts_for_neither():
    rng = np.random.default_rng(5)
    references, first, second = shares(rng, 80, 2), shares(rng, 1, 80, 2), shares(rng, 1, 80, 2)
    alone = paired_difference(first[:, :, :1], second[:, :, :1], references[:, :1], resamples=20)
    references[:, 1] = 0.5
    assert paired_difference(first, second, references, resamples=20) == alone


def test_without_a_rho_there_is_no_difference():
    rng = np.random.default_rng(4)
    difference = paired_difference(shares(rng, 1, 9, 1), shares(rng, 1, 9, 1), np.full((9, 1), np.nan), resamples=10)
    assert all(math.isnan(value) for value in (difference.value, difference.low, difference.high))


def test_a_systems_scores_are_the_means_of_its_runs():
    rng = np.random.default_rng(6)
    references, predictions = shares(rng, 80, 2), shares(rng, 3, 80, 2)
    runs = [Scorer(references, ["joy", "awe"]).scores(run, bootstrap=20, seed=5) for run in predictions]
    scores = mean_scores(predictions, references, ["joy", "awe"])
    for label in (MEAN, "joy", "awe"):
        assert scores[label].rho == pytest.approx(np.mean([run[label].rho for run in runs]))
        assert math.isnan(scores[label].low)
    # One run, without groups: what the metric gives.
    alone = mean_scores(predictions[:1], references, ["joy", "awe"], resamples=20, seed=5)
    for label, score in runs[0].items():
        assert (alone[label].low, alone[label].high) == pytest.approx((score.low, score.high))


def test_a_label_without_rho_has_no_interval():
    rng = np.random.default_rng(7)
    references = np.column_stack([shares(rng, 30), np.full(30, 0.5)])
    scores = mean_scores(shares(rng, 1, 30, 2), references, ["joy", "envy"], resamples=10)
    assert all(math.isnan(value) for value in vars(scores["envy"]).values())
    assert scores[MEAN] == scores["joy"]


def test_an_interval_over_groups_covers_where_that_over_clips_does_not():
    """A model is right about some speakers and wrong about others: all 10 clips of a speaker agree."""
    rng = np.random.default_rng(8)

    def corpus(speakers):
        true = rng.standard_normal((speakers, 10))
        is_right = np.where(rng.random((speakers, 1)) < 0.8, 1, -1)
        predicted = is_right * true + rng.standard_normal((speakers, 10))
        return predicted.reshape(1, -1, 1), true.reshape(-1, 1), np.repeat(np.arange(speakers), 10)

    predicted, true, _ = corpus(2000)
    rho = mean_scores(predicted, true, ["joy"])[MEAN].rho
    covered = {"groups": 0, "clips": 0}
    for seed in range(40):
        predicted, true, groups = corpus(30)
        for over, own in {"groups": groups, "clips": None}.items():
            score = mean_scores(predicted, true, ["joy"], own, resamples=100, seed=seed)[MEAN]
            covered[over] += score.low <= rho <= score.high
    assert covered["groups"] >= 34
    assert covered["clips"] < 28


def test_a_difference_may_be_over_groups():
    rng = np.random.default_rng(9)
    references, first, second = shares(rng, 90, 1), shares(rng, 1, 90, 1), shares(rng, 1, 90, 1)
    groups = np.arange(90) // 30
    over_clips = paired_difference(first, second, references, resamples=50)
    over_groups = paired_difference(first, second, references, resamples=50, groups=groups)
    alone = paired_difference(first, second, references, resamples=50, groups=np.arange(90))
    assert over_groups.value == over_clips.value
    assert (over_groups.low, over_groups.high) != (over_clips.low, over_clips.high)
    assert alone == over_clips


def test_a_difference_is_of_the_same_labels_in_each_resample():
    """The systems differ in the rare label alone, and resamples without its only clip are left out."""
    rng = np.random.default_rng(10)
    references = np.column_stack([rng.random(60), np.eye(60)[0]])
    first, second = references + 0.01 * rng.random((1, 60, 2)), references + 0.01 * rng.random((1, 60, 2))
    second[0, :, 1] *= -1
    difference = paired_difference(first, second, references, resamples=100)
    assert difference.high < -0.2
