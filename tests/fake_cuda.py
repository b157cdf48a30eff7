"""A fake CUDA device: fake tensors, which know the device of each result."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class FakeCuda(FakeTensorMode):
    """
    PyTorch's fake tensors have a shape, a dtype and a device, and operators refuse those on different devices as they
    do on a GPU. These have a value, too, which is computed on the CPU where it has the operator, so that code which
    asks for a length or compares masks takes its usual way. What depends on other values gets NaN.
    """

    is_inside = False  # for an operator that consists of others

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_inside:
            return super().dispatch(func, types, args, kwargs)
        values = _on_values(func, args, kwargs)
        self.is_inside = True
        try:
            fakes = super().dispatch(func, types, args, kwargs)
        except DataDependentOutputException:  # a number, or whether two tensors are the same
            return torch.nan if values is None else values
        finally:
            self.is_inside = False
        own = _tensors(fakes)
        for fake, value in zip(own, _tensors(values) or [None] * len(own), strict=True):
            fake.value = value
        return fakes


class _UnknownValueError(Exception):
    pass


def _on_values(func, args, kwargs):
    try:
        args, kwargs = tree_map_only(FakeTensor, _value, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
        return func(*args, **kwargs)
    except (_UnknownValueError, NotImplementedError):
        return None


def _value(tensor):
    if getattr(tensor, "value", None) is None:
        raise _UnknownValueError
    return tensor.value


def _tensors(outputs):
    return [output for output in tree_leaves(outputs) if isinstance(output, torch.Tensor)]


@contextmanager
def fake_cuda():
    """
    Within it, tensors and modules can be on `CUDA`, and nothing is computed there. What asks for a real GPU is
    replaced: cuDNN, whose LSTM asks the driver (PyTorch's own LSTM takes its place), the backward pass, generators of
    random numbers, pinned memory, and the check of autocast.
    """
    plain_to, plain_numpy = torch.nn.Module.to, torch.Tensor.numpy

    def to(module, *args, **kwargs):
        """Fake parameters cannot be moved; those that are there already need not be."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None and all(parameter.device.type == device.type for parameter in module.parameters()):
            return module
        return plain_to(module, *args, **kwargs)

    def numpy(tensor, **kwargs):
        if tensor.device.type == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if isinstance(tensor, FakeTensor):
            if getattr(tensor, "value", None) is None:
                return np.full(tensor.shape, np.nan, dtype=np.float32)
            tensor = tensor.value
        with _disable_current_modes():
            return plain_numpy(tensor, **kwargs)

    def backward(loss):
        """Gradients of zeros for all that the loss was made of: PyTorch's autograd asks for streams of the GPU."""
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += [function for function, _ in node.next_functions if function is not None]
                if hasattr(node, "variable"):
                    node.variable.grad = torch.zeros_like(node.variable)

    with ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", to))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", numpy))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device: torch._C.Generator("cpu")))
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(mock.patch.object(torch.cuda, "device", lambda device: nullcontext()))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        yield stack.enter_context(FakeCuda(allow_non_fake_inputs=True))


def convert(module, dtype):
    """What `module.to(dtype)` does, which cannot change fake parameters in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                part.register_buffer(name, buffer.to(dtype))
