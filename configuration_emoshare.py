"""Configuration of the EmoShare model."""

import copy
import os
from dataclasses import fields
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .architectures_emoshare import ARCHITECTURES
from .backbone_emoshare import family_of
from .checks_emoshare import check_choice, check_known, checked_dtype, is_known
from .fields_emoshare import CHOICES, DEFAULTS, label_fields, labels_by_index
from .losses_emoshare import LIKELIHOODS, takes
from .repository_emoshare import (
    AUTO_MAP,
    CUSTOM_PIPELINES,
    PushToHub,
    copy_modules,
    is_remote_code,
    module_file,
    remember_access,
)

logger = logging.get_logger(__name__)

# Transformers fetches the code of a repository by following relative imports, which it finds by searching the text.
# After an interruption, it looks for missing modules only among the imports of the module that it was asked for, which
# is this one at first. So all other modules are named here.
OTHER_MODULES = """
import .audio_emoshare
import .batched_features_emoshare
import .containers_emoshare
import .descriptors_emoshare
import .embeddings_emoshare
import .encoder_layers_emoshare
import .feature_extraction_emoshare
import .filter_banks_emoshare
import .finetuning_emoshare
import .frames_emoshare
import .head_emoshare
import .mel_emoshare
import .modeling_emoshare
import .offload_emoshare
import .onnx_export_emoshare
import .onnx_graph_emoshare
import .onnx_layers_emoshare
import .other_formats_emoshare
import .outputs_emoshare
import .passes_emoshare
import .pipeline_emoshare
import .pooling_emoshare
import .resampling_emoshare
import .saving_emoshare
import .segments_emoshare
import .stream_emoshare
import .threads_emoshare
import .votes_emoshare
import .wav2vec2_bert_emoshare
import .wav2vec2_convolutions_emoshare
import .wav2vec2_emoshare
import .whisper_emoshare
import .windows_emoshare
"""


LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 1000  # a damaged config may ask for so many layers that building them takes forever
DEFAULT_FEATURE_SIZE = 40  # of acoustic features: the paper's 40 mel bands (section 2.3)
# Fields that any Transformers config may have. Those that begin with an underscore are not checked.
COMMON_FIELDS = {field.name for field in fields(PreTrainedConfig)} | {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "use_cache",  # set by Transformers' Trainer
}


