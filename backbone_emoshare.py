"""Pretrained speech encoders as backbones: their families, and how they are loaded and identified."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash, logging

from .wav2vec2_bert_emoshare import Wav2Vec2BertFamily
from .wav2vec2_emoshare import Wav2Vec2Family
from .whisper_emoshare import WhisperFamily


class BackboneFamily(Protocol):
    """
    What the rest of the code knows about a kind of speech encoder. A family is one module, with one entry in
    `FAMILIES`; nothing outside it depends on the encoder's structure.

    Attributes:
        model_types: Transformers' names of the encoders in this family.
        feature_type: the input that the encoder takes, as in `EmoShareFeatureExtractor.feature_type`.
        input_name: argument of `EmoShareModel.forward` for this input, `"input_values"` or `"input_features"`.
        optional_weights: names of weights that a checkpoint may lack, because frame features do not depend on them.
        attention_projections: names, within a layer of the encoder, of its attention's linear layers.
        paddings: the choices for `EmoShareConfig.backbone_padding`, the default first; empty if there is no choice.
    """

    model_types: tuple[str, ...]
    feature_type: str
    input_name: str
    optional_weights: tuple[str, ...]
    attention_projections: tuple[str, ...]
    paddings: tuple[str, ...]

    def check(self, config, is_frozen):
        """Raises ValueError, beginning with "backbone_config:", if frame features would not be exact in a batch."""

    def width(self, config):
        """Width of the frame features."""

    def num_layers(self, config):
        """Number of layers of the encoder; hidden states are numbered from 0 (the first layer's input) to this."""

    def frame_geometry(self, config):
        """Samples that one frame sees, and samples from one frame to the next."""

    def num_frames(self, config, lengths):
        """Number of frames (int or int tensor, as given) for inputs of these lengths."""

    def build(self, config):
        """A backbone with random weights."""

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""

    def prepare(self, backbone, fast=True):
        """
        Changes a backbone in place so that frame features never depend on padding. Without `fast`, which is for export,
        its modules run as Transformers wrote them wherever exactness allows it.
        """

    def exportable(self, backbone):
        """
        A copy on the CPU, in eval mode, whose `hidden_states` `torch.export` can trace. Optional: models of a family
        without this method cannot be exported.
        """

    def cut(self, backbone, layer):
        """
        A view of a backbone with only the layers that `hidden_states` runs for `layer`, and with a config to match. If
        these are all layers, or `layer` is not the number of a hidden state, this is the backbone itself.
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
        Changes a backbone in place so that in training, too, each layer runs and no frame is masked: LayerDrop and
        SpecAugment draw from generators that a training run cannot seed.
        """

    def layers(self, backbone, first, layer):
        """
        The layers of the encoder, in order, that turn hidden state `first` (a number from 0) into `layer` (as in
        `hidden_states`), without a final norm.
        """

    def upper_states(self, backbone, hidden_states, lengths, first, layer):
        """
        Runs the layers that `layers` returns, so that trained layers can start from stored states. The result and its
        gradients are those of a pass through the whole encoder without dropout below. In training mode, the layers
        apply their own dropout, none is skipped (LayerDrop), and gradients are checkpointed if Transformers was asked
        to.

        Args:
            backbone: after `prepare`.
            hidden_states: (batch, frames, width), what `hidden_states` returned for `first`; arbitrary finite values
                past a clip's last frame.
            lengths: (batch,) int64, each clip's number of frames.
            first: a number from 0.
            layer: -1 or k >= `first`, as in `hidden_states`.

        Returns:
            (batch, frames, width), what `hidden_states` returns for `layer`; arbitrary past a clip's last frame. A clip
            has the same states and gradients alone and in any batch.
        """


logger = logging.get_logger(__name__)

FAMILIES = [Wav2Vec2Family(), Wav2Vec2BertFamily(), WhisperFamily()]
# Keeps Transformers from having repositories of pickles converted. By default, it asks a service to do so, which gets
# the token of private ones, and downloads the weights a second time from the pull request.
CONVERSION_SWITCH = "DISABLE_SAFETENSORS_CONVERSION"
AS_FOR_WEIGHTS = ("cache_dir", "local_files_only")
LFS_POINTER = b"version https://git-lfs"  # how large files begin in a clone without Git LFS


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
        FileNotFoundError: if a path that can only be a local folder does not exist.
        OSError: if there is no such repository on the Hub, or it cannot be reached.
    """
    path = Path(name_or_path)
    if len(path.parts) != 2 and not path.is_dir():
        raise FileNotFoundError(f"backbone: {name_or_path} is neither a folder nor a Hub id (ORG/NAME)")
    config_file = cached_file(name_or_path, CONFIG_NAME, revision=revision, **hub_arguments)
    return extract_commit_hash(config_file, None) or revision


def config_of_backbone(name_or_path, revision=None, **hub_arguments):
    """
    The config in a pretrained backbone's repository or folder; arguments as of `load_backbone`.

    Raises:
        ValueError: if it has invalid values, or Transformers does not know the model type.
        OSError: if it cannot be fetched.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, **hub_arguments)
    except StrictDataclassError as error:
        raise ValueError(f"{name_or_path}: config.json: {' '.join(str(error).split())}") from error


