"""
How well extraction and training scale from one process to two, with one thread each.

    python benchmarks/scaling.py

The runs are launched with torchrun, as on CPUs. The backbone has four layers of HuBERT Base; there are 64 clips of 4 s,
and nine heads of medium size train on the features for two epochs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from corpus import write_corpus
from machine import describe, seconds_of
from transformers import AutoConfig

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer

CLIPS, SECONDS, EPOCHS = 64, 4.0, 2
HEAD = {"conv_channels": (256, 128, 64), "lstm_hidden_size": 128, "ffn_sizes": (64,)}


def main():
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus", train=[SECONDS] * CLIPS, devel=[SECONDS])
        one, two = (launch(processes, Path(folder)) for processes in (1, 2))
    for name in one:
        print(
            f"{name}: {one[name]:.1f} s with one process, {two[name]:.1f} s with two: {one[name] / two[name]:.2f}x, "
            f"parallel efficiency {one[name] / two[name] / 2:.0%}"
        )


def launch(processes, folder):
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc_per_node", str(processes), __file__, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.splitlines()[-1])


def work(folder):
    """Runs one process's part; the main process prints the seconds of all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    corpus = load_corpus("csv", data_dir=folder / "corpus", cache_dir=folder / "cache")
    backbone = AutoConfig.for_model("hubert", mask_time_prob=0.0, num_hidden_layers=4)
    model = EmoShareModel(EmoShareConfig(backbone_config=backbone, **HEAD))
    cache_dir = folder / f"store-{accelerator.num_processes}"
    stores = []

    def extract():
        extractor = EmoShareFeatureExtractor()
        stores.append(extract_frame_features(corpus, "train", model, extractor, cache_dir, accelerator))

    seconds = {"extraction": seconds_of(extract)}
    batch_size = 16 // accelerator.num_processes  # the same total batch size
    run = RunArguments(per_device_train_batch_size=batch_size, mixed_precision="no")
    arguments, stores = Arguments(DataArguments(), ModelArguments(), run), {"train": stores[0], "devel": stores[0]}
    trainer = HeadTrainer(model, stores, None, arguments, accelerator)
    seconds["training"] = seconds_of(lambda: trainer.train_epoch(trainer.progress.heads), runs=EPOCHS)
    accelerator.print(json.dumps(seconds))
    accelerator.end_training()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]))
    else:
        main()
