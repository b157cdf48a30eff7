"""
EmoShare on an NVIDIA GPU: whether its shares equal those on the CPU, and how fast it extracts and trains.

    python benchmarks/cuda.py            # about 5 minutes, including the CPU's part
    python benchmarks/cuda.py --small    # tiny sizes, to try the script on any machine

All weights are random, so nothing is downloaded. If a section fails, it prints its error, and the next one runs.
"""

import argparse
import copy
import dataclasses
import tempfile
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from accelerate import Accelerator
from corpus import voices, write_corpus
from inference import DEMO_HEAD, encoder_operations, front_end_counts
from machine import DEVICE, copy_rate, describe, matmul_rate, seconds_of
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

import training
from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.architectures_emoshare import ARCHITECTURES
from emoshare.dataset_script import load_corpus
from emoshare.training.features import extract_frame_features

RATE = 16000
BASE = {"mask_time_prob": 0.0}
LARGE = {
    **BASE,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY |= {"conv_dim": (32,) * 7, "num_conv_pos_embedding_groups": 2}
TINY_HEAD = {"conv_channels": (16, 8), "lstm_hidden_size": 16, "ffn_sizes": (8,)}
TOLERANCE = 1e-4  # of shares in float32


@dataclasses.dataclass
class Sizes:
    parity_clips: int = 24
    parity_batch: int = 8
    clip_seconds: float = 4.0
    batch_sizes: tuple = (8, 16, 32, 64, 128)
    stored_clips: int = 2048
    training_clips: int = 640
    matmul: int = 8192
    copied_megabytes: int = 2048
    runs: int = 5
    backbones: dict = dataclasses.field(default_factory=lambda: {"HuBERT Base": BASE, "HuBERT Large": LARGE})
    released_head: dict = dataclasses.field(default_factory=dict)


SMALL = Sizes(
    parity_clips=4,
    parity_batch=2,
    clip_seconds=1.0,
    batch_sizes=(1, 2),
    stored_clips=6,
    training_clips=48,
    matmul=256,
    copied_megabytes=8,
    runs=1,
    backbones={"tiny": {**BASE, **TINY}, "tiny, layer norm": {**LARGE, **TINY}},
    released_head=TINY_HEAD,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    sizes = SMALL if parser.parse_args().small else Sizes()
    if sizes is SMALL:
        training.WIDTH = 32
    torch.manual_seed(0)
    print(describe())
    for section in (print_rates, print_parity, print_gradients, print_extraction, print_training):
        started = time.perf_counter()
        print(f"\n## {section.__doc__}\n")
        try:
            with tf32(False):
                section(sizes)
        except Exception:  # noqa: BLE001 - the next section should still run
            print(f"FAILED\n{traceback.format_exc(limit=-6)}")
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        print(f"({time.perf_counter() - started:.0f} s)", flush=True)


@contextmanager
def tf32(is_allowed):
    """Turns TF32 for float32 products on the GPU on or off."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = is_allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def peak_memory(function):
    """A function's result, and its peak GPU memory as text."""
    if DEVICE.type != "cuda":
        return function(), "-"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return result, f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"


def print_rates(sizes):
    """What the machine can do"""
    for name, dtype, is_allowed in (
        ("bfloat16", torch.bfloat16, False),
        ("TF32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        with tf32(is_allowed):
            print(f"{name}: {matmul_rate(dtype, sizes.matmul) / 1e12:.1f} TFLOP/s, {sizes.matmul}³ matrix product")
    print(f"copy: {copy_rate(sizes.copied_megabytes) / 1e9:.0f} GB/s, read and written")


def print_parity(sizes):
    """The same shares as on the CPU in float32"""
    rng = np.random.default_rng(0)
    clips = voices(rng.uniform(1, 8, size=sizes.parity_clips) * sizes.clip_seconds / 4)
    print(
        f"{len(clips)} clips of {min(map(len, clips)) / RATE:.1f} to {max(map(len, clips)) / RATE:.1f} s. Last layers "
        f"are scaled so that each emotion's shares spread widely.\n"
    )
    print("| model | float32, one by one | in batches | TF32 | bfloat16 | Spearman, TF32 | Spearman, bfloat16 |")
    print("|---|---|---|---|---|---|---|")
    for name, fields in sizes.backbones.items():
        backbone_config = AutoConfig.for_model("hubert", **fields)
        if backbone_config.num_hidden_layers > 12:  # to save time on the CPU
            backbone_config.num_hidden_layers = 4
            name += ", 4 layers"
        model = EmoShareModel(EmoShareConfig(backbone_config=backbone_config, **sizes.released_head)).eval()
        print_parity_of(name, model, EmoShareFeatureExtractor(), clips, sizes)
    for architecture in ARCHITECTURES:
        model = EmoShareModel(EmoShareConfig(architecture=architecture, **DEMO_HEAD)).eval()
        print_parity_of(f"mel, {architecture}", model, EmoShareFeatureExtractor("mel"), clips, sizes)
    model = EmoShareModel(EmoShareConfig(loss="beta_binomial", separate_heads=False, **DEMO_HEAD)).eval()
    print_parity_of("mel, shared trunk with concentrations", model, EmoShareFeatureExtractor("mel"), clips, sizes)


def print_parity_of(name, model, extractor, clips, sizes):
    spread(model, shares_of(model, extractor, clips, "cpu"))
    expected = shares_of(model, extractor, clips, "cpu")
    alone = shares_of(model, extractor, clips, DEVICE)
    together = shares_of(model, extractor, clips, DEVICE, batch_size=sizes.parity_batch)
    with tf32(True):
        rounded = {"TF32": shares_of(model, extractor, clips, DEVICE, batch_size=sizes.parity_batch)}
    if model.backbone is not None:
        model.backbone.bfloat16()
        rounded["bfloat16"] = shares_of(model, extractor, clips, DEVICE, batch_size=sizes.parity_batch)
    errors = [np.abs(shares - expected).max() for shares in (alone, together)]
    columns = [f"{error:.1e}{'' if error <= TOLERANCE else ' (too much)'}" for error in errors]
    of_rounded = [rounded.get("TF32"), rounded.get("bfloat16")]
    columns += ["" if shares is None else f"{np.abs(shares - expected).max():.1e}" for shares in of_rounded]
    columns += ["" if shares is None else f"{mean_spearman(shares, expected):.5f}" for shares in of_rounded]
    print(f"| {name} | {' | '.join(columns)} |", flush=True)


def shares_of(model, extractor, clips, device, batch_size=1):
    """The pipeline's shares, (clips, labels), from a copy of the model."""
    pipe = EmotionSharePipeline(model=copy.deepcopy(model), feature_extractor=extractor, device=device)
    labels = model.config.labels
    by_label = [{share["label"]: share["score"] for share in shares} for shares in pipe(clips, batch_size=batch_size)]
    return np.array([[shares[label] for label in labels] for shares in by_label])


def spread(model, shares):
    """Scales the last layers so that each emotion's logits have mean 0 and standard deviation 1 over the clips."""
    logits = torch.from_numpy(np.log(shares / (1 - shares))).float().T
    rows = [(head, row) for head in model.heads for row in range(head.num_outputs)]
    with torch.no_grad():
        for (head, row), of_label in zip(rows, logits, strict=True):
            scale = 1 / of_label.std().clamp(min=1e-3)
            head.output.weight[row] *= scale
            head.output.bias[row] = (head.output.bias[row] - of_label.mean()) * scale


def mean_spearman(shares, expected):
    return np.mean([spearmanr(a, b)[0] for a, b in zip(shares.T, expected.T, strict=True)])


def print_gradients(sizes):
    """The same gradients as on the CPU: relative RMS error for one training batch"""
    frames = training.speech_frames(16)
    batch = training.RandomStore(frames).collate(np.arange(len(frames)))
    batch = {name: batch[name] for name in ("frame_features", "attention_mask", "labels")}
    print("| architecture | float32 | TF32 | bfloat16 |")
    print("|---|---|---|---|")
    for architecture in ARCHITECTURES:
        config = EmoShareConfig(feature_size=training.WIDTH, architecture=architecture, **DEMO_HEAD)
        model = EmoShareModel(config).train()
        expected = gradients(model, batch, "cpu", torch.float32)
        columns = []
        for dtype, is_allowed in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            with tf32(is_allowed):
                found = gradients(model, batch, DEVICE, dtype)
            columns.append(f"{(found - expected).norm() / expected.norm():.1e}")
        print(f"| {architecture} | {' | '.join(columns)} |", flush=True)


def gradients(model, batch, device, dtype):
    """The gradients of all heads as one vector."""
    model = copy.deepcopy(model).to(device)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["frame_features"] = batch["frame_features"].to(dtype)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()


def print_extraction(sizes):
    """Extraction: hours of audio per second"""
    print(
        f"Clips of {sizes.clip_seconds:.0f} s. Roofline: counted operations at the rate of a large matrix product in "
        "bfloat16, or bytes at that of a copy, whichever takes longer, for the front end and for the encoder. From "
        "files, in bfloat16: WAV files are decoded, and features stored in float16 "
        f"({sizes.stored_clips} clips, the second of two extractions).\n"
    )
    print("| backbone | | hours/s | of the roofline | batch size | memory |")
    print("|---|---|---|---|---|---|")
    flops = matmul_rate(torch.bfloat16, sizes.matmul)
    bandwidth = copy_rate(sizes.copied_megabytes)
    for name, fields in sizes.backbones.items():
        config = AutoConfig.for_model("hubert", **fields)
        roofline = sizes.clip_seconds / 3600 / seconds_at_least(config, sizes.clip_seconds, flops, bandwidth)
        print(f"| {name} | roofline | {roofline:.2f} | | | |")
        with torch.inference_mode():
            print_extraction_of(name, config, roofline, sizes)


def print_extraction_of(name, config, roofline, sizes):
    stock = AutoModel.from_config(config).eval().to(DEVICE)
    model = EmoShareModel(EmoShareConfig(backbone_config=config, **TINY_HEAD)).eval()
    model.backbone.to(DEVICE)

    def row(kind, hours, memory, size=""):
        print(f"| {name} | {kind} | {hours:.2f} | {hours / roofline:.0%} | {size} | {memory} |", flush=True)

    best = {}
    for dtype, is_allowed in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        stock.to(dtype)
        model.backbone.to(dtype)
        precision = "TF32" if is_allowed else str(dtype).removeprefix("torch.")
        for kind, run in (("stock", stock), ("EmoShare", model.frame_features)):
            with tf32(is_allowed):
                rates, memory = peak_memory(partial(rates_by_batch_size, run, dtype, sizes))
            best[kind] = max(rates, key=rates.get)
            row(f"{kind}, {precision}, on the device", rates[best[kind]], memory, best[kind])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_corpus(folder / "corpus", train=[sizes.clip_seconds] * sizes.stored_clips, devel=[sizes.clip_seconds])
        hours, memory = peak_memory(partial(stock_from_files, stock, best["stock"], sizes, folder))
        row("stock, from files", hours, memory, best["stock"])
        hours, memory = peak_memory(partial(ours_from_files, model, sizes, folder))
        row("EmoShare, from files", hours, memory)


def seconds_at_least(config, seconds, flops, bandwidth):
    """The roofline time for one clip."""
    operations, values, frames = front_end_counts(config, round(seconds * RATE))
    front_end = max(operations / flops, 2 * values / bandwidth)
    # A layer reads and writes the values of its linear layers, attention, GELU, and two norms with their sums.
    values = config.num_hidden_layers * frames * (18 * config.hidden_size + 4 * config.intermediate_size)
    weights = config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    encoder = max(encoder_operations(config, frames) / flops, 2 * (values + weights / 32) / bandwidth)
    return front_end + encoder


def rates_by_batch_size(run, dtype, sizes):
    rates = {}
    for batch_size in sizes.batch_sizes:
        waveforms = torch.randn(batch_size, round(sizes.clip_seconds * RATE), device=DEVICE, dtype=dtype)
        run(waveforms)
        seconds = seconds_of(partial(run, waveforms), runs=sizes.runs)
        rates[batch_size] = batch_size * sizes.clip_seconds / 3600 / seconds
    return rates


def stock_from_files(model, batch_size, sizes, folder):
    """Like a short script: reads, computes and saves one batch after another."""
    files = sorted((folder / "corpus" / "wav").glob("train*.wav"))
    extractor = Wav2Vec2FeatureExtractor()

    def extract():
        for start in range(0, len(files), batch_size):
            waveforms = [soundfile.read(file, dtype="float32")[0] for file in files[start : start + batch_size]]
            batch = extractor(waveforms, sampling_rate=RATE, padding=True, return_tensors="pt").to(DEVICE)
            features = model(batch["input_values"].bfloat16()).last_hidden_state.half().cpu().numpy()
            for file, array in zip(files[start:], features, strict=False):
                np.save(folder / f"{file.stem}.npy", array)

    return len(files) * sizes.clip_seconds / 3600 / seconds_of(extract, runs=2)


def ours_from_files(model, sizes, folder):
    corpus = load_corpus("csv", data_dir=folder / "corpus", cache_dir=folder / "cache")
    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    accelerator.print = lambda *_: None
    seconds = []
    for store in ("first", "second"):
        extract = partial(
            extract_frame_features, corpus, "train", model, EmoShareFeatureExtractor(), folder / store, accelerator
        )
        seconds.append(seconds_of(extract))
    return sizes.stored_clips * sizes.clip_seconds / 3600 / seconds[-1]


def print_training(sizes):
    """Training of nine heads of the released sizes: seconds per epoch"""
    frames = training.speech_frames(sizes.training_clips)
    print(
        f"{len(frames)} clips of {frames.mean() / 50:.1f} s on average, in batches of {training.CLIPS_PER_BATCH}, "
        f"features of width {training.WIDTH}. The peer trains one emotion after another, as the released scripts do.\n"
    )
    print("| | s per epoch | against the peer | waiting for data | limit, s | memory |")
    print("|---|---|---|---|---|---|")
    if sizes is SMALL:
        peer, memory = float("nan"), ""
    else:
        with tf32(True):  # as PyTorch would by default, at least for convolutions and LSTMs
            peer, memory = peak_memory(partial(training.peer_epoch, frames))
    print(f"| released design, TF32 | {peer:.2f} | | | | {memory} |", flush=True)
    for name, precision, dtype, is_allowed in (
        ("bfloat16", "bf16", torch.bfloat16, False),
        ("TF32", "no", torch.float32, True),
        ("float32", "no", torch.float32, False),
    ):
        for separate_heads in (True, False):
            config = EmoShareConfig(feature_size=training.WIDTH, separate_heads=separate_heads, **sizes.released_head)
            with tf32(is_allowed):
                limit = training.operations(config) * frames.sum() * (9 if separate_heads else 1)
                limit /= matmul_rate(dtype, sizes.matmul)
                model = EmoShareModel(config).to(DEVICE)
                (epoch, _), memory = peak_memory(partial(training.our_epoch, model, frames, precision))
            print(
                f"| {'nine heads' if separate_heads else 'shared trunk'}, {name} | {epoch.seconds:.2f} | "
                f"{peer / epoch.seconds:.1f}x | {epoch.waiting:.1%} | {limit:.2f} | {memory} |",
                flush=True,
            )


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
