"""The EmoShare model: a speech encoder, and for each emotion a CNN + LSTM + attention network (paper, section 2.4)."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import CONFIG_NAME, ModelOutput, cached_file, extract_commit_hash, logging

from .backbone_emoshare import frame_features, layer_features, length_mask, make_exact_in_batch, num_frames
from .configuration_emoshare import TRANSFORMER_HEADS, EmoShareConfig

logger = logging.get_logger(__name__)

# Parameters that a backbone's checkpoint may lack: SpecAugment's mask is used in pretraining and fine-tuning alone.
OPTIONAL_BACKBONE_KEYS = {"masked_spec_embed"}
TRANSFORMER_LAYERS = 2
# Of `from_pretrained`'s arguments, those that say how to reach the Hub and not what to load.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


@dataclass
class EmoShareOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, mean squared error over the known shares; only where labels were given.
        logits: (batch, labels), the predicted shares.
        hidden_states: the backbone's hidden states, each (batch, frames, width), where they were asked for and
            waveforms came in.
        attentions: (batch, labels, steps), the weight of each step (`pool_size` frames) in the prediction, where they
            were asked for; `None` without such an attention: the mean weighs all steps alike. Zero on padding; with
            `normalization="sequence"` the released network's LayerNorm follows the softmax, so that they do not sum
            to 1.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: torch.FloatTensor | None = None


class EmotionHead(nn.Module):
    """
    Emotion regression network: frame features to shares (paper, section 2.4, Architectures 1 and 2).

    CNN -> max-pooling -> LSTM -> mean over time (Eq. 1) or attention (Eq. 2a, 2b) -> feed-forward network. The scores
    of the attention are scaled by the square root of the LSTM's width, as in the authors' code. With `"transformer"`,
    encoder layers stand for the LSTM, and the mean follows; the order of frames is seen by the convolutions alone.

    Args:
        config: the model's `EmoShareConfig`.
        num_outputs: shares that this network predicts: 1 in a network per emotion.
    """

    def __init__(self, config, num_outputs=1):
        super().__init__()
        self.layer_weights = None
        if config.backbone_layer == "weighted":
            # One weight for the input of the backbone's first layer and one for the output of each, before the softmax.
            self.layer_weights = nn.Parameter(torch.zeros(config.backbone_config.num_hidden_layers + 1))
        self.pads_to_sequence = config.normalization == "sequence"
        self.max_frames = config.max_frames
        widths = [config.feature_size, *config.conv_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width_in, width_out, config.conv_kernel_size, padding="same")
            for width_in, width_out in pairwise(widths)
        )
        self.pool_size = config.pool_size
        self.lstm_norm = _lstm_norm(config)
        self.lstm, self.transformer, self.attention = nn.ModuleList(), nn.ModuleList(), None
        channels, width = config.conv_channels[-1], config.lstm_hidden_size
        if config.architecture == "transformer":
            width = channels
            self.transformer.extend(
                nn.TransformerEncoderLayer(width, TRANSFORMER_HEADS, 4 * width, dropout=0.0, batch_first=True)
                for _ in range(TRANSFORMER_LAYERS)
            )
        else:
            # One module per layer, because the attention's query takes every layer's state at a clip's own last step.
            widths = [channels] + [width] * config.lstm_num_layers
            self.lstm.extend(nn.LSTM(*layer, batch_first=True) for layer in pairwise(widths))
        if config.architecture == "cnn_lstm_attention":
            self.attention = Attention(config)
        self.ffn = _feed_forward(width, config)
        self.output = nn.Linear([width, *config.ffn_sizes][-1], num_outputs)
        self.output_activation = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}[config.output_activation]()

    def forward(self, features, lengths):
        """
        Args:
            features: (batch, frames, width), or (batch, layers, frames, width) for `backbone_layer="weighted"`. In
                bfloat16, the convolutions compute in bfloat16 too; what follows is in the dtype of the weights.
            lengths: (batch,) int64, each clip's number of frames, at least `pool_size`.

        Returns:
            Shares (batch, outputs), and attention weights (batch, steps) or `None`.
        """
        if self.layer_weights is not None:
            features = torch.einsum("l,blfw->bfw", self.layer_weights.softmax(dim=0).to(features.dtype), features)
        mask = length_mask(lengths, features.shape[1])
        features = features.masked_fill(~mask[..., None], 0)
        if self.pads_to_sequence:
            features = nn.functional.pad(features, (0, 0, 0, self.max_frames - features.shape[1]))
            mask = torch.ones_like(features[..., 0], dtype=torch.bool)  # the released network masks no convolution

        maps = features.transpose(1, 2)  # (batch, width, frames)
        for convolution in self.convolutions:
            maps = _convolve(convolution, maps).relu() * mask[:, None]
        maps = nn.functional.max_pool1d(maps, self.pool_size).to(self.output.weight.dtype)  # (batch, channels, steps)

        states = self.lstm_norm(maps.transpose(1, 2))  # (batch, steps, channels)
        step_lengths = lengths // self.pool_size
        last_states = []
        # The LSTM runs forward in time from a clip's first step, so padding after its last step cannot reach it.
        for layer in self.lstm:
            states, _ = layer(states)
            last_states.append(_last_step(states, step_lengths))

        step_mask = length_mask(step_lengths, states.shape[1])
        for layer in self.transformer:
            states = layer(states, src_key_padding_mask=~step_mask)
        if self.attention is None:
            pooled, weights = _masked_mean(states, step_mask), None
        else:
            pooled, weights = self.attention(torch.cat(last_states, dim=-1), states, step_mask)
        return self.output_activation(self.output(self.ffn(pooled))), weights


class Attention(nn.Module):
    """Scaled dot-product attention of one query, from the final LSTM states, over all steps (Eq. 2a and 2b)."""

    def __init__(self, config):
        super().__init__()
        width = config.lstm_hidden_size
        self.query = nn.Linear(config.lstm_num_layers * width, width)
        self.weight_norm = nn.Identity()
        if config.normalization == "sequence":
            self.weight_norm = nn.LayerNorm((1, config.max_frames // config.pool_size))

    def forward(self, last_states, states, mask):
        """
        Args:
            last_states: (batch, layers * width), each LSTM layer's state at the clip's last step, first layer first.
            states: (batch, steps, width), the LSTM's output: keys and values.
            mask: (batch, steps) bool, true on a clip's own steps.

        Returns:
            The weighted sum (batch, width) and the weights (batch, steps).
        """
        query = self.query(last_states)
        scores = torch.einsum("bw,bsw->bs", query, states) / states.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        weights = self.weight_norm(weights[:, None])[:, 0] * mask
        return torch.einsum("bs,bsw->bw", weights, states), weights


class EmoShareModel(PreTrainedModel):
    """
    Predicts, for each emotion, the share of listeners who would perceive it in a speech clip.

    `forward` takes waveforms (`input_values`), which go through the backbone, or frame features (`input_features`),
    which skip it. With `normalization` `"frame"` or `"none"` a clip's shares are the same alone and in any padded
    batch: to 1e-5 in float32. On NVIDIA GPUs, PyTorch computes convolutions and LSTMs in TF32 unless
    `torch.backends.cudnn.allow_tf32 = False`; float32 is float32 only then.
    """

    config_class = EmoShareConfig
    base_model_prefix = "emoshare"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmotionHead"]
    # With a backbone in bfloat16 too: shares near 0.5 are 0.004 apart there, which costs rank correlation.
    _keep_in_fp32_modules_strict = ["heads"]
    # Of the backbone, which checks its own: the heads compute their attention by themselves.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config):
        super().__init__(config)
        config.check()
        self.backbone = None
        if config.backbone_config is None:
            self.main_input_name = "input_features"
        else:
            _fall_back_to_eager(config.backbone_config)
            self.backbone = AutoModel.from_config(config.backbone_config)
            make_exact_in_batch(self.backbone)
        if not config.include_backbone:
            self._keys_to_ignore_on_load_missing = {r"^backbone\."}  # `from_pretrained` fetches it
        if config.separate_heads:
            self.heads = nn.ModuleList(EmotionHead(config) for _ in range(config.num_labels))
        else:
            self.heads = nn.ModuleList([EmotionHead(config, num_outputs=config.num_labels)])
        self.post_init()
        self._freeze_backbone()

    @classmethod
    def from_backbone_pretrained(cls, name_or_path, revision=None, **config_fields):
        """
        A new model, its heads freshly initialised, around a pretrained backbone.

        Args:
            name_or_path: Hub id or local folder of the backbone.
            revision: its branch, tag or commit.
            config_fields: further fields of `EmoShareConfig`.

        Raises:
            ValueError: if the backbone is of an unsupported kind, or its checkpoint lacks weights.
        """
        commit = extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, revision=revision), None)
        revision = commit or revision  # in a folder there is no commit
        backbone_config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        backbone = _load_backbone(name_or_path, revision, config=backbone_config)
        config = cls.config_class(
            backbone_config=backbone_config,
            backbone_name_or_path=str(name_or_path),
            backbone_revision=revision,
            backbone_hash=_weights_hash(backbone),
            **config_fields,
        )
        make_exact_in_batch(backbone)
        model = cls(config)
        model.backbone = backbone
        model._freeze_backbone()
        return model

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As in Transformers. Where the checkpoint holds the heads alone, their backbone is fetched from
        `config.backbone_name_or_path` (give that as an argument if it has moved).

        Raises:
            ValueError: if its weights are not those that the heads were trained on.
        """
        kwargs.setdefault("use_safetensors", True)  # these models never come as anything else; nothing is unpickled
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model.config.include_backbone:
            model._fetch_backbone({name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        model._freeze_backbone()  # the loader makes every parameter anew
        return loaded

    def _fetch_backbone(self, hub_arguments):
        name, revision = self.config.backbone_name_or_path, self.config.backbone_revision
        try:
            backbone = _load_backbone(name, revision, **hub_arguments)
        except OSError as error:
            raise OSError(
                f"this checkpoint holds the heads alone, and their backbone {name!r} (revision {revision}) cannot be "
                f"loaded; if it has moved, give backbone_name_or_path to from_pretrained. {error}"
            ) from error
        found = _weights_hash(backbone)
        if found != self.config.backbone_hash:
            raise ValueError(
                f"{name} (revision {revision}): the backbone's weights have the hash {found}; these heads were trained "
                f"on weights with the hash {self.config.backbone_hash}"
            )
        # Not strict: of OPTIONAL_BACKBONE_KEYS, one of the two may have more.
        self.backbone.load_state_dict(backbone.state_dict(), strict=False)

    def save_pretrained(self, save_directory, *args, include_backbone=True, **kwargs):
        """
        As in Transformers, and the modules that a model repository needs.

        Args:
            save_directory: folder.
            include_backbone: `False` writes the weights of the heads alone, and `from_pretrained` fetches the backbone
                from where it came from. A backbone that is trained (`freeze_backbone=False`) is always written.
            args, kwargs: as in Transformers.

        Raises:
            ValueError: if the backbone is to be left out, but is not the one that would be fetched.
        """
        if not include_backbone and self.backbone is not None:
            if self.config.freeze_backbone:
                self._check_backbone_is_pretrained()
            else:
                logger.warning("include_backbone=False: the backbone is trained (freeze_backbone=False), and saved too")
        self.config.include_backbone = include_backbone or self.backbone is None or not self.config.freeze_backbone
        if not self.config.include_backbone:
            state_dict = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {
                name: weight for name, weight in state_dict.items() if not name.startswith("backbone.")
            }
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_backbone_is_pretrained(self):
        if self.config.backbone_hash is None:
            raise ValueError(
                "include_backbone=False: this model's backbone was not loaded by from_backbone_pretrained, so nobody "
                "could fetch it; save it with the heads"
            )
        if _weights_hash(self.backbone) != self.config.backbone_hash:
            raise ValueError(
                f"include_backbone=False: the backbone's weights are not those of {self.config.backbone_name_or_path} "
                "any more: they have been changed, or the model was loaded in 16 bits; save them with the heads, or "
                "load the model in float32"
            )

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # on the backbone, which says by itself where it cannot

    def train(self, mode=True):
        super().train(mode)
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.eval()
        return self

    def _freeze_backbone(self):
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def _init_weights(self, module):
        # PyTorch's own initialisation, which the authors' code uses; the backbone has an initialisation of its own.
        if isinstance(module, nn.Conv1d | nn.Linear | nn.LSTM | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, EmotionHead) and module.layer_weights is not None:
            nn.init.zeros_(module.layer_weights)

    def frame_features(self, input_values, attention_mask=None, output_hidden_states=False):
        """
        The backbone's frame features, as `forward` takes them for `input_features`.

        Args:
            input_values: (batch, samples) float, waveforms as `EmoShareFeatureExtractor` prepares them.
            attention_mask: (batch, samples), 1 on samples and 0 on the padding to their right; `None` is all ones.
            output_hidden_states: whether to return all hidden states too.

        Returns:
            `FrameFeatures`: features, lengths (batch,) in frames, and hidden states.

        Raises:
            ValueError: if the model has no backbone, a mask is not padded on the right, or a clip is too short.
        """
        lengths = self._checked_samples(input_values, attention_mask)
        with self._backbone_gradients():
            return frame_features(
                self.backbone,
                input_values.to(self.backbone.dtype),
                lengths,
                self.config.backbone_layer,
                output_hidden_states,
            )

    def layer_features(self, input_values, attention_mask, layers):
        """
        The frame features of several layers of the backbone, which runs once.

        Args:
            input_values, attention_mask: as in `frame_features`.
            layers: each as `EmoShareConfig.backbone_layer`; that of the model's own config does not matter.

        Returns:
            `list[FrameFeatures]`: for each of `layers`, what `frame_features` gives in a model of that layer.

        Raises:
            ValueError: as `frame_features`.
        """
        lengths = self._checked_samples(input_values, attention_mask)
        with self._backbone_gradients():
            return layer_features(self.backbone, input_values.to(self.backbone.dtype), lengths, layers)

    def _checked_samples(self, input_values, attention_mask):
        """Each clip's number of samples, (batch,) int64."""
        if self.backbone is None:
            raise ValueError("input_values: this model has no backbone; it takes frame features as input_features")
        lengths = _lengths(input_values, attention_mask)
        shortest = int(num_frames(self.backbone.config, lengths.min()))
        if shortest < self.config.pool_size:
            raise ValueError(
                f"input_values: the shortest clip has {int(lengths.min())} samples, {max(shortest, 0)} frames; "
                f"expected at least {self.config.pool_size} frames"
            )
        return lengths

    def _backbone_gradients(self):
        return torch.no_grad() if self.config.freeze_backbone else nullcontext()

    def forward(
        self,
        input_values=None,
        input_features=None,
        attention_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """
        Args:
            input_values: (batch, samples) float, waveforms as `EmoShareFeatureExtractor` prepares them.
            input_features: (batch, frames, width) float, frame features; (batch, layers, frames, width) for
                `backbone_layer="weighted"`. Exactly one of the two.
            attention_mask: (batch, samples) or (batch, frames), 1 on the clip and 0 on the padding to its right;
                `None` is all ones.
            labels: (batch, labels) float in [0, 1]; NaN where a share is not known, which adds nothing to the loss.
            output_attentions: whether to return the attention of each emotion over the steps.
            output_hidden_states: whether to return the backbone's hidden states.
            return_dict: `False` for a plain tuple.

        Returns:
            `EmoShareOutput`.

        Raises:
            ValueError: if not exactly one input is given, or a shape or length does not fit.
        """
        if (input_values is None) == (input_features is None):
            raise ValueError("expected exactly one of input_values and input_features")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict

        hidden_states = None
        if input_values is not None:
            features, lengths, hidden_states = self.frame_features(input_values, attention_mask, output_hidden_states)
        else:
            features, lengths = input_features, self._checked_lengths(input_features, attention_mask)
        if features.dtype != torch.bfloat16:
            features = features.to(self.heads[0].output.weight.dtype)
        if self.config.normalization == "sequence" and features.shape[-2] > self.config.max_frames:
            raise ValueError(
                f"got {features.shape[-2]} frames, but normalization='sequence' takes at most max_frames="
                f"{self.config.max_frames}; cut the clip into shorter windows"
            )

        shares, weights = zip(*(head(features, lengths) for head in self.heads), strict=True)
        logits = torch.cat(shares, dim=1)
        attentions = None
        if output_attentions and weights[0] is not None:
            attentions = torch.stack(weights, dim=1).expand(-1, self.config.num_labels, -1)
        output = EmoShareOutput(
            loss=None if labels is None else known_mse(logits, labels),
            logits=logits,
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return output if return_dict else output.to_tuple()

    def _checked_lengths(self, input_features, attention_mask):
        weighted = self.config.backbone_layer == "weighted"
        expected = "(batch, layers, frames, width)" if weighted else "(batch, frames, width)"
        if input_features.dim() != (4 if weighted else 3) or input_features.shape[-1] != self.config.feature_size:
            raise ValueError(
                f"input_features: got shape {tuple(input_features.shape)}; expected {expected} with width "
                f"{self.config.feature_size}"
            )
        lengths = _lengths(input_features[:, 0, :, 0] if weighted else input_features[..., 0], attention_mask)
        if int(lengths.min()) < self.config.pool_size:
            raise ValueError(
                f"input_features: the shortest clip has {int(lengths.min())} frames; "
                f"expected at least {self.config.pool_size}"
            )
        return lengths


def _load_backbone(name_or_path, revision, **kwargs):
    """A pretrained backbone in float32, which holds whatever is stored."""
    backbone, loading = AutoModel.from_pretrained(
        name_or_path, revision=revision, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    missing = sorted(set(loading["missing_keys"]) - OPTIONAL_BACKBONE_KEYS)
    if missing:
        raise ValueError(f"{name_or_path}: the checkpoint lacks {len(missing)} backbone weights: {missing[:5]}")
    return backbone


def _weights_hash(backbone):
    """SHA-256 of a backbone's weights as float32, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(backbone.state_dict().items()):
        if name not in OPTIONAL_BACKBONE_KEYS:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def _fall_back_to_eager(backbone_config):
    """WavLM computes its attention in one way only; another backbone refuses what it cannot do by itself."""
    if backbone_config.model_type == "wavlm" and backbone_config._attn_implementation == "sdpa":
        logger.warning("attn_implementation: WavLM has no 'sdpa'; its attention runs as 'eager'")
        backbone_config._attn_implementation = "eager"


def _convolve(convolution, maps):
    """
    (batch, width, frames) -> (batch, channels, frames). In 16 bits, maps and weights go in as images one pixel high
    with the channels side by side in memory, which is several times as fast on CPUs. In float32 that gains little,
    and PyTorch's own conv1d rounds as it did for whoever trained the weights.
    """
    if maps.dtype == torch.float32:
        return convolution(maps)
    weight = convolution.weight[:, :, None].to(maps.dtype, memory_format=torch.channels_last)
    padding = (0, convolution.kernel_size[0] // 2)
    return nn.functional.conv2d(maps[:, :, None], weight, convolution.bias.to(maps.dtype), padding=padding)[:, :, 0]


def _lstm_norm(config):
    channels = config.conv_channels[-1]
    if config.normalization == "frame":
        return nn.LayerNorm(channels)
    if config.normalization == "sequence" and config.architecture == "cnn_lstm_attention":
        return nn.LayerNorm((config.max_frames // config.pool_size, channels))
    return nn.Identity()


def _feed_forward(width, config):
    """From `width`: Linear, ReLU and, except in the architectures without it, LayerNorm for each hidden size."""
    has_norm = config.normalization == "frame" or (
        config.normalization == "sequence" and config.architecture == "cnn_lstm_attention"
    )
    widths = [width, *config.ffn_sizes]
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        if has_norm:
            layers.append(nn.LayerNorm(width_out))
    return nn.Sequential(*layers)


def _last_step(states, step_lengths):
    """(batch, steps, width) -> (batch, width): each clip's state at its own last step."""
    return states[torch.arange(len(states), device=states.device), step_lengths - 1]


def _masked_mean(states, mask):
    """Mean over a clip's own steps (Eq. 1): (batch, steps, width) -> (batch, width)."""
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _lengths(inputs, attention_mask):
    """(batch, length) inputs and a mask of the same shape -> (batch,) int64 lengths."""
    if attention_mask is None:
        return torch.full((inputs.shape[0],), inputs.shape[1], device=inputs.device)
    if attention_mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)} for an input of length "
            f"{tuple(inputs.shape)}; they must agree in batch and length"
        )
    lengths = attention_mask.long().sum(dim=1)
    if not torch.equal(attention_mask.bool(), length_mask(lengths, inputs.shape[1])):
        raise ValueError("attention_mask: expected ones followed by zeros in each row (padding on the right)")
    return lengths


def known_mse(logits, labels):
    """Mean squared error over the known shares; NaN labels add nothing."""
    if labels.shape != logits.shape:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}; expected {tuple(logits.shape)}")
    known = ~labels.isnan()
    errors = (logits.float() - labels.float()).masked_fill(~known, 0)
    return errors.square().sum() / known.sum().clamp(min=1)
