"""The layers of an encoder of Transformers: only those that are needed run, and their linear layers are fast."""

import copy
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import islice

import torch
from torch import nn

# Layers of the encoder that are being run; None for all. It reaches modules deep inside a model of Transformers, whose
# `forward` has no argument for it.
_num_layers = ContextVar("num_layers", default=None)


@contextmanager
def running(layers):
    """While it is open, `EncoderLayers` are only those that these hidden states need."""
    token = _num_layers.set(_layers_to_run(layers))
    try:
        yield
    finally:
        _num_layers.reset(token)


def cut_encoder(backbone, layer):
    """A view of a backbone, as `BackboneFamily.cut` gives it, without layers of `backbone.encoder`."""
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
    at every call; without gradients, this one does it once, as long as the weights are unchanged, with the operators
    that `torch.compile` uses for it. It keeps a second copy of them in memory.

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
            # Weights change at each step of training, and inference tensors do not count their changes.
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
