"""
The wav2vec 2.0 family of speech encoders: wav2vec 2.0, HuBERT, WavLM, data2vec-audio and UniSpeech-SAT.

Convolutions over the waveform, a positional convolution and Transformer layers. In Transformers' own implementation,
padding reaches a clip's frames in several ways; here a clip has the same frames alone and in any batch.
"""

import copy
import math
from contextvars import ContextVar
from functools import cache
from itertools import islice
from types import MethodType

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import GELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .frames_emoshare import length_mask
from .offload_emoshare import weights_in_place

logger = logging.get_logger(__name__)

# Both reach modules deep inside a Transformers model, whose `forward` has no argument for them.
# Samples of each clip in the padded batch that is being run, (batch,) int64; None while nothing is padded.
_clip_samples = ContextVar("clip_samples", default=None)
# Layers of the encoder that are being run; None for all.
_num_layers = ContextVar("num_layers", default=None)


class Wav2Vec2Family:
    """What `BackboneFamily` asks for, of the encoders that have wav2vec 2.0's shape."""

    model_types = ("hubert", "wav2vec2", "wavlm", "data2vec-audio", "unispeech-sat")
    feature_type = "waveform"
    input_name = "input_values"
    # SpecAugment's mask, which only pretraining and fine-tuning use: a checkpoint may lack it.
    optional_weights = ("masked_spec_embed",)

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

    def width(self, config):
        """Width of the frame features."""
        return config.hidden_size

    def num_layers(self, config):
        """Layers of the encoder: there is one more hidden state than layers."""
        return config.num_hidden_layers

    def frame_geometry(self, config):
        """Samples that one frame sees, and samples from one frame to the next."""
        frame_length, hop_length = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            frame_length += (kernel - 1) * hop_length
            hop_length *= stride
        return frame_length, hop_length

    def num_frames(self, config, num_samples):
        """Frames (int or int tensor, as given) that the front end makes of `num_samples`."""
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples

    def build(self, config):
        """A backbone with random weights."""
        if config.model_type == "wavlm" and config._attn_implementation == "sdpa":
            logger.warning("attn_implementation: WavLM has no 'sdpa'; its attention runs as 'eager'")
            config._attn_implementation = "eager"
        return AutoModel.from_config(config)

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""
        return AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)

    def prepare(self, backbone, fast=True):
        """
        Closes, in place, the ways by which padding reaches a clip in Transformers' own implementation. A clip alone
        gives what it gave before, and the names of parameters stay, so pretrained weights load and saved ones load
        elsewhere.

        - Where the first convolution has a GroupNorm over time, that takes its statistics over each clip's own frames.
        - The positional convolutions see zeros past a clip's last frame, as they do past the end of a clip alone. This
          matters where several are stacked (data2vec-audio) or a BatchNorm comes before (`conv_pos_batch_norm=True`).

        With `fast`, it also leaves out what need not be computed; without, all else runs as Transformers wrote it.

        - Without gradients, the convolutional front end runs as matrix products.
        - On a GPU, positional convolutions in 16 bits have the shape for which cuDNN uses the tensor cores.
        - Layers of the encoder above the highest one that is asked for are not run.
        - On a CPU, frozen linear layers in bfloat16 keep their weights in the layout of its matrix unit.

        All of it takes effect in `hidden_states`, which knows the length of each clip.
        """
        backbone.feature_extractor = FrontEnd(backbone.feature_extractor, fast)
        for module in backbone.encoder.pos_conv_embed.modules():
            if isinstance(module, nn.Conv1d):
                module.register_forward_pre_hook(_ZeroPadding(self, backbone.config))
                if fast:
                    module._conv_forward = MethodType(_positional_convolution, module)
        if fast:
            backbone.encoder.layers = EncoderLayers(backbone.encoder.layers)

    def cut(self, backbone, layer):
        """A view without the layers of the encoder that `hidden_states` does not run for this layer."""
        layers = list(backbone.encoder.layers.children())
        kept = _layers_to_run([layer]) if isinstance(layer, int) else None
        if kept is None or kept >= len(layers):
            return backbone
        view, encoder = copy.copy(backbone), copy.copy(backbone.encoder)
        view._modules = {**backbone._modules, "encoder": encoder}
        encoder._modules = {**encoder._modules, "layers": type(encoder.layers)(layers[:kept])}
        view.config = encoder.config = copy.copy(backbone.config)
        view.config.num_hidden_layers = kept
        return view

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
        if isinstance(backbone.encoder.layers, EncoderLayers):
            backbone.encoder.layers.pack_linears(backbone.dtype, input_values.device)
        is_padded = bool((lengths != input_values.shape[1]).any())
        clip_samples = _clip_samples.set(lengths if is_padded else None)
        num_layers = _num_layers.set(_layers_to_run(layers))
        try:
            outputs = backbone(
                input_values,
                attention_mask=length_mask(lengths, input_values.shape[1]).long() if is_padded else None,
                output_hidden_states=any(layer != -1 for layer in layers),
                return_dict=True,
            )
        finally:
            _clip_samples.reset(clip_samples)
            _num_layers.reset(num_layers)
        return {layer: outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer] for layer in layers}


