"""
Speed of the emotion-share pipeline, against Transformers' own pipeline and the machine's limits.

    python benchmarks/inference.py

HuBERT Base in its published size with random weights, 32 synthetic clips of 1 to 8 s. The peer is the stock
`pipeline("audio-classification")` with `HubertForSequenceClassification`, whose head is two linear layers. EmoShare has
nine small heads instead (sizes as in configs/demo.yaml), and in the rows "released sizes" nine heads of the paper's
sizes. Each pipeline runs at its own best batch size. They take turns, for several rounds; a ratio is the median over
the rounds. Then come the times for several values of `batch_size` (best of the rounds), and those of a model that reads
a middle layer. The real-time factor (RTF) is seconds of computing per second of audio. The limit is the counted
arithmetic at the rate of a large matrix product, and the memory traffic of the front end at the rate of a copy, both
measured in this run.
"""

import copy
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from corpus import voices
from machine import DEVICE, copy_rate, describe, matmul_rate, seconds_of
from scipy.stats import spearmanr
from transformers import AutoConfig, HubertForSequenceClassification, Wav2Vec2FeatureExtractor, pipeline

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline

CLIPS = 32
SECONDS = (1.0, 8.0)
LATENCY_SECONDS = 4.0
BATCH_SIZES = (1, 4, 8)
ASKED = (1, 4, 8, 32)
CUT_LAYER = 9
ROUNDS, LATENCY_ROUNDS = 5, 15
DEMO_HEAD = {"conv_channels": (32, 32, 32), "lstm_hidden_size": 32, "ffn_sizes": (32,)}
DTYPES = (torch.float32, torch.bfloat16)


def main():
    torch.manual_seed(0)
    print(describe())

    backbone_config = AutoConfig.for_model("hubert", mask_time_prob=0.0, num_labels=len(EMOTIONS))
    peer = HubertForSequenceClassification(backbone_config).eval()
    model = emoshare_model(backbone_config, peer.hubert, **DEMO_HEAD)
    released = emoshare_model(backbone_config, peer.hubert)
    clips = voices(np.random.default_rng(0).uniform(*SECONDS, size=CLIPS))
    seconds = sum(len(clip) for clip in clips) / 16000
    (clip,) = voices([LATENCY_SECONDS])
    print(f"{CLIPS} clips, {seconds:.0f} s in all\n")

    pipelines = {
        f"{kind} {dtype}".replace("torch.", ""): make(network, dtype)
        for dtype in DTYPES
        for kind, make, network in (
            ("stock", stock_pipeline, peer),
            ("EmoShare", our_pipeline, model),
            ("released sizes", our_pipeline, released),
        )
    }
    report(f"{CLIPS} clips", best_times(pipelines, clips), seconds)
    report(f"one clip of {LATENCY_SECONDS:.0f} s", latencies(pipelines, clip), LATENCY_SECONDS)
    print_batch_sizes({name: pipe for name, pipe in pipelines.items() if "stock" not in name}, clips)
    print_cut(model, clips)
    for dtype in DTYPES:
        print_limits(model.config, released.config, dtype, clips)
    print()
    print_accuracy(peer.hubert, model, clips)


def emoshare_model(backbone_config, backbone, **head):
    model = EmoShareModel(EmoShareConfig(backbone_config=copy.deepcopy(backbone_config), **head)).eval()
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def stock_pipeline(peer, dtype):
    model = copy.deepcopy(peer).to(dtype)
    return pipeline(
        "audio-classification", model=model, feature_extractor=Wav2Vec2FeatureExtractor(), dtype=dtype, device=DEVICE
    )


def our_pipeline(model, dtype):
    model = copy.deepcopy(model)
    model.backbone.to(dtype)  # like `from_pretrained(dtype=...)`: the heads' weights stay in float32
    return EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor(), device=DEVICE)


