"""
Whisper's encoder: two convolutions over log-mels, positions, and Transformer layers.

Whisper takes 30 s at a time. Shorter clips are padded with silence, to which it attends as well. Here, a clip has the
same frames alone and in any batch, in either of two ways (`EmoShareConfig.backbone_padding`): with the silence, as
Whisper was trained, or without it.
"""

import copy
from functools import lru_cache

import torch
from torch.nn.functional import dropout, gelu
from transformers import WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperPreTrainedModel

from .encoder_layers_emoshare import EncoderLayers
from .frames_emoshare import length_mask, padding_mask

SAMPLING_RATE, WINDOW, HOP = 16000, 400, 160  # of log-mels: rate in Hz, window and hop in samples
LONGEST_S = 30
POSITIONS = LONGEST_S * SAMPLING_RATE // HOP // 2  # of the encoder, which makes one frame of two log-mels
# Number of log-mels that follow a clip's own: three that its last samples reach, and one of silence.
LOG_MELS_AFTER_END = 4


class WhisperLogMels:
    """
    One of `feature_extraction_emoshare.BACKBONE_INPUTS`: the log-mels of Transformers' `WhisperFeatureExtractor`.

    Attributes:
        num_mel_bins, frame_length, hop_length: defaults of these fields of `EmoShareFeatureExtractor`. The encoder's
            frames are `hop_length` apart, and the first is centred on the clip's first sample. A further frame needs
            `frame_length` samples after the centre of the last one.
    """

    num_mel_bins = 80
    frame_length, hop_length = HOP, 2 * HOP

    def own_extractor(self, backbone_config):
        """Transformers' feature extractor for a backbone whose repository has no preprocessor config."""
        return WhisperFeatureExtractor(feature_size=backbone_config.num_mel_bins)

    def fields(self, own, backbone_config):
        """
        Args:
            own: the backbone's own feature extractor.
            backbone_config: its config.

        Returns:
            `dict`: fields of the `EmoShareFeatureExtractor` that makes the same log-mels.

        Raises:
            ValueError: if these are not the log-mels that the backbone takes.
        """
        expected = {
            "feature_size": backbone_config.num_mel_bins,
            "sampling_rate": SAMPLING_RATE,
            "n_fft": WINDOW,
            "hop_length": HOP,
            "chunk_length": LONGEST_S,
        }
        for name, value in expected.items():
            if getattr(own, name) != value:
                raise ValueError(f"its preprocessor config has {name}={getattr(own, name)!r}; expected {value}")
        return {"do_normalize": False, "num_mel_bins": own.feature_size}

    def width(self, extractor):
        """
        Width of the log-mels that an `EmoShareFeatureExtractor` makes.

        Raises:
            ValueError: if its fields are not Whisper's.
        """
        fixed = {"sampling_rate": SAMPLING_RATE, "frame_length": self.frame_length, "hop_length": self.hop_length}
        for name, value in fixed.items():
            if getattr(extractor, name) != value:
                raise ValueError(f"{name}: got {getattr(extractor, name)}; with Whisper's log-mels, it is {value}")
        if extractor.chunk_length_s > LONGEST_S:
            raise ValueError(
                f"chunk_length_s: got {extractor.chunk_length_s} s; expected at most {LONGEST_S} s, the most that "
                "Whisper hears"
            )
        return extractor.num_mel_bins

    def features(self, waveform, extractor):
        """
        Args:
            waveform: (samples,) float32.
            extractor: `EmoShareFeatureExtractor`, whose fields are used.

        Returns:
            (log-mels, bands) float32: those that `WhisperFeatureExtractor` makes of the clip padded with silence to
            30 s, up to the first one that holds only silence.
        """
        num_samples, longest = len(waveform), LONGEST_S * SAMPLING_RATE
        if num_samples > longest:
            raise ValueError(
                f"raw_speech: got {num_samples / SAMPLING_RATE:.1f} s; Whisper hears {LONGEST_S} s at most; cut it "
                "with windows(), as the emotion-share pipeline does"
            )
        with_silence = min(num_samples + LOG_MELS_AFTER_END * HOP, longest)
        made = _own_extractor(extractor.num_mel_bins)(
            waveform, sampling_rate=SAMPLING_RATE, max_length=with_silence, return_tensors="pt"
        )
        log_mels = made["input_features"][0].T
        # After a clip of nearly 30 s there is no silence. Its last log-mel fills these places, and is never used.
        rows = torch.arange(num_samples // HOP + LOG_MELS_AFTER_END).clamp(max=len(log_mels) - 1)
        return log_mels[rows].numpy()


@lru_cache
def _own_extractor(num_mel_bins):
    return WhisperFeatureExtractor(feature_size=num_mel_bins)


class WhisperEncoderOnly(WhisperPreTrainedModel):
    """Whisper without its decoder; the encoder's weights are named as in checkpoints of whole models."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = WhisperEncoder(config)
        self.post_init()


class WhisperFamily:
    """The `BackboneFamily` of Whisper's encoder."""

    model_types = ("whisper",)
    feature_type = "whisper_log_mels"
    input_name = "input_features"
    optional_weights = ()
    attention_projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    paddings = ("30s", "clip")

    def check(self, config, is_frozen):
        """Raises ValueError for an input length that is not Whisper's, and for LayerDrop in training."""
        if config.max_source_positions != POSITIONS:
            raise ValueError(
                f"backbone_config: max_source_positions={config.max_source_positions} is not supported: Whisper hears "
                f"{LONGEST_S} s, {POSITIONS} frames"
            )
        if config.encoder_layerdrop and not is_frozen:
            raise ValueError(
                f"backbone_config: encoder_layerdrop={config.encoder_layerdrop} is not supported with "
                "freeze_backbone=False; expected 0, as Whisper has it"
            )

    def width(self, config):
        """Width of the frame features."""
        return config.d_model

    def num_layers(self, config):
        """Layers of the encoder: there is one more hidden state than layers."""
        return config.encoder_layers

    def frame_geometry(self, config):
        """Length and hop of frames in samples, as in `WhisperLogMels`."""
        return WhisperLogMels.frame_length, WhisperLogMels.hop_length

    def num_frames(self, config, lengths):
        """Number of frames (int or int tensor, as given) of a clip, without the silence after it."""
        return (lengths - LOG_MELS_AFTER_END + 1) // 2

    def build(self, config):
        """A backbone with random weights."""
        return WhisperEncoder(config)

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""
        whisper, loading = WhisperEncoderOnly.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            loading[kind] = {name.removeprefix("model.").removeprefix("encoder.") for name in loading[kind]}
        return whisper.encoder, loading

    def prepare(self, backbone, fast=True):
        """
        Nothing has to change for exactness: `hidden_states` runs the layers of the encoder itself, and masks padding.
        With `fast`, frozen linear layers in bfloat16 keep their weights in the layout of the CPU's matrix unit.
        """
        if fast:
            backbone.layers = EncoderLayers(backbone.layers)

    def cut(self, backbone, layer):
        """As `BackboneFamily.cut`."""
        if not isinstance(layer, int) or layer in (-1, len(backbone.layers)):
            return backbone
        view = copy.copy(backbone)
        view._modules = {**backbone._modules, "layers": type(backbone.layers)(list(backbone.layers)[:layer])}
        view.config = copy.copy(backbone.config)
        view.config.encoder_layers = layer
        view.config.is_cut = True  # its last layer is one from the middle, which no norm follows
        return view

    def hidden_states(self, backbone, input_features, lengths, layers):
        """
        Runs a prepared backbone once on a batch of padded clips.

        Args:
            backbone: after `prepare`.
            input_features: (batch, log-mels, bands), padded on the right.
            lengths: (batch,) int64, each clip's number of log-mels, including those after its end.
            layers: which hidden states: -1 is Transformers' `last_hidden_state`, k >= 0 its `hidden_states[k]`.

        Returns:
            `dict` from layer to (batch, frames, width), arbitrary past a clip's last frame.

        Raises:
            ValueError: if the number of bands is not the backbone's.
        """
        num_bands = input_features.shape[-1]
        if num_bands != backbone.config.num_mel_bins:
            raise ValueError(f"input_features: got {num_bands} bands; expected {backbone.config.num_mel_bins}")
        if isinstance(backbone.layers, EncoderLayers):
            backbone.layers.pack_linears(backbone.dtype, input_features.device)
        num_frames = self.num_frames(backbone.config, lengths)
        if backbone.config.backbone_padding == "30s":
            log_mels = _with_silence(input_features, lengths)
            states, mask = _embedded(backbone, log_mels, torch.full_like(lengths, 2 * POSITIONS)), None
        else:
            own = lengths - LOG_MELS_AFTER_END
            states = _embedded(backbone, input_features[:, : int(own.max())], own)
            mask = padding_mask(num_frames, states.shape[1])
        found = _run(backbone, states, mask, 0, layers)
        return {layer: states[:, : int(num_frames.max())] for layer, states in found.items()}

    def run_all_layers(self, backbone):
        """Does nothing: no layer is skipped and no frame masked here, in training either."""

    def layers(self, backbone, first, layer):
        """The modules of the encoder's layers that `upper_states` runs, in their order."""
        return list(backbone.layers.children())[first : None if layer == -1 else layer]

    def upper_states(self, backbone, hidden_states, lengths, first, layer):
        """
        As `BackboneFamily.upper_states`.

        Raises:
            ValueError: if the layers also attend to the silence after a clip, whose hidden states are missing.
        """
        if backbone.config.backbone_padding == "30s":
            raise ValueError(
                "backbone_padding: got '30s'; the layers of Whisper also hear the silence after a clip, so that they "
                "cannot run on the clip's frames alone; expected 'clip'"
            )
        mask = padding_mask(lengths, hidden_states.shape[1])
        return _run(backbone, hidden_states, mask, first, [layer])[layer]


def _with_silence(log_mels, lengths):
    """Extends (batch, log-mels, bands) to 30 s by repeating each clip's last log-mel, which is of silence."""
    rows = torch.arange(2 * POSITIONS, device=log_mels.device).clamp(max=lengths[:, None] - 1)
    return log_mels.take_along_dim(rows[..., None], dim=1)


def _embedded(backbone, log_mels, lengths):
    """
    The input of the first layer.

    Args:
        log_mels: (batch, log-mels, bands).
        lengths: (batch,) int64, how many log-mels of each clip the convolutions see, which see zeros past them.

    Returns:
        (batch, frames, width)
    """
    rest = ~length_mask(lengths, log_mels.shape[1])[:, None]
    frames = gelu(backbone.conv1(log_mels.mT.masked_fill(rest, 0)))
    frames = gelu(backbone.conv2(frames.masked_fill(rest, 0))).mT
    frames = frames + backbone.embed_positions(torch.arange(frames.shape[1], device=frames.device))
    return dropout(frames, p=backbone.dropout, training=backbone.training)


def _run(backbone, states, mask, first, layers):
    """
    Runs the encoder's layers.

    Args:
        states: (batch, frames, width), hidden states of `first`.
        mask: (batch, frames) bool, or `None` if nothing is padded.
        first, layers: numbers of hidden states; -1 in `layers` is the last one.

    Returns:
        `dict` from layer to (batch, frames, width).
    """
    num_layers = len(backbone.layers)
    numbers = {layer: num_layers if layer == -1 else layer for layer in layers}
    mask = create_bidirectional_mask(backbone.config, states, mask)
    found = {first: states}
    for number in range(first, max(numbers.values())):
        states = backbone.layers[number](states, mask)
        if number + 1 in numbers.values():
            found[number + 1] = states
    # As in Transformers, only the last of all hidden states is normalised.
    if num_layers in found and num_layers > first and not getattr(backbone.config, "is_cut", False):
        found[num_layers] = backbone.layer_norm(found[num_layers])
    return {layer: found[number] for layer, number in numbers.items()}
