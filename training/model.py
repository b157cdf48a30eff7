"""A run's model, its heads untrained, and the feature extractor that fits it."""

import copy
import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers.utils import CONFIG_NAME, cached_file

from ..backbone_emoshare import load_backbone, source_of_backbone, weights_hash
from ..configuration_emoshare import EmoShareConfig
from ..dataset_script.digests import Entry, are_settled, keep, kept, state_of
from ..feature_extraction_emoshare import MIN_FRAMES, EmoShareFeatureExtractor
from ..modeling_emoshare import EmoShareModel


def build_model(arguments, labels):
    """
    With `--push_backbone false`, which saves the heads alone, the weights of a backbone that an earlier run has loaded
    with the same `--seed` are left out: frame features may all be there already, and `load_left_out_backbone` loads
    them where they are not.

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
        fields |= arguments.backbone_fields
        if arguments.lora_rank and find_spec("peft") is None:
            raise ValueError("--lora_rank: needs PEFT, which is not installed: pip install peft")
        is_needed = run.push_backbone or arguments.tunes_backbone
        build = EmoShareModel.from_backbone_pretrained if is_needed else _with_backbone_if_new
        try:
            model = build(arguments.backbone, revision=arguments.backbone_revision, **fields)
        except ValueError as error:  # the one field whose flag has another name
            raise ValueError(str(error).replace("finetuned_layers", "--finetune_last_layers")) from error
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
    model.attach_backbone(backbone)


def _with_backbone_if_new(name_or_path, revision, **fields):
    """
    As `EmoShareModel.from_backbone_pretrained`, with the same heads; without the backbone's weights if they were loaded
    with this state of torch's generator before, so that their hash and what loading draws from it are known.
    """
    # Checked before the weights are fetched, so that a wrong field costs no time.
    config = EmoShareConfig(**source_of_backbone(name_or_path, revision), **fields)
    revision = config.backbone_revision
    drawn_before = hashlib.blake2b(torch.get_rng_state().numpy()).hexdigest()
    checkpoint = _Checkpoint.at(name_or_path, revision)
    config.backbone_hash, generator = checkpoint.known(drawn_before)
    backbone = None
    if config.backbone_hash is None:
        backbone = load_backbone(name_or_path, copy.deepcopy(config.backbone_config), revision)
        config.backbone_hash, generator = weights_hash(backbone), torch.get_rng_state()
        checkpoint = _Checkpoint.at(name_or_path, revision)  # it may have been fetched
        checkpoint.keep(drawn_before, config.backbone_hash, generator)
    torch.set_rng_state(generator)
    model = EmoShareModel(config)  # with a backbone of random weights: those of the heads are drawn after them
    model.backbone = None
    if backbone is not None:
        model.attach_backbone(backbone)
    return model


@dataclass(frozen=True)
class _Checkpoint:
    """
    What is known of a backbone that was loaded before.

    Attributes:
        folder: of its files, as bytes.
        state: of them, as of `Entry`.
        is_settled: whether what is known may be kept.
    """

    folder: bytes
    state: bytes
    is_settled: bool

    @classmethod
    def at(cls, name_or_path, revision):
        """Of the checkpoint as it is there now."""
        folder = Path(cached_file(name_or_path, CONFIG_NAME, revision=revision)).parent
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        versions = f"{transformers.__version__} {torch.__version__}".encode()
        state = b" ".join([versions, *(os.fsencode(path.name) for path in files), state_of(files)])
        return cls(os.fsencode(folder.absolute()), state, are_settled(files))

    def known(self, drawn_before):
        """
        The hash of the weights, and the state of torch's generator after they were loaded; both `None` if not known.

        Args:
            drawn_before: a digest of the generator's state before.
        """
        name = self._name(drawn_before)
        value = kept({name: self.state}).get(name)
        if value is None:
            return None, None
        backbone_hash, _, generator = value.partition(b" ")
        return backbone_hash.decode(), torch.frombuffer(bytearray(generator), dtype=torch.uint8)

    def keep(self, drawn_before, backbone_hash, generator):
        """Makes this known, with arguments as `known` has and gives them."""
        value = backbone_hash.encode() + b" " + generator.numpy().tobytes()
        keep([Entry(self._name(drawn_before), self.state, value, self.is_settled)])

    def _name(self, drawn_before):
        return b"backbone loaded after %s from %s" % (drawn_before.encode(), self.folder)
