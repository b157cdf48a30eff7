"""What makes a Transformers speech encoder exact in a batch: its frame features never depend on padding."""

from typing import NamedTuple

import torch
from torch import nn


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


def is_exact_in_batch(backbone_config):
    """
    Whether Transformers' own implementation gives a clip the same features alone and in a padded batch.

    GroupNorm in the first convolution takes its statistics over padded time, data2vec-audio's stacked positional
    convolutions reach over the end of a clip, and so does a batch-normalised positional convolution, which turns
    masked zeros into something else.
    """
    return not (
        getattr(backbone_config, "feat_extract_norm", "layer") == "group"
        or backbone_config.model_type == "data2vec-audio"
        or getattr(backbone_config, "conv_pos_batch_norm", False)
    )


def frame_features(backbone, input_values, lengths, layer=-1, output_hidden_states=False):
    """
    Runs `backbone` on a batch of padded waveforms.

    Args:
        backbone: a Transformers model of the wav2vec 2.0 family.
        input_values: (batch, samples), padded on the right.
        lengths: (batch,) int64, each clip's number of samples.
        layer: as `EmoShareConfig.backbone_layer`.
        output_hidden_states: whether to return all hidden states too.

    Returns:
        `FrameFeatures`; features past a clip's last frame are arbitrary.
    """
    is_padded = bool((lengths != input_values.shape[1]).any())
    if is_padded and not is_exact_in_batch(backbone.config):
        clips = [
            _run(backbone, clip[None, :length], None, layer, output_hidden_states)
            for clip, length in zip(input_values, lengths.tolist(), strict=True)
        ]
        features = _pad_frames([features for features, _ in clips])
        hidden_states = None
        if output_hidden_states:
            hidden_states = tuple(_pad_frames(states) for states in zip(*(states for _, states in clips), strict=True))
    else:
        attention_mask = None
        if is_padded:
            attention_mask = length_mask(lengths, input_values.shape[1]).long()
        features, hidden_states = _run(backbone, input_values, attention_mask, layer, output_hidden_states)
    return FrameFeatures(features, num_frames(backbone.config, lengths), hidden_states)


def length_mask(lengths, size):
    """(batch,) lengths -> (batch, size) bool, true on each row's first `length` entries."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _run(backbone, input_values, attention_mask, layer, output_hidden_states):
    outputs = backbone(
        input_values,
        attention_mask=attention_mask,
        output_hidden_states=output_hidden_states or layer != -1,
        return_dict=True,
    )
    if layer == -1:
        features = outputs.last_hidden_state
    elif layer == "weighted":
        features = torch.stack(outputs.hidden_states, dim=1)
    else:
        features = outputs.hidden_states[layer]
    return features, outputs.hidden_states if output_hidden_states else None


def _pad_frames(clips):
    """Tensors of one clip each, (1, ..., frames, width), to one (batch, ..., most frames, width), zero-padded."""
    most = max(clip.shape[-2] for clip in clips)
    return torch.cat([nn.functional.pad(clip, (0, 0, 0, most - clip.shape[-2])) for clip in clips])