def _layers_to_run(layers):
    """How many, for these hidden states; `None` is all."""
    # One at least: Transformers records hidden_states[0] as the first layer's input.
    return None if -1 in layers else max(1, *layers)


class EncoderLayers(nn.ModuleList):
    """
    The encoder's layers; iterating over them gives only those that are needed. Transformers' encoders iterate over
    their layers, and have no argument for how many.
    """

    has_packed_linears = False

    def __iter__(self):
        return islice(super().__iter__(), _num_layers.get())

    def pack_linears(self, dtype, device):
        """
        Makes the linear layers `PackedLinear`s, in place, once they run in a dtype and on a device where that helps.
        Until then, tools which look for `nn.Linear` itself find them, as dynamic quantisation does.
        """
        is_useful = dtype == torch.bfloat16 and device.type == "cpu" and not torch.compiler.is_compiling()
        if is_useful and _has_packed_linear() and not self.has_packed_linears:
            for module in self.modules():
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
            self.has_packed_linears = True


class PackedLinear(nn.Linear):
    """
    A linear layer of the encoder. On a CPU, `nn.Linear` rearranges its bfloat16 weights for the processor's matrix unit
    at every call; this one does it once, as long as the weights are frozen and unchanged, with the operators that
    `torch.compile` uses for it. It keeps a second copy of them in memory.

    PyTorch counts the changes of a tensor, but not those through `weight.data`. These are found by comparing weights of
    every row and column; one that changes a single weight can remain unseen, so write in `torch.no_grad()` instead.
    """

    _packed = None
    # The weights that were packed, their version, and some of their values. Holding the weights keeps others from
    # taking their address.
    _packed_from, _packed_version, _packed_sample = None, None, None

    def forward(self, rows):
        """(..., width in) -> (..., width out)"""
        if not self._runs_packed(rows):
            return super().forward(rows)
        sample = self._sample()
        if self._packed is None or self._has_new_weight(sample):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._packed_from, self._packed_version = self.weight.detach(), self.weight._version
            self._packed_sample = sample
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "none")

    def _runs_packed(self, rows):
        return (
            not torch.compiler.is_compiling()  # which packs by itself
            and rows.device.type == self.weight.device.type == "cpu"
            and rows.dtype == self.weight.dtype == torch.bfloat16
            and not (torch.is_grad_enabled() and rows.requires_grad)
            # Weights that are trained change, and inference tensors do not count their changes.
            and not (self.weight.requires_grad or self.weight.is_inference())
            and _has_packed_linear()
        )

    def _has_new_weight(self, sample):
        return (
            self._packed_from.data_ptr() != self.weight.data_ptr()
            or self._packed_version != self.weight._version
            or not torch.equal(self._packed_sample, sample)
        )

    def _sample(self):
        """The weights on the diagonals, which cross every row and column."""
        return self.weight.detach().take(_diagonals(*self.weight.shape))

    def __getstate__(self):
        """Copies do not share the packed weights; they pack their own."""
        return {**self.__dict__, "_packed": None, "_packed_from": None, "_packed_sample": None}


@cache
def _diagonals(rows, columns):
    """Positions in a flattened (rows, columns) matrix, int64."""
    index = torch.arange(max(rows, columns))
    return index % rows * columns + index % columns


