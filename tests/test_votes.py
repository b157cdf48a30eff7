"""What a panel would vote: the probability of votes, and intervals of shares."""

import numpy as np
import pytest
from scipy.stats import betabinom

from emoshare.votes_emoshare import log_likelihood, share_intervals

RNG = np.random.default_rng(0)
SHARES, CONCENTRATIONS = RNG.beta(1.5, 2.5, 400), np.exp(RNG.uniform(0, 6, 400))


def test_the_likelihood_is_that_of_scipy():
    votes, listeners = RNG.integers(0, 8, 400), RNG.integers(8, 30, 400)
    expected = betabinom.logpmf(votes, listeners, SHARES * CONCENTRATIONS, (1 - SHARES) * CONCENTRATIONS)
    np.testing.assert_allclose(log_likelihood(votes, listeners, SHARES, CONCENTRATIONS), expected, atol=1e-9)
    assert np.isfinite(log_likelihood(2.5, 7, np.array([0.0, 1.0]), 3.0)).all()


@pytest.mark.parametrize("listeners", [1, 3, 7])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_an_interval_is_the_most_probable_one_of_the_width_whose_probability_is_nearest(level, listeners):
    low, high, held = share_intervals(SHARES, CONCENTRATIONS, listeners, level)
    for clip in range(40):
        of_clip = betabinom(listeners, SHARES[clip] * CONCENTRATIONS[clip], (1 - SHARES[clip]) * CONCENTRATIONS[clip])
        probabilities = of_clip.pmf(range(listeners + 1))
        best = [
            max((probabilities[start : start + width].sum(), start, width) for start in range(listeners + 2 - width))
            for width in range(1, listeners + 2)
        ]
        probability, start, width = min(best, key=lambda interval: abs(interval[0] - level))
        assert held[clip] == pytest.approx(probability)
        assert (low[clip], high[clip]) == pytest.approx((start / listeners, (start + width - 1) / listeners))


def test_intervals_hold_the_shares_of_nine_panels_in_ten():
    """For panels of 3 to 20. Intervals between quantiles would contain 96 % of these."""
    drawn = np.random.default_rng(1)
    within, stated = [], []
    for listeners in range(3, 21):
        low, high, held = share_intervals(SHARES, CONCENTRATIONS, listeners)
        first, second = SHARES * CONCENTRATIONS, (1 - SHARES) * CONCENTRATIONS
        shares = betabinom.rvs(listeners, first, second, size=(5, 400), random_state=drawn) / listeners
        within.append(np.mean((low <= shares) & (shares <= high)))
        stated.append(held.mean())
    assert 0.89 < np.mean(within) < 0.92
    np.testing.assert_allclose(within, stated, atol=0.03)


def test_more_listeners_and_higher_concentrations_make_narrower_intervals():
    def width(concentration, listeners):
        low, high, held = share_intervals(np.array([[0.3, 0.6]]), np.full((1, 2), concentration), listeners)
        assert held.shape == (1, 2)
        return (high - low).max()

    assert width(50.0, 10_000) < width(50.0, 20) < width(5.0, 20)
    # With endless listeners, what is left is the Beta distribution's own spread.
    assert width(50.0, 10_000) == pytest.approx(2 * 1.645 * np.sqrt(0.25 / 51), rel=0.05)
