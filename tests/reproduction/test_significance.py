import math

import numpy as np
import pytest

from emoshare.evaluation.scores import MEAN, Scorer
from emoshare.reproduction.significance import ResampledSpearman, paired_difference


def shares(rng, *shape, decimals=1):
    return np.round(rng.random(shape), decimals)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rho_of_a_resample_is_the_metrics():
    """With ties in both, unknown references, constant predictions and constant references."""
    rng = np.random.default_rng(0)
    references, predictions = shares(rng, 60, 4), shares(rng, 2, 60, 4)
    references[:30, 1] = np.nan
    predictions[1, :, 2] = 0.5
    references[:, 3] = 0.25
    labels = ["joy", "awe", "envy", "relief"]
    for draw in [np.arange(60), rng.integers(60, size=60), rng.integers(60, size=60)]:
        counts = np.bincount(draw, minlength=60)
        for run, prediction in enumerate(predictions):
            expected = Scorer(references[draw], labels).rhos(prediction[draw], [0, 1, 2, 3])
            for index in range(4):
                rhos = ResampledSpearman(predictions[:, :, index], references[:, index]).rhos(counts)
                assert rhos[run] == pytest.approx(expected[index], nan_ok=True)


def test_an_interval_covers_the_difference_of_two_systems():
    """Two systems of many runs, so that the clips alone scatter: 95 % of devel sets give an interval that covers."""
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
    """Systems whose errors are the same differ by little, however much each scatters."""
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
