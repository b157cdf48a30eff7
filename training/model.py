"""The model of a run, with untrained heads, and its feature extractor."""

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
    Builds a model and its feature extractor.

    With `--push_backbone false`, which saves the heads alone, the backbone is left out if an earlier run has loaded it
    with the same `--seed`: all frame features may exist already. If not, `load_left_out_backbone` loads it.

    Args:
        arguments: `Arguments`. Without `--head_seeds`, the initial weights depend on torch's global seed.
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
        except ValueError as error:  # this field and its flag have different names
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
    Loads the backbone if `build_model` has left it out.

    Raises:
        ValueError: if its weights were changed or are damaged.
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
    As `EmoShareModel.from_backbone_pretrained`, with the same heads, but without the backbone if it was loaded before
    with the same state of torch's generator, so that its hash and the state after loading are known.
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
        checkpoint = _Checkpoint.at(name_or_path, revision)  # it may have been fetched just now
        checkpoint.keep(drawn_before, config.backbone_hash, generator)
    torch.set_rng_state(generator)
    model = EmoShareModel(config)  # with a random backbone, because the heads' weights are drawn after it
    model.backbone = None
    if backbone is not None:
        model.attach_backbone(backbone)
    return model


@dataclass(frozen=True)
class _Checkpoint:
    """
    What is known about a backbone that was loaded before.

    Attributes:
        folder: folder of its files, as bytes.
        state: state of the files, as in `Entry`.
        is_settled: whether the knowledge may be kept.
    """

    folder: bytes
    state: bytes
    is_settled: bool

    @classmethod
    def at(cls, name_or_path, revision):
        """For the checkpoint as it is now."""
        folder = Path(cached_file(name_or_path, CONFIG_NAME, revision=revision)).parent
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        versions = f"{transformers.__version__} {torch.__version__}".encode()
        state = b" ".join([versions, *(os.fsencode(path.name) for path in files), state_of(files)])
        return cls(os.fsencode(folder.absolute()), state, are_settled(files))

    def known(self, drawn_before):
        """
        The hash of the weights, and the state of torch's generator after loading; both `None` if unknown.

        Args:
            drawn_before: a digest of the generator's state before loading.
        """
        name = self._name(drawn_before)
        value = kept({name: self.state}).get(name)
        if value is None:
            return None, None
        backbone_hash, _, generator = value.partition(b" ")
        return backbone_hash.decode(), torch.frombuffer(bytearray(generator), dtype=torch.uint8)

    def keep(self, drawn_before, backbone_hash, generator):
        """Keeps what `known` will then return for `drawn_before`."""
        value = backbone_hash.encode() + b" " + generator.numpy().tobytes()
        keep([Entry(self._name(drawn_before), self.state, value, self.is_settled)])

    def _name(self, drawn_before):
        return b"backbone loaded after %s from %s" % (drawn_before.encode(), self.folder)
