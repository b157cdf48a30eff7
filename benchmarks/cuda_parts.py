"""
Where the time of a backbone goes on a GPU, and what other ways of computing its parts would take: they decide what
wav2vec2_emoshare does there. bfloat16, random weights, HuBERT Base and Large.

    python benchmarks/cuda_parts.py            # about a minute
    python benchmarks/cuda_parts.py --small    # tiny sizes, to try the script itself on any machine
"""

import sys
import traceback
from functools import partial

import torch
from cuda import BASE, LARGE, RATE, TINY
from inference import encoder_operations, front_end_counts
from machine import DEVICE, copy_rate, describe, matmul_rate, seconds_of
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel

from emoshare.wav2vec2_emoshare import Wav2Vec2Family, _activate, _convolution, _first_convolution, with_group_norm

SMALL = "--small" in sys.argv
SECONDS, BATCH, RUNS = (1.0, 2, 1) if SMALL else (4.0, 32, 10)
DTYPE = torch.bfloat16


@torch.inference_mode()
def main():
    print(describe())
    flops, bandwidth = matmul_rate(DTYPE, 256 if SMALL else 8192), copy_rate(8 if SMALL else 2048)
    print(f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    for name, fields in {"Base": BASE, "Large": LARGE}.items():
        config = AutoConfig.for_model("hubert", **({**fields, **TINY} if SMALL else fields))
        waveforms = torch.randn(BATCH, round(SECONDS * RATE), device=DEVICE, dtype=DTYPE)
        operations, values, frames = front_end_counts(config, waveforms.shape[1])
        print(
            f"\n{name}, {BATCH} clips of {SECONDS} s. Front end: at least {1e3 * BATCH * operations / flops:.3f} ms of "
            f"products, {1e3 * BATCH * 2 * values / bandwidth:.3f} ms of traffic; encoder: at least "
            f"{1e3 * BATCH * encoder_operations(config, frames) / flops:.3f} ms of products\n"
        )
        print("| | ms | relative error |")
        print("|---|---|---|")
        stock = AutoModel.from_config(config).eval().to(DEVICE, DTYPE)
        backbone = AutoModel.from_config(config).eval().to(DEVICE, DTYPE)
        backbone.load_state_dict(stock.state_dict())
        Wav2Vec2Family().prepare(backbone)
        frames = print_front_ends(backbone.feature_extractor, stock.feature_extractor, waveforms)
        hidden = torch.randn(BATCH, frames, config.hidden_size, device=DEVICE, dtype=DTYPE)
        print_positions(backbone.encoder.pos_conv_embed.conv, hidden)
        print_row("layers of the encoder", partial(run_layers, backbone, hidden))
        print_row("encoder", lambda: backbone.encoder(hidden).last_hidden_state)  # noqa: B023
        lengths = torch.full((BATCH,), waveforms.shape[1], device=DEVICE)
        ours = partial(Wav2Vec2Family().hidden_states, backbone, waveforms, lengths, [-1])
        print_row("whole, ours", lambda: ours()[-1])  # noqa: B023
        print_row("whole, stock", lambda: stock(waveforms).last_hidden_state)  # noqa: B023
        print_profile(ours)


def print_row(name, function, expected=None):
    try:
        result = function()
        error = ""
        if expected is not None:
            frames = min(result.shape[1], expected.shape[1])
            difference = (result[:, :frames].float() - expected[:, :frames].float()).norm()
            error = f"{difference / expected[:, :frames].float().norm():.1e}"
        print(f"| {name} | {1000 * seconds_of(function, runs=RUNS):.3f} | {error} |", flush=True)
    except Exception:  # noqa: BLE001 - the next row says something too
        print(f"| {name} | {traceback.format_exc(limit=-1)} | |", flush=True)


def print_front_ends(front, stock, waveforms):
    """Returns the number of frames."""
    lengths = torch.full((BATCH,), waveforms.shape[1], device=DEVICE)
    given = (front, waveforms, lengths, front.weights())
    expected = stock.float()(waveforms.float()).transpose(1, 2)
    stock.to(DTYPE)
    print_row("front end, stock", lambda: stock(waveforms).transpose(1, 2), expected)
    print_row("front end, now", lambda: front(waveforms).transpose(1, 2), expected)
    print_row("front end, flat", partial(flat, *given), expected)
    print_row("front end, flat, 16 taps", partial(flat, *given, first=aligned_first), expected)
    print_row("front end, cuDNN channels last", partial(channels_last, *given), expected)
    print_row("front end, cuDNN channels last, 16 taps", partial(channels_last, *given, first=aligned_first), expected)
    given = (front.conv_layers[0], waveforms, lengths, front.weights()[0])
    print_row("first layer", partial(_first_convolution, *given))
    print_row("first layer, 16 taps", partial(aligned_first, *given))
    maps = _first_convolution(*given)
    print_row("GELU of the first map", lambda: torch.ops.aten.gelu_(maps))
    return expected.shape[1]


def flat(front, waveforms, lengths, weights, first=_first_convolution):
    """All clips of a batch as one sequence of frames, so that every matrix is a view."""
    hop = 1
    for layer in front.conv_layers:
        hop *= layer.conv.stride[0]
    layer, *others = front.conv_layers
    batch, samples = waveforms.shape
    frames = -(-samples // hop)
    extra = layer.conv.kernel_size[0] - layer.conv.stride[0]
    waveforms = nn.functional.pad(waveforms, (0, frames * hop + extra - samples))
    maps = first(layer, waveforms, lengths, weights[0]).flatten(0, 1)[None]
    for layer, weight in zip(others, weights[1:], strict=True):
        maps = _convolution(layer.conv, maps, weight)
        if hasattr(layer, "layer_norm"):
            maps = layer.layer_norm(maps)
        maps = _activate(layer.activation, maps)
    maps = nn.functional.pad(maps[0], (0, 0, 0, batch * frames - maps.shape[1]))
    return maps.unflatten(0, (batch, frames))


def aligned_first(layer, waveforms, lengths, weight):
    """As `_first_convolution`, with 16 taps."""
    kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    windows = waveforms.unfold(1, kernel, stride)
    has_group_norm = isinstance(layer.layer_norm, nn.GroupNorm)
    if has_group_norm:
        own = (lengths - kernel) // stride + 1
        weight, bias = with_group_norm(weight, layer.layer_norm, windows, own)
    else:
        bias = weight.new_zeros(len(weight)) if layer.conv.bias is None else layer.conv.bias
    taps = torch.cat([weight, bias[..., None]], dim=-1).to(waveforms.dtype)
    missing = 16 - taps.shape[-1]
    taps = nn.functional.pad(taps, (0, missing))
    windows = torch.cat([windows, windows.new_ones(*windows.shape[:2], 1 + missing)], dim=-1)
    maps = windows @ taps.mT
    return _activate(layer.activation, maps if has_group_norm else layer.layer_norm(maps))


def channels_last(front, waveforms, lengths, weights, first=_first_convolution):
    """The further layers by cuDNN, (batch, channels, 1, frames) with the channels next to each other."""
    layer, *others = front.conv_layers
    maps = first(layer, waveforms, lengths, weights[0])
    for layer in others:
        images = maps.transpose(1, 2)[:, :, None]
        weight = layer.conv.weight[:, :, None].to(memory_format=torch.channels_last)
        maps = nn.functional.conv2d(images, weight, layer.conv.bias, stride=(1, layer.conv.stride[0]))
        maps = maps[:, :, 0].transpose(1, 2)
        if hasattr(layer, "layer_norm"):
            maps = layer.layer_norm(maps)
        maps = _activate(layer.activation, maps)
    return maps


def print_positions(conv, hidden):
    padding = {"padding": conv.padding, "groups": conv.groups}
    expected = nn.functional.conv1d(hidden.float().transpose(1, 2), conv.weight.float(), conv.bias.float(), **padding)
    expected = expected.transpose(1, 2)
    print_row("positional convolution, now", lambda: conv(hidden.transpose(1, 2)).transpose(1, 2), expected)
    print_row("positional convolution, products", lambda: positions_by_products(conv, hidden), expected)
    weight = conv.weight[:, :, None].to(memory_format=torch.channels_last)
    padding["padding"] = (0, conv.padding[0])

    def by_images():
        return nn.functional.conv2d(hidden.transpose(1, 2)[:, :, None], weight, conv.bias, **padding)

    print_row("positional convolution, channels last", lambda: by_images()[:, :, 0].transpose(1, 2), expected)


def positions_by_products(conv, frames):
    """As batched matrix products: every `kernel`-th window is a row of a view."""
    batch, length, width = frames.shape
    kernel, groups, pad = conv.kernel_size[0], conv.groups, conv.padding[0]
    own = width // groups
    stride = (-(-(length + 2 * pad) // kernel) + 1) * kernel  # frames from clip to clip, zeros between them
    padded = nn.functional.pad(frames, (0, 0, pad, stride - length - pad))
    padded = padded.reshape(batch * stride, groups, own).transpose(0, 1)  # (groups, frames, own)
    padded = nn.functional.pad(padded, (0, 0, 0, kernel)).contiguous()
    rows = batch * stride // kernel
    weight = conv.weight.unflatten(0, (groups, own)).permute(0, 3, 2, 1).reshape(groups, kernel * own, own)
    outputs = []
    for of_group, weight_of_group in zip(padded, weight, strict=True):
        windows = of_group.as_strided((kernel, rows, kernel * own), (own, kernel * own, 1), of_group.storage_offset())
        outputs.append(torch.bmm(windows, weight_of_group.expand(kernel, -1, -1)))
    outputs = torch.stack(outputs, dim=2).transpose(0, 1).reshape(batch, stride, width)
    return outputs[:, : length + 2 * pad - kernel + 1] + conv.bias


def run_layers(backbone, hidden):
    for layer in backbone.encoder.layers:
        hidden = layer(hidden)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
    return hidden


def print_profile(run):
    """Where the GPU's time goes, by kernel."""
    if DEVICE.type != "cuda":
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:16]:
        print(f"    {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d}x {event.key[:110]}")


if __name__ == "__main__":
    main()
