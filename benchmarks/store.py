"""
The cost of the feature store: disk per clip, memory for growing numbers of clips, an estimate for 50,000 clips, and
opening, shuffling and reading a store of a million windows.

    python benchmarks/store.py

Extracts and trains on 128, 256 and 512 clips of 1 to 8 s (mean 4), each in a process of its own, and samples anonymous
memory (RssAnon, without pages of mapped files). It does so by default and with an allocator that returns freed memory
at once (`MALLOC_TRIM_THRESHOLD_`), which shows the memory that the program itself holds. The backbone has HuBERT
Large's width, but for speed only one thin layer and a thin front end; nine small heads train for one epoch. The time
for 50,000 clips is scaled from a HuBERT Large in its published size, with random weights, on a clip of 4 s.

The million windows have the lengths of clips of 1 to 8 s, and features one value wide, so that 1 GB of disk holds them.
They are made in a temporary folder, in about two minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from corpus import write_corpus
from fabricated_store import FabricatedCorpus, fabricate, speech_seconds
from machine import DEVICE, PeakMemory, anonymous_memory, describe, seconds_of
from transformers import AutoConfig

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import LengthBatchSampler
from emoshare.training.features import extract_frame_features
from emoshare.training.store import FrameFeatureStore, is_whole
from emoshare.training.trainer import HeadTrainer

SIZES = (128, 256, 512)
ALLOCATORS = {"default": {}, "returns memory": {"MALLOC_TRIM_THRESHOLD_": str(2**20)}}
WINDOWS = 1_000_000
USERS_CLIPS = 50_000
MEAN_SECONDS = 4.0
RELEASED_BYTES = 398 * 1024 * 8  # per clip: zero-padded float64
THIN = {"num_hidden_layers": 1, "conv_dim": (32,) * 7, "intermediate_size": 64, "num_conv_pos_embeddings": 2}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
SMALL_HEAD = {"conv_channels": (32, 32, 32), "lstm_hidden_size": 32, "ffn_sizes": (32,)}
MEBIBYTE = 2**20


def main():
    print(describe())
    open_shuffle_read(WINDOWS)
    print("\n| allocator | clips | bytes a clip | of the released arrays | memory of extraction | memory of training |")
    print("|---|---|---|---|---|---|")
    for allocator, environment in ALLOCATORS.items():
        peaks = []
        for clips in SIZES:
            measured = in_a_process("measure", clips, **environment)
            # Scaled to a mean of 4 s per clip.
            size = measured["bytes"] / measured["seconds"] * MEAN_SECONDS
            peaks.append([measured["extraction"], measured["training"]])
            memory = " | ".join(f"{peak / MEBIBYTE:.0f} MiB" for peak in peaks[-1])
            print(f"| {allocator} | {clips} | {size:.0f} | 1/{RELEASED_BYTES / size:.2f} | {memory} |", flush=True)
        spread = np.max(peaks, axis=0) / np.min(peaks, axis=0) - 1
        print(f"peaks within {spread[0]:.1%} (extraction) and {spread[1]:.1%} (training) of each other", flush=True)

    rate = extraction_rate()
    hours = USERS_CLIPS * MEAN_SECONDS / 3600
    print(
        f"\n{USERS_CLIPS} clips of {MEAN_SECONDS:.0f} s ({hours:.0f} hours) through HuBERT Large, float32, this "
        f"machine: {hours * rate:.1f} hours, {USERS_CLIPS * size / 1e9:.1f} GB of disk"
    )


def in_a_process(name, *arguments, **environment):
    """Runs a function of this module in a process of its own; returns the JSON that it prints."""
    command = [sys.executable, __file__, name, *map(str, arguments)]
    environment = {**os.environ, **environment}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def open_shuffle_read(windows):
    """Prints what a process needs to open, shuffle and read a store of `windows` windows."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = fabricate(Path(folder), windows)
        files = len(list(store.iterdir()))
        print(f"{windows} windows written in {time.perf_counter() - started:.0f} s, {files} files")
        measured = in_a_process("use_store", store, windows)
    print("| | seconds | anonymous memory | maps of its files |")
    print("|---|---|---|---|")
    for step, (seconds, memory, maps) in measured.items():
        print(f"| {step} | {seconds:.2f} | {memory / MEBIBYTE:.0f} MiB | {maps} |", flush=True)


