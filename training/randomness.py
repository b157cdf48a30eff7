"""
Random generators of a training run, each made from the seed of the run and the place where its numbers are used.

Nothing depends on what was drawn before. So a run that resumes draws the same numbers, and heads that train side by
side on threads do not wait for each other.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..head_emoshare import Dropout

# The purpose of the numbers, which is the first element of a place.
AUGMENTATION, LISTENERS, DROPOUT, ENCODER = range(4)


def generator_at(seed, *place):
    """
    Args:
        seed: of the run.
        place: the purpose of the numbers and where they are used: integers, such as the epoch and the step.

    Returns:
        `np.random.Generator`.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


@contextmanager
def dropout_at(model, seed, *place):
    """
    Within this context, each `Dropout` of a model draws from a generator of its own.

    Args:
        model: `EmoShareModel`, on its device.
        seed, place: as in `generator_at`.
    """
    parts = [part for part in model.modules() if isinstance(part, Dropout) and part.p]
    if parts:
        seeds = generator_at(seed, DROPOUT, *place).integers(2**63, size=len(parts))
        for part, own in zip(parts, seeds, strict=True):
            part.generator = torch.Generator(model.device).manual_seed(int(own))
    try:
        yield
    finally:
        for part in parts:
            part.generator = None


@contextmanager
def random_at(device, seed, *place):
    """
    Within this context, PyTorch's global generators are seeded by a place, for modules without a generator of their
    own, such as an encoder's dropout. Afterwards, they have their previous state.

    Args:
        device: `torch.device` that the modules are on.
        seed, place: as in `generator_at`.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(generator_at(seed, ENCODER, *place).integers(2**63)))
        yield


class FastMasks(TorchDispatchMode):
    """
    Within this context, dropout on a CPU draws its masks in a third of the time, from 16 bits per value of the default
    generator. PyTorch draws one value at a time on one thread, which is a quarter of the time of a step of an encoder's
    upper layers in bfloat16. Probabilities are rounded to multiples of 2**-16.

    The backward pass needs it, too, because gradient checkpointing draws the same masks again.
    """

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.bernoulli_.float and arguments[0].device.type == "cpu":
            return _draw_mask(*arguments, **(keywords or {}))
        return function(*arguments, **(keywords or {}))


def _draw_mask(mask, probability=0.5, generator=None):
    """Fills a tensor with ones, with this probability, and zeros."""
    ones = round(probability * 2**16)
    if ones in (0, 2**16):
        return mask.fill_(ones != 0)
    drawn = torch.empty(mask.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    values = drawn.view(torch.int16)[: mask.numel()].view(mask.shape)  # from -2**15 to 2**15 - 1
    return mask.copy_(values < ones - 2**15)
