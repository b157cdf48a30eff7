from types import SimpleNamespace

import numpy as np
import pytest

from emoshare.evaluation.predictions import VotePredictions
from emoshare.training import concentrations
from emoshare.training.concentrations import fit_concentrations


class Head:
    """Gives these concentrations."""

    def __init__(self, values):
        self.concentrations = values

    def rescale_concentrations(self, factor, exponent=1.0):
        self.concentrations = factor * self.concentrations**exponent


def fitted(monkeypatch, true_concentrations, predicted, listeners=15, bias=0.0):
    """Predicted concentrations after they were fitted to a devel split, whose votes have the true ones."""
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.1, 0.9, predicted.shape)
    panel = np.full(len(shares), listeners, dtype=np.float32)
    number = np.nan_to_num(panel, nan=5)[:, None].astype(int)
    probabilities = rng.beta(shares * true_concentrations, (1 - shares) * true_concentrations)
    true = (rng.binomial(number, probabilities) / number).astype(np.float32)
    true[:100, 0] = np.nan
    head = Head(predicted)
    monkeypatch.setattr(concentrations, "predict_votes", lambda *_: VotePredictions(shares + bias, head.concentrations))
    loader = SimpleNamespace(store=SimpleNamespace(shares=true, listeners=panel))
    fit_concentrations(SimpleNamespace(heads=[head]), loader, SimpleNamespace(print=print))
    return head.concentrations


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_concentrations_become_as_high_as_the_votes_say(factor, monkeypatch):
    true = np.exp(np.random.default_rng(1).normal(2, 0.7, (3000, 2)))
    found = fitted(monkeypatch, true, true / factor)
    np.testing.assert_allclose(np.log(found / true).mean(), 0, atol=0.15)
    assert np.log(found).std() == pytest.approx(0.7, abs=0.15)


def test_differences_by_chance_are_made_smaller(monkeypatch):
    by_chance = 12 * np.exp(np.random.default_rng(1).normal(0, 1, (3000, 2)))
    found = fitted(monkeypatch, 12.0, by_chance)
    np.testing.assert_allclose(found, 12, rtol=0.5)


def test_wrong_shares_are_less_sure(monkeypatch):
    high = np.full((1500, 2), 12.0)
    assert fitted(monkeypatch, 12.0, high, bias=0.09).max() < 0.7 * fitted(monkeypatch, 12.0, high).min()


@pytest.mark.parametrize("listeners", [1, np.nan])
def test_without_panels_nothing_changes_and_that_is_said(listeners, monkeypatch, capsys):
    before = np.full((1500, 2), 12.0)
    np.testing.assert_array_equal(fitted(monkeypatch, 12.0, before, listeners), before)
    assert "Concentrations are not fitted to devel" in capsys.readouterr().out
