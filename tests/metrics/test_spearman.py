"""ρ of any subset of the clips, and its resamples, equal what the metric gives."""

import evaluate
import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import spearmanr

from emoshare.metrics.emotion_share_spearman.spearman import (
    ResampledSpearman,
    mean_rho,
    resampled_counts,
    resamples,
    spearman_scores,
)


def draw(rng, clips, runs=2):
    """Predictions (runs, clips, 4) and references (clips, 4) with ties, unknown shares, and constant columns."""
    predictions, references = rng.random((runs, clips, 4)).round(1), rng.random((clips, 4)).round(1)
    references[::7, 0] = np.nan
    references[: clips // 2, 1] = np.nan
    predictions[-1, :, 2] = 0.5
    references[: clips // 2, 3] = 0.25
    return predictions, references


def rho_by_scipy(predicted, true):
    known = ~np.isnan(true)
    if known.sum() < 2 or np.ptp(true[known]) == 0:
        return np.nan
    return spearmanr(predicted[known], true[known]).statistic if np.ptp(predicted[known]) else 0.0


def test_rho_among_any_clips_is_scipys():
    rng = np.random.default_rng(0)
    predictions, references = draw(rng, 60)
    rhos_of = ResampledSpearman(predictions, references)
    several_times = rng.integers(60, size=45)
    for clips in (
        np.arange(60),
        np.arange(30),
        several_times,
        np.repeat(several_times, 3),
        np.array([4]),
        np.array([4, 9]),
    ):
        expected = [[rho_by_scipy(run[clips, i], references[clips, i]) for i in range(4)] for run in predictions]
        np.testing.assert_allclose(rhos_of(clips), expected, atol=1e-12)
        counts = np.bincount(clips, minlength=60)
        np.testing.assert_array_equal(rhos_of(counts=counts), rhos_of(clips))
        np.testing.assert_array_equal(rhos_of(np.arange(20, 60), counts[20:]), rhos_of(clips[clips >= 20]))
    assert np.isnan(rhos_of(np.array([], dtype=int))).all()


def test_a_rho_is_exact_at_any_size():
    """Sums of ranks are whole or half numbers, so ρ of the clips is ρ of each of them three times, to the last bit."""
    rng = np.random.default_rng(1)
    predictions, references = rng.random((1, 30_000, 2)), rng.integers(0, 50, (30_000, 2)) / 49
    predictions[..., 1] += references[:, 1]
    rhos_of = ResampledSpearman(predictions, references)
    assert rhos_of()[0] == pytest.approx([rho_by_scipy(predictions[0, :, i], references[:, i]) for i in range(2)])
    order = rng.permutation(30_000)
    np.testing.assert_array_equal(ResampledSpearman(predictions[:, order], references[order])(), rhos_of())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_metric_gives_what_is_computed_without_it():
    predictions, references = draw(np.random.default_rng(2), 50, runs=1)
    options = {"bootstrap": 20, "seed": 3, "groups": [clip // 5 for clip in range(50)], "within_clips": True}
    metric = evaluate.load(str(ROOT / "metrics" / "emotion_share_spearman"))
    by_metric = metric.compute(predictions=predictions[0], references=references, **options)
    computed = spearman_scores(predictions[0], references, **options)
    assert list(computed) == list(by_metric)
    for name, score in computed.items():
        np.testing.assert_array_equal(score, by_metric[name], err_msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_intervals_are_those_of_the_resampled_clips():
    predictions, references = draw(np.random.default_rng(4), 40, runs=1)
    for groups in (None, [clip // 4 for clip in range(40)]):
        scores = spearman_scores(predictions[0], references, ["a", "b", "c", "d"], 25, 6, groups)
        rhos = [
            [rho_by_scipy(predictions[0, clips, i], references[clips, i]) for i in range(4)]
            for clips in resamples(40, groups, 25, 6)
        ]
        columns = {
            "spearman": np.nanmean(rhos, axis=1),
            "spearman_a": np.array(rhos)[:, 0],
            "spearman_d": np.array(rhos)[:, 3],
        }
        for name, column in columns.items():
            assert scores[f"{name}_ci95"] == pytest.approx(list(np.nanpercentile(column, [2.5, 97.5])), abs=1e-12)


def test_groups_are_drawn_whole():
    groups = np.array(["eve", "adam", "eve", "ida", "eve", "ida"])
    draws = list(resampled_counts(6, groups, 200, 0))
    for counts in draws:
        assert len({counts[0], counts[2], counts[4]}) == len({counts[3], counts[5]}) == 1
        assert counts[0] + counts[1] + counts[3] == 3  # as many groups as there are
    assert {tuple(counts[[0, 1, 3]]) for counts in draws} >= {(1, 1, 1), (3, 0, 0), (0, 1, 2)}
    assert list(resampled_counts(6, ["eve"] * 6, 200, 0)) == []  # one group says nothing about others


def test_the_mean_is_over_the_labels_that_have_a_rho():
    assert mean_rho(np.array([0.5, np.nan, 0.25])) == 0.375
    np.testing.assert_array_equal(mean_rho(np.array([[np.nan, np.nan], [1.0, 0.0]])), [np.nan, 0.5])
