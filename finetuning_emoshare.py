"""Backbones that are frozen but for their upper layers: which weights are trained with the heads."""

from functools import partial

from torch import nn

from .backbone_emoshare import family_of


def tuned_modules(backbone, config):
    """
    The layers of a backbone that are trained with the heads, in their order.

    Args:
        backbone: of a model.
        config: the model's `EmoShareConfig`.
    """
    if not config.finetuned_layers:
        return []
    return family_of(backbone.config).layers(backbone, lowest_hidden_state(config), config.backbone_layer)


def lowest_hidden_state(config):
    """The number of the hidden state that the tuned layers of a model with this config take."""
    backbone, layer = config.backbone_config, config.backbone_layer
    return (family_of(backbone).num_layers(backbone) if layer == -1 else layer) - config.finetuned_layers


def stored_layer(config):
    """The hidden states that `EmoShareModel.trained_part` takes, as `EmoShareConfig.backbone_layer`."""
    return lowest_hidden_state(config) if config.finetuned_layers else config.backbone_layer


def freeze(backbone, config):
    """Lets gradients reach the tuned weights of a backbone alone, with arguments as in `tuned_modules`."""
    backbone.requires_grad_(False)
    for module in tuned_modules(backbone, config):
        module.requires_grad_(True)


class UpperLayers(nn.Module):
    """
    The tuned layers of a backbone, which share their weights with it, as a module of their own: they run on what the
    layers below have made.

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