def best_times(pipelines, clips):
    """Times of each pipeline in each round, over all clips, at its best batch size, and that size."""
    batch_sizes = {}
    for name, pipe in pipelines.items():
        pipe(clips[:2])  # warm-up
        times = {size: seconds_of(lambda: pipe(clips, batch_size=size)) for size in BATCH_SIZES}  # noqa: B023
        batch_sizes[name] = min(times, key=times.get)
    return interleaved(
        {name: partial(pipe, clips, batch_size=batch_sizes[name]) for name, pipe in pipelines.items()}, ROUNDS
    ), batch_sizes


def latencies(pipelines, clip):
    """Like `best_times`, for one clip on its own."""
    runs = {name: partial(pipe, clip) for name, pipe in pipelines.items()}
    return interleaved(runs, LATENCY_ROUNDS), dict.fromkeys(pipelines, 1)


def interleaved(runs, rounds):
    """
    The seconds of each run in each round: (rounds,) for each name. The runs take turns, so that other load on the
    machine affects all of them.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    return {name: np.array(own) for name, own in times.items()}


def print_batch_sizes(pipelines, clips):
    """Prints the time for each value of `batch_size`, relative to the fastest."""
    print(f"| {len(clips)} clips, time against the fastest | {' | '.join(f'batch_size={n}' for n in ASKED)} |")
    print(f"|---|{'---|' * len(ASKED)}")
    for name, pipe in pipelines.items():
        times = interleaved({size: partial(pipe, clips, batch_size=size) for size in ASKED}, ROUNDS)
        least = {size: own.min() for size, own in times.items()}
        columns = [f"{seconds / min(least.values()):.2f}x" for seconds in least.values()]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)
    print()


def print_cut(model, clips):
    """Saves, loads and runs a model that reads a middle layer; its repository has no layers above that."""
    print(f"| reads | on disk | loading | {len(clips)} clips |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for layer in (model.config.backbone_config.num_hidden_layers, CUT_LAYER):
            saved, path = copy.deepcopy(model), Path(folder) / str(layer)
            saved.config.backbone_layer = layer
            saved.save_pretrained(path)
            loading = seconds_of(partial(EmoShareModel.from_pretrained, path), runs=3)
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            pipes[layer] = our_pipeline(EmoShareModel.from_pretrained(path).eval(), torch.float32)
            pipes[layer](clips[:2])  # warm-up
            pipes[layer] = (f"layer {layer} | {size / 1e6:.0f} MB | {loading:.2f} s", pipes[layer])
        times = interleaved({name: partial(pipe, clips, batch_size=8) for name, pipe in pipes.values()}, ROUNDS)
        for name, own in times.items():
            print(f"| {name} | {np.median(own):.2f} s |", flush=True)
    print()


def report(title, measured, seconds):
    """Prints a row for each pipeline; ratios are medians over the rounds, with minimum and maximum."""
    times, batch_sizes = measured
    print(f"| {title} | median | RTF | batch size | against stock float32 | against stock, same dtype |")
    print("|---|---|---|---|---|---|")
    for name, own in times.items():
        peers = ("stock float32", f"stock {name.split()[-1]}")
        ratios = [
            f"{np.median(r):.2f}x ({r.min():.2f} to {r.max():.2f})" for r in (times[peer] / own for peer in peers)
        ]
        median = np.median(own)
        print(f"| {name} | {median:.3f} s | {median / seconds:.4f} | {batch_sizes[name]} | {ratios[0]} | {ratios[1]} |")
    print(flush=True)


def print_limits(demo, released, dtype, clips):
    """Prints the counted arithmetic and memory traffic of all clips, and the machine's lower limit for their time."""
    seconds = sum(len(clip) for clip in clips) / 16000
    flops, memory = matmul_rate(dtype), copy_rate()
    heads = {"demo": demo, "released": released}
    counted = dict.fromkeys(("front end", "encoder"), 0)
    counted |= {f"nine {sizes} heads' {part}": 0 for sizes in heads for part in ("convolutions", "LSTMs")}
    traffic = 0
    for clip in clips:
        operations, values, frames = front_end_counts(demo.backbone_config, len(clip))
        counted["front end"] += operations
        traffic += values * dtype.itemsize
        counted["encoder"] += encoder_operations(demo.backbone_config, frames)
        for sizes, config in heads.items():
            convolutions, lstms = head_operations(config, frames)
            counted[f"nine {sizes} heads' convolutions"] += convolutions
            counted[f"nine {sizes} heads' LSTMs"] += lstms
    # The LSTMs run in float32, whatever the backbone's dtype.
    float32_flops = matmul_rate(torch.float32)
    rates = {name: float32_flops if "LSTMs" in name else flops for name in counted}
    parts = ", ".join(
        f"{name} {count / 1e9:.0f} GFLOP = {count / rates[name]:.3f} s" for name, count in counted.items()
    )
    least = sum(count / rates[name] for name, count in counted.items() if "released" not in name)
    print(
        f"limit at {flops / 1e12:.2f} TFLOP/s (float32 LSTMs: {float32_flops / 1e12:.2f}): {parts}; "
        f"with demo heads {least:.3f} s (RTF {least / seconds:.4f}); traffic of the front end "
        f"{traffic / 1e9:.1f} GB at {memory / 1e9:.1f} GB/s = {traffic / memory:.3f} s",
        flush=True,
    )


