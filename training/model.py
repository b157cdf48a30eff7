"""A run's model, its heads untrained, and the feature extractor that fits it."""

import copy
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, cached_file

from ..backbone_emoshare import commit_of, load_backbone, weights_hash
from ..configuration_emoshare import EmoShareConfig
from ..dataset_script.digests import Entry, are_settled, keep, kept, state_of
from ..feature_extraction_emoshare import MIN_FRAMES, EmoShareFeatureExtractor
from ..modeling_emoshare import EmoShareModel


def build_model(arguments, labels):
    """
    With `--push_backbone false`, which saves the heads alone, the weights of a backbone that an earlier run has loaded
    are left out: frame features may all be there already, and `load_left_out_backbone` loads them where they are not.

    Args:
        arguments: `Arguments`. Without `--head_seeds`, the initial weights follow torch's global seed.
        labels: label names.

    Returns:
        `EmoShareModel` and `EmoShareFeatureExtractor`.

    Raises:
        ValueError: if there is not one seed for each label.
    """
    run, arguments = arguments.run, arguments.model
    head_seeds = run.head_seeds
    if head_seeds is not None and len(head_seeds) != len(labels):
        raise ValueError(f"--head_seeds: got {len(head_seeds)}; expected one for each of the {len(labels)} labels")
    fields = {**arguments.config_fields, "id2label": dict(enumerate(labels))}
    windows = {"chunk_length_s": arguments.chunk_length_s, "min_frames": max(MIN_FRAMES, arguments.pool_size)}
    if arguments.is_acoustic:
        feature_extractor = EmoShareFeatureExtractor(arguments.acoustic_features, **windows)
        model = EmoShareModel(EmoShareConfig(feature_size=feature_extractor.feature_size, **fields))
    else:
        fields["backbone_layer"] = arguments.layer
        revision = commit_of(arguments.backbone, arguments.backbone_revision)
        build = _with_backbone if run.push_backbone else _without_known_backbone
        model = build(arguments.backbone, revision, fields)
        feature_extractor = EmoShareFeatureExtractor.for_backbone(
            arguments.backbone,
            model.config.backbone_config,
            revision=model.config.backbone_revision,
            **windows,
        )
    if model.config.normalization == "sequence":
        feature_extractor.limit_windows(model.config.max_frames)
    if head_seeds is not None:
        for index, seed in enumerate(head_seeds):
            model.initialize_head(index, seed)
    return model, feature_extractor


def load_left_out_backbone(model):
    """
    Loads the backbone that `build_model` has left out, if it has.

    Raises:
        ValueError: if its weights are other ones now, or damaged.
        OSError: if it cannot be fetched.
    """
    config = model.config
    if model.backbone is not None or config.backbone_config is None:
        return
    name = config.backbone_name_or_path
    backbone = load_backbone(name, copy.deepcopy(config.backbone_config), config.backbone_revision)
    if weights_hash(backbone) != config.backbone_hash:
        raise ValueError(f"{name}: the backbone's weights were changed while the run began")
    model.family.prepare(backbone)
    model.backbone = backbone.requires_grad_(False).eval()


def _with_backbone(name_or_path, revision, fields):
    return EmoShareModel.from_backbone_pretrained(name_or_path, revision=revision, **fields)


def _without_known_backbone(name_or_path, revision, fields):
    """A model without its backbone's weights, if their hash is kept; otherwise with them, and their hash is kept."""
    entry, state, _ = _checkpoint(name_or_path, revision)
    known = kept({entry: state}).get(entry)
    if known is not None:
        return _without_backbone(name_or_path, revision, fields, known.decode())
    before = torch.get_rng_state()
    model = _with_backbone(name_or_path, revision, fields)
    after = torch.get_rng_state()
    entry, state, is_settled = _checkpoint(name_or_path, revision)  # it may have been fetched
    if is_settled:
        # Loading draws random numbers if the checkpoint lacks weights: heads would have others without it.
        torch.set_rng_state(before)
        _without_backbone(name_or_path, revision, fields, model.config.backbone_hash)
        if torch.equal(torch.get_rng_state(), after):
            keep([Entry(entry, state, model.config.backbone_hash.encode())])
        torch.set_rng_state(after)
    return model


def _without_backbone(name_or_path, revision, fields, backbone_hash):
    config = EmoShareConfig(
        backbone_config=AutoConfig.from_pretrained(name_or_path, revision=revision),
        backbone_name_or_path=str(name_or_path),
        backbone_revision=revision,
        backbone_hash=backbone_hash,
        **fields,
    )
    model = EmoShareModel(config)  # draws the backbone's random numbers, after which come those of the heads
    model.backbone = None
    return model


def _checkpoint(name_or_path, revision):
    """Name and state of a backbone's checkpoint, as in `Entry`, and whether its files are settled."""
    folder = Path(cached_file(name_or_path, CONFIG_NAME, revision=revision)).parent
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    versions = f"{transformers.__version__} {torch.__version__}".encode()
    names = [path.name.encode("utf-8", "surrogateescape") for path in files]
    state = b" ".join([versions, *names, state_of(files)])
    return b"backbone " + os.fsencode(folder.absolute()), state, are_settled(files)
