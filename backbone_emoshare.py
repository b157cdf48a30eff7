"""What makes a Transformers speech encoder exact in a batch: its frame features never depend on padding."""

from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Samples of each clip in the padded batch that is being run, (batch,) int64; None while nothing is padded.
_clip_samples = ContextVar("clip_samples", default=None)


class FrameFeatures(NamedTuple):
    """
    Attributes:
        features: (batch, frames, width), or (batch, layers, frames, width) for `layer="weighted"`.
        lengths: (batch,) int64, each clip's number of frames.
        hidden_states: all of the backbone's hidden states, each (batch, frames, width), or `None`.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None


def num_frames(backbone_config, num_samples):
    """Frames (int or int tensor, as given) that the backbone's convolutional front end makes of `num_samples`."""
    for kernel, stride in zip(backbone_config.conv_kernel, backbone_config.conv_stride, strict=True):
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


def make_exact_in_batch(backbone):
    """
    Closes, in place, the ways by which padding reaches a clip in Transformers' own implementation. A clip alone gives
    what it gave before, and the names of parameters stay, so pretrained weights load and saved ones load elsewhere.

    - Where the first convolution has a GroupNorm over time, that takes its statistics over each clip's own frames.
    - The positional convolutions see zeros past a clip's last frame, as they do past the end of a clip alone. This
      matters where several are stacked (data2vec-audio) or a BatchNorm comes before (`conv_pos_batch_norm=True`).

    Both hold in `frame_features`, which knows the length of each clip.
    """
    if isinstance(getattr(backbone.feature_extractor.conv_layers[0], "layer_norm", None), nn.GroupNorm):
        backbone.feature_extractor = GroupNormFrontEnd(backbone.feature_extractor)
    for module in backbone.encoder.pos_conv_embed.modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_pre_hook(_ZeroPadding(backbone.config))


def frame_features(backbone, input_values, lengths, layer=-1, output_hidden_states=False):
    """
    Runs `backbone` on a batch of padded waveforms.

    Args:
        backbone: a Transformers model of the wav2vec 2.0 family, after `make_exact_in_batch`.
        input_values: (batch, samples), padded on the right.
        lengths: (batch,) int64, each clip's number of samples.
        layer: as `EmoShareConfig.backbone_layer`.
        output_hidden_states: whether to return all hidden states too.

    Returns:
        `FrameFeatures`; features past a clip's last frame are arbitrary.
    """
    is_padded = bool((lengths != input_values.shape[1]).any())
    token = _clip_samples.set(lengths if is_padded else None)
    try:
        outputs = backbone(
            input_values,
            attention_mask=length_mask(lengths, input_values.shape[1]).long() if is_padded else None,
            output_hidden_states=output_hidden_states or layer != -1,
            return_dict=True,
        )
    finally:
        _clip_samples.reset(token)
    if layer == -1:
        features = outputs.last_hidden_state
    elif layer == "weighted":
        features = torch.stack(outputs.hidden_states, dim=1)
    else:
        features = outputs.hidden_states[layer]
    hidden_states = outputs.hidden_states if output_hidden_states else None
    return FrameFeatures(features, num_frames(backbone.config, lengths), hidden_states)


def length_mask(lengths, size):
    """(batch,) lengths -> (batch, size) bool, true on each row's first `length` entries."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class GroupNormFrontEnd(nn.Module):
    """
    The convolutional front end of a backbone with `feat_extract_norm="group"`, exact in a batch.

    Args:
        feature_extractor: Transformers' front end, whose layers this one takes over.
    """

    def __init__(self, feature_extractor):
        super().__init__()
        first, *others = feature_extractor.conv_layers
        self.conv_layers = nn.ModuleList([GroupNormConvLayer(first), *others])

    def forward(self, input_values):
        """(batch, samples) -> (batch, channels, frames)"""
        first, *others = self.conv_layers
        waveforms = input_values[:, None]
        if self.training and first.conv.weight.requires_grad:
            waveforms.requires_grad_()  # else reentrant gradient checkpointing would leave the front end untrained
        # The lengths go in as an argument: gradient checkpointing runs the layer again when the context is gone.
        maps = first(waveforms, _clip_samples.get())
        for layer in others:
            maps = layer(maps)
        return maps

    def _freeze_parameters(self):
        """What Transformers' `freeze_feature_encoder` calls."""
        self.requires_grad_(False)


class GroupNormConvLayer(GradientCheckpointingLayer):
    """The first convolution, its GroupNorm taken over each clip's own frames."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer_norm, self.activation = layer.conv, layer.layer_norm, layer.activation

    def forward(self, waveforms, lengths):
        """
        Args:
            waveforms: (batch, 1, samples).
            lengths: (batch,) int64, each clip's number of samples; `None` where nothing is padded.

        Returns:
            (batch, channels, frames), zero past each clip's last frame.
        """
        maps = self.conv(waveforms)
        if lengths is None:
            return self.activation(self.layer_norm(maps))
        frames = (lengths - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        clips = [self.layer_norm(clip[None, :, :own]) for clip, own in zip(maps, frames.tolist(), strict=True)]
        longest = maps.shape[-1]
        return self.activation(torch.cat([nn.functional.pad(clip, (0, longest - clip.shape[-1])) for clip in clips]))


class _ZeroPadding:
    """Forward pre-hook of a convolution over frames: (batch, width, frames), zero past each clip's last frame."""

    def __init__(self, backbone_config):
        self.backbone_config = backbone_config

    def __call__(self, convolution, inputs):
        lengths = _clip_samples.get()
        if lengths is None:
            return None
        (frames,) = inputs
        mask = length_mask(num_frames(self.backbone_config, lengths), frames.shape[-1])
        return frames.masked_fill(~mask[:, None], 0)
