"""
The wav2vec 2.0 family of speech encoders: wav2vec 2.0, HuBERT, WavLM, data2vec-audio and UniSpeech-SAT.

They consist of convolutions over the waveform, a positional convolution and Transformer layers. In Transformers' own
implementation, padding reaches a clip's frames in several ways; here a clip has the same frames alone and in any batch.
"""

import copy
from types import MethodType

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging

from .encoder_layers_emoshare import EncoderFamily, EncoderLayers
from .frames_emoshare import length_mask, padding_mask
from .wav2vec2_convolutions_emoshare import (
    ExportableFrontEnd,
    FrontEnd,
    clip_samples,
    num_frames,
    positional_convolution,
)

logger = logging.get_logger(__name__)


class Wav2Vec2Family(EncoderFamily):
    """The `BackboneFamily` of encoders with the structure of wav2vec 2.0."""

    model_types = ("hubert", "wav2vec2", "wavlm", "data2vec-audio", "unispeech-sat")
    feature_type = "waveform"
    input_name = "input_values"
    attention_projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")

    def check(self, config, is_frozen):
        """Raises ValueError for a backbone config that would not be exact in a batch."""
        if getattr(config, "add_adapter", False):
            raise ValueError(
                "backbone_config: add_adapter=True is not supported: the adapter shortens the frames and mixes "
                "padding into them"
            )
        if getattr(config, "conv_pos_batch_norm", False) and not is_frozen:
            raise ValueError(
                "backbone_config: conv_pos_batch_norm=True is not supported with freeze_backbone=False: its statistics "
                "would be taken over padding and over the other clips of a batch"
            )

    def frame_geometry(self, config):
        """Length and hop of frames in samples."""
        frame_length, hop_length = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            frame_length += (kernel - 1) * hop_length
            hop_length *= stride
        return frame_length, hop_length

    def num_frames(self, config, num_samples):
        """Number of frames (int or int tensor, as given) that the front end makes of `num_samples`."""
        return num_frames(config.conv_kernel, config.conv_stride, num_samples)

    def build(self, config):
        """A backbone with random weights."""
        if config.model_type == "wavlm" and config._attn_implementation == "sdpa":
            logger.warning("attn_implementation: WavLM has no 'sdpa'; its attention runs as 'eager'")
            config._attn_implementation = "eager"
        return AutoModel.from_config(config)

    def prepare(self, backbone, fast=True):
        """
        Changes a backbone in place so that padding cannot reach a clip, as it does in Transformers' own implementation.
        The output for a clip alone and the names of parameters stay the same, so pretrained weights load, and saved
        ones load elsewhere.

        - If the first convolution has a GroupNorm over time, its statistics are over each clip's own frames.
        - The positional convolutions see zeros past a clip's last frame, as they do past the end of a clip alone. This
          matters if several are stacked (data2vec-audio) or follow a BatchNorm (`conv_pos_batch_norm=True`).

        With `fast`, it also saves time. Without it, all else runs as Transformers wrote it.

        - Without gradients, the convolutional front end runs as matrix products.
        - On a GPU, positional convolutions in 16 bits have the shape for which cuDNN uses the tensor cores.
        - Layers of the encoder above the highest requested one do not run.
        - On a CPU, frozen linear layers in bfloat16 keep their weights in the layout of its matrix unit.

        All of this takes effect in `hidden_states`, which knows the length of each clip. Also, the attention of WavLM
        calls linear layers that have adapters, instead of reading their weights.
        """
        if backbone.config.model_type == "wavlm":
            for layer in backbone.encoder.layers:
                layer.attention.torch_multi_head_self_attention = MethodType(_wavlm_attention, layer.attention)
        backbone.feature_extractor = FrontEnd(backbone.feature_extractor, fast)
        for module in backbone.encoder.pos_conv_embed.modules():
            if isinstance(module, nn.Conv1d):
                module.register_forward_pre_hook(_ZeroPadding(self, backbone.config))
                if fast:
                    module._conv_forward = MethodType(positional_convolution, module)
        if fast:
            backbone.encoder.layers = EncoderLayers(backbone.encoder.layers)

    def exportable(self, backbone):
        """
        A copy for export: prepared without `fast`, and with an `ExportableFrontEnd`. Its attention is `"eager"`, whose
        masks need fewer operators, and its positional convolution's weight norm is computed once.
        """
        copied = self.build(copy.deepcopy(backbone.config))
        self.prepare(copied, fast=False)
        copied.load_state_dict(backbone.state_dict())
        copied.set_attn_implementation("eager")
        for module in filter(is_parametrized, list(copied.modules())):
            remove_parametrizations(module, "weight")
        copied.feature_extractor = ExportableFrontEnd(copied.feature_extractor)
        return copied.eval()

    def hidden_states(self, backbone, input_values, lengths, layers):
        """
        Runs a prepared backbone once on a batch of padded waveforms.

        Args:
            backbone: after `prepare`.
            input_values: (batch, samples), padded on the right.
            lengths: (batch,) int64, each clip's number of samples.
            layers: which hidden states: -1 is Transformers' `last_hidden_state`, k >= 0 its `hidden_states[k]`.

        Returns:
            `dict` from layer to (batch, frames, width), arbitrary past a clip's last frame.
        """
        # An exported graph must serve batches with and without padding.
        is_padded = torch.compiler.is_exporting() or bool((lengths != input_values.shape[1]).any())
        token = clip_samples.set(lengths if is_padded else None)
        try:
            mask = length_mask(lengths, input_values.shape[1]).long() if is_padded else None
            return self.run(backbone, input_values, mask, layers)
        finally:
            clip_samples.reset(token)

    def upper_states(self, backbone, hidden_states, lengths, first, layer):
        """As `BackboneFamily.upper_states`."""
        mask = padding_mask(lengths, hidden_states.shape[1])
        layers = self.layers(backbone, first, layer)
        if backbone.config.model_type == "wavlm":
            states = _through_wavlm(layers, hidden_states, mask, backbone.encoder)
        else:
            states, mask = hidden_states, create_bidirectional_mask(backbone.config, hidden_states, mask)
            for module in layers:
                states = module(states, attention_mask=mask)
        has_last_norm = layer == -1 and getattr(backbone.config, "do_stable_layer_norm", False)
        return backbone.encoder.layer_norm(states) if has_last_norm else states


