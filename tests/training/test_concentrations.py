from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_model

from emoshare.evaluation.predictions import VotePredictions
from emoshare.training import concentrations
from emoshare.training.concentrations import fit_concentrations


def fitted(monkeypatch, listeners, factor):
    """What the concentrations of a model are multiplied by that are `1 / factor` times too high on devel."""
    rng, clips, concentration = np.random.default_rng(0), 1500, 12.0
    shares = rng.uniform(0.1, 0.9, (clips, 2))
    panel = np.full(clips, listeners, dtype=np.float32)
    probabilities = rng.beta(shares * concentration, (1 - shares) * concentration)
    votes = rng.binomial(np.nan_to_num(panel, nan=5)[:, None].astype(int), probabilities)
    true = (votes / np.nan_to_num(panel, nan=5)[:, None]).astype(np.float32)
    true[:100, 0] = np.nan
    predicted = VotePredictions(shares, np.full(shares.shape, concentration / factor))
    monkeypatch.setattr(concentrations, "predict_votes", lambda *_: predicted)
    model = small_model(loss="beta_binomial", id2label={0: "joy", 1: "awe"})
    features = torch.randn(2, 20, 40)
    before = model(input_features=features)
    loader = SimpleNamespace(store=SimpleNamespace(shares=true, listeners=panel))
    fit_concentrations(model, loader, SimpleNamespace(print=lambda text: None))
    after = model(input_features=features)
    torch.testing.assert_close(after.logits, before.logits)
    ratios = after.concentrations / before.concentrations
    torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))
    return ratios[0, 0].item()


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_the_factor_is_the_one_with_which_the_votes_on_devel_are_most_likely(factor, monkeypatch):
    assert fitted(monkeypatch, 15, factor) == pytest.approx(factor, rel=0.15)


def test_without_listeners_nothing_changes(monkeypatch):
    assert fitted(monkeypatch, np.nan, 4.0) == pytest.approx(1.0)
