"""The EmoShare model: a speech encoder, and for each emotion a CNN + LSTM + attention head (paper, section 2.4)."""

import copy
import re
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone_emoshare import (
    build_backbone,
    clear_errors_of_weights,
    family_of,
    load_backbone,
    source_of_backbone,
)
from .checks_emoshare import checked_dtype
from .configuration_emoshare import EmoShareConfig
from .finetuning_emoshare import (
    UpperLayers,
    add_adapters,
    freeze,
    frozen_hash,
    frozen_pattern,
    merge_adapters,
    tuned_modules,
)
from .frames_emoshare import lengths_of
from .head_emoshare import EmotionHead, run_heads
from .losses_emoshare import LOSSES, takes
from .onnx_export_emoshare import ExportsOnnx
from .outputs_emoshare import EmoShareOutput, FrameFeatures
from .passes_emoshare import in_passes
from .repository_emoshare import ACCESS, PushToHub, remember_access
from .saving_emoshare import check_is_pretrained, check_loaded, cut_to_read_layer, fetch_frozen

logger = logging.get_logger(__name__)


class EmoShareModel(ExportsOnnx, PushToHub, PreTrainedModel):
    """
    Predicts, for each emotion, the share of listeners who would perceive it in a speech clip.

    `forward` takes what the feature extractor makes (waveforms as `input_values`, acoustic features as
    `input_features`), or `frame_features`, which skip the backbone. With `normalization` `"frame"` or `"none"`, a
    clip's shares are the same alone and in any padded batch: to 1e-5 in float32. On NVIDIA GPUs, PyTorch computes
    convolutions and LSTMs in TF32 unless `torch.backends.cudnn.allow_tf32 = False`; float32 is exact only then.

    Example:

    ```python
    import torch
    from emoshare import EmoShareFeatureExtractor, EmoShareModel

    model = EmoShareModel.from_pretrained("ORG/NAME").eval()
    feature_extractor = EmoShareFeatureExtractor.from_pretrained("ORG/NAME")
    inputs = feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        shares = model(**inputs).logits  # (batch, labels)
    ```
    """

    config_class = EmoShareConfig
    base_model_prefix = "emoshare"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmotionHead"]
    # Heads stay in float32 when the backbone is in bfloat16: shares near 0.5 would be 0.004 apart, and rank worse.
    _keep_in_fp32_modules_strict = ["heads"]
    # These are about the backbone, which checks what it supports; the heads compute their attention themselves.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config):
        super().__init__(config)
        config.check()
        has_backbone = config.backbone_config is not None
        self.main_input_name = self.family.input_name if has_backbone else "input_features"
        self.backbone = build_backbone(config.backbone_config) if has_backbone else None
        if config.separate_heads:
            self.heads = nn.ModuleList(EmotionHead(config) for _ in range(config.num_labels))
        else:
            self.heads = nn.ModuleList([EmotionHead(config, num_outputs=config.num_labels)])
        self.upper_layers = None  # only a `trained_part` has them
        self.post_init()
        if has_backbone:
            self._set_up_tuning()
        if not config.include_backbone:  # `from_pretrained` fetches what is frozen of it
            self._keys_to_ignore_on_load_missing = {frozen_pattern(self.backbone, config)}

    @classmethod
    def from_backbone_pretrained(
        cls,
        name_or_path,
        revision=None,
        dtype=torch.float32,
        token=None,
        cache_dir=None,
        local_files_only=False,
        force_download=False,
        **config_fields,
    ):
        """
        A new model around a pretrained backbone, with newly initialised heads.

        Args:
            name_or_path: Hub id or local folder of the backbone.
            revision: its branch, tag or commit.
            dtype: dtype that the backbone runs in, whatever it is stored in, such as `torch.bfloat16` or `"bfloat16"`;
                heads and adapters stay in float32.
            token, cache_dir, local_files_only, force_download: how to reach the Hub, as in `from_pretrained`.
            config_fields: further fields of `EmoShareConfig`.

        Raises:
            ValueError: if the backbone's model type is not supported, its checkpoint lacks weights or is damaged, or a
                field is unknown or illegal.
            OSError: if there is no such backbone, or it cannot be fetched.
            ImportError: if `lora_rank` asks for adapters, and PEFT is not installed.
        """
        values = (token, cache_dir, local_files_only, force_download)
        access = dict(zip(ACCESS, values, strict=True))
        dtype = checked_dtype("dtype", dtype)
        # Checked before the weights are fetched, so that a wrong field costs no time.
        config = cls.config_class(**source_of_backbone(name_or_path, revision, **access), **config_fields)
        backbone = load_backbone(name_or_path, config.backbone_config, config.backbone_revision, **access)
        config.backbone_hash = frozen_hash(backbone, config)
        model = cls(config)
        model.attach_backbone(backbone.to(dtype))
        return model

    def attach_backbone(self, backbone):
        """
        Makes a backbone this model's own: prepares it so that padding cannot reach a clip, adds new adapters if the
        config asks for them, and freezes what is not trained.

        Args:
            backbone: pretrained, of `config.backbone_config`, not prepared yet.
        """
        self.family.prepare(backbone)
        self.backbone = backbone
        self._set_up_tuning()

    def _set_up_tuning(self):
        if self.config.lora_rank:
            add_adapters(self.backbone, self.config)
        self._freeze_backbone()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As in Transformers. If the checkpoint lacks the frozen part of the backbone, that is fetched from
        `config.backbone_name_or_path` (pass that as an argument if the backbone has moved).

        Raises:
            ValueError: if the checkpoint lacks weights, has unexpected ones, or is damaged; or if the backbone's
                weights are not those that the heads were trained on. With `ignore_mismatched_sizes=True`, as in
                Transformers, weights that are missing or of another shape are initialised at random, with a warning.
            RuntimeError: as in Transformers, if weights do not have the shapes that the config says.
            ImportError: if the model has adapters, and PEFT is not installed.
        """
        kwargs.setdefault("use_safetensors", True)  # these models are never saved as pickles, and none is loaded
        wants_loading_info = kwargs.pop("output_loading_info", False)
        name_or_path = kwargs.get("pretrained_model_name_or_path") or args[0]
        remember_access(name_or_path, kwargs)
        with clear_errors_of_weights(name_or_path):
            model, loading = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if not kwargs.get("ignore_mismatched_sizes"):
            check_loaded(name_or_path, loading, () if model.backbone is None else model.family.optional_weights)
        if not model.config.include_backbone:
            fetch_frozen(model.backbone, model.config, {name: kwargs[name] for name in ACCESS if name in kwargs})
        model._freeze_backbone()  # the loader has made new parameters, which all require gradients
        return (model, loading) if wants_loading_info else model

    def save_pretrained(self, save_directory, *args, include_backbone=True, **kwargs):
        """
        As in Transformers; also writes the modules that a model repository needs.

        Args:
            save_directory: folder.
            include_backbone: `False` leaves out the frozen part of the backbone, which `from_pretrained` then fetches
                from where it came from. A backbone that is trained as a whole (`freeze_backbone=False`) is always
                written.
            args, kwargs: as in Transformers.

        Raises:
            ValueError: if the backbone is to be left out, but what is frozen of it is not what would be fetched.
        """
        if not include_backbone and self.backbone is not None:
            if self.config.freeze_backbone:
                check_is_pretrained(self.backbone, self.config)
            else:
                logger.warning("include_backbone=False: the backbone is trained (freeze_backbone=False), and saved too")
        has_backbone = self.config.backbone_config is not None
        self.config.include_backbone = include_backbone or not has_backbone or not self.config.freeze_backbone
        if not self.config.include_backbone:
            frozen = re.compile(frozen_pattern(self.backbone, self.config))
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {name: weight for name, weight in state_dict.items() if not frozen.match(name)}
        super(EmoShareModel, cut_to_read_layer(self)).save_pretrained(save_directory, *args, **kwargs)

    def merge_adapters(self):
        """
        Adds the adapters to the weights of their layers, in place, and removes them. The model is then one with
        `config.finetuned_layers` tuned layers, and no longer needs PEFT. Shares stay the same up to rounding.

        Returns:
            The model itself.

        Raises:
            ValueError: if the model has no adapters, or was loaded in 16 bits, which would round away what they add.
        """
        merge_adapters(self.backbone, self.config)
        self._freeze_backbone()
        return self

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # of the backbone, which refuses what it does not support

    def train(self, mode=True):
        super().train(mode)
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.eval()
            for module in tuned_modules(self.backbone, self.config):
                module.train(mode)
        return self

    def _freeze_backbone(self):
        if self.backbone is not None and self.config.freeze_backbone:
            freeze(self.backbone, self.config)
            self.train(self.training)

    def _init_weights(self, module):
        # PyTorch's own initialisation, as in the authors' code; the backbone initialises itself.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, EmotionHead) and module.layer_weights is not None:
            nn.init.zeros_(module.layer_weights)

    @property
    def family(self):
        """The backbone's `BackboneFamily`; fails if the model has no backbone."""
        return family_of(self.config.backbone_config)

    def select(self, labels):
        """
        A view of this model with some of its labels: it shares their heads, and has no backbone, so that it takes
        `frame_features`.

        Args:
            labels: their indices, in order; with `separate_heads=False`, where all labels share one head, all of them.

        Raises:
            ValueError: if labels that share a head are to be separated.
        """
        labels = list(labels)
        if self.config.separate_heads:
            heads = [self.heads[label] for label in labels]
        elif labels == list(range(self.config.num_labels)):
            heads = list(self.heads)
        else:
            raise ValueError(f"labels: got {labels}; with separate_heads=False all labels share one head: select all")
        view = copy.copy(self)
        view._modules = {"backbone": None, "heads": nn.ModuleList(heads)}
        view.config = copy.copy(self.config)
        view.config.id2label = {index: self.config.labels[label] for index, label in enumerate(labels)}
        view.config.label2id = {label: index for index, label in view.config.id2label.items()}
        view.main_input_name = "frame_features" if self.backbone is not None else self.main_input_name
        return view

    def trained_part(self):
        """
        A view of the part of this model that is trained. It takes the output of the frozen rest as `frame_features`:
        the hidden states that the tuned layers take or, without tuned layers, what the heads take. If no part of the
        backbone is frozen, this is the model itself.
        """
        if self.backbone is not None and not self.config.freeze_backbone:
            return self
        view = self.select(range(self.config.num_labels))
        if self.config.finetuned_layers:
            view.upper_layers = UpperLayers(self.backbone, self.config)
        return view

    def initialize_head(self, index, seed):
        """Gives a head new initial weights, the same on every device; the global random state does not change."""
        head = self.heads[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            new = type(head)(self.config, num_outputs=head.num_outputs)
        # Buffers, which hold the scale of the training set, stay.
        head.load_state_dict(dict(new.named_parameters()), strict=False)

    def frame_features(self, inputs, attention_mask=None, layers=None):
        """
        Runs the backbone once and returns the frame features of one or several layers.

        Args:
            inputs: as `EmoShareFeatureExtractor` prepares them: waveforms (batch, samples), for most backbones; for a
                `trained_part` with tuned layers, the hidden states that these take.
            attention_mask: (batch, length), 1 on the clip and 0 on the padding to its right; `None` is all ones.
            layers: each as in `EmoShareConfig.backbone_layer`; by default, the layer in the config.

        Returns:
            `FrameFeatures`.

        Raises:
            ValueError: if the model has no backbone, the mask is not padded on the right, or a clip is too short.
        """
        if self.upper_layers is not None:
            lengths = self._frame_lengths(inputs, attention_mask)
            return FrameFeatures({self.config.backbone_layer: self.upper_layers(inputs, lengths)}, lengths)
        if self.backbone is None:
            raise ValueError("this model has no backbone that could make frame features")
        layers = [self.config.backbone_layer] if layers is None else layers
        lengths = lengths_of(inputs, attention_mask)
        num_frames = self.family.num_frames(self.backbone.config, lengths)
        shortest = int(num_frames.min())
        if shortest < self.config.pool_size:
            raise ValueError(
                f"{self.main_input_name}: the shortest clip has {int(lengths.min())} "
                f"{'samples' if inputs.dim() == 2 else 'input frames'}, {max(shortest, 0)} frames; expected at least "
                f"{self.config.pool_size} frames"
            )
        all_layers = range(self.family.num_layers(self.backbone.config) + 1)
        to_run = [layer for layer in layers if layer != "weighted"] + (list(all_layers) if "weighted" in layers else [])
        run = partial(self.family.hidden_states, self.backbone, layers=to_run)
        is_one_pass = inputs.device.type != "cpu" or self.backbone.training or torch.compiler.is_compiling()
        inputs = inputs.to(self.backbone.dtype)
        states = run(inputs, lengths) if is_one_pass else in_passes(run, inputs, lengths, num_frames)
        if "weighted" in layers:
            states["weighted"] = torch.stack([states[layer] for layer in all_layers], dim=1)
        return FrameFeatures({layer: states[layer] for layer in layers}, num_frames)

    def forward(
        self,
        input_values=None,
        input_features=None,
        frame_features=None,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        listeners=None,
    ):
        """
        Args:
            input_values: (batch, samples) float, waveforms as `EmoShareFeatureExtractor` prepares them.
            input_features: (batch, frames, width) float, acoustic features as it prepares them.
            frame_features: (batch, frames, width) float, the heads' input, which skips the backbone; (batch, layers,
                frames, width) for `backbone_layer="weighted"`. For a model without a backbone, the same as
                `input_features`. Exactly one of the three must be given.
            attention_mask: (batch, samples) or (batch, frames), 1 on the clip and 0 on the padding to its right;
                `None` is all ones.
            labels: (batch, labels) float in [0, 1], the true shares; NaN where unknown, which adds nothing to the loss.
            output_attentions: whether to return the attention of each emotion over the steps.
            output_hidden_states: whether to return the backbone's hidden states.
            return_dict: `False` returns a plain tuple.
            listeners: (batch,) float, how many listeners rated each clip, for losses that need it; NaN if unknown.

        Returns:
            `EmoShareOutput`.

        Raises:
            ValueError: if not exactly one input is given, if this model does not take it, or if a shape or length does
                not fit.
        """
        _refuse_tracing()
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict

        hidden_states = None
        name, inputs = self._given_input(
            input_values=input_values, input_features=input_features, frame_features=frame_features
        )
        if name == "frame_features" and self.upper_layers is None:
            features, lengths = inputs, self._frame_lengths(inputs, attention_mask)
        else:
            layer = self.config.backbone_layer
            all_layers = ()
            if output_hidden_states and self.backbone is not None:
                all_layers = range(self.family.num_layers(self.backbone.config) + 1)
            by_layer, lengths = self.frame_features(inputs, attention_mask, [layer, *all_layers])
            features = by_layer[layer]
            if output_hidden_states:
                hidden_states = tuple(by_layer[layer] for layer in all_layers)
        if features.dtype != torch.bfloat16:
            features = features.to(self.heads[0].dtype)
        self._check_fits_max_frames(features.shape[-2])

        outputs, weights = zip(*run_heads(self.heads, features, lengths), strict=True)
        logits, concentrations = self.shares_and_concentrations(outputs)
        attentions = None
        if output_attentions and weights[0] is not None:
            attentions = torch.stack(weights, dim=1).expand(-1, self.config.num_labels, -1)
        output = EmoShareOutput(
            loss=None if labels is None else self.loss(logits, labels, None, listeners, concentrations),
            logits=logits,
            hidden_states=hidden_states,
            attentions=attentions,
            concentrations=concentrations,
        )
        return output if return_dict else output.to_tuple()

    def shares_and_concentrations(self, outputs):
        """
        Args:
            outputs: what each head returns first: (batch, outputs) or, with concentrations, (batch, 2 * outputs).

        Returns:
            Shares (batch, labels), and concentrations (batch, labels) or `None`.
        """
        if not self.config.has_concentrations:
            return torch.cat(outputs, dim=1), None
        halves = zip(*(output.chunk(2, dim=1) for output in outputs), strict=True)
        return tuple(torch.cat(half, dim=1) for half in halves)

    def loss(self, logits, labels, weights=None, listeners=None, concentrations=None):
        """
        `config.loss` of predicted against true shares.

        Args:
            logits: (batch, labels) predicted shares.
            labels: (batch, labels) true shares, NaN where unknown.
            weights: (batch,) weight of each clip, or (batch, labels) of each share; `None` weighs all alike.
            listeners: (batch,) how many listeners rated each clip, for losses that need it; NaN if unknown.
            concentrations: (batch, labels) as in `EmoShareOutput`, for losses that need them.

        Returns:
            Scalar float32.

        Raises:
            ValueError: if the shapes differ.
        """
        if labels.shape != logits.shape:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}; expected {tuple(logits.shape)}")
        optional = {"listeners": listeners, "concentrations": concentrations}
        taken = {name: value for name, value in optional.items() if takes(self.config.loss, name)}
        return LOSSES[self.config.loss](logits, labels, weights, **taken)

    def _given_input(self, **inputs):
        """The name and value of the one given input; without a backbone, it counts as `frame_features`."""
        given = {name: value for name, value in inputs.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(inputs)}; got {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if name not in ("frame_features", self.main_input_name):
            kind = "no backbone" if self.backbone is None else f"a {self.config.backbone_config.model_type} backbone"
            expected = " or ".join(dict.fromkeys((self.main_input_name, "frame_features")))
            raise ValueError(f"{name}: this model has {kind}; it takes {expected}")
        return (name if self.backbone is not None else "frame_features"), value

    def _frame_lengths(self, features, attention_mask):
        """Each clip's number of frames, (batch,) int64."""
        weighted = self.config.backbone_layer == "weighted"
        expected = "(batch, layers, frames, width)" if weighted else "(batch, frames, width)"
        if features.dim() != (4 if weighted else 3) or features.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"frame features: got shape {tuple(features.shape)}; expected {expected} with width "
                f"{self.config.feature_size}"
            )
        lengths = lengths_of(features[:, 0] if weighted else features, attention_mask)
        if int(lengths.min()) < self.config.pool_size:
            raise ValueError(
                f"frame features: the shortest clip has {int(lengths.min())} frames; expected at least "
                f"{self.config.pool_size}"
            )
        return lengths

    def _check_fits_max_frames(self, frames):
        if self.config.normalization == "sequence" and frames > self.config.max_frames:
            raise ValueError(
                f"got {frames} frames, but normalization='sequence' takes at most max_frames={self.config.max_frames}; "
                "cut the clip into shorter windows"
            )


def _refuse_tracing():
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace: an EmoShare model cannot be traced. A trace fixes each clip's length, and would give "
            "wrong shares for other clips without a word; torch.compile works"
        )
