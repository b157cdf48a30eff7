"""Which parts of a model are saved, and checks of what is loaded."""

import copy
import re
from pathlib import Path

from .backbone_emoshare import load_backbone, weights_hash
from .finetuning_emoshare import frozen_hash, tuned_names


def cut_to_read_layer(model):
    """The model to save: a view whose backbone has no layers above the one that is read, or the model itself."""
    config = model.config
    if model.backbone is None or not config.include_backbone:
        return model
    backbone = model.family.cut(model.backbone, config.backbone_layer)
    if backbone is model.backbone:
        return model
    view = copy.copy(model)
    view._modules = {**model._modules, "backbone": backbone}
    view.config = copy.copy(config)
    view.config.backbone_config = backbone.config
    view.config.backbone_num_layers = config.backbone_num_layers or model.family.num_layers(model.backbone.config)
    if config.backbone_hash is not None and frozen_hash(model.backbone, config) == config.backbone_hash:
        view.config.backbone_hash = frozen_hash(backbone, view.config)
    return view


def check_is_pretrained(backbone, config):
    """
    Args:
        backbone: of a model.
        config: the model's `EmoShareConfig`.

    Raises:
        ValueError: if the frozen weights differ from those that the config names, or cannot be verified.
    """
    if config.backbone_hash is None:
        raise ValueError(
            "include_backbone=False: this model's backbone was not loaded by from_backbone_pretrained, so it could not "
            "be fetched again; save it with the heads"
        )
    name = config.backbone_name_or_path
    if not (Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise ValueError(
            f"include_backbone=False: the backbone came from a folder {name!r}, which is not known any more; set "
            "config.backbone_name_or_path to it, or save the backbone with the heads"
        )
    if frozen_hash(backbone, config) != config.backbone_hash:
        raise ValueError(
            f"include_backbone=False: the backbone's weights are not those of {name} any more: they were changed, or "
            "the model was loaded in 16 bits; save them with the heads, or load the model in float32"
        )


def check_loaded(name_or_path, loading, optional_weights):
    """
    Checks that a checkpoint and a model have the same weights. Transformers initialises missing ones at random, and
    ignores unexpected ones.

    Args:
        name_or_path: repository or folder of a model.
        loading: Transformers' loading info.
        optional_weights: of the backbone's family.

    Raises:
        ValueError: if the checkpoint lacks weights, or holds unexpected ones.
    """
    for kind, found in (("missing_keys", "lacks {} weight(s)"), ("unexpected_keys", "holds {} unexpected weight(s)")):
        names = sorted(name for name in loading[kind] if name.removeprefix("backbone.") not in optional_weights)
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{name_or_path}: the checkpoint {found.format(len(names))}: {shown}")


def fetch_frozen(backbone, config, hub_arguments):
    """
    Fetches the frozen weights of a model's backbone, which its checkpoint leaves out.

    Args:
        backbone: of the model; gets the weights.
        config: the model's `EmoShareConfig`. A folder that it names relative to the checkpoint is made absolute.
        hub_arguments: arguments of `from_pretrained` that say how to reach the Hub.

    Raises:
        ValueError: if these are not the weights that the heads were trained on.
        OSError: if they cannot be fetched.
    """
    name, revision = config.backbone_name_or_path, config.backbone_revision
    if (Path(config.name_or_path) / name).is_dir():  # a folder is saved relative to that of the heads
        name = config.backbone_name_or_path = str((Path(config.name_or_path) / name).resolve())
    try:
        is_cut = config.backbone_num_layers is not None
        fetched = load_backbone(name, copy.deepcopy(config.backbone_config), revision, is_cut, **hub_arguments)
    except OSError as error:
        raise OSError(
            f"this checkpoint holds the heads alone, and their backbone {name!r} (revision {revision}) cannot be "
            f"loaded; if it has moved, give backbone_name_or_path to from_pretrained. {error}"
        ) from error
    tuned = tuned_names(backbone, config)
    found = weights_hash(fetched, tuned)
    if found != config.backbone_hash:
        raise ValueError(
            f"{name} (revision {revision}): the backbone's weights have the hash {found}; these heads were trained "
            f"on weights with the hash {config.backbone_hash}"
        )
    # Not strict: one of the two may have optional weights that the other lacks.
    frozen = {name: weight for name, weight in fetched.state_dict().items() if name not in tuned}
    backbone.load_state_dict(frozen, strict=False)
