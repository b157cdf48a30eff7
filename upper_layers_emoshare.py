"""The tuned layers of a backbone by themselves: they run on stored outputs of the layers below, which are frozen."""

from functools import partial

from torch import nn

from .backbone_emoshare import family_of
from .finetuning_emoshare import lowest_hidden_state, tuned_modules


def stored_layer(config):
    """
    The hidden states that `EmoShareModel.trained_part` takes, as `EmoShareConfig.backbone_layer`: those that the heads
    take, if the whole backbone is frozen.
    """
    return lowest_hidden_state(config) if config.finetuned_layers else config.backbone_layer


class UpperLayers(nn.Module):
    """
    The tuned layers of a backbone, which share their weights with it, as a module of their own.

    Args:
        backbone: after `prepare` of its family.
        config: the model's `EmoShareConfig`.
    """

    def __init__(self, backbone, config):
        super().__init__()
        self.layers = nn.ModuleList(tuned_modules(backbone, config))
        # Not a submodule: the rest of the backbone is not trained.
        run, first = family_of(backbone.config).upper_states, lowest_hidden_state(config)
        self._run = partial(run, backbone, first=first, layer=config.backbone_layer)

    def forward(self, hidden_states, lengths):
        """(batch, frames, width) hidden states and (batch,) frames -> (batch, frames, width), what the heads take"""
        return self._run(hidden_states, lengths)
