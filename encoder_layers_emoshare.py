"""What backbone families share: only the layers that are needed run, and frozen linear layers are fast."""

import copy
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import islice

import torch
from torch import nn
from transformers import AutoModel

# Number of encoder layers to run; None for all. A context variable, because `forward` of Transformers' models has no
# argument for it.
_num_layers = ContextVar("num_layers", default=None)


@contextmanager
def running(layers):
    """Within this context, `EncoderLayers` iterate only over the layers that these hidden states need."""
    token = _num_layers.set(_layers_to_run(layers))
    try:
        yield
    finally:
        _num_layers.reset(token)


def _layers_to_run(layers):
    """How many layers these hidden states need; `None` for all."""
    # At least one: Transformers records hidden_states[0] as the first layer's input.
    return None if -1 in layers else max(1, *layers)


class EncoderLayers(nn.ModuleList):
    """
    The encoder's layers. Iterating yields only those that are needed: Transformers' encoders iterate over their layers,
    and have no argument for how many.
    """

    has_packed_linears = False

    def __iter__(self):
        return islice(super().__iter__(), _num_layers.get())

    def pack_linears(self, dtype, device):
        """
        Turns the linear layers into `PackedLinear`s, in place, once they run in a dtype and on a device where that
        helps. Until then, tools that look for `nn.Linear` itself, such as dynamic quantisation, find them.
        """
        is_useful = dtype == torch.bfloat16 and device.type == "cpu" and not torch.compiler.is_compiling()
        if is_useful and _has_packed_linear() and not self.has_packed_linears:
            for module in self.modules():
                if type(module) is nn.Linear:
                    module.__class__ = PackedLinear
            self.has_packed_linears = True


class EncoderFamily:
    """
    Base class of families whose backbones have Transformers' usual structure: layers in `encoder.layers`, and fields
    `hidden_size` and `num_hidden_layers` in the config.
    """

    # SpecAugment's mask, which only pretraining and fine-tuning use: a checkpoint may lack it.
    optional_weights = ("masked_spec_embed",)
    paddings = ()

    def width(self, config):
        """Width of the frame features."""
        return config.hidden_size

    def num_layers(self, config):
        """Layers of the encoder: there is one more hidden state than layers."""
        return config.num_hidden_layers

    def load(self, name_or_path, **kwargs):
        """A pretrained backbone and Transformers' loading info; `kwargs` as in `from_pretrained`."""
        return AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)

    def cut(self, backbone, layer):
        """As `BackboneFamily.cut`."""
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

    def run(self, backbone, inputs, attention_mask, layers):
        """
        Runs a prepared backbone once.

        Args:
            backbone, inputs, layers: as in `BackboneFamily.hidden_states`.
            attention_mask: (batch, length) as the backbone takes it; `None` if nothing is padded.

        Returns:
            As `BackboneFamily.hidden_states`.
        """
        if isinstance(backbone.encoder.layers, EncoderLayers):
            backbone.encoder.layers.pack_linears(backbone.dtype, inputs.device)
        needs_all = any(layer != -1 for layer in layers)
        with running(layers):
            outputs = backbone(inputs, attention_mask=attention_mask, output_hidden_states=needs_all, return_dict=True)
        return {layer: outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer] for layer in layers}

    def run_all_layers(self, backbone):
        """Switches off LayerDrop and SpecAugment, in place."""
        backbone.config.layerdrop = 0.0
        backbone.config.apply_spec_augment = False

    def layers(self, backbone, first, layer):
        """The modules of the encoder's layers that `upper_states` runs, in their order."""
        return list(backbone.encoder.layers.children())[first : None if layer == -1 else layer]


class PackedLinear(nn.Linear):
    """
    A linear layer of the encoder. On a CPU, `nn.Linear` rearranges its bfloat16 weights for the processor's matrix unit
    at every call. Without gradients, this layer does so once, until the weights change, with the operators that
    `torch.compile` uses. It keeps a second copy of the weights in memory.

    PyTorch counts the changes of a tensor, but not those through `weight.data`. These are detected by comparing weights
    of every row and column. A change of a single weight may go unnoticed, so use `torch.no_grad()` instead.
    """

    _packed = None
    # The weights that were packed, their version, and some of their values. Holding the weights prevents that others
    # get their address.
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
            not torch.compiler.is_compiling()  # the compiler packs by itself
            and rows.device.type == self.weight.device.type == "cpu"
            and rows.dtype == self.weight.dtype == torch.bfloat16
            and not (torch.is_grad_enabled() and rows.requires_grad)
            # In training, weights change at each step; inference tensors do not count their changes.
            and not (torch.is_grad_enabled() and self.weight.requires_grad)
            and not self.weight.is_inference()
            and _has_packed_linear()
        )

    def _has_new_weight(self, sample):
        return (
            self._packed_from.data_ptr() != self.weight.data_ptr()
            or self._packed_version != self.weight._version
            or not torch.equal(self._packed_sample, sample)
        )

    def _sample(self):
        """The weights on diagonals that cross every row and column."""
        return self.weight.detach().take(_diagonals(*self.weight.shape))

    def __getstate__(self):
        """Copies do not share the packed weights, but pack their own."""
        return {**self.__dict__, "_packed": None, "_packed_from": None, "_packed_sample": None}


@cache
def _diagonals(rows, columns):
    """Positions in a flattened (rows, columns) matrix, int64."""
    index = torch.arange(max(rows, columns))
    return index % rows * columns + index % columns


@cache
def _has_packed_linear():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
