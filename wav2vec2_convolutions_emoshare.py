"""
The convolutions of the wav2vec 2.0 family: the front end over the waveform, which is exact in a batch and fast, and the
positional convolution on GPUs.
"""

import math
from contextvars import ContextVar

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from .frames_emoshare import length_mask
from .offload_emoshare import weights_in_place
from .onnx_layers_emoshare import kernel_matrix

# Number of samples of each clip in the padded batch that is being run, (batch,) int64; None if nothing is padded. A
# context variable, because `forward` of Transformers' models has no argument for it.
clip_samples = ContextVar("clip_samples", default=None)


class FrontEnd(nn.Module):
    """
    The convolutional front end of a backbone, exact in a batch: waveforms to frames.

    With gradients it runs Transformers' own modules. Without gradients, and if `fast`, it computes the same in the
    layout (frames, channels), in which a convolution is a few matrix products over views of its input, and nothing is
    transposed or unfolded. Weights are read from the modules at every call.

    Args:
        feature_extractor: Transformers' front end, whose layers this one uses.
        fast: whether it may compute without Transformers' modules.
    """

    def __init__(self, feature_extractor, fast=True):
        super().__init__()
        self.fast = fast
        first, *others = feature_extractor.conv_layers
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first = GroupNormConvLayer(first)
        self.conv_layers = nn.ModuleList([first, *others])

    def forward(self, input_values):
        """(batch, samples) -> (batch, channels, frames)"""
        with weights_in_place(self):
            return self._frames(input_values, clip_samples.get())

    def _frames(self, input_values, lengths):
        if self._runs_as_modules(input_values):
            return self._modules_forward(input_values, lengths)
        if lengths is None:
            lengths = torch.full((len(input_values),), input_values.shape[1], device=input_values.device)
        weights = self.weights()
        if input_values.device.type != "cpu":
            return self.padded_batch(input_values, lengths, weights).transpose(1, 2)
        # One clip at a time: on a CPU, the maps of a whole batch exceed the cache, and padding would cost time.
        clips = [
            self.padded_batch(waveform[None, :own], own[None], weights)[0]
            for waveform, own in zip(input_values, lengths, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)

    def _runs_as_modules(self, input_values):
        needs_gradients = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (input_values, *self.parameters())
        )
        # Autocast does not support in-place products, nor MPS float64.
        device = input_values.device.type
        return not self.fast or needs_gradients or torch.is_autocast_enabled(device) or device == "mps"

    def _modules_forward(self, input_values, lengths):
        maps = input_values[:, None]
        if self.training and self.conv_layers[0].conv.weight.requires_grad:
            maps.requires_grad_()  # without this, reentrant gradient checkpointing would not train the front end
        for layer in self.conv_layers:
            # The lengths are an argument because gradient checkpointing runs the layer again outside this context.
            maps = layer(maps, lengths) if isinstance(layer, GroupNormConvLayer) else layer(maps)
        return maps

    def weights(self):
        """Each layer's weight, as a matrix (channels out, taps * channels in)."""
        return [layer.conv.weight.transpose(1, 2).flatten(1) for layer in self.conv_layers]

    def padded_batch(self, waveforms, lengths, weights):
        """
        Args:
            waveforms: (batch, samples), padded on the right.
            lengths: (batch,) int64, each clip's number of samples.
            weights: what `weights` returns, so that it is computed once for all clips.

        Returns:
            (batch, frames, channels), arbitrary past a clip's last frame.
        """
        # Clips are concatenated, each padded to whole hops, so one convolution serves all. Rows that see two clips are
        # past the last frame of the first.
        first, *others = self.conv_layers
        batch, samples = waveforms.shape
        waveforms, rows = _in_whole_hops(self.conv_layers, waveforms)
        maps = _first_convolution(first, waveforms, lengths, weights[0]).flatten(0, 1)
        for layer, weight in zip(others, weights[1:], strict=True):
            maps = _convolution(layer.conv, maps, weight)
            if hasattr(layer, "layer_norm"):
                maps = layer.layer_norm(maps)
            maps = _activate(layer.activation, maps)
        maps = nn.functional.pad(maps, (0, 0, 0, batch * rows - len(maps))).unflatten(0, (batch, rows))
        return maps[:, : _frames_of(self.conv_layers, samples)]

    def _freeze_parameters(self):
        """What Transformers' `freeze_feature_encoder` calls."""
        self.requires_grad_(False)


