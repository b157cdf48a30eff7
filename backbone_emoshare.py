"""Pretrained speech encoders as backbones: their families, and how one is loaded and recognised."""

import hashlib
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
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
    """

    model_types: tuple[str, ...]
    feature_type: str
    input_name: str
    optional_weights: tuple[str, ...]

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

    def exportable(self, backbone):
        """
        A copy on the CPU, in eval mode, that `torch.export` can run `hidden_states` of. A family may do without this
        method: models with its backbones cannot be exported then.
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


def check_is_pretrained(backbone, config):
    """
    Raises:
        ValueError: if a model's backbone is not, or cannot be known to be, the one that its config says where to fetch.
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
    if weights_hash(backbone) != config.backbone_hash:
        raise ValueError(
            f"include_backbone=False: the backbone's weights are not those of {name} any more: they were changed, or "
            "the model was loaded in 16 bits; save them with the heads, or load the model in float32"
        )


def weights_hash(backbone):
    """SHA-256 of a backbone's weights as float32, in the order of their names."""
    optional_weights = family_of(backbone.config).optional_weights
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.state_dict().items()):
        if name not in optional_weights:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