def _through_wavlm(layers, states, mask, encoder):
    """(batch, frames, width) and (batch, frames) bool or `None` -> (batch, frames, width)"""
    # The first layer of the encoder has the embedding of relative positions; all layers use its biases.
    attention = next(encoder.layers.children()).attention
    frames = states.shape[1]
    bias = attention.compute_bias(frames, frames).repeat(len(states), 1, 1)  # (batch * attention heads, frames, frames)
    for layer in layers:
        states, bias = layer(states, attention_mask=mask, position_bias=bias)
    return states


def _wavlm_attention(self, hidden_states, attention_mask, gated_position_bias):
    """
    Replaces the method of `WavLMAttention` that reads the weights of its linear layers instead of calling them, and
    would silently ignore adapters.

    Args:
        hidden_states: (batch, frames, width).
        attention_mask: (batch, frames), 1 on a clip's own frames; `None` is all ones.
        gated_position_bias: (batch * attention heads, frames, frames).

    Returns:
        (batch, frames, width), and the attention weights or `None`.
    """
    if isinstance(self.q_proj, nn.Linear):
        return type(self).torch_multi_head_self_attention(self, hidden_states, attention_mask, gated_position_bias)
    projections = (self.q_proj, self.k_proj, self.v_proj)
    of_heads = [project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in projections]
    bias = gated_position_bias.unflatten(0, (-1, self.num_heads)).to(of_heads[0].dtype)
    if attention_mask is not None:
        bias = bias.masked_fill(attention_mask[:, None, None] != 1, float("-inf"))
    dropout = self.dropout if self.training else 0.0
    attended = nn.functional.scaled_dot_product_attention(*of_heads, attn_mask=bias, dropout_p=dropout)
    return self.out_proj(attended.transpose(1, 2).flatten(2)), None


class _ZeroPadding:
    """Forward pre-hook of a convolution: sets its input (batch, width, frames) to zero past each clip's last frame."""

    def __init__(self, family, backbone_config):
        self.family = family
        self.backbone_config = backbone_config

    def __call__(self, convolution, inputs):
        lengths = clip_samples.get()
        if lengths is None:
            return None
        (frames,) = inputs
        mask = length_mask(self.family.num_frames(self.backbone_config, lengths), frames.shape[-1])
        return frames.masked_fill(~mask[:, None], 0)
