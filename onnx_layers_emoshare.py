"""Layers in forms that ONNX supports: convolutions over frames as matrix products, and ONNX's own LSTM."""

import torch
from torch import nn


def seen_by_kernel(frames, taps):
    """The inputs of a convolution's kernel: (batch, frames, channels) -> (batch, frames out, taps * channels)."""
    frames_out = frames.shape[1] - taps + 1
    return torch.cat([frames[:, tap : tap + frames_out] for tap in range(taps)], dim=-1)


def kernel_matrix(convolution):
    """The weight of a Conv1d without groups, to multiply `seen_by_kernel` with: (taps * channels in, channels out)."""
    return convolution.weight.detach().permute(2, 1, 0).flatten(0, 1)


class OnnxLSTM(nn.Module):
    """A one-layer `nn.LSTM` as ONNX's operator, which orders the gates differently."""

    def __init__(self, lstm):
        super().__init__()
        self.hidden_size = lstm.hidden_size
        self.register_buffer("input_weight", _in_onnx_order(lstm.weight_ih_l0))
        self.register_buffer("state_weight", _in_onnx_order(lstm.weight_hh_l0))
        biases = _in_onnx_order(lstm.bias_ih_l0), _in_onnx_order(lstm.bias_hh_l0)
        self.register_buffer("bias", torch.cat(biases, dim=1))

    def forward(self, steps):
        """(batch, steps, channels) -> (batch, steps, hidden size), and `None` instead of the last states."""
        inputs = steps.transpose(0, 1)  # (steps, batch, channels)
        states = torch.onnx.ops.symbolic(
            "LSTM",
            (inputs, self.input_weight, self.state_weight, self.bias),
            attrs={"hidden_size": self.hidden_size},
            dtype=inputs.dtype,
            shape=(inputs.shape[0], 1, inputs.shape[1], self.hidden_size),  # one direction
        )
        return states[:, 0].transpose(0, 1), None


def _in_onnx_order(weight):
    """Reorders gates from PyTorch's order to ONNX's, and adds a first dimension for the one direction."""
    input_gate, forget_gate, cell_gate, output_gate = weight.detach().chunk(4)
    return torch.cat([input_gate, output_gate, forget_gate, cell_gate])[None]