def front_end_counts(config, samples):
    """Operations, values moved, and frames. A feature map is written, activated, and read again."""
    operations, values, channels_in = 0, 0, 1
    for channels, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
        operations += 2 * samples * channels * channels_in * kernel
        values += 4 * samples * channels
        channels_in = channels
    return operations, values, samples


def encoder_operations(config, frames):
    width, inner = config.hidden_size, config.intermediate_size
    projection = config.conv_dim[-1] * width
    positions = width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layer = 4 * width * width + 2 * width * inner + 2 * frames * width
    return 2 * frames * (projection + positions + config.num_hidden_layers * layer)


def head_operations(config, frames):
    """Operations of all emotions' convolutions and LSTMs. Later layers run once per clip, and cost little."""
    widths = [config.feature_size, *config.conv_channels]
    convolutions = sum(config.conv_kernel_size * a * b for a, b in pairwise(widths))
    width = config.lstm_hidden_size
    lstm = 4 * width * (config.conv_channels[-1] + width + (config.lstm_num_layers - 1) * 2 * width)
    steps = frames // config.pool_size
    return 2 * config.num_labels * frames * convolutions, 2 * config.num_labels * steps * lstm


@torch.inference_mode()
def print_accuracy(plain, model, clips):
    """Prints errors of frame features, against plain Transformers in float32 on single clips, and of shares."""
    extractor = EmoShareFeatureExtractor()
    plain, model = plain.to(DEVICE), model.to(DEVICE)
    halved = copy.deepcopy(model)
    halved.backbone.bfloat16()
    batches = [extractor(clip, sampling_rate=16000, return_tensors="pt").to(DEVICE) for clip in clips]
    expected, exact, rounded, shares, rounded_shares = [], [], [], [], []
    for batch in batches:
        waveform = batch["input_values"]
        expected.append(plain(waveform).last_hidden_state[0])
        exact.append(model.frame_features(waveform).by_layer[-1][0])
        rounded.append(halved.frame_features(waveform).by_layer[-1][0].float())
        shares.append(model(waveform).logits[0])
        rounded_shares.append(halved(waveform).logits[0])
    expected, exact, rounded = torch.cat(expected), torch.cat(exact), torch.cat(rounded)
    shares, rounded_shares = torch.stack(shares).cpu(), torch.stack(rounded_shares).cpu()
    rho = [spearmanr(a, b)[0] for a, b in zip(shares.T, rounded_shares.T, strict=True)]
    print(f"float32: frame features within {(exact - expected).abs().max():.1e} of plain Transformers")
    print(f"bfloat16: relative RMS error of frame features {(rounded - expected).norm() / expected.norm():.1e}")
    print(
        f"bfloat16: shares within {(shares - rounded_shares).abs().max():.1e} of float32's, Spearman "
        f"{spearmanr(shares.flatten(), rounded_shares.flatten())[0]:.5f} over all, {np.mean(rho):.5f} as the mean over "
        f"emotions (untrained: an emotion's shares differ by only {shares.std(dim=0).mean():.3f}, their standard "
        "deviation over clips)"
    )


if __name__ == "__main__":
    main()
