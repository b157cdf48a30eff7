"""What a model returns, and what its heads take."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


@dataclass
class EmoShareOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, `config.loss` over the known shares; only if labels were given.
        logits: (batch, labels), the predicted shares.
        hidden_states: the backbone's hidden states, each (batch, frames, width), if they were asked for and the
            backbone ran.
        attentions: (batch, labels, steps), the weight of each step (`pool_size` frames) in the prediction, if they were
            asked for; `None` for an architecture without attention. Zero on padding; with `normalization="sequence"`
            the released network's LayerNorm follows the softmax, so that they do not sum to 1.
        concentrations: (batch, labels) float32, above 0, with the loss `"beta_binomial"`; `None` otherwise. How sure
            each share is: the probability that a listener perceives the emotion has a Beta distribution with the share
            as mean and the concentration as the sum of its two parameters. The votes of two listeners of a clip have
            the correlation 1 / (1 + concentration).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: torch.FloatTensor | None = None
    concentrations: torch.FloatTensor | None = None


class FrameFeatures(NamedTuple):
    """
    What the heads take, past the backbone.

    Attributes:
        by_layer: by `backbone_layer`: (batch, frames, width), or (batch, layers, frames, width) for `"weighted"`.
        lengths: (batch,) int64, each clip's number of frames; features past it are arbitrary.
    """

    by_layer: dict
    lengths: torch.Tensor