@cache
def _has_packed_linear():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FrontEnd(nn.Module):
    """
    The convolutional front end of a backbone, exact in a batch: waveforms to frames.

    With gradients it runs Transformers' own modules. Without gradients, and if `fast`, it computes the same in the
    layout (frames, channels), where a convolution is a few matrix products over views of its input and nothing is
    transposed or unfolded. Weights are read from the modules at every call.

    Args:
        feature_extractor: Transformers' front end, whose layers this one takes over.
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
            return self._frames(input_values, _clip_samples.get())

    def _frames(self, input_values, lengths):
        if self._runs_as_modules(input_values):
            return self._modules_forward(input_values, lengths)
        if lengths is None:
            lengths = torch.full((len(input_values),), input_values.shape[1], device=input_values.device)
        weights = self.weights()
        if input_values.device.type != "cpu":
            return self.padded_batch(input_values, lengths, weights).transpose(1, 2)
        # One clip at a time: on a CPU, the maps of a whole batch fit no cache, and padding is computed for nothing.
        clips = [
            self.padded_batch(waveform[None, :own], own[None], weights)[0]
            for waveform, own in zip(input_values, lengths, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)

    def _runs_as_modules(self, input_values):
        needs_gradients = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (input_values, *self.parameters())
        )
        # Autocast has no in-place product, and MPS no float64.
        device = input_values.device.type
        return not self.fast or needs_gradients or torch.is_autocast_enabled(device) or device == "mps"

    def _modules_forward(self, input_values, lengths):
        maps = input_values[:, None]
        if self.training and self.conv_layers[0].conv.weight.requires_grad:
            maps.requires_grad_()  # without this, reentrant gradient checkpointing would not train the front end
        for layer in self.conv_layers:
            # The lengths are an argument because gradient checkpointing runs the layer again outside of this context.
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
            weights: each layer's, as `weights` returns them, so that they are computed once for all clips.

        Returns:
            (batch, frames, channels), arbitrary past a clip's last frame.
        """
        # The clips one after another as one sequence, each of a whole number of hops: a convolution of all of them is
        # one of the sequence. Rows that see two clips are past the last frame of the first.
        first, *others = self.conv_layers
        batch, samples = waveforms.shape
        hop = math.prod(layer.conv.stride[0] for layer in self.conv_layers)
        rows = -(-samples // hop)
        overlap = first.conv.kernel_size[0] - first.conv.stride[0]
        waveforms = nn.functional.pad(waveforms, (0, rows * hop + overlap - samples))
        maps = _first_convolution(first, waveforms, lengths, weights[0]).flatten(0, 1)
        for layer, weight in zip(others, weights[1:], strict=True):
            maps = _convolution(layer.conv, maps, weight)
            if hasattr(layer, "layer_norm"):
                maps = layer.layer_norm(maps)
            maps = _activate(layer.activation, maps)
        maps = nn.functional.pad(maps, (0, 0, 0, batch * rows - len(maps))).unflatten(0, (batch, rows))
        for layer in self.conv_layers:
            samples = (samples - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
        return maps[:, :samples]

    def _freeze_parameters(self):
        """What Transformers' `freeze_feature_encoder` calls."""
        self.requires_grad_(False)


def _first_convolution(layer, waveforms, lengths, weight):
    """
    The first layer: its convolution of one channel, the norm and the activation.

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
    """In place for GELU: the maps are so large that allocating new memory costs more than computing the function."""
    if isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu:
        return torch.ops.aten.gelu_(maps)
    return activation(maps)


def with_group_norm(weight, norm, windows, lengths):
    """
    A convolution of one channel and the GroupNorm after it, as one convolution for each clip.

    The norm has one group per channel, and a channel is a linear function of the window that it sees. So its mean and
    variance over time follow from the windows' mean and (taps, taps) covariance, without a pass over the largest map of
    the whole backbone. Computed in float64, because a filter may cancel nearly everything in a window.

    Args:
        weight: (channels, taps). A bias would cancel in the norm.
        norm: the GroupNorm.
        windows: (batch, frames, taps), of the waveform.
        lengths: (batch,) int64, each clip's number of frames: statistics are over these.

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
    A convolution over frames as a sum of matrix products, one for every `stride` taps: these see rows of `maps` that
    do not overlap, so that a view of it is the matrix.

    Args:
        convolution: Conv1d without padding.
        maps: (frames, channels in), contiguous.
        weight: (channels out, taps * channels in), its weight.

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


def _positional_convolution(convolution, frames, weight, bias):
    """In place of `Conv1d._conv_forward`: (batch, width, frames) -> (batch, width, frames out)."""
    if frames.device.type == "cuda" and frames.dtype in (torch.bfloat16, torch.float16):
        return in_groups_of_64(convolution, frames, weight, bias)
    return nn.Conv1d._conv_forward(convolution, frames, weight, bias)


def in_groups_of_64(convolution, frames, weight, bias):
    """
    The same convolution, with each group of channels filled up with zeros to a multiple of 64, and a frame's channels
    next to each other. In 16 bits, cuDNN is fast at these, and 20 times slower at HuBERT Base's groups of 48.
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
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))  # 16 bits would lose the sums over time
        mean = maps.masked_fill(~mask, 0).sum(dim=-1, keepdim=True) / frames
        centred = (maps - mean).masked_fill(~mask, 0)
        variance = centred.square().sum(dim=-1, keepdim=True) / frames
        return centred * (variance + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]


class _ZeroPadding:
    """Forward pre-hook of a convolution over frames: (batch, width, frames), zero past each clip's last frame."""

    def __init__(self, family, backbone_config):
        self.family = family
        self.backbone_config = backbone_config

    def __call__(self, convolution, inputs):
        lengths = _clip_samples.get()
        if lengths is None:
            return None
        (frames,) = inputs
        mask = length_mask(self.family.num_frames(self.backbone_config, lengths), frames.shape[-1])
        return frames.masked_fill(~mask[:, None], 0)
