import math

import pytest
import torch
from conftest import small_model
from torch import nn

from emoshare.training.arguments import RunArguments
from emoshare.training.optimization import PLAIN, Optimization, PartOptimizer


def test_the_plain_optimizer_is_adam():
    """As in the paper (section 2.5)."""
    optimizer = PartOptimizer(small_model(), 0.1, PLAIN)
    assert type(optimizer.adam) is torch.optim.Adam
    assert optimizer.schedule is None
    assert Optimization.of_run(RunArguments(num_train_epochs=1), 1) == PLAIN


@pytest.mark.parametrize("fields", [{}, {"normalization": "sequence", "max_frames": 20}])
def test_weights_decay_and_biases_and_norms_do_not(fields):
    """Without gradients, a step of AdamW multiplies by 1 - learning rate times decay."""
    model = small_model(**fields)
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part in ("weight", "bias")
    }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    PartOptimizer(model, 0.1, Optimization(weight_decay=0.5)).step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "bias" in name or name in norms else 0.95
        torch.testing.assert_close(parameter, before[name] * factor)


def rates(settings, steps, epochs_done=0):
    """The learning rate of each step."""
    model = small_model()
    optimizer = PartOptimizer(model, 0.1, settings)
    optimizer.begin(epochs_done)
    found = []
    for _ in range(steps):
        found.append(optimizer.adam.param_groups[0]["lr"])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return found


def test_the_learning_rate_grows_and_then_falls_to_0():
    settings = Optimization(schedule="cosine", warmup_ratio=0.2, epochs=5, steps_per_epoch=4)
    found = rates(settings, 21)
    assert found[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert found[12] == pytest.approx(0.05)  # half-way
    assert found[4:21] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(17)])


def test_a_constant_learning_rate_may_grow_first():
    settings = Optimization(warmup_ratio=0.5, epochs=2, steps_per_epoch=4)
    assert rates(settings, 7) == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_a_head_that_begins_again_has_the_remaining_epochs_for_its_schedule():
    settings = Optimization(schedule="cosine", warmup_ratio=0.25, epochs=3, steps_per_epoch=4)
    found = rates(settings, 9, epochs_done=1)
    assert found[:3] == pytest.approx([0, 0.05, 0.1])
    assert found[-1] == pytest.approx(0)


def test_a_long_gradient_is_cut_and_a_short_one_is_not():
    for size, expected in [(3.0, 1.0), (0.001, None)]:
        model = small_model()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, size)
        norm = nn.utils.get_total_norm(parameter.grad for parameter in model.parameters())
        optimizer = PartOptimizer(model, 0.1, Optimization(max_grad_norm=1.0))
        seen = []
        optimizer.adam.register_step_pre_hook(
            lambda adam, *_, seen=seen: seen.append(
                nn.utils.get_total_norm(parameter.grad for parameter in adam.param_groups[0]["params"]).item()
            )
        )
        optimizer.step()
        assert seen == pytest.approx([expected or norm.item()], rel=1e-4)
        assert all(parameter.grad is None for parameter in model.parameters())
