"""
Backbones that are frozen except for what is trained with the heads: their upper layers, or adapters (LoRA) in these.
`UpperLayers` runs these layers by themselves, on stored outputs of the layers below.

Adapters are PEFT's, but the backbone's weights keep the names that they have without adapters. An adapter's own weights
are `lora_A.default.weight`, (rank, width in), and `lora_B.default.weight`, (width out, rank), prefixed by the name of
its linear layer, to whose output it adds 2 B A x.
"""

import re
from functools import partial

import torch
from torch import nn

from .backbone_emoshare import family_of, weights_hash

SCALING = 2  # factor on what adapters add; PEFT calls its product with the rank "alpha"
ADAPTER_WEIGHTS = re.compile(r"\.lora_[AB]\.")


def tuned_modules(backbone, config):
    """
    The layers of a backbone that are trained with the heads, or whose adapters are, in order.

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
    """
    Which hidden states `EmoShareModel.trained_part` takes, as in `EmoShareConfig.backbone_layer`. If the whole backbone
    is frozen, these are what the heads take.
    """
    return lowest_hidden_state(config) if config.finetuned_layers else config.backbone_layer


def tuned_names(backbone, config):
    """
    Names, in the backbone's `state_dict`, of the weights that are trained with the heads; arguments as in
    `tuned_modules`. Empty for a backbone whose adapters have not been added.
    """
    if not config.finetuned_layers:
        return set()
    if config.lora_rank:
        return {name for name in backbone.state_dict() if ADAPTER_WEIGHTS.search(name)}
    prefixes = tuple(f"{name}." for name in _names(tuned_modules(backbone, config), backbone))
    return {name for name in backbone.state_dict() if name.startswith(prefixes)}


def frozen_hash(backbone, config):
    """`weights_hash` of the frozen weights of a backbone; arguments as in `tuned_modules`."""
    return weights_hash(backbone, tuned_names(backbone, config))


def frozen_pattern(backbone, config):
    """
    A regular expression that matches the names, in the model's `state_dict`, of the frozen weights of its backbone;
    arguments as in `tuned_modules`.
    """
    tuned = "|".join(map(re.escape, sorted(tuned_names(backbone, config))))
    return rf"^backbone\.(?!(?:{tuned})$)"


def freeze(backbone, config):
    """Freezes all weights of a backbone except for the tuned ones; arguments as in `tuned_modules`."""
    tuned = tuned_names(backbone, config)
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(name in tuned)


class UpperLayers(nn.Module):
    """
    The tuned layers of a backbone as a module of their own, which shares their weights with the backbone.

    Args:
        backbone: after `prepare` of its family.
        config: the model's `EmoShareConfig`.
    """

    def __init__(self, backbone, config):
        super().__init__()
        self.layers = nn.ModuleList(tuned_modules(backbone, config))
        # The backbone is not a submodule, because the rest of it is not trained.
        run, first = family_of(backbone.config).upper_states, lowest_hidden_state(config)
        self._run = partial(run, backbone, first=first, layer=config.backbone_layer)

    def forward(self, hidden_states, lengths):
        """(batch, frames, width) hidden states and (batch,) frames -> (batch, frames, width), what the heads take"""
        return self._run(hidden_states, lengths)


def add_adapters(backbone, config):
    """
    Adds new adapters to a backbone, whose output does not change yet; arguments as in `tuned_modules`. They are drawn
    from torch's global generator, and are in float32 whatever the backbone is in, because what they add is small.

    Raises:
        ImportError: if PEFT is not installed.
    """
    peft = _peft()
    layers = _names(tuned_modules(backbone, config), backbone)
    targets = [f"{layer}.{name}" for layer in layers for name in family_of(backbone.config).attention_projections]
    rank = config.lora_rank
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=targets), backbone)
    for _, adapted in _adapted_layers(backbone):
        for linear in (*adapted.lora_A.values(), *adapted.lora_B.values()):
            linear.float().__class__ = AdapterLinear
        # PEFT's wrapper has the layer as a submodule, so that its weight would be named `base_layer.weight`. Here, both
        # share one dict of weights, and only the wrapper is a module of the backbone.
        base_layer = adapted._modules.pop("base_layer")
        vars(adapted).update(base_layer=base_layer, _parameters=base_layer._parameters)


def merge_adapters(backbone, config):
    """
    Adds a backbone's adapters to the weights of its layers, and removes them; arguments as in `tuned_modules`. The
    config then describes these layers as tuned, and has the hash of the others.

    Raises:
        ValueError: if there are no adapters, or the backbone is in 16 bits, which would round away what they add.
    """
    if not config.lora_rank:
        raise ValueError("merge_adapters: this model has no adapters (lora_rank is 0)")
    if backbone.dtype != torch.float32:
        raise ValueError(f"merge_adapters: this model is in {backbone.dtype}; load it in float32 to merge it")
    is_pretrained = frozen_hash(backbone, config) == config.backbone_hash
    for name, adapted in _adapted_layers(backbone):
        adapted.merge()
        backbone.set_submodule(name, adapted.base_layer)
    del backbone.peft_config
    config.lora_rank = 0
    if is_pretrained:
        config.backbone_hash = frozen_hash(backbone, config)


def _adapted_layers(backbone):
    """The names of linear layers with adapters, and PEFT's modules that replaced these layers."""
    return [(name, module) for name, module in backbone.named_modules() if hasattr(module, "lora_A")]


class AdapterLinear(nn.Linear):
    """One of the two matrices of an adapter. A subclass, so that it is not quantised, which PEFT cannot handle."""


def _names(modules, backbone):
    return [name for name, module in backbone.named_modules() if any(module is wanted for wanted in modules)]


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"lora_rank: the adapters of this model need PEFT ({error}): pip install peft; or merge them where it is "
            "installed: emoshare merge"
        ) from error
    return peft
