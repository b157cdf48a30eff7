"""
Where the time of a backbone goes on a GPU, and what other ways of computing its parts would take. Scratch: decides what
wav2vec2_emoshare does there.

    python benchmarks/cuda_parts.py [--small]
"""

import sys
import traceback
from functools import partial

import torch
from cuda import BASE, LARGE, RATE, TINY
from inference import encoder_operations, front_end_counts
from machine import DEVICE, copy_rate, describe, matmul_rate, seconds_of
from torch import nn
from transformers import AutoConfig, AutoModel

from emoshare.wav2vec2_emoshare import Wav2Vec2Family, _activate, _convolution, _first_convolution

SMALL = "--small" in sys.argv
SECONDS, BATCH, RUNS = (1.0, 2, 1) if SMALL else (4.0, 32, 10)
DTYPE = torch.bfloat16


def flat(front, waveforms, lengths, weights, align=False):
    """All clips of a batch as one sequence of frames, so that every matrix is a view."""
    hop = 1
    for layer in front.conv_layers:
        hop *= layer.conv.stride[0]
    first, *others = front.conv_layers
    batch, samples = waveforms.shape
    padded = -(-samples // hop) * hop
    frames = padded // hop
    extra = first.conv.kernel_size[0] - first.conv.stride[0]
    waveforms = nn.functional.pad(waveforms, (0, padded + extra - samples))
    maps = (
        _first_convolution(first, waveforms, lengths, weights[0])
        if not align
        else aligned_first(first, waveforms, lengths, weights[0])
    )
    maps = maps.flatten(0, 1)[None]
    for layer, weight in zip(others, weights[1:], strict=True):
        maps = _convolution(layer.conv, maps, weight)
        if hasattr(layer, "layer_norm"):
            maps = layer.layer_norm(maps)
        maps = _activate(layer.activation, maps)
    maps = nn.functional.pad(maps[0], (0, 0, 0, batch * frames - maps.shape[1]))
    return maps.unflatten(0, (batch, frames))


def aligned_first(layer, waveforms, lengths, weight):
    """As `_first_convolution`, with 16 taps."""
    from emoshare.wav2vec2_emoshare import with_group_norm

    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    windows = waveforms.unfold(1, kernel, stride)
    has_group_norm = isinstance(layer.layer_norm, nn.GroupNorm)
    if has_group_norm:
        own = (lengths - kernel) // stride + 1
        weight, bias = with_group_norm(weight, layer.layer_norm, windows, own)
    else:
        bias = weight.new_zeros(len(weight)) if layer.conv.bias is None else layer.conv.bias
    taps = torch.cat([weight, bias[..., None]], dim=-1).to(waveforms.dtype)
    taps = nn.functional.pad(taps, (0, 16 - taps.shape[-1]))
    ones = windows.new_ones(*windows.shape[:2], 1)
    windows = torch.cat([windows, ones, windows.new_zeros(*windows.shape[:2], 5)], dim=-1)
    maps = windows @ taps.mT
    return _activate(layer.activation, maps if has_group_norm else layer.layer_norm(maps))


def channels_last(front, waveforms, lengths, weights):
    """The further layers by cuDNN, (batch, channels, 1, frames) with the channels next to each other."""
    first, *others = front.conv_layers
    maps = _first_convolution(first, waveforms, lengths, weights[0])
    for layer in others:
        images = maps.transpose(1, 2)[:, :, None]
        weight = layer.conv.weight[:, :, None].to(memory_format=torch.channels_last)
        maps = nn.functional.conv2d(images, weight, layer.conv.bias, stride=(1, layer.conv.stride[0]))
        maps = maps[:, :, 0].transpose(1, 2)
        if hasattr(layer, "layer_norm"):
            maps = layer.layer_norm(maps)
        maps = _activate(layer.activation, maps)
    return maps


def flat_channels_last(front, waveforms, lengths, weights):
    """cuDNN on one long image."""
    first, *others = front.conv_layers
    maps = _first_convolution(first, waveforms, lengths, weights[0])
    batch, frames, _ = maps.shape
    maps = maps.flatten(0, 1)[None]
    for layer in others:
        images = maps.transpose(1, 2)[:, :, None]
        weight = layer.conv.weight[:, :, None].to(memory_format=torch.channels_last)
        maps = nn.functional.conv2d(images, weight, layer.conv.bias, stride=(1, layer.conv.stride[0]))
        maps = maps[:, :, 0].transpose(1, 2)
        if hasattr(layer, "layer_norm"):
            maps = layer.layer_norm(maps)
        maps = _activate(layer.activation, maps)
    return maps


def positions_by_products(conv, frames):
    """The positional convolution as batched matrix products: every `kernel`-th window is a row of a view."""
    batch, length, width = frames.shape
    kernel, groups = conv.kernel_size[0], conv.groups
    own = width // groups
    pad = conv.padding[0]
    blocks = -(-(length + 2 * pad) // kernel)
    # One long sequence: clips at a distance of blocks * kernel frames, zeros between them.
    padded = nn.functional.pad(frames, (0, 0, pad, (blocks + 1) * kernel - length - pad))
    stride = (blocks + 1) * kernel
    x = padded.reshape(batch * stride, groups, own).transpose(0, 1).contiguous()  # (groups, frames, own)
    x = nn.functional.pad(x, (0, 0, 0, kernel))
    rows = batch * stride // kernel
    weight = conv.weight.unflatten(0, (groups, own)).permute(0, 3, 2, 1).reshape(groups, kernel * own, own)
    out = []
    for group in range(groups):
        a = x[group].as_strided((kernel, rows, kernel * own), (own, kernel * own, 1), x[group].storage_offset())
        out.append(
            torch.matmul(a, weight[group]) if a.is_contiguous() else torch.bmm(a, weight[group].expand(kernel, -1, -1))
        )
    out = torch.stack(out, dim=2)  # (phase, rows, groups, own)
    out = out.transpose(0, 1).reshape(batch, stride, width)[:, : length + 2 * pad - kernel + 1]
    return out + conv.bias


def print_row(name, function, expected=None):
    try:
        result = function()
        error = ""
        if expected is not None:
            frames = min(result.shape[1], expected.shape[1])
            difference = (result[:, :frames].float() - expected[:, :frames].float()).norm()
            error = f"{difference / expected[:, :frames].float().norm():.1e}"
        print(f"| {name} | {1000 * seconds_of(function, runs=RUNS):.3f} ms | {error} |", flush=True)
    except Exception as error:
        print(f"| {name} | {traceback.format_exc(limit=-2)} | |", flush=True)


@torch.inference_mode()
def main():
    print(describe())
    size = 256 if SMALL else 8192
    flops, bandwidth = matmul_rate(DTYPE, size), copy_rate(8 if SMALL else 2048)
    print(f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    for name, fields in {"base": BASE, "large": LARGE}.items():
        fields = {**fields, **TINY} if SMALL else fields
        config = AutoConfig.for_model("hubert", **fields)
        backbone = AutoModel.from_config(config).eval().to(DEVICE, DTYPE)
        stock = AutoModel.from_config(config).eval().to(DEVICE, DTYPE)
        stock.load_state_dict(backbone.state_dict())
        family = Wav2Vec2Family()
        family.prepare(backbone)
        waveforms = torch.randn(BATCH, round(SECONDS * RATE), device=DEVICE, dtype=DTYPE)
        lengths = torch.full((BATCH,), waveforms.shape[1], device=DEVICE)
        front = backbone.feature_extractor
        weights = front.weights()
        operations, values, frames = front_end_counts(config, waveforms.shape[1])
        print(
            f"\n{name}: {BATCH} clips of {SECONDS} s; front end at least {1000 * BATCH * operations / flops:.3f} ms of products, "
            f"{1000 * BATCH * 2 * values / bandwidth:.3f} ms of traffic; encoder {1000 * BATCH * encoder_operations(config, frames) / flops:.3f} ms\n"
        )
        print("| | time | relative error |")
        print("|---|---|---|")
        expected = stock.feature_extractor.float()(waveforms.float()).transpose(1, 2)
        stock.feature_extractor.to(DTYPE)
        print_row("front end, now", lambda: front(waveforms).transpose(1, 2), expected)
        print_row("front end, stock", lambda: stock.feature_extractor(waveforms).transpose(1, 2), expected)
        print_row("front end, flat", lambda: flat(front, waveforms, lengths, weights), expected)
        print_row("front end, flat, 16 taps", lambda: flat(front, waveforms, lengths, weights, True), expected)
        print_row("front end, cuDNN channels last", lambda: channels_last(front, waveforms, lengths, weights), expected)
        print_row(
            "front end, cuDNN channels last, flat", lambda: flat_channels_last(front, waveforms, lengths, weights)
        )
        print_row("first layer", lambda: _first_convolution(front.conv_layers[0], waveforms, lengths, weights[0]))
        print_row("first layer, 16 taps", lambda: aligned_first(front.conv_layers[0], waveforms, lengths, weights[0]))
        maps = _first_convolution(front.conv_layers[0], waveforms, lengths, weights[0])
        print_row("GELU of the first map", lambda: torch.ops.aten.gelu_(maps))
        frames = torch.randn(BATCH, expected.shape[1], config.hidden_size, device=DEVICE, dtype=DTYPE)
        conv = backbone.encoder.pos_conv_embed.conv
        reference = nn.functional.conv1d(
            frames.float().transpose(1, 2),
            conv.weight.float(),
            conv.bias.float(),
            padding=conv.padding,
            groups=conv.groups,
        ).transpose(1, 2)
        print_row("positional convolution, now", lambda: conv(frames.transpose(1, 2)).transpose(1, 2), reference)
        print_row("positional convolution, products", lambda: positions_by_products(conv, frames), reference)
        weight = conv.weight[:, :, None].to(memory_format=torch.channels_last)
        print_row(
            "positional convolution, channels last",
            lambda: nn.functional.conv2d(
                frames.transpose(1, 2)[:, :, None], weight, conv.bias, padding=(0, conv.padding[0]), groups=conv.groups
            )[:, :, 0].transpose(1, 2),
            reference,
        )
        layer = list(backbone.encoder.layers)[0]

        def layers(hidden=frames, backbone=backbone):
            for layer in backbone.encoder.layers:
                hidden = layer(hidden)
                hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
            return hidden

        print_row("layers of the encoder", layers)
        print_row("encoder", lambda: backbone.encoder(frames).last_hidden_state)
        print_row("whole, ours", lambda: family.hidden_states(backbone, waveforms, lengths, [-1])[-1])
        print_row("whole, stock", lambda: stock(waveforms).last_hidden_state)
        if not SMALL:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                family.hidden_states(backbone, waveforms, lengths, [-1])
                torch.cuda.synchronize()
            print(
                profiled.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60)[-4500:]
            )


if __name__ == "__main__":
    main()
