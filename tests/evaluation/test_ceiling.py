import numpy as np
import pytest
from scipy.stats import spearmanr

from emoshare.dataset_script.synthetic import AFFECT_TO_EMOTION, MEAN_LOGIT
from emoshare.evaluation.ceiling import NoiseCeiling, noise_ceiling
from emoshare.evaluation.scores import MEAN

CLIPS = 2000
LABELS = [f"label {number}" for number in range(9)]


def even(rng):
    return rng.beta([0.5, 0.6, 0.8, 1, 1, 1.5, 2, 2, 3], [2, 2.5, 2, 1, 3, 4, 2, 5, 3], size=(CLIPS, 9))


def rare(rng):
    """As in CREMA-D: in most clips hardly anybody hears an emotion, in a few nearly everybody."""
    logits = rng.normal(0, 1.2, size=(CLIPS, 9))
    logits[np.arange(CLIPS), rng.integers(9, size=CLIPS)] += 3
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def simulated_listeners(rng):
    return 1 / (1 + np.exp(-(rng.standard_normal((CLIPS, 4)) @ AFFECT_TO_EMOTION.T + MEAN_LOGIT)))


def panels_of(listeners, rng):
    if listeners == "3 to 20":
        return rng.integers(3, 21, size=CLIPS)
    return np.full(CLIPS, listeners)


@pytest.mark.parametrize("listeners", [3, 4, 5, 7, 10, 14, 20, "3 to 20"])
@pytest.mark.parametrize("draw", [even, rare, simulated_listeners])
def test_the_ceiling_is_the_correlation_of_true_probabilities_with_drawn_shares(draw, listeners):
    rng = np.random.default_rng(1)
    probabilities, panels = draw(rng), panels_of(listeners, rng)
    shares = rng.binomial(panels[:, None], probabilities) / panels[:, None]
    true = np.mean([spearmanr(*columns).statistic for columns in zip(probabilities.T, shares.T, strict=True)])
    ceiling = noise_ceiling(shares, panels.astype(float), LABELS)
    assert ceiling.rhos[MEAN] == pytest.approx(true, abs=0.02)
    assert ceiling.rhos[MEAN] == pytest.approx(np.mean([ceiling.rhos[label] for label in LABELS]))
    assert ceiling.clips == CLIPS


def test_each_label_has_its_ceiling():
    rng = np.random.default_rng(2)
    probabilities = np.stack([rng.beta(1, 1, CLIPS), rng.beta(5, 9, CLIPS), np.full(CLIPS, 0.0)], axis=1)
    shares = rng.binomial(9, probabilities) / 9
    rhos = noise_ceiling(shares, np.full(CLIPS, 9.0), ["wide", "narrow", "never"]).rhos
    for index, label in enumerate(["wide", "narrow"]):
        assert rhos[label] == pytest.approx(spearmanr(probabilities[:, index], shares[:, index]).statistic, abs=0.03)
    assert rhos[MEAN] == pytest.approx((rhos["wide"] + rhos["narrow"]) / 2)
    assert "never" not in rhos


def test_clips_and_shares_that_are_not_known_are_left_out():
    rng = np.random.default_rng(3)
    listeners = rng.integers(3, 12, size=400).astype(float)
    shares = rng.binomial(listeners.astype(int)[:, None], rng.random((400, 2))) / listeners[:, None]
    expected = noise_ceiling(shares[:300], listeners[:300], ["joy", "awe"])
    shares[300:] = rng.random((100, 2))  # of nobody knows how many
    listeners[300:] = np.nan
    assert noise_ceiling(shares, listeners, ["joy", "awe"]) == expected
    shares[:50, 1] = np.nan
    partly = noise_ceiling(shares, listeners, ["joy", "awe"]).rhos
    assert partly["joy"] == expected.rhos["joy"]
    assert partly["awe"] == noise_ceiling(shares[50:], listeners[50:], ["joy", "awe"]).rhos["awe"]


@pytest.mark.parametrize("decimals", [2, 3, 4])
@pytest.mark.parametrize("listeners", [7, 20, 45])
def test_rounded_shares_are_votes(decimals, listeners):
    rng = np.random.default_rng(4)
    shares = rng.binomial(listeners, rng.random((200, 1))) / listeners
    panels = np.full(200, float(listeners))
    rounded = noise_ceiling(shares.round(decimals), panels, ["joy"])
    assert rounded.rhos["joy"] == pytest.approx(noise_ceiling(shares, panels, ["joy"]).rhos["joy"], abs=1e-9)


def test_what_is_no_share_of_whole_votes_has_no_ceiling_and_says_why():
    rng = np.random.default_rng(5)
    votes = rng.binomial(9, rng.random((100, 2)))
    shares, panels = votes / 9, np.full(100, 9.0)
    weighted = shares.copy()
    weighted[0, 0] = 0.4
    for given, listeners, reason in [
        (weighted, panels, "1 of 200 shares are not a whole number of their listeners' votes"),
        (shares[:29], panels[:29], "the listeners of only 29 clips are known; expected 30 or more"),
        (np.ones((100, 2)), panels, "every label has the same share for all clips"),
        ((votes > 4).astype(float), np.ones(100), "no clip has two or more listeners"),
    ]:
        ceiling = noise_ceiling(given, listeners, ["joy", "awe"])
        assert (ceiling.rhos, ceiling.reason) == ({}, reason)
        assert ceiling.text == f"No noise ceiling: {reason}."
    nobody = noise_ceiling(shares, np.full(100, np.nan), ["joy", "awe"])
    assert (nobody, nobody.text) == (NoiseCeiling(), "")
    assert "perfect predictor would have a mean rho of about 0." in noise_ceiling(shares, panels, ["joy", "awe"]).text
