"""
How much another process that keeps one core busy slows down the training and prediction of heads.

    python benchmarks/busy_machine.py

Compares two ways to run the heads of configs/demo.yaml, on batches of 12 clips of 400 frames:
- one head after another, with each operator divided among all intra-op threads, as PyTorch runs a loop over heads;
- heads side by side, each on one intra-op thread, with `threads_emoshare.side_by_side`, as EmoShare does.
"""

import multiprocessing
import statistics
import time
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from machine import describe

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.frames_emoshare import length_mask
from emoshare.training.arguments import parse_arguments
from emoshare.training.steps import heads_in_training, threads_for, train_step

CLIPS, FRAMES = 12, 400
SECONDS = 10.0  # per measurement


def main():
    arguments = parse_arguments([])
    torch.manual_seed(0)
    model = EmoShareModel(EmoShareConfig(**arguments.model.config_fields))
    batch = {
        "frame_features": torch.randn(CLIPS, FRAMES, model.config.feature_size),
        "attention_mask": torch.ones(CLIPS, FRAMES, dtype=torch.bool),
        "labels": torch.rand(CLIPS, model.config.num_labels),
        "weights": torch.ones(CLIPS),
        "weight_per_step": torch.full((model.config.num_labels,), float(CLIPS)),
    }
    ways = {
        "training, one head after another": lambda: train_one_after_another(model, batch),
        "training, side by side": lambda: train_side_by_side(model, batch),
        "prediction, one head after another": lambda: predict_one_after_another(model, batch),
        "prediction, side by side": lambda: predict_side_by_side(model, batch),
    }
    print(f"{describe()}\npasses per second, median and slowest of {SECONDS:.0f} s")
    print(f"{'':<38} {'machine free':>20} {'next to a busy process':>24}")
    for name, run in ways.items():
        free = passes_per_second(run())
        with busy_core():
            busy = passes_per_second(run())
        print(f"{name:<38} {free[0]:>10.2f} {free[1]:>9.2f} {busy[0]:>14.2f} {busy[1]:>9.2f}")


def train_one_after_another(model, batch):
    heads = heads_in_training(model, 1e-3)

    def step():
        for head in heads:
            head.compute_gradients(batch)
            head.update_weights()

    return step


def train_side_by_side(model, batch):
    heads, accelerator = heads_in_training(model, 1e-3), Accelerator(cpu=True)

    def step():
        with threads_for(model) as num_threads:
            train_step(heads, batch, accelerator, num_threads)

    return step


def predict_one_after_another(model, batch):
    lengths = torch.full((CLIPS,), FRAMES)

    def predict():
        with torch.inference_mode():
            for head in model.heads:
                head(batch["frame_features"], lengths)

    return predict


def predict_side_by_side(model, batch):
    mask = length_mask(torch.full((CLIPS,), FRAMES), FRAMES)

    def predict():
        with torch.inference_mode():
            model(frame_features=batch["frame_features"], attention_mask=mask)

    return predict


def passes_per_second(run):
    """Median and slowest rate of passes within `SECONDS`, after two warm-up passes."""
    run(), run()
    seconds, started = [], time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return 1 / statistics.median(seconds), 1 / max(seconds)


@contextmanager
def busy_core():
    """Keeps one core busy with another process."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    time.sleep(1)
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin():
    while True:
        pass


if __name__ == "__main__":
    main()
