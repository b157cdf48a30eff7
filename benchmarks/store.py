"""
What the feature store takes: disk for each clip, memory for any number of clips, and what 50,000 clips would take.

    python benchmarks/store.py

Extracts and trains on 128, 256 and 512 clips of 1 to 8 s (mean 4) in a process of its own each, and samples its
anonymous memory (RssAnon: pages of mapped files do not count). The backbone has HuBERT Large's width but one layer and
a thin front end, so that it is quick; nine small heads train for one epoch. Time for 50,000 clips is scaled from a
HuBERT Large in its published size, random weights, on a clip of 4 s.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from corpus import write_corpus
from machine import DEVICE, anonymous_memory, describe, seconds_of
from transformers import AutoConfig

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer

SIZES = (128, 256, 512)
USERS_CLIPS = 50_000
MEAN_SECONDS = 4.0
RELEASED_BYTES = 398 * 1024 * 8  # per clip: zero-padded float64
THIN = {"num_hidden_layers": 1, "conv_dim": (32,) * 7, "intermediate_size": 1024}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
SMALL_HEAD = {"conv_channels": (32, 32, 32), "lstm_hidden_size": 32, "ffn_sizes": (32,)}
MEBIBYTE = 2**20


def main():
    print(describe())
    print("| clips | bytes a clip | of the released arrays | peak memory, extraction | peak memory, training |")
    print("|---|---|---|---|---|")
    peaks = []
    for clips in SIZES:
        command = [sys.executable, __file__, str(clips)]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        measured = json.loads(output.splitlines()[-1])
        # At a mean of 4 s, whatever the mean of these clips is.
        size = measured["bytes"] / measured["seconds"] * MEAN_SECONDS
        peaks.append([measured["extraction"], measured["training"]])
        memory = " | ".join(f"{peak / MEBIBYTE:.0f} MiB" for peak in peaks[-1])
        print(f"| {clips} | {size:.0f} | 1/{RELEASED_BYTES / size:.2f} | {memory} |", flush=True)
    spread = np.max(peaks, axis=0) / np.min(peaks, axis=0) - 1
    print(f"peaks within {spread[0]:.1%} (extraction) and {spread[1]:.1%} (training) of each other\n")

    rate = extraction_rate()
    hours = USERS_CLIPS * MEAN_SECONDS / 3600
    print(
        f"{USERS_CLIPS} clips of {MEAN_SECONDS:.0f} s ({hours:.0f} hours) through HuBERT Large, float32, this machine: "
        f"{hours * rate:.1f} hours, {USERS_CLIPS * size / 1e9:.1f} GB of disk"
    )


def measure(clips):
    """Extraction and one epoch of training on this many clips; prints what they took as JSON."""
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


class PeakMemory:
    """Samples this process's anonymous memory while it is open."""

    def __enter__(self):
        self.peak = 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while not self.is_over.wait(0.005):
            self.peak = max(self.peak, anonymous_memory())

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()


def speech_seconds(clips):
    """1 to 8 s with a mean of 4; the longest is among them in any case, since it decides what a batch takes."""
    seconds = np.clip(np.random.default_rng(clips).gamma(6, 0.67, size=clips), 1, 8)
    seconds[:32:8] = 8
    return seconds


def extraction_rate():
    """Seconds of computing per second of audio, HuBERT Large in its published size."""
    config = AutoConfig.for_model(
        "hubert", mask_time_prob=0.0, num_hidden_layers=24, intermediate_size=4096, conv_bias=True, **LARGE
    )
    model = EmoShareModel(EmoShareConfig(backbone_config=config, **SMALL_HEAD)).eval().to(DEVICE)
    waveforms = torch.randn(1, round(MEAN_SECONDS * 16000), device=DEVICE)
    with torch.inference_mode():
        model.frame_features(waveforms)
        return seconds_of(lambda: model.frame_features(waveforms), runs=3) / MEAN_SECONDS


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        started = time.perf_counter()
        main()
        print(f"\n{time.perf_counter() - started:.0f} s in all")