def source_of_backbone(name_or_path, revision=None, **hub_arguments):
    """
    The fields of `EmoShareConfig` that say which pretrained backbone a model has, as a dict; arguments and errors as of
    `load_backbone` and `commit_of`.
    """
    revision = commit_of(name_or_path, revision, **hub_arguments)
    return {
        "backbone_config": config_of_backbone(name_or_path, revision, **hub_arguments),
        "backbone_name_or_path": str(name_or_path),
        "backbone_revision": revision,
    }


def build_backbone(backbone_config):
    """
    A backbone with random weights, prepared.

    Raises:
        ValueError: if no backbone can be built from its config.
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


def load_backbone(name_or_path, backbone_config, revision=None, is_cut=False, **hub_arguments):
    """
    A pretrained backbone in float32, which holds every stored dtype without loss. It is not prepared yet.

    Args:
        name_or_path: Hub id or local folder.
        backbone_config: its config.
        revision: branch, tag or commit.
        is_cut: whether the config leaves out layers of the checkpoint on purpose.
        hub_arguments: arguments of `from_pretrained` that say how to reach the Hub.

    Raises:
        ValueError: if the checkpoint lacks weights, has some of other shapes, or is damaged.
        OSError: if it cannot be fetched.
    """
    family = family_of(backbone_config)
    with clear_errors_of_weights(name_or_path), _of_encoder_alone():
        backbone, loading = family.load(
            name_or_path,
            revision=revision,
            config=backbone_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            # Where PEFT is installed, Transformers looks for adapters first, and would use neither of these.
            adapter_kwargs={name: hub_arguments[name] for name in AS_FOR_WEIGHTS if name in hub_arguments},
            **hub_arguments,
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{name_or_path}: {len(mismatched)} backbone weights have other shapes than its config says: {name} "
            f"is {tuple(stored)}; expected {tuple(expected)}"
        )
    missing = sorted(set(loading["missing_keys"]) - set(family.optional_weights))
    if missing:
        raise ValueError(f"{name_or_path}: the checkpoint lacks {len(missing)} backbone weights: {missing[:5]}")
    if not is_cut:
        _warn_of_surplus(name_or_path, backbone, loading["unexpected_keys"])
    return backbone


def _warn_of_surplus(name_or_path, backbone, names):
    """Warns of encoder weights that its config has no place for; weights of a head around the encoder are expected."""
    names = [name.removeprefix(f"{backbone.base_model_prefix}.") for name in names]
    own = sorted(name for name in names if name.split(".")[0] in backbone._modules)
    if own:
        logger.warning(
            f"{name_or_path}: the checkpoint holds {len(own)} backbone weights for which its config has no place, and "
            f"which are left out: {own[:5]}"
        )


@contextmanager
def _of_encoder_alone():
    """Within this context, silences Transformers' load report and disables its conversion of pickles."""
    before, modeling = os.environ.get(CONVERSION_SWITCH), logging.get_logger("transformers.modeling_utils")
    os.environ[CONVERSION_SWITCH] = "true"
    modeling.addFilter(_is_no_report)
    try:
        yield
    finally:
        modeling.removeFilter(_is_no_report)
        if before is None:
            del os.environ[CONVERSION_SWITCH]
        else:
            os.environ[CONVERSION_SWITCH] = before


def _is_no_report(record):
    return "LOAD REPORT" not in record.getMessage()


@contextmanager
def clear_errors_of_weights(name_or_path):
    """
    While weights are loaded, turns errors of PyTorch and safetensors about damaged files into a short ValueError, and
    errors of the Hub's client about a broken connection into an OSError.

    Args:
        name_or_path: the repository or folder that they are loaded from.
    """
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):  # a response of the Hub, which Transformers explains
            raise
        raise OSError(f"{name_or_path}: the connection to the Hub broke off ({error}); please try again") from error
    # Scanners of remote code distrust modules that import pickle, so its error is named through torch.
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


def weights_hash(backbone, tuned=()):
    """SHA-256 of a backbone's weights as float32, in the order of their names, without those named in `tuned`."""
    left_out = {*family_of(backbone.config).optional_weights, *tuned}
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