def use_store(folder, windows):
    """Opens a fabricated store, shuffles it for an epoch and reads all of it; prints the cost of each as JSON."""
    corpus, steps = FabricatedCorpus(windows), {}
    before = anonymous_memory()

    def measure_step(name, function):
        started = time.perf_counter()
        with PeakMemory() as memory:
            result = function()
        seconds = time.perf_counter() - started
        maps = Path("/proc/self/maps").read_text().count(folder)
        steps[name] = seconds, memory.peak - before, maps
        return result

    def opened():
        assert is_whole(Path(folder))
        return FrameFeatureStore(Path(folder), corpus, "train")

    store = measure_step("checked and opened", opened)
    accelerator = Accelerator(cpu=True)
    sampler = measure_step("batches made", lambda: LengthBatchSampler(store.num_frames, 32, accelerator, seed=0))
    measure_step("shuffled for another epoch", lambda: sampler.set_epoch(1))

    def read():
        for batch in sampler:
            features = store.collate([store[window] for window in batch])["frame_features"]
            assert (features[:, 0, 0].numpy() == store.clip_of_window[batch] % 1000).all()

    measure_step("read in this order", read)
    print(json.dumps(steps))


def measure(clips):
    """Runs extraction and one epoch of training on this many clips; prints their cost as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, devel = speech_seconds(clips), speech_seconds(clips // 4)
        write_corpus(folder / "corpus", train=train, devel=devel)
        corpus = load_corpus("csv", data_dir=folder / "corpus", cache_dir=folder / "cache")
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        backbone = AutoConfig.for_model("hubert", mask_time_prob=0.0, **LARGE, **THIN)
        model = EmoShareModel(EmoShareConfig(backbone_config=backbone, **SMALL_HEAD))
        extractor = EmoShareFeatureExtractor()
        with PeakMemory() as extraction:
            stores = {
                split: extract_frame_features(corpus, split, model, extractor, folder / "store", accelerator)
                for split in ("train", "devel")
            }
        size = sum(path.stat().st_size for path in (folder / "store").glob("*/*"))
        run = RunArguments(output_dir=str(folder / "output"), num_train_epochs=1)
        scorer = Scorer(stores["devel"].shares, list(EMOTIONS))
        with PeakMemory() as training:
            arguments = Arguments(DataArguments(), ModelArguments(), run)
            HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()
    print(
        json.dumps(
            {
                "bytes": size,
                "seconds": train.sum() + devel.sum(),
                "extraction": extraction.peak,
                "training": training.peak,
            }
        )
    )


def extraction_rate():
    """Seconds of computing per second of audio, for HuBERT Large in its published size."""
    config = AutoConfig.for_model(
        "hubert", mask_time_prob=0.0, num_hidden_layers=24, intermediate_size=4096, conv_bias=True, **LARGE
    )
    model = EmoShareModel(EmoShareConfig(backbone_config=config, **SMALL_HEAD)).eval().to(DEVICE)
    waveforms = torch.randn(1, round(MEAN_SECONDS * 16000), device=DEVICE)
    with torch.inference_mode():
        model.frame_features(waveforms)
        return seconds_of(lambda: model.frame_features(waveforms), runs=3) / MEAN_SECONDS


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(int(sys.argv[2]))
    elif sys.argv[1:2] == ["use_store"]:
        use_store(sys.argv[2], int(sys.argv[3]))
    else:
        started = time.perf_counter()
        main()
        print(f"\n{time.perf_counter() - started:.0f} s in all")