class EmoShareConfig(PushToHub, PreTrainedConfig):
    r"""
    Configuration of an [`EmoShareModel`]. The defaults are Architecture 2 of the paper (section 2.4) in the sizes of
    the authors' released code, with normalisation that does not depend on padding.

    Example: `EmoShareModel(EmoShareConfig(architecture="cnn_lstm"))` is an untrained model that takes log-mels.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of a Transformers audio encoder: HuBERT, wav2vec 2.0, WavLM, data2vec-audio, UniSpeech-SAT, w2v-BERT
            2.0 or Whisper (its encoder). If `None`, the model has no backbone and takes acoustic features, such as
            log-mels, as `input_features`.
        backbone_name_or_path (`str`, *optional*):
            Hub id or folder that the backbone's weights came from. When saved, a local folder is reduced to its name,
            or to its path relative to a heads-only checkpoint.
        backbone_revision (`str`, *optional*):
            Commit of `backbone_name_or_path`, if that is on the Hub.
        backbone_hash (`str`, *optional*):
            SHA-256 of the backbone's pretrained weights, without layers that are tuned or were left out.
        backbone_num_layers (`int`, *optional*):
            Number of layers of the original backbone; the checkpoint keeps those that `backbone_layer` needs. `None`
            if it keeps all of them. Set by `save_pretrained`.
        backbone_padding (`str`, *optional*):
            For Whisper only: what its encoder hears. `"30s"`, its default: the clip, padded with silence to 30 s as in
            Whisper's training; frames of the padding are dropped. `"clip"`: the clip alone, several times as fast. It
            is stored in `backbone_config`.
        include_backbone (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint holds the frozen weights of the backbone. Without them, `from_pretrained` fetches the
            backbone from `backbone_name_or_path`. Set by `save_pretrained`.
        backbone_layer (`int` or `"weighted"`, *optional*, defaults to -1):
            Which hidden states are the frame features: `-1` is the backbone's `last_hidden_state`, an integer k >= 0
            is Transformers' `hidden_states[k]`, and `"weighted"` is a learned softmax-weighted sum of all of them.
        freeze_backbone (`bool`, *optional*, defaults to `True`):
            Whether the backbone is a fixed feature extractor, without gradients and always in eval mode.
        finetuned_layers (`int`, *optional*, defaults to 0):
            How many layers of an otherwise frozen backbone are trained with the heads, counted down from the one that
            `backbone_layer` reads. A normalisation after the last layer stays frozen.
        lora_rank (`int`, *optional*, defaults to 0):
            Rank of adapters (LoRA) on the attention of these layers, which are trained instead of the layers
            themselves; 0 trains the layers. Needs PEFT.
        feature_size (`int`, *optional*):
            Width of the frame features: that of the backbone; without a backbone, 40 by default.
        architecture (`str`, *optional*, defaults to `"cnn_lstm_attention"`):
            A key of `ARCHITECTURES`: `"cnn_lstm"` (the paper's Architecture 1), `"cnn_lstm_attention"` (Architecture 2)
            or `"transformer"` (the multi-headed transformer that the paper tried and dropped, section 3.2; the paper
            gives no sizes, so they are ours): two encoder layers instead of the LSTM, as wide as the last convolution,
            with 8 heads and a feed-forward network four times as wide. Not from the paper: `"cnn_lstm_statistics"`
            (attentive statistics pooling with four queries after the LSTM), `"statistics"` (a linear probe of mean and
            standard deviation of the frame features) and `"functionals"` (the functionals of classical systems and a
            feed-forward network). The last two have no convolutions and no LSTM, and ignore their fields, except that
            clips must have at least `pool_size` frames.
        conv_channels (`tuple[int]`, *optional*, defaults to `(768, 384, 192)`):
            Output channels of the 1D convolutions.
        conv_kernel_size (`int`, *optional*, defaults to 3):
            Kernel size of the convolutions, in frames; odd, so that the result is centred on its frame.
        pool_size (`int`, *optional*, defaults to 2):
            Frames per step after max-pooling: L frames become floor(L / pool_size) steps.
        lstm_hidden_size (`int`, *optional*, defaults to 512):
            Width of the LSTM.
        lstm_num_layers (`int`, *optional*, defaults to 2):
            Layers of the LSTM.
        ffn_sizes (`tuple[int]`, *optional*):
            Hidden sizes of the feed-forward network. `None` takes the architecture's own: (256, 64, 8) for Architecture
            1 and (256, 128, 64) for Architecture 2, as in the released code.
        normalization (`str`, *optional*, defaults to `"frame"`):
            `"frame"`: padding is masked after every layer; LayerNorm over the channels of each step before the LSTM,
            and after each hidden layer of the feed-forward network. `"none"`: the same masks, without LayerNorms other
            than those inside a transformer layer.
            `"sequence"`: the authors' released network: inputs padded to `max_frames`, no masks in the convolutions,
            and LayerNorms over the padded sequence where the released architecture has them.
        max_frames (`int`, *optional*, defaults to 398):
            Length in frames that `normalization="sequence"` pads to; unused otherwise.
        output_activation (`str`, *optional*, defaults to `"sigmoid"`):
            Last activation, `"sigmoid"` or `"relu"` (the released network's).
        separate_heads (`bool`, *optional*, defaults to `True`):
            `True` for one head per emotion, as in the paper; `False` for one head with all outputs (a shared trunk).
        loss (`str`, *optional*, defaults to `"mse"`):
            A key of `losses_emoshare.LOSSES`: the loss that `forward` returns and training minimises. With
            `"beta_binomial"`, the last layer of a head has twice as many outputs: a concentration for each share, too.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability, at least 0 and less than 1: after the convolutions, between LSTM layers or within a
            transformer layer, after pooling, and after each hidden layer of the feed-forward network.
        id2label (`dict[int, str]`, *optional*):
            The labels by index; by default, the nine emotions of ComParE 2023.
        problem_type (`str`, *optional*, defaults to `"regression"`):
            Must be `"regression"`, so that Transformers' own pipelines return the shares as they are.

    Raises:
        ValueError: on an illegal value or combination, or an unknown field; the message begins with the field's name.
    """

    model_type = "emoshare"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        backbone_name_or_path=None,
        backbone_revision=None,
        backbone_hash=None,
        backbone_num_layers=None,
        backbone_padding=DEFAULTS["backbone_padding"],
        include_backbone=True,
        backbone_layer=-1,
        freeze_backbone=True,
        finetuned_layers=0,
        lora_rank=0,
        feature_size=None,
        architecture=DEFAULTS["architecture"],
        conv_channels=DEFAULTS["conv_channels"],
        conv_kernel_size=3,
        pool_size=DEFAULTS["pool_size"],
        lstm_hidden_size=DEFAULTS["lstm_hidden_size"],
        lstm_num_layers=DEFAULTS["lstm_num_layers"],
        ffn_sizes=DEFAULTS["ffn_sizes"],
        normalization=DEFAULTS["normalization"],
        max_frames=DEFAULTS["max_frames"],
        output_activation=DEFAULTS["output_activation"],
        separate_heads=DEFAULTS["separate_heads"],
        loss=DEFAULTS["loss"],
        dropout=DEFAULTS["dropout"],
        id2label=None,
        problem_type="regression",
        **kwargs,
    ):
        check_known(kwargs, EmoShareConfig, COMMON_FIELDS)
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(f"model_type: got {kwargs['model_type']!r}; expected {self.model_type!r}")
        for name in ("dtype", "torch_dtype"):
            if kwargs.get(name) is not None:
                checked_dtype(name, kwargs[name])
        if isinstance(backbone_config, dict):
            backbone_config = _backbone_config_from_dict(backbone_config)
        elif not isinstance(backbone_config, PreTrainedConfig | None):
            raise ValueError(f"backbone_config: got {backbone_config!r}; expected a config, a dict or None")
        if feature_size is None:
            feature_size = _feature_size(backbone_config)
        self.backbone_config = backbone_config
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_hash = backbone_hash
        self.backbone_num_layers = backbone_num_layers
        self.backbone_padding = backbone_padding
        self.include_backbone = include_backbone
        self.backbone_layer = backbone_layer
        self.freeze_backbone = freeze_backbone
        self.finetuned_layers = finetuned_layers
        self.lora_rank = lora_rank
        self.feature_size = feature_size
        self.architecture = architecture
        self.conv_channels = _sizes("conv_channels", conv_channels)
        self.conv_kernel_size = conv_kernel_size
        self.pool_size = pool_size
        self.lstm_hidden_size = lstm_hidden_size
        self.lstm_num_layers = lstm_num_layers
        check_choice("architecture", architecture, ARCHITECTURES)
        self.ffn_sizes = ARCHITECTURES[architecture].ffn_sizes if ffn_sizes is None else _sizes("ffn_sizes", ffn_sizes)
        self.normalization = normalization
        self.max_frames = max_frames
        self.output_activation = output_activation
        self.separate_heads = separate_heads
        self.loss = loss
        self.dropout = dropout
        if not is_remote_code():
            # The installed package has registered its task. If the config listed it too, `pipeline()` would treat it as
            # remote code and ask for `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        if problem_type != "regression":
            raise ValueError(f"problem_type: got {problem_type!r}; shares are predicted by 'regression' only")
        super().__init__(problem_type=problem_type, **label_fields(id2label, kwargs))
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in Transformers. Saving the model later may need further files of its repository, with the same token."""
        remember_access(pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def backbone_padding(self):
        """The padding in `backbone_config`; `None` if the backbone's family offers no choice."""
        return getattr(self.backbone_config, "backbone_padding", None)

    @backbone_padding.setter
    def backbone_padding(self, padding):
        """`None` keeps the padding in `backbone_config`, or sets the family's default if there is none."""
        backbone = self.backbone_config
        choices = () if backbone is None else family_of(backbone).paddings
        if padding is None and choices:
            padding = getattr(backbone, "backbone_padding", choices[0])
        if padding is None:
            return
        if not choices:
            kind = "backbone_config is None" if backbone is None else f"a {backbone.model_type} backbone has no choice"
            raise ValueError(f"backbone_padding: got {padding!r}, but {kind}")
        check_choice("backbone_padding", padding, choices)
        backbone.backbone_padding = padding

    @property
    def labels(self):
        """The label names, in the order of the model's outputs."""
        return [self.id2label[index] for index in range(self.num_labels)]

    @property
    def has_attention(self):
        """Whether the model returns attention weights."""
        return ARCHITECTURES[self.architecture].has_attention

    @property
    def has_concentrations(self):
        """Whether the model returns a concentration with each share, because its loss needs one."""
        return takes(self.loss, "concentrations")

    @property
    def tunes_backbone(self):
        """Whether the backbone, or a part of it, is trained with the heads."""
        return self.backbone_config is not None and (not self.freeze_backbone or self.finetuned_layers > 0)

    def check(self):
        """
        Raises ValueError on an illegal field, and makes `label2id` match `id2label`. Transformers sets fields that are
        given to `from_pretrained` after construction, so models and `save_pretrained` check again.
        """
        self.id2label = labels_by_index(self.id2label)
        self.label2id = {label: index for index, label in self.id2label.items()}
        self._validate_backbone()
        self._validate_finetuning()
        self._validate_head()

    def _validate_backbone(self):
        backbone = self.backbone_config
        if backbone is None:
            if self.backbone_layer != -1:
                raise ValueError(f"backbone_layer: got {self.backbone_layer!r}, but backbone_config is None")
            return
        family = family_of(backbone)
        family.check(backbone, is_frozen=self.freeze_backbone)
        if self.feature_size != family.width(backbone):
            raise ValueError(
                f"feature_size: got {self.feature_size}, but the backbone's hidden size is {family.width(backbone)}; "
                "leave it out to follow the backbone"
            )
        layer, num_layers = self.backbone_layer, family.num_layers(backbone)
        _check_layers("backbone_config", num_layers)
        is_layer_index = isinstance(layer, int) and not isinstance(layer, bool)
        if layer != "weighted" and not (is_layer_index and -1 <= layer <= num_layers):
            raise ValueError(
                f"backbone_layer: got {layer!r}; expected -1 (last_hidden_state), 0 to {num_layers} (hidden_states[k]) "
                "or 'weighted'"
            )
        of_pretrained = self.backbone_num_layers
        if of_pretrained is not None and not (_is_positive_int(of_pretrained) and of_pretrained >= num_layers):
            raise ValueError(f"backbone_num_layers: got {of_pretrained!r}; expected at least {num_layers}, or None")
        if layer in (-1, "weighted") and of_pretrained not in (None, num_layers):
            raise ValueError(
                f"backbone_layer: got {layer!r}, for which {num_layers} of the backbone's {of_pretrained} "
                "layers do not suffice: the others were left out when the model was saved"
            )

    def _validate_finetuning(self):
        number, rank = self.finetuned_layers, self.lora_rank
        for field in ("finetuned_layers", "lora_rank"):
            if getattr(self, field) != 0 and not _is_positive_int(getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected 0 or a positive integer")
        if not number:
            if rank:
                raise ValueError(f"lora_rank: got {rank}, but finetuned_layers is 0: there are no layers to adapt")
            return
        for field, excluded in (("backbone_config", None), ("freeze_backbone", False), ("backbone_layer", "weighted")):
            if getattr(self, field) == excluded:
                raise ValueError(f"finetuned_layers: got {number}, but {field} is {excluded!r}; expected 0")
        if self.backbone_padding == "30s":
            raise ValueError(
                f"backbone_padding: got '30s' with {number} finetuned_layers, which would also hear the silence after "
                "a clip, whose hidden states are not stored; expected 'clip'"
            )
        layer = self.backbone_layer
        num_layers = family_of(self.backbone_config).num_layers(self.backbone_config) if layer == -1 else layer
        if number > num_layers:
            raise ValueError(
                f"finetuned_layers: got {number}; expected at most {num_layers}, the layers up to the one that is read"
            )
        if rank > self.feature_size:
            raise ValueError(f"lora_rank: got {rank}; expected at most {self.feature_size}, the backbone's width")

    def _validate_head(self):
        for field, allowed in CHOICES.items():
            check_choice(field, getattr(self, field), allowed)
        for field in ("freeze_backbone", "include_backbone", "separate_heads"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected true or false")
        sizes = ("feature_size", "conv_kernel_size", "pool_size", "lstm_hidden_size", "lstm_num_layers", "max_frames")
        for field in sizes:
            if not _is_positive_int(getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected a positive integer")
        _check_layers("lstm_num_layers", self.lstm_num_layers)
        for field in ("conv_channels", "ffn_sizes"):
            if not all(_is_positive_int(size) for size in getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected positive integers")
        if not self.conv_channels:
            raise ValueError("conv_channels: got none; expected at least one convolution")
        if not _is_fraction(self.dropout):
            raise ValueError(f"dropout: got {self.dropout!r}; expected a number from 0 to less than 1")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size: got {self.conv_kernel_size}; expected an odd number")
        architecture = ARCHITECTURES[self.architecture]
        heads = architecture.attention_heads
        if heads and self.conv_channels[-1] % heads:
            raise ValueError(
                f"conv_channels: got {self.conv_channels}; with architecture={self.architecture!r} the last must be a "
                f"multiple of {heads}, its attention heads"
            )
        if self.backbone_layer == "weighted" and architecture.stem == "no_stem":
            raise ValueError(
                f"backbone_layer: got 'weighted'; with architecture={self.architecture!r}, whose statistics are scaled "
                "before training, the weights of the layers cannot be learned; expected a layer"
            )
        if self.loss in LIKELIHOODS and self.output_activation != "sigmoid":
            raise ValueError(
                f"loss: got {self.loss!r}, a likelihood of votes, which needs shares between 0 and 1; expected "
                f"output_activation='sigmoid', and not {self.output_activation!r}"
            )
        if self.normalization == "sequence" and not architecture.is_released:
            raise ValueError(
                "normalization: got 'sequence', which reproduces a network that the authors released; they released no "
                f"{self.architecture!r}"
            )
        if self.normalization == "sequence" and self.max_frames < self.pool_size:
            raise ValueError(
                f"max_frames: got {self.max_frames}, less than one step of pool_size {self.pool_size} frames"
            )

    def save_pretrained(self, save_directory, **kwargs):
        """
        Writes config.json and, next to it, the Python modules that it names. With weights and preprocessor config, the
        folder is then a complete model repository for `trust_remote_code=True`.
        """
        self.check()
        modules = copy_modules(Path(save_directory), self.name_or_path)
        saved = copy.deepcopy(self)
        saved.auto_map = {key: name for key, name in AUTO_MAP.items() if module_file(name) in modules}
        saved.custom_pipelines = {
            task: info for task, info in CUSTOM_PIPELINES.items() if module_file(info["impl"]) in modules
        }
        saved._leave_out_unknown()
        saved._leave_out_folders(save_directory)
        super(EmoShareConfig, saved).save_pretrained(save_directory, **kwargs)

    def _leave_out_unknown(self):
        """Removes attributes that are not fields of the config, with which it could not be loaded again."""
        for name in [name for name in vars(self) if not is_known(name, EmoShareConfig, COMMON_FIELDS)]:
            logger.warning(f"config.{name} is not saved: EmoShareConfig has no such field")
            delattr(self, name)

    def _leave_out_folders(self, save_directory):
        """Replaces paths of local folders, which mean nothing on another machine."""
        self.name_or_path = ""
        if self.backbone_config is not None:
            self.backbone_config.name_or_path = ""
        folder = self.backbone_name_or_path
        if folder is not None and Path(folder).is_dir():
            folder = Path(folder).resolve()
            self.backbone_name_or_path = folder.name if self.include_backbone else _path_from(save_directory, folder)


def _path_from(start, folder):
    """The path of a folder relative to `start`, or unchanged if there is none, as between two Windows drives."""
    try:
        return Path(os.path.relpath(folder, Path(start).resolve())).as_posix()
    except ValueError:
        return str(folder)


def _check_layers(field, num_layers):
    if num_layers > MOST_LAYERS:
        raise ValueError(f"{field}: got {num_layers} layers; expected at most {MOST_LAYERS}")


def _is_fraction(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _is_positive_int(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE


def _backbone_config_from_dict(fields):
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"backbone_config: got no model_type in {fields}")
    for name, value in fields.items():
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and abs(size) > LARGEST_SIZE:
                raise ValueError(f"backbone_config: {name} is {value!r}; expected numbers up to {LARGEST_SIZE}")
    try:
        return AutoConfig.for_model(**fields)
    except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"backbone_config: {' '.join(str(error).split())}") from error


def _feature_size(backbone_config):
    return DEFAULT_FEATURE_SIZE if backbone_config is None else family_of(backbone_config).width(backbone_config)


def _sizes(field, sizes):
    if not isinstance(sizes, list | tuple):
        raise ValueError(f"{field}: got {sizes!r}; expected a list of sizes")
    return tuple(sizes)
