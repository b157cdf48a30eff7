"""The losses: each of them, and the mean squared error in particular."""

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given
from hypothesis import strategies as st

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.losses_emoshare import LOSSES, mse

NAN = float("nan")


def predicted_and_true(clips=8, labels=3):
    return torch.rand(clips, labels, requires_grad=True), torch.rand(clips, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_documented_and_may_be_configured(name):
    assert LOSSES[name].__doc__
    assert EmoShareConfig(loss=name).loss == name
    assert f'"{name}"' in EmoShareConfig.__doc__ or "losses_emoshare.LOSSES" in EmoShareConfig.__doc__


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_scalar_that_gets_smaller_along_its_gradient(name):
    predicted, true = predicted_and_true()
    loss = LOSSES[name](predicted, true)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert LOSSES[name](predicted - 0.01 * predicted.grad, true) < loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_loss_is_in_float32(name, dtype):
    predicted, true = predicted_and_true()
    for weights in (None, torch.rand(8, dtype=torch.float64)):
        assert LOSSES[name](predicted.to(dtype), true.double(), weights).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_shares_add_nothing_to_a_loss_or_its_gradient(name):
    predicted, true = predicted_and_true()
    true[2:5], weights = NAN, torch.rand(8)
    known = [0, 1, 5, 6, 7]
    for own in (None, weights):
        predicted.grad = None
        loss = LOSSES[name](predicted, true, own)
        loss.backward()
        expected = LOSSES[name](predicted[known], true[known], None if own is None else own[known])
        torch.testing.assert_close(loss, expected)
        assert (predicted.grad[2:5] == 0).all()
        assert predicted.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_known_or_of_any_weight_gives_a_loss_of_zero(name):
    predicted, true = predicted_and_true()
    nothing = torch.full_like(true, NAN)
    for shares, weights in [(nothing, None), (nothing, torch.ones(8)), (true, torch.zeros(8))]:
        predicted.grad = None
        loss = LOSSES[name](predicted, shares, weights)
        loss.backward()
        assert loss == 0
        assert (predicted.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_equal_weights_are_none_and_a_weight_of_zero_is_no_clip(name):
    predicted, true = predicted_and_true()
    true[3, 1] = NAN
    expected = LOSSES[name](predicted, true)
    torch.testing.assert_close(LOSSES[name](predicted, true, torch.full((8,), 2.5)), expected)
    weights = torch.tensor([1.0] * 6 + [0.0] * 2)
    torch.testing.assert_close(LOSSES[name](predicted, true, weights), LOSSES[name](predicted[:6], true[:6]))


@given(clips=st.integers(1, 6), labels=st.integers(1, 4), has_weights=st.booleans(), seed=st.integers(0, 2**16))
def test_mse_is_the_weighted_mean_over_known_shares(clips, labels, has_weights, seed):
    rng = np.random.default_rng(seed)
    predicted, true = rng.random((clips, labels)), rng.random((clips, labels))
    true[rng.random((clips, labels)) < 0.3] = np.nan
    weights = rng.random(clips) + 0.01 if has_weights else None
    known = ~np.isnan(true)
    by_share = np.broadcast_to((np.ones(clips) if weights is None else weights)[:, None], true.shape)[known]
    expected = np.average((predicted - true)[known] ** 2, weights=by_share) if known.any() else 0.0
    weights = None if weights is None else torch.from_numpy(weights)
    loss = mse(torch.from_numpy(predicted), torch.from_numpy(true), weights)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def mae(predicted, true, weights=None):
    """Mean absolute error over the known shares."""
    known = ~true.isnan()
    errors = (predicted.float() - true.float()).masked_fill(~known, 0).abs()
    weights = known if weights is None else weights.float()[:, None] * known
    return (errors * weights).sum() / weights.sum().clamp(min=1e-9)


def test_a_new_loss_is_one_entry(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"^loss: got 'mae'; expected one of mse"):
        EmoShareConfig(loss="mae")
    monkeypatch.setitem(LOSSES, "mae", mae)
    model = small_model(loss="mae")
    features, labels = torch.randn(4, 20, 40), torch.rand(4, 9)
    labels[1, 2] = NAN
    output = model(input_features=features, labels=labels)
    known = ~labels.isnan()
    torch.testing.assert_close(output.loss, (output.logits - labels)[known].abs().mean())
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = (output.logits - labels)[0].abs().mean()
    torch.testing.assert_close(model.loss(output.logits, labels, weights), expected)

    model.save_pretrained(tmp_path)
    loaded = EmoShareModel.from_pretrained(tmp_path)
    assert loaded.config.loss == "mae"
    torch.testing.assert_close(loaded(input_features=features, labels=labels).loss, output.loss)
    # A model that was trained with it may be trained on with another.
    assert EmoShareModel.from_pretrained(tmp_path, loss="mse").config.loss == "mse"


def test_a_model_checks_labels_before_its_loss_sees_them():
    model = small_model()
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 8\); expected \(2, 9\)"):
        model.loss(torch.rand(2, 9), torch.rand(2, 8))


def test_the_loss_of_a_config_that_names_none_is_mse(tmp_path):
    """As in model repositories of earlier versions."""
    config = EmoShareConfig().to_dict()
    del config["loss"]
    assert EmoShareConfig.from_dict(config).loss == "mse"
