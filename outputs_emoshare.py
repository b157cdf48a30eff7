"""The output of a model, and the input of its heads."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


@dataclass
class EmoShareOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, `config.loss` over the known shares, if labels were given.
        logits: (batch, labels), the predicted shares.
        hidden_states: the backbone's hidden states, each (batch, frames, width), if they were requested and the
            backbone ran.
        attentions: (batch, labels, steps), the weight of each step (`pool_size` frames) in the prediction, if
            requested; `None` for an architecture without attention. Zero on padding. With `normalization="sequence"`,
            they do not sum to 1, because the released network has a LayerNorm after the softmax.
        concentrations: (batch, labels) float32, above 0, with the loss `"beta_binomial"`; `None` otherwise. They say
            how certain each share is: the probability that a listener perceives the emotion has a Beta distribution
            with the share as mean and the concentration as the sum of its two parameters. The votes of two listeners of
            a clip have the correlation 1 / (1 + concentration).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: torch.FloatTensor | None = None
    concentrations: torch.FloatTensor | None = None


class FrameFeatures(NamedTuple):
    """
    The input of the heads.

    Attributes:
        by_layer: `dict` from `backbone_layer` to (batch, frames, width), or to (batch, layers, frames, width) for
            `"weighted"`.
        lengths: (batch,) int64, each clip's number of frames; features past the last one are arbitrary.
    """

    by_layer: dict
    lengths: torch.Tensor
