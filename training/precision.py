"""The precision of training and evaluation: bfloat16 if the device supports it, otherwise float32."""

import os
from functools import cache

import torch


def training_dtype(requested, device):
    """
    The dtype in which heads train. Weights, predictions and scores are float32 in any case.

    Args:
        requested: `--mixed_precision`: `"auto"`, `"bf16"` or `"no"`. `"auto"` follows `accelerate launch
            --mixed_precision bf16`, and otherwise chooses bfloat16 if the device can train in it.
        device: `torch.device`.

    Returns:
        `torch.bfloat16` or `torch.float32`.

    Raises:
        ValueError: if bfloat16 was requested, by flag or launcher, and the device cannot train in it.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested == "auto" and launched not in ("no", "bf16"):
        raise ValueError(f"accelerate launch --mixed_precision {launched}: heads train in float32 or bf16")
    is_possible = can_train_in_bfloat16(device)
    if requested == "bf16" or (requested == "auto" and launched == "bf16"):
        if not is_possible:
            flag = "--mixed_precision bf16" if requested == "bf16" else "accelerate launch --mixed_precision bf16"
            raise ValueError(
                f"{flag}: this device ({device.type}) cannot train in bfloat16; --mixed_precision auto takes it only "
                "where it is possible"
            )
        return torch.bfloat16
    return torch.bfloat16 if requested == "auto" and is_possible else torch.float32


def can_train_in_bfloat16(device):
    """Whether a device has bfloat16 arithmetic, and every operator of a head computes in it."""
    if device.type == "cpu":
        return has_bfloat16(device) and _cpu_trains_lstm_in_bfloat16()
    return device.type == "cuda" and has_bfloat16(device)


def has_bfloat16(device):
    """Whether a CPU or an NVIDIA GPU has instructions for bfloat16; true for other devices, without a check."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def set_precision_of_evaluation(model):
    """
    For the rest of the process, a GPU computes in float32 instead of TF32, so that shares are those of a CPU; and a
    backbone that was saved in bfloat16 runs in float32 if the device has no instructions for bfloat16, which it would
    emulate, and more slowly.

    Args:
        model: `EmoShareModel`, on its device.
    """
    keep_float32()
    if model.backbone is not None and model.backbone.dtype == torch.bfloat16 and not has_bfloat16(model.device):
        model.backbone.float()


def keep_float32():
    """For the rest of the process, convolutions and LSTMs in float32 are not computed in TF32."""
    torch.backends.cudnn.allow_tf32 = False


@cache
def _cpu_trains_lstm_in_bfloat16():
    """
    Tries it out. oneDNN does not have a bfloat16 LSTM for every CPU, and ONEDNN_MAX_CPU_ISA can disable it on any. Then
    it raises RuntimeError ("could not create a primitive descriptor for the LSTM forward propagation primitive").
    """
    lstm, steps = torch.nn.LSTM(2, 2, batch_first=True), torch.zeros(1, 2, 2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = lstm(steps)
        states.sum().backward()
    except RuntimeError:
        return False
    return True
