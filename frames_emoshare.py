"""Clips of different lengths in a padded batch: their lengths, and masks that separate clips from padding."""

import torch


def length_mask(lengths, size):
    """(batch,) lengths -> (batch, size) bool, true on each row's first `length` entries."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def padding_mask(lengths, size):
    """As `length_mask`, or `None` if nothing is padded."""
    return length_mask(lengths, size) if bool((lengths != size).any()) else None


def lengths_of(inputs, attention_mask):
    """
    Args:
        inputs: (batch, length, ...).
        attention_mask: (batch, length), 1 on the clip and 0 on the padding to its right; `None` is all ones.

    Returns:
        (batch,) int64, the length of each clip.

    Raises:
        ValueError: if the mask does not have the shape (batch, length), or has a zero before a one.
    """
    batch, size = inputs.shape[:2]
    if attention_mask is None:
        return torch.full((batch,), size, device=inputs.device)
    if attention_mask.shape != (batch, size):
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)} for an input of {batch} clips and length {size}; "
            "they must agree in batch and length"
        )
    lengths = attention_mask.long().sum(dim=1)
    if not torch.equal(attention_mask.bool(), length_mask(lengths, size)):
        raise ValueError("attention_mask: expected ones followed by zeros in each row (padding on the right)")
    return lengths


def last_step(states, lengths):
    """(batch, steps, width) -> (batch, width): each clip's state at its own last step."""
    return states[torch.arange(states.shape[0], device=states.device), lengths - 1]


def masked_mean(states, mask):
    """Mean over each clip's own steps: (batch, steps, width) and (batch, steps) bool -> (batch, width)."""
    return (states * mask[..., None].to(states.dtype)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
