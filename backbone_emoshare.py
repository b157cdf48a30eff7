"""Pretrained speech encoders as backbones: their families, and how one is loaded and recognised."""

import copy
import hashlib
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .wav2vec2_emoshare import Wav2Vec2Family


class BackboneFamily(Protocol):
    """
    What the rest of the code knows about a kind of speech encoder. A family is one module, with one entry in
    `FAMILIES`; nothing outside it depends on the encoder's structure.

    Attributes:
        model_types: Transformers' names of the encoders in this family.
        feature_type: what its input is, as `EmoShareFeatureExtractor.feature_type`.
        input_name: argument of `EmoShareModel.forward` for its input, `"input_values"` or `"input_features"`.
        optional_weights: names of weights that a checkpoint may lack, because frame features do not depend on them.
        attention_projections: names, within a layer of the encoder, of its attention's linear layers.
    """

    model_types: tuple[str, ...]
    feature_type: str
    input_name: str
    optional_weights: tuple[str, ...]
    attention_projections: tuple[str, ...]

    def check(self, config, is_frozen):
        """Raises ValueError, beginning with "backbone_config:", if frame features would not be exact in a batch."""

    def width(self, config):
        """Width of the frame features."""

    def num_layers(self, config):
        """Layers of the encoder; `hidden_states` has layers 0 (the first layer's input) to this number."""

    def frame_geometry(self, config):
        """Samples that one frame sees, and samples from one frame to the next."""

    def num_frames(self, config, lengths):
        """Frames (int or int tensor, as given) that inputs of these lengths become."""

    def build(self, config):
        """A backbone with random weights."""

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""

    def prepare(self, backbone, fast=True):
        """
        Changes a backbone in place so that frame features never depend on padding. Without `fast`, its modules run as
        Transformers wrote them wherever exactness allows it, which is what exporting needs.
        """

    def cut(self, backbone, layer):
        """
        A view of a backbone that has the layers which `hidden_states` runs for this one, and a config that says so; the
        backbone itself if that is all of them, or if `layer` is no number of a hidden state.
        """

    def hidden_states(self, backbone, inputs, lengths, layers):
        """
        Args:
            backbone: after `prepare`.
            inputs: padded on the right, (batch, length) or (batch, length, width).
            lengths: (batch,) int64, each clip's own length.
            layers: -1 for the encoder's output, k >= 0 for `hidden_states[k]` as Transformers counts them.

        Returns:
            `dict` from layer to (batch, frames, width), arbitrary past a clip's last frame.
        """

    def run_all_layers(self, backbone):
        """
        Changes a backbone in place so that in training, too, each of its layers runs, and no frame is masked: LayerDrop
        and SpecAugment draw from generators that a training run cannot set.
        """

    def layers(self, backbone, first, layer):
        """
        The modules of the encoder's layers between two hidden states, in their order: those that make the states of
        `layer`, as in `hidden_states`, of those of `first`, a number from 0. A norm after the last one is none of them.
        """

    def upper_states(self, backbone, hidden_states, lengths, first, layer):
        """
        Runs the modules of `layers`, so that layers which are trained need not wait for those below: what this returns,
        and its gradients, are those of a pass through the whole encoder without dropout below. In training mode, the
        modules' own dropout is as they have it, layers are never left out (LayerDrop), and gradients are checkpointed
        where Transformers has been asked to.

        Args:
            backbone: after `prepare`.
            hidden_states: (batch, frames, width), what `hidden_states` returned of the layer `first`; past a clip's
                last frame it is arbitrary, and finite.
            lengths: (batch,) int64, each clip's number of frames.
            first: a number from 0.
            layer: -1 or k >= `first`, as in `hidden_states`.

        Returns:
            (batch, frames, width), arbitrary past a clip's last frame: what `hidden_states` returns of `layer`. A clip
            has the same states and gradients alone and in any batch.
        """


FAMILIES = [Wav2Vec2Family()]
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a large file


def family_of(backbone_config):
    """
    The family of a backbone, by the model type of its config.

    Raises:
        ValueError: if no family has it.
    """
    for family in FAMILIES:
        if backbone_config.model_type in family.model_types:
            return family
    supported = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise ValueError(
        f"backbone_config: model type {backbone_config.model_type!r} is not supported; supported are {supported}"
    )


def commit_of(name_or_path, revision=None, **hub_arguments):
    """
    The commit that a revision on the Hub points to; for a folder, which has none, the revision as given.

    Raises:
        FileNotFoundError: if a path that can only be a folder's does not exist.
        OSError: if there is no such repository on the Hub, or it cannot be reached.
    """
    path = Path(name_or_path)
    if len(path.parts) != 2 and not path.is_dir():
        raise FileNotFoundError(f"backbone: {name_or_path} is neither a folder nor a Hub id (ORG/NAME)")
    config_file = cached_file(name_or_path, CONFIG_NAME, revision=revision, **hub_arguments)
    return extract_commit_hash(config_file, None) or revision


def source_of_backbone(name_or_path, revision=None, **hub_arguments):
    """
    The fields of `EmoShareConfig` that say which pretrained backbone a model has, as a dict; arguments and errors as of
    `load_backbone` and `commit_of`.
    """
    revision = commit_of(name_or_path, revision, **hub_arguments)
    return {
        "backbone_config": AutoConfig.from_pretrained(name_or_path, revision=revision, **hub_arguments),
        "backbone_name_or_path": str(name_or_path),
        "backbone_revision": revision,
    }


