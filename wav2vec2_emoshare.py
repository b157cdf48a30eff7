"""
The wav2vec 2.0 family of speech encoders: wav2vec 2.0, HuBERT, WavLM, data2vec-audio and UniSpeech-SAT.

Convolutions over the waveform, a positional convolution and Transformer layers. In Transformers' own implementation,
padding reaches a clip's frames in several ways; here a clip has the same frames alone and in any batch.
"""

import copy
from contextvars import ContextVar
from functools import cache
from itertools import islice
from types import MethodType

import torch
from torch import nn
from transformers import AutoModel
from transformers.utils import logging

from .frames_emoshare import length_mask
from .wav2vec2_convolutions_emoshare import ExportableFrontEnd, FrontEnd, clip_samples, positional_convolution

logger = logging.get_logger(__name__)

# Layers of the encoder that are being run; None for all. As `clip_samples`, it reaches modules deep inside a model of
# Transformers, whose `forward` has no argument for it.
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
                    module._conv_forward = MethodType(positional_convolution, module)
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

    def exportable(self, backbone):
        """A copy for export: prepared without `fast`, and with an `ExportableFrontEnd`."""
        copied = self.build(copy.deepcopy(backbone.config))
        self.prepare(copied, fast=False)
        copied.load_state_dict(backbone.state_dict())
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
        if isinstance(backbone.encoder.layers, EncoderLayers):
            backbone.encoder.layers.pack_linears(backbone.dtype, input_values.device)
        # A graph that is exported is for batches with and without padding.
        is_padded = torch.compiler.is_exporting() or bool((lengths != input_values.shape[1]).any())
        token = clip_samples.set(lengths if is_padded else None)
        num_layers = _num_layers.set(_layers_to_run(layers))
        try:
            outputs = backbone(
                input_values,
                attention_mask=length_mask(lengths, input_values.shape[1]).long() if is_padded else None,
                output_hidden_states=any(layer != -1 for layer in layers),
                return_dict=True,
            )
        finally:
            clip_samples.reset(token)
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


class _ZeroPadding:
    """Forward pre-hook of a convolution over frames: (batch, width, frames), zero past each clip's last frame."""

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
