"""
Backbones that are frozen but for what is trained with the heads: their upper layers, or adapters (LoRA) in these.

Adapters are PEFT's, and the weights of a model with adapters have the names that they have without, so that whoever
knows the backbone's weights finds them. An adapter's own are `lora_A.default.weight`, (rank, width in), and
`lora_B.default.weight`, (width out, rank), after the name of its linear layer, to whose output it adds 2 B A x.
"""

import re

import torch
from torch import nn

from .backbone_emoshare import family_of, weights_hash

SCALING = 2  # of what adapters add; PEFT calls its product with the rank "alpha"
ADAPTER_WEIGHTS = re.compile(r"\.lora_[AB]\.")


def tuned_modules(backbone, config):
    """
    The layers of a backbone that are trained with the heads, or whose adapters are, in their order.

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


def tuned_names(backbone, config):
    """
    Names of the weights that are trained with the heads, as the backbone's `state_dict` has them; arguments as in
    `tuned_modules`. Of a pretrained backbone, which has no adapters, none if these are what is trained.
    """
    if not config.finetuned_layers:
        return set()
    if config.lora_rank:
        return {name for name in backbone.state_dict() if ADAPTER_WEIGHTS.search(name)}
    prefixes = tuple(f"{name}." for name in _names(tuned_modules(backbone, config), backbone))
    return {name for name in backbone.state_dict() if name.startswith(prefixes)}


def frozen_hash(backbone, config):
    """`weights_hash` of what is frozen of a backbone, with arguments as in `tuned_modules`."""
    return weights_hash(backbone, tuned_names(backbone, config))


def frozen_pattern(backbone, config):
    """
    A regular expression of the names, in the model's `state_dict`, of what is frozen of its backbone, with arguments as
    in `tuned_modules`.
    """
    tuned = "|".join(map(re.escape, sorted(tuned_names(backbone, config))))
    return rf"^backbone\.(?!(?:{tuned})$)"


def freeze(backbone, config):
    """Lets gradients reach the tuned weights of a backbone alone, with arguments as in `tuned_modules`."""
    tuned = tuned_names(backbone, config)
    for name, weight in backbone.named_parameters():
        weight.requires_grad_(name in tuned)


def add_adapters(backbone, config):
    """
    Puts new adapters into a backbone, which change nothing yet; arguments as in `tuned_modules`. They are drawn from
    torch's global generator, and are in float32, whatever the backbone is in: what they add is small.

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
        # PEFT's wrapper has the layer as a submodule, so that its weights would be `base_layer.weight`. Here, the two
        # share one dict of weights, and whoever lists the modules sees the wrapper alone.
        base_layer = adapted._modules.pop("base_layer")
        vars(adapted).update(base_layer=base_layer, _parameters=base_layer._parameters)


def merge_adapters(backbone, config):
    """
    Adds a backbone's adapters to the weights of its layers, and removes them; arguments as in `tuned_modules`. The
    config then says that these layers were trained, and has the hash of the others.

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
    """Their names, and PEFT's modules in the place of linear layers."""
    return [(name, module) for name, module in backbone.named_modules() if hasattr(module, "lora_A")]


class AdapterLinear(nn.Linear):
    """One of the two matrices of an adapter. Dynamic quantisation, which PEFT does not allow for, does not find it."""


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
