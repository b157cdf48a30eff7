"""The losses: what they have in common, and what each one computes."""

import numpy as np
import pytest
import torch
from conftest import small_model
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln
from scipy.stats import spearmanr
from torch import nn

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.losses_emoshare import LOSSES, beta_binomial, binomial, ccc, mse, rank, takes

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


CLIPS_ALIKE = {
    "one clip": ([[0.2, 0.7]], [[0.5, 0.0]]),
    "true shares alike": ([[0.2, 0.7], [0.4, 0.1], [0.3, 0.9]], [[0.5, 0.0]] * 3),
    "predicted shares alike": ([[0.2, 0.7]] * 3, [[0.5, 0.0], [0.1, 1.0], [0.3, 0.2]]),
    "shares of 0 and 1": ([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
}


@pytest.mark.parametrize("shares", CLIPS_ALIKE.values(), ids=CLIPS_ALIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_no_batch_gives_a_loss_or_gradient_that_is_no_number(name, dtype, shares):
    predicted, true = (torch.tensor(of_clips) for of_clips in shares)
    predicted = predicted.to(dtype).requires_grad_()
    concentrations = torch.tensor([[1e-3, 1e5]] * len(true)).to(dtype).requires_grad_()
    optional = {"listeners": torch.tensor([1.0, NAN, 20.0])[: len(true)], "concentrations": concentrations}
    taken = {argument: value for argument, value in optional.items() if takes(name, argument)}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = LOSSES[name](predicted, true, None, **taken)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert predicted.grad.isfinite().all()
    assert concentrations.grad is None or concentrations.grad.isfinite().all()


def test_autocast_leaves_shares_near_1_their_gradient():
    model = small_model(architecture="statistics", loss="binomial").train()
    for head in model.heads:
        nn.init.zeros_(head.output.weight)
        nn.init.constant_(head.output.bias, 6.5)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_features=torch.randn(4, 20, 40), labels=torch.full((4, 9), 0.8))
    assert output.logits.dtype == torch.float32
    output.loss.backward()
    expected = torch.tensor([6.5]).sigmoid() - 0.8
    torch.testing.assert_close(9 * model.heads[0].output.bias.grad, expected)


def test_autocast_computes_no_loss_in_16_bits():
    predicted, true = torch.rand(30, 3), torch.rand(30, 3)
    for loss in LOSSES.values():
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(predicted, true)
        assert found == loss(predicted, true)


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


def known_by_label(clips=40, labels=3, seed=0):
    """Predicted and true shares with ties, weights, and the known ones of these for each label."""
    rng = np.random.default_rng(seed)
    predicted, true = rng.random((clips, labels)).round(1), rng.random((clips, labels)).round(1)
    true[rng.random((clips, labels)) < 0.2] = np.nan
    weights = rng.random(clips) + 0.1
    known = ~np.isnan(true)
    own = [(predicted[is_known, i], true[is_known, i], weights[is_known]) for i, is_known in enumerate(known.T)]
    return *map(torch.from_numpy, (predicted, true, weights)), own


def test_ccc_is_the_concordance_correlation_coefficient():
    predicted, true, weights, own = known_by_label()
    losses = []
    for x, y, w in own:
        (variance_x, covariance), (_, variance_y) = np.cov(x, y, aweights=w, ddof=0)
        offset = np.average(x, weights=w) - np.average(y, weights=w)
        losses.append(1 - 2 * covariance / (variance_x + variance_y + offset**2))
    expected = np.average(losses, weights=[w.sum() for _, _, w in own])
    assert ccc(predicted, true, weights).item() == pytest.approx(expected, abs=1e-6)
    assert ccc(true.nan_to_num(), true, weights).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("clips", [2, 7, 40])
def test_rank_is_spearmans_rho_at_a_low_temperature(clips):
    predicted, true, _, own = known_by_label(clips, seed=clips)
    own = [(x, y) for x, y, _ in own if len(set(y)) > 1]
    rhos = [spearmanr(x, y).statistic if len(set(x)) > 1 else 0.0 for x, y in own]
    expected = np.average(1 - np.array(rhos), weights=[len(x) for x, _ in own])
    assert rank(predicted, true, temperature=1e-3).item() == pytest.approx(expected, abs=1e-3)


def test_rank_does_not_depend_on_the_scale_of_the_shares():
    predicted, true = torch.rand(30, 2), torch.rand(30, 2)
    loss = rank(predicted, true)
    torch.testing.assert_close(rank(0.1 * predicted + 0.2, true), loss)
    assert 0.2 < loss < 1.8
    assert rank(true, true) < 0.01


def test_a_batch_without_order_adds_nothing_to_ccc_and_rank():
    predicted, true = torch.rand(5, 2), torch.rand(5, 2)
    alike = torch.full((5, 1), 0.3)
    for loss in (ccc, rank):
        expected = loss(predicted, true)
        assert loss(predicted, alike.expand(5, 2)) == 0
        torch.testing.assert_close(loss(torch.cat([predicted, alike], 1), torch.cat([true, alike], 1)), expected)


def votes(clips=50, seed=0):
    """Shares, listeners of whom some are not known, and concentrations of all sizes: float64 arrays."""
    rng = np.random.default_rng(seed)
    listeners = rng.integers(1, 200, clips).astype(float)
    true = rng.binomial(listeners[:, None].astype(int), rng.random((clips, 2))) / listeners[:, None]
    true[:5] = rng.random((5, 2))  # for which listeners give no whole number of votes
    true[5:8], true[8:11] = 0, 1
    listeners[::7] = np.nan
    return rng.uniform(0.01, 0.99, (clips, 2)), true, listeners, np.exp(rng.uniform(-6, 11, (clips, 2)))


def test_binomial_is_the_likelihood_of_votes():
    predicted, true, listeners, _ = votes()
    number = np.nan_to_num(listeners, nan=1)[:, None]
    expected = -(number * (true * np.log(predicted) + (1 - true) * np.log(1 - predicted))).mean()
    predicted, true, listeners = map(torch.from_numpy, (predicted, true, listeners))
    assert binomial(predicted, true, None, listeners).item() == pytest.approx(expected, rel=1e-5)
    cross_entropy = torch.nn.functional.binary_cross_entropy(predicted, true)
    assert binomial(predicted, true).item() == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_beta_binomial_is_the_likelihood_of_votes():
    predicted, true, listeners, concentrations = votes()
    number = listeners[:, None]
    first, second = predicted * concentrations, (1 - predicted) * concentrations
    expected = betaln(first, second) - betaln(first + true * number, second + (1 - true) * number)
    of_one = -(true * np.log(predicted) + (1 - true) * np.log(1 - predicted))
    expected = np.where(np.isnan(number), of_one, expected)
    for clip in range(len(true)):
        given = [torch.from_numpy(array[clip : clip + 1]) for array in (predicted, true, listeners, concentrations)]
        loss = beta_binomial(*given[:2], None, *given[2:]).item()
        assert loss == pytest.approx(expected[clip].mean(), rel=1e-4, abs=1e-5)


def test_beta_binomial_without_a_concentration_is_binomial_and_learns_one_from_listeners_alone():
    predicted, true, listeners, _ = (torch.from_numpy(array).float() for array in votes())
    expected = binomial(predicted, true, None, listeners)
    torch.testing.assert_close(beta_binomial(predicted, true, None, listeners), expected)
    infinite = torch.full_like(true, 1e7).requires_grad_()
    loss = beta_binomial(predicted, true, None, listeners, infinite)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    concentrations = torch.full_like(true, 5.0).requires_grad_()
    beta_binomial(predicted, true, None, listeners, concentrations).backward()
    assert (concentrations.grad[listeners.isnan()] == 0).all()
    assert (concentrations.grad[~listeners.isnan() & (listeners > 1)] != 0).all()


def test_a_model_passes_on_listeners_and_concentrations_to_the_losses_that_take_them():
    features, labels, listeners = torch.randn(4, 20, 40), torch.rand(4, 9), torch.tensor([3.0, 20.0, NAN, 7.0])
    for name, loss in LOSSES.items():
        model = small_model(loss=name)
        output = model(input_features=features, labels=labels, listeners=listeners)
        optional = {"listeners": listeners, "concentrations": output.concentrations}
        taken = {argument: value for argument, value in optional.items() if takes(name, argument)}
        torch.testing.assert_close(output.loss, loss(output.logits, labels, **taken))
        assert (output.concentrations is not None) == (name == "beta_binomial")


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_single_shares_work_with_every_loss(name):
    model = small_model(loss=name)
    predicted, true, listeners = torch.rand(8, 9), torch.rand(8, 9), torch.full((8,), 5.0)
    true[2:4, 1], weights = NAN, torch.rand(8, 9)
    concentrations = torch.rand(8, 9) * 10
    loss = model.loss(predicted, true, weights, listeners, concentrations)
    expected, total = 0.0, 0.0
    for label in range(9):
        known, column = ~true[:, label].isnan(), [label]
        own = model.loss(
            predicted[:, column].expand(8, 9),
            true[:, column].expand(8, 9),
            weights[:, label],
            listeners,
            concentrations[:, column].expand(8, 9),
        )
        weight = weights[known, label].sum()
        expected, total = expected + own * weight, total + weight
    torch.testing.assert_close(loss, expected / total)


@pytest.mark.parametrize("loss", [ccc, rank])
def test_a_label_without_order_adds_nothing_whatever_the_weights_are_of(loss):
    predicted, true, weights = torch.rand(5, 2), torch.rand(5, 2), torch.rand(5, 2)
    true[:, 1] = 0.3
    expected = loss(predicted[:, :1], true[:, :1], weights[:, 0])
    torch.testing.assert_close(loss(predicted, true, weights), expected)


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