class ExportableFrontEnd(nn.Module):
    """A `FrontEnd` for export: `FrontEnd.padded_batch` without strided views, which ONNX does not have."""

    def __init__(self, front_end):
        super().__init__()
        self.conv_layers = front_end.conv_layers
        self.weights = nn.ModuleList(
            nn.ParameterList(kernel_matrix(layer.conv).split(layer.conv.stride[0] * layer.conv.in_channels))
            for layer in self.conv_layers[1:]
        )

    def forward(self, input_values):
        """(batch, samples) -> (batch, channels, frames)"""
        first, *others = self.conv_layers
        waveforms, _ = _in_whole_hops(self.conv_layers, input_values)
        maps = _first_convolution(first, waveforms, clip_samples.get(), first.conv.weight[:, 0])
        for layer, weights in zip(others, self.weights, strict=True):
            maps = _convolution_of_whole_strides(layer.conv, maps, weights)
            if hasattr(layer, "layer_norm"):
                maps = layer.layer_norm(maps)
            maps = layer.activation(maps)
        return maps[:, : _frames_of(self.conv_layers, input_values.shape[1])].transpose(1, 2)


def _in_whole_hops(conv_layers, waveforms):
    """
    Pads waveforms, (batch, samples), until each layer's output is a whole number of the strides after it.

    Returns:
        The waveforms, and how many frames the last layer makes of each, including those that see padding.
    """
    first, samples = conv_layers[0].conv, waveforms.shape[1]
    hop = math.prod(layer.conv.stride[0] for layer in conv_layers)
    rows = (samples + hop - 1) // hop  # and not -(-samples // hop): ONNX divides towards zero
    overlap = first.kernel_size[0] - first.stride[0]
    return nn.functional.pad(waveforms, (0, rows * hop + overlap - samples)), rows


def _frames_of(conv_layers, samples):
    """Number of frames that the layers make of so many samples, without padding."""
    kernels = (layer.conv.kernel_size[0] for layer in conv_layers)
    return num_frames(kernels, (layer.conv.stride[0] for layer in conv_layers), samples)


def num_frames(kernels, strides, samples):
    """Number of frames (int or int tensor, as given) that stacked convolutions without padding make of `samples`."""
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def _first_convolution(layer, waveforms, lengths, weight):
    """
    The first layer: a convolution of one channel, the norm and the activation.

    Args:
        layer: Transformers' module.
        waveforms: (batch, samples).
        lengths: (batch,) int64, each clip's number of samples.
        weight: (channels, taps).

    Returns:
        (batch, frames, channels)
    """
    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    windows = waveforms.unfold(1, kernel, stride)  # (batch, frames, taps)
    has_group_norm = isinstance(layer.layer_norm, nn.GroupNorm)
    if has_group_norm:
        own = (lengths - kernel) // stride + 1
        weight, bias = with_group_norm(weight, layer.layer_norm, windows, own)
    else:
        bias = weight.new_zeros(len(weight)) if layer.conv.bias is None else layer.conv.bias
    # The bias is one more tap, on a constant 1: cheaper than another pass over all channels.
    taps = torch.cat([weight, bias[..., None]], dim=-1).to(waveforms.dtype)
    windows = torch.cat([windows, windows.new_ones(*windows.shape[:2], 1)], dim=-1)
    maps = windows @ taps.mT
    return _activate(layer.activation, maps if has_group_norm else layer.layer_norm(maps))


def _activate(activation, maps):
    """GELU runs in place: the maps are so large that allocating memory costs more than computing the function."""
    if isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu:
        return torch.ops.aten.gelu_(maps)
    return activation(maps)


def with_group_norm(weight, norm, windows, lengths):
    """
    A convolution of one channel and the GroupNorm after it, combined into one convolution for each clip.

    The norm has one group per channel, and a channel is a linear function of the window that it sees. So its mean and
    variance over time follow from the windows' mean and (taps, taps) covariance, without a pass over the largest map of
    the backbone. This is computed in float64, because a filter may cancel nearly everything in a window.

    Args:
        weight: (channels, taps). A bias would cancel in the norm.
        norm: the GroupNorm.
        windows: (batch, frames, taps), of the waveform.
        lengths: (batch,) int64, each clip's number of frames, over which statistics are taken.

    Returns:
        Weight (batch, channels, taps) and bias (batch, channels), float64.
    """
    weight, windows = weight.double(), windows.double()
    is_padding = ~length_mask(lengths, windows.shape[1])[..., None]
    lengths = lengths[:, None, None]
    mean = windows.masked_fill(is_padding, 0).sum(dim=1, keepdim=True) / lengths  # (batch, 1, taps)
    centred = (windows - mean).masked_fill(is_padding, 0)
    covariance = centred.mT @ centred / lengths
    variance = (weight @ covariance * weight).sum(dim=-1)  # (batch, channels)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = scale[..., None] * weight
    return weight, norm.bias - (weight * mean).sum(dim=-1)


