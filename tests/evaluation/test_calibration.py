import numpy as np
import pytest

from emoshare.evaluation.calibration import LEVELS, calibration_of
from emoshare.evaluation.figures import plot_calibration
from emoshare.evaluation.predictions import VotePredictions
from emoshare.votes_emoshare import log_likelihood


def panels(clips=1500, concentration=15.0, seed=0):
    """Correct predictions, true shares, and numbers of listeners."""
    rng = np.random.default_rng(seed)
    shares, listeners = rng.beta(2, 2, (clips, 2)), rng.integers(3, 21, clips).astype(float)
    probabilities = rng.beta(shares * concentration, (1 - shares) * concentration)
    true = rng.binomial(listeners[:, None].astype(int), probabilities) / listeners[:, None]
    return VotePredictions(shares, np.full(shares.shape, concentration)), true, listeners


def test_a_model_that_knows_how_sure_it_is_is_calibrated():
    predictions, true, listeners = panels()
    calibration = calibration_of(predictions, true.round(4), listeners)  # as label files have them
    np.testing.assert_allclose(calibration.predicted, calibration.true, atol=0.05)
    assert calibration.error < 0.02
    np.testing.assert_allclose(calibration.held, calibration.stated, atol=0.03)
    assert np.all(np.diff(calibration.predicted) > 0)
    assert 0.88 < calibration.stated[-1] < 0.92
    votes = true * listeners[:, None]
    expected = log_likelihood(votes, listeners[:, None], *predictions).mean()
    assert calibration.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_a_model_that_is_too_sure_or_predicts_too_much_shows_it():
    predictions, true, listeners = panels()
    honest = calibration_of(predictions, true, listeners)
    too_sure = calibration_of(VotePredictions(predictions.shares, predictions.concentrations * 30), true, listeners)
    assert too_sure.held[-1] < too_sure.stated[-1] - 0.05
    assert too_sure.error == honest.error
    too_high = VotePredictions(np.sqrt(predictions.shares), predictions.concentrations)
    assert calibration_of(too_high, true, listeners).error > honest.error + 0.1
    for worse in (too_sure, calibration_of(too_high, true, listeners)):
        assert worse.log_likelihood < honest.log_likelihood


def test_what_is_not_known_does_not_count():
    predictions, true, listeners = panels(60)
    expected = calibration_of(VotePredictions(*(values[:40] for values in predictions)), true[:40], listeners[:40])
    listeners[40:50], true[50:] = np.nan, np.nan
    assert calibration_of(predictions, true, listeners) == expected
    assert calibration_of(predictions, true, np.full(60, np.nan)) is None
    assert calibration_of(predictions, np.full((60, 2), np.nan), listeners) is None


def test_it_is_written_and_drawn(tmp_path):
    calibration = calibration_of(*panels(30))
    values = calibration.as_dict()
    assert list(values["intervals"]) == [f"{level:.0%}" for level in LEVELS]
    assert values["intervals"]["90%"] == {"stated": calibration.stated[-1], "held": calibration.held[-1]}
    plot_calibration(tmp_path / "c.svg", {"devel": calibration, "test": calibration}, "Calibration")
    text = (tmp_path / "c.svg").read_text()
    for part in ("Calibration", "devel", "test", "predicted share", "mean share of listeners"):
        assert f"<!-- {part} -->" in text
