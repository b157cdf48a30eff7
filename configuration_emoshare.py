"""Configuration of the EmoShare model, and the list of files that make its Hub repository."""

import copy
import shutil
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file, logging

logger = logging.get_logger(__name__)

# The nine emotions of the ComParE 2023 Emotion Share sub-challenge, in the challenge's order.
EMOTIONS = (
    "Anger",
    "Boredom",
    "Calmness",
    "Concentration",
    "Determination",
    "Excitement",
    "Interest",
    "Sadness",
    "Tiredness",
)

SUPPORTED_BACKBONES = ("hubert", "wav2vec2", "wavlm", "data2vec-audio", "unispeech-sat")
ARCHITECTURES = ("cnn_lstm", "cnn_lstm_attention", "transformer")
TRANSFORMER_HEADS = 8  # attention heads of "transformer", which divide its width
NORMALIZATIONS = ("frame", "none", "sequence")
OUTPUT_ACTIVATIONS = ("sigmoid", "relu")

# Hidden sizes of the feed-forward network in the authors' released code, per architecture. The transformer was not
# released, and has those of Architecture 2.
RELEASED_FFN_SIZES = {
    "cnn_lstm": (256, 64, 8),
    "cnn_lstm_attention": (256, 128, 64),
    "transformer": (256, 128, 64),
}
DEFAULT_ACOUSTIC_FEATURES = 40

# What a Hub repository of this model names in its config.json, and the modules that these names live in.
AUTO_MAP = {
    "AutoConfig": "configuration_emoshare.EmoShareConfig",
    "AutoModel": "modeling_emoshare.EmoShareModel",
    "AutoModelForAudioClassification": "modeling_emoshare.EmoShareModel",
}
CUSTOM_PIPELINES = {
    "emotion-share": {
        "impl": "pipeline_emoshare.EmotionSharePipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "audio",
    }
}
MODULES = (
    "configuration_emoshare.py",
    "audio_emoshare.py",
    "backbone_emoshare.py",
    "modeling_emoshare.py",
    "feature_extraction_emoshare.py",
    "pipeline_emoshare.py",
)