def _convolution(convolution, maps, weight):
    """
    A convolution over frames as a sum of matrix products, one for every `stride` taps: these see rows of `maps` that do
    not overlap, so the matrix is a view.

    Args:
        convolution: Conv1d without padding.
        maps: (frames, channels in), contiguous.
        weight: (channels out, taps * channels in), the weight of the convolution.

    Returns:
        (frames out, channels out)
    """
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    frames, channels = maps.shape
    frames_out = (frames - kernel) // stride + 1
    products = None
    for tap in range(0, kernel, stride):
        columns = slice(tap * channels, min(tap + stride, kernel) * channels)
        rows = maps.as_strided(
            (frames_out, columns.stop - columns.start),
            (stride * channels, 1),
            maps.storage_offset() + columns.start,
        )
        if products is None:
            products = nn.functional.linear(rows, weight[:, columns], convolution.bias)
        else:
            products.addmm_(rows, weight[:, columns].T)
    return products


def _convolution_of_whole_strides(convolution, maps, weights):
    """
    As `_convolution`, for maps of a whole number of strides. If a kernel is longer than its stride, the rows for its
    further taps are copied; copying all that a kernel sees into one matrix would take three times as long.

    Args:
        convolution: Conv1d without padding.
        maps: (batch, frames, channels in).
        weights: one for every `stride` taps, (taps * channels in, channels out).

    Returns:
        (batch, frames / stride, channels out), arbitrary where the kernel sees more than `maps`.
    """
    rows = maps.unflatten(1, (-1, convolution.stride[0])).flatten(2)  # (batch, frames out, stride * channels in)
    products = rows @ weights[0]
    for shift, weight in enumerate(weights[1:], start=1):
        products = products + nn.functional.pad(rows, (0, len(weight) - rows.shape[2], -shift, shift)) @ weight
    return products if convolution.bias is None else products + convolution.bias


def positional_convolution(convolution, frames, weight, bias):
    """Replaces `Conv1d._conv_forward`: (batch, width, frames) -> (batch, width, frames out)."""
    if frames.device.type == "cuda" and frames.dtype in (torch.bfloat16, torch.float16):
        return in_groups_of_64(convolution, frames, weight, bias)
    return nn.Conv1d._conv_forward(convolution, frames, weight, bias)


def in_groups_of_64(convolution, frames, weight, bias):
    """
    The same convolution, with each group of channels padded with zeros to a multiple of 64, and channels last. In 16
    bits, cuDNN is fast for these, and 20 times slower for HuBERT Base's groups of 48.
    """
    groups = convolution.groups
    own = len(weight) // groups
    more = -own % 64
    weight = nn.functional.pad(weight.unflatten(0, (groups, own)), (0, 0, 0, more, 0, more)).flatten(0, 1)
    frames = nn.functional.pad(frames.mT.unflatten(2, (groups, own)), (0, more)).flatten(2).mT
    frames, weight = (tensor[:, :, None].to(memory_format=torch.channels_last) for tensor in (frames, weight))
    maps = nn.functional.conv2d(frames, weight, padding=(0, *convolution.padding), groups=groups)[:, :, 0]
    return maps.unflatten(1, (groups, own + more))[:, :, :own].flatten(1, 2) + bias[:, None]


class GroupNormConvLayer(GradientCheckpointingLayer):
    """The first convolution, with the statistics of its GroupNorm taken over each clip's own frames."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer_norm, self.activation = layer.conv, layer.layer_norm, layer.activation

    def forward(self, waveforms, lengths):
        """
        Args:
            waveforms: (batch, 1, samples).
            lengths: (batch,) int64, each clip's number of samples; `None` if nothing is padded.

        Returns:
            (batch, channels, frames), zero past each clip's last frame.
        """
        maps = self.conv(waveforms)
        if lengths is None:
            return self.activation(self.layer_norm(maps))
        frames = (lengths - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        mask = length_mask(frames, maps.shape[-1])[:, None]
        return self.activation(self._norm(maps, mask).to(maps.dtype) * mask)

    def _norm(self, maps, mask):
        """The GroupNorm of one group per channel, over the frames where `mask` is true."""
        norm, frames = self.layer_norm, mask.sum(dim=-1, keepdim=True)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # 16 bits are too few for sums over time
        mean = maps.masked_fill(~mask, 0).sum(dim=-1, keepdim=True) / frames
        centred = (maps - mean).masked_fill(~mask, 0)
        variance = centred.square().sum(dim=-1, keepdim=True) / frames
        return centred * (variance + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]