def build_backbone(backbone_config):
    """
    A backbone with random weights, prepared.

    Raises:
        ValueError: if its config has values that no backbone can be built of.
    """
    family = family_of(backbone_config)
    try:
        backbone = family.build(backbone_config)
        family.prepare(backbone)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"backbone_config: no backbone can be built of it ({error})") from error
    return backbone


def load_backbone(name_or_path, backbone_config, revision=None, **hub_arguments):
    """
    A pretrained backbone in float32, which holds every stored dtype without loss. It is not prepared yet.

    Args:
        name_or_path: Hub id or local folder.
        backbone_config: its config.
        revision: branch, tag or commit.
        hub_arguments: arguments of `from_pretrained` that say how to reach the Hub.

    Raises:
        ValueError: if the checkpoint lacks weights, or is damaged.
        OSError: if it cannot be fetched.
    """
    family = family_of(backbone_config)
    with clear_errors_of_weights(name_or_path):
        backbone, loading = family.load(
            name_or_path, revision=revision, config=backbone_config, dtype=torch.float32, **hub_arguments
        )
    missing = sorted(set(loading["missing_keys"]) - set(family.optional_weights))
    if missing:
        raise ValueError(f"{name_or_path}: the checkpoint lacks {len(missing)} backbone weights: {missing[:5]}")
    return backbone


@contextmanager
def clear_errors_of_weights(name_or_path):
    """
    While weights are loaded: what PyTorch and safetensors raise for a file that is damaged becomes a short ValueError.

    Args:
        name_or_path: the repository or folder that they are loaded from.
    """
    try:
        yield
    # Scanners of remote code mistrust modules that import pickle, so its error comes by way of torch.
    except (SafetensorError, torch.serialization.pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        pointers = [path for path in Path(name_or_path).glob("*") if _is_lfs_pointer(path)]
        if pointers:
            raise ValueError(
                f"{pointers[0]}: holds a Git LFS pointer instead of weights; `git lfs pull` in its folder fetches them"
            ) from error
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or "it is empty"
        raise ValueError(f"{name_or_path}: the weights cannot be read, their file is damaged ({reason})") from error


def _is_lfs_pointer(path):
    if path.suffix not in (".safetensors", ".bin"):
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def fetch_backbone(config, tuned, hub_arguments):
    """
    The backbone of a model whose checkpoint does not hold it.

    Args:
        config: the model's `EmoShareConfig`. A folder that it names by its path from the checkpoint is made absolute.
        tuned: names of the backbone's weights that the checkpoint does hold, because they were trained with the heads.
        hub_arguments: as in `load_backbone`.

    Raises:
        ValueError: if its weights, but for the tuned ones, are not those that the heads were trained on.
        OSError: if it cannot be fetched.
    """
    name, revision = config.backbone_name_or_path, config.backbone_revision
    if (Path(config.name_or_path) / name).is_dir():  # a folder is saved as its path from that of the heads
        name = config.backbone_name_or_path = str((Path(config.name_or_path) / name).resolve())
    try:
        backbone = load_backbone(name, copy.deepcopy(config.backbone_config), revision, **hub_arguments)
    except OSError as error:
        raise OSError(
            f"this checkpoint holds the heads alone, and their backbone {name!r} (revision {revision}) cannot be "
            f"loaded; if it has moved, give backbone_name_or_path to from_pretrained. {error}"
        ) from error
    found = weights_hash(backbone, tuned)
    if found != config.backbone_hash:
        raise ValueError(
            f"{name} (revision {revision}): the backbone's weights have the hash {found}; these heads were trained "
            f"on weights with the hash {config.backbone_hash}"
        )
    return backbone


def check_loaded(name_or_path, loading, optional_weights):
    """
    Transformers initialises missing weights at random, and ignores those that it does not know.

    Args:
        name_or_path: repository or folder of a model.
        loading: Transformers' loading info.
        optional_weights: of the backbone's family.

    Raises:
        ValueError: if the checkpoint lacks weights, or has others than the model's.
    """
    for kind, problem in (("missing_keys", "lacks"), ("unexpected_keys", "holds, besides those of this model,")):
        names = sorted(name for name in loading[kind] if name.removeprefix("backbone.") not in optional_weights)
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{name_or_path}: the checkpoint {problem} {len(names)} weight(s): {shown}")


def check_is_pretrained(backbone, config, tuned):
    """
    Args:
        backbone: of a model.
        config: the model's `EmoShareConfig`.
        tuned: names of the backbone's weights that were trained with the heads.

    Raises:
        ValueError: if the other weights are not, or cannot be known to be, those that the config says where to fetch.
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
    if weights_hash(backbone, tuned) != config.backbone_hash:
        raise ValueError(
            f"include_backbone=False: the backbone's weights are not those of {name} any more: they were changed, or "
            "the model was loaded in 16 bits; save them with the heads, or load the model in float32"
        )


def weights_hash(backbone, tuned=()):
    """SHA-256 of a backbone's weights as float32, in the order of their names, without the `tuned` ones."""
    left_out = {*family_of(backbone.config).optional_weights, *tuned}
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