class EmoShareConfig(PreTrainedConfig):
    r"""
    Configuration of an [`EmoShareModel`]. The defaults are Architecture 2 of the paper (section 2.4) in the sizes of
    the authors' released code, with normalisation that does not depend on padding.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of a Transformers audio encoder: HuBERT, wav2vec 2.0, WavLM, data2vec-audio or UniSpeech-SAT. With
            `None` the model has no backbone, and takes frame features (log-mels, say) as `input_features`.
        backbone_name_or_path (`str`, *optional*):
            Hub id or folder that the backbone's weights came from.
        backbone_revision (`str`, *optional*):
            Commit of `backbone_name_or_path`, where that is on the Hub.
        backbone_hash (`str`, *optional*):
            SHA-256 of the backbone's pretrained weights as they are stored there.
        include_backbone (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint holds the backbone's weights, or those of the heads alone; what `save_pretrained` was
            told last. Without them, `from_pretrained` fetches the backbone from `backbone_name_or_path`.
        backbone_layer (`int` or `"weighted"`, *optional*, defaults to -1):
            Which hidden states are the frame features: `-1` is the backbone's `last_hidden_state`, an integer k >= 0
            is Transformers' `hidden_states[k]`, and `"weighted"` is a learned softmax-weighted sum of all of them.
        freeze_backbone (`bool`, *optional*, defaults to `True`):
            Whether the backbone is a fixed feature extractor: no gradient, always in eval mode.
        feature_size (`int`, *optional*):
            Width of the frame features. Follows from the backbone; without one it is 40 if not given.
        architecture (`str`, *optional*, defaults to `"cnn_lstm_attention"`):
            `"cnn_lstm"` (the paper's Architecture 1), `"cnn_lstm_attention"` (Architecture 2) or `"transformer"` (the
            multi-headed transformer that the paper tried and dropped, section 3.2; it gives no sizes, so they are
            ours): two encoder layers in the place of the LSTM, as wide as the last convolution, with 8 heads and a
            feed-forward network four times as wide.
        conv_channels (`tuple[int]`, *optional*, defaults to `(768, 384, 192)`):
            Output channels of the 1D convolutions.
        conv_kernel_size (`int`, *optional*, defaults to 3):
            Kernel size of the convolutions, in frames; odd.
        pool_size (`int`, *optional*, defaults to 2):
            Frames per step after max-pooling; L frames become floor(L / pool_size) steps.
        lstm_hidden_size (`int`, *optional*, defaults to 512):
            Width of the LSTM.
        lstm_num_layers (`int`, *optional*, defaults to 2):
            Layers of the LSTM.
        ffn_sizes (`tuple[int]`, *optional*):
            Hidden sizes of the feed-forward network. `None` takes those of the released code: (256, 64, 8) for
            Architecture 1 and (256, 128, 64) for Architecture 2.
        normalization (`str`, *optional*, defaults to `"frame"`):
            `"frame"`: padding is masked after every layer; LayerNorm over the channels of each step before the LSTM
            and after each hidden layer of the feed-forward network. `"none"`: the same masks, no LayerNorm but those
            that a transformer layer is made with.
            `"sequence"`: the authors' released network: inputs padded to `max_frames`, nothing masked in the
            convolutions, and LayerNorms over the padded sequence where the released architecture has them.
        max_frames (`int`, *optional*, defaults to 398):
            Length that `normalization="sequence"` pads to; without meaning otherwise.
        output_activation (`str`, *optional*, defaults to `"sigmoid"`):
            Last activation, `"sigmoid"` or `"relu"` (the released network's).
        separate_heads (`bool`, *optional*, defaults to `True`):
            One network per emotion, as in the paper, or one network with all outputs.
        id2label (`dict[int, str]`, *optional*):
            The labels; the nine emotions of ComParE 2023 if not given.
        problem_type (`str`, *optional*, defaults to `"regression"`):
            Only `"regression"`: Transformers' own pipelines then return the shares as they are.

    Raises:
        ValueError: on an illegal value or combination; the message begins with the field's name.
    """

    model_type = "emoshare"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        backbone_name_or_path=None,
        backbone_revision=None,
        backbone_hash=None,
        include_backbone=True,
        backbone_layer=-1,
        freeze_backbone=True,
        feature_size=None,
        architecture="cnn_lstm_attention",
        conv_channels=(768, 384, 192),
        conv_kernel_size=3,
        pool_size=2,
        lstm_hidden_size=512,
        lstm_num_layers=2,
        ffn_sizes=None,
        normalization="frame",
        max_frames=398,
        output_activation="sigmoid",
        separate_heads=True,
        id2label=None,
        problem_type="regression",
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            backbone_config = _config_from_dict(backbone_config)
        self.backbone_config = backbone_config
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_hash = backbone_hash
        self.include_backbone = include_backbone
        self.backbone_layer = backbone_layer
        self.freeze_backbone = freeze_backbone
        self.architecture = architecture
        self.conv_channels = _sizes("conv_channels", conv_channels)
        self.conv_kernel_size = conv_kernel_size
        self.pool_size = pool_size
        self.lstm_hidden_size = lstm_hidden_size
        self.lstm_num_layers = lstm_num_layers
        released = RELEASED_FFN_SIZES.get(architecture, ())
        self.ffn_sizes = released if ffn_sizes is None else _sizes("ffn_sizes", ffn_sizes)
        self.normalization = normalization
        self.max_frames = max_frames
        self.output_activation = output_activation
        self.separate_heads = separate_heads
        if feature_size is None:
            feature_size = getattr(backbone_config, "hidden_size", DEFAULT_ACOUSTIC_FEATURES)
        self.feature_size = feature_size

        if id2label is None and kwargs.get("num_labels") in (None, len(EMOTIONS)):
            id2label = dict(enumerate(EMOTIONS))
        if id2label is not None:
            id2label = _labels_by_index(id2label)
            label2id = kwargs.get("label2id")
            kwargs["label2id"] = {label: index for index, label in id2label.items()}
            if label2id is not None and label2id != kwargs["label2id"]:
                raise ValueError(f"label2id: got {label2id}, which is not the inverse of id2label {id2label}")
        if not _is_remote_code():
            # The installed package has registered its task. Were it listed here too, `pipeline()` would take it for
            # remote code and ask for `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        if problem_type != "regression":
            raise ValueError(f"problem_type: got {problem_type!r}; shares are predicted by 'regression' only")
        super().__init__(id2label=id2label, problem_type=problem_type, **kwargs)
        self.check()

    def check(self):
        """
        Raises ValueError on an illegal field, and brings `label2id` in line with `id2label`. Transformers sets fields
        that are given to `from_pretrained` after construction, so models and `save_pretrained` check once more.
        """
        self.id2label = _labels_by_index(self.id2label)
        self.label2id = {label: index for index, label in self.id2label.items()}
        self._validate_backbone()
        self._validate_head()

    def _validate_backbone(self):
        backbone = self.backbone_config
        if backbone is None:
            if self.backbone_layer != -1:
                raise ValueError(f"backbone_layer: got {self.backbone_layer!r}, but backbone_config is None")
            return
        if backbone.model_type not in SUPPORTED_BACKBONES:
            raise ValueError(
                f"backbone_config: model type {backbone.model_type!r} is not supported; "
                f"supported are {', '.join(SUPPORTED_BACKBONES)}"
            )
        if getattr(backbone, "add_adapter", False):
            raise ValueError(
                "backbone_config: add_adapter=True is not supported: the adapter shortens the frames and mixes "
                "padding into them"
            )
        if getattr(backbone, "conv_pos_batch_norm", False) and not self.freeze_backbone:
            raise ValueError(
                "backbone_config: conv_pos_batch_norm=True is not supported with freeze_backbone=False: its statistics "
                "would be taken over padding and over the other clips of a batch"
            )
        if self.feature_size != backbone.hidden_size:
            raise ValueError(
                f"feature_size: got {self.feature_size}, but the backbone's hidden size is {backbone.hidden_size}; "
                "leave it out to follow the backbone"
            )
        layer = self.backbone_layer
        is_layer_index = isinstance(layer, int) and not isinstance(layer, bool)
        if layer != "weighted" and not (is_layer_index and -1 <= layer <= backbone.num_hidden_layers):
            raise ValueError(
                f"backbone_layer: got {layer!r}; expected -1 (last_hidden_state), 0 to "
                f"{backbone.num_hidden_layers} (hidden_states[k]) or 'weighted'"
            )

    def _validate_head(self):
        choices = {
            "architecture": ARCHITECTURES,
            "normalization": NORMALIZATIONS,
            "output_activation": OUTPUT_ACTIVATIONS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected one of {', '.join(allowed)}")
        for field in ("freeze_backbone", "include_backbone", "separate_heads"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected true or false")
        sizes = ("feature_size", "conv_kernel_size", "pool_size", "lstm_hidden_size", "lstm_num_layers", "max_frames")
        for field in sizes:
            if not _is_positive_int(getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected a positive integer")
        for field in ("conv_channels", "ffn_sizes"):
            if not all(_is_positive_int(size) for size in getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}; expected positive integers")
        if not self.conv_channels:
            raise ValueError("conv_channels: got none; expected at least one convolution")
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size: got {self.conv_kernel_size}; only odd kernels keep frames centred")
        if self.architecture == "transformer":
            if self.conv_channels[-1] % TRANSFORMER_HEADS:
                raise ValueError(
                    f"conv_channels: got {self.conv_channels}; with architecture='transformer' the last must be a "
                    f"multiple of {TRANSFORMER_HEADS}, its attention heads"
                )
            if self.normalization == "sequence":
                raise ValueError("normalization: got 'sequence', a released network; no transformer was released")
        if self.normalization == "sequence" and self.max_frames < self.pool_size:
            raise ValueError(
                f"max_frames: got {self.max_frames}, less than one step of pool_size {self.pool_size} frames"
            )

    def save_pretrained(self, save_directory, **kwargs):
        """
        Writes config.json and, beside it, the Python modules that it names, so that the folder is a complete model
        repository for `trust_remote_code=True` once weights and preprocessor config are there too.
        """
        self.check()
        modules = _copy_modules(Path(save_directory), self.name_or_path)
        saved = copy.deepcopy(self)
        saved.auto_map = {key: name for key, name in AUTO_MAP.items() if _module_file(name) in modules}
        saved.custom_pipelines = {
            task: info for task, info in CUSTOM_PIPELINES.items() if _module_file(info["impl"]) in modules
        }
        super(EmoShareConfig, saved).save_pretrained(save_directory, **kwargs)


def _is_positive_int(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _config_from_dict(backbone_config):
    if backbone_config.get("model_type") not in SUPPORTED_BACKBONES:
        raise ValueError(
            f"backbone_config: got model_type {backbone_config.get('model_type')!r}; "
            f"expected one of {', '.join(SUPPORTED_BACKBONES)}"
        )
    return AutoConfig.for_model(**backbone_config)


def _sizes(field, sizes):
    if not isinstance(sizes, list | tuple):
        raise ValueError(f"{field}: got {sizes!r}; expected a list of sizes")
    return tuple(sizes)


def _labels_by_index(id2label):
    try:
        id2label = {int(index): label for index, label in id2label.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"id2label: got {id2label!r}; expected a dict of index and label") from error
    if sorted(id2label) != list(range(len(id2label))) or not id2label:
        raise ValueError(f"id2label: got indices {sorted(id2label)}; expected 0, 1, 2, ... without gaps")
    if len(set(id2label.values())) != len(id2label):
        raise ValueError(f"id2label: got a label twice in {list(id2label.values())}")
    return id2label


def _module_file(class_reference):
    return class_reference.split(".")[0] + ".py"


def _copy_modules(folder, name_or_path):
    """
    Copies the modules of a model repository to `folder`; returns the names of those that are there.

    The installed package has them all beside this file. Remote code has only what its entry module imports; the rest
    is fetched from the repository that the config was loaded from, at the same commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = set()
    for name in MODULES:
        source = Path(__file__).with_name(name)
        if not source.is_file():
            source = fetch_file(name, name_or_path)
        target = folder / name
        if source is not None and not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        if target.exists():  # a model that is being saved has written its own modules before
            present.add(name)
        else:
            logger.warning(f"{folder} is saved without {name}: {name_or_path!r} has it no more")
    return present


def fetch_file(name, name_or_path):
    """
    A file of the repository or folder that a model was loaded from; remote code looks at the commit that it is of.

    Returns:
        Its path, or `None` if there is none.
    """
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        local = Path(name_or_path) / name
        return local if local.is_file() else None
    # Transformers keeps a Hub repository's modules in a folder named after their commit.
    commit = Path(__file__).parent.name if _is_remote_code() else None
    try:
        return cached_file(name_or_path, name, revision=commit)
    except OSError as error:
        logger.info(f"{name} was not found in {name_or_path!r}: {error}")
        return None


def _is_remote_code():
    return __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
