import pytest
import torch
from conftest import small_model

from emoshare.training.randomness import FastMasks, dropout_at, generator_at


def test_numbers_follow_the_seed_and_the_place_alone():
    def numbers(*place):
        return tuple(generator_at(*place).integers(2**32, size=4))

    assert numbers(3, 1, 2) == numbers(3, 1, 2)
    places = [(3, 1, 2), (4, 1, 2), (3, 2, 1), (3, 1, 3), (3, 1), (3, 1, 2, 0), (3, 0, 1, 2), (0, 3, 1, 2)]
    assert len({numbers(*place) for place in places}) == len(places)


def test_dropout_follows_the_place_and_leaves_the_global_state_alone():
    model, features = small_model(dropout=0.5).train(), torch.randn(3, 20, 40)
    before = torch.get_rng_state()

    def shares(*place):
        with dropout_at(model, *place):
            return model(input_features=features).logits.detach()

    first = shares(0, 1)
    assert torch.equal(first, shares(0, 1))
    assert not torch.equal(first, shares(0, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_afterwards_a_model_draws_from_the_global_state_again():
    """As somebody's own training loop does."""
    model, features = small_model(dropout=0.5).train(), torch.randn(3, 20, 40)
    with dropout_at(model, 0, 1):
        model(input_features=features)
    torch.manual_seed(1)
    first, second = (model(input_features=features).logits for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, model(input_features=features).logits)
    first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_fast_masks_have_their_probability_everywhere_and_follow_the_global_state(p, dtype):
    values = torch.ones(500, 401, dtype=dtype, requires_grad=True)

    def dropped():
        torch.manual_seed(1)
        with FastMasks():
            return torch.nn.functional.dropout(values, p)

    first = dropped()
    assert torch.equal(first, dropped())
    kept = (first != 0).flatten()
    assert set(first.detach().flatten().tolist()) == {0, (values[0, 0] / (1 - p)).item()}
    columns = kept[:200_000].view(-1, 4).double()  # four values are drawn at a time
    assert (columns.mean(dim=0) - (1 - p)).abs().max() < 0.01
    assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 0.02
    first.sum().backward()
    assert torch.equal(values.grad, first)


@pytest.mark.parametrize("probability", [0.0, 1.0, 1e-9, 1 - 1e-9])
def test_fast_masks_of_certainties(probability):
    with FastMasks():
        mask = torch.empty(1001).bernoulli_(probability)
    assert torch.equal(mask, torch.full_like(mask, round(probability)))
