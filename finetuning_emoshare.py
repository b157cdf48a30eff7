"""Backbones that are frozen but for their upper layers: which weights are trained with the heads."""

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


def freeze(backbone, config):
    """Lets gradients reach the tuned weights of a backbone alone, with arguments as in `tuned_modules`."""
    backbone.requires_grad_(False)
    for module in tuned_modules(backbone, config):
        module.requires_grad_(True)
