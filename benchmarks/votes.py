"""
What it is worth to know how many listeners voted: heads that are trained on votes, against heads trained on shares.

    python benchmarks/votes.py

Synthetic clips: four hidden numbers decide how likely a listener is to perceive each of three emotions, and features
show these numbers with noise. A panel of 3 to 20 listeners votes on each clip; on half of the clips it is a small one
of 3 to 5. The same small heads are trained with several losses on 400 clips, and tested on 2,000 others, over five
seeds. Nothing is chosen on test.
"""

import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from machine import describe, seconds_of
from scipy.stats import spearmanr

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.dataset_script import Corpus
from emoshare.evaluation.predictions import predict_votes
from emoshare.evaluation.scores import Scorer
from emoshare.losses_emoshare import LOSSES
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.store import FrameFeatureStore, begin, finish, shard_path, write_shard
from emoshare.training.trainer import HeadTrainer, heads_in_training, train_step
from emoshare.votes_emoshare import log_likelihood, share_intervals

LABELS = ["joy", "awe", "calm"]
CLIPS = {"train": 400, "devel": 200, "test": 2000}
FRAMES, WIDTH, HIDDEN = 24, 16, 4
HEAD = {"conv_channels": (16,), "pool_size": 4, "lstm_hidden_size": 16, "ffn_sizes": (16,), "architecture": "cnn_lstm"}
SEEDS = range(5)
RESAMPLES = 1000
CONCENTRATIONS = np.geomspace(0.5, 5000, 200)


def main():
    print(describe())
    accelerator = Accelerator(cpu=True)
    accelerator.print = lambda *_: None
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            stores = make_stores(Path(folder), seed)
            for name in LOSSES:
                started = time.perf_counter()
                predictions = train(name, stores, seed, folder, accelerator)
                print(seed, name, measure(predictions, stores), f"{time.perf_counter() - started:.1f} s", flush=True)


def make_stores(folder, seed):
    rng = np.random.default_rng(seed)
    weights, bias = rng.normal(0, 1.0, (HIDDEN, len(LABELS))), np.array([-0.5, -1.0, -1.5])
    mixing = rng.normal(0, 1, (HIDDEN, WIDTH))
    stores = {}
    for split, clips in CLIPS.items():
        hidden = rng.normal(0, 1, (clips, HIDDEN))
        unseen = rng.normal(0, 0.5, (clips, len(LABELS)))
        probabilities = 1 / (1 + np.exp(-(hidden @ weights + bias + unseen)))
        small = rng.random(clips) < 0.5
        listeners = np.where(small, rng.integers(3, 6, clips), rng.integers(6, 21, clips))
        votes = rng.binomial(listeners[:, None], probabilities)
        seen = hidden + rng.normal(0, 0.3, hidden.shape)
        features = seen[:, None] @ mixing + rng.normal(0, 1.0, (clips, FRAMES, WIDTH))
        columns = {"filename": [f"{n}.wav" for n in range(clips)], "listeners": listeners.astype(float)}
        columns |= {label: votes[:, i] / listeners for i, label in enumerate(LABELS)}
        corpus = Corpus(
            "csv", datasets.DatasetDict({split: datasets.Dataset.from_dict(columns)}), LABELS, ["listeners"]
        )
        unfinished, store = folder / f"{split}.unfinished", folder / split
        begin(unfinished, 1)
        windows = [
            {"clip": n, "start": 0, "num_samples": 1, "features": features[n].astype(np.float32)} for n in range(clips)
        ]
        write_shard(shard_path(unfinished, range(clips), 0, 1), windows, "float32")
        finish(unfinished, store, "float32")
        stores[split] = FrameFeatureStore(store, corpus, split)
    return stores


def train(loss, stores, seed, folder, accelerator, **run):
    torch.manual_seed(seed)
    model = EmoShareModel(
        EmoShareConfig(feature_size=WIDTH, id2label=dict(enumerate(LABELS)), separate_heads=False, loss=loss, **HEAD)
    )
    run = RunArguments(
        **{
            **dict(
                output_dir=f"{folder}/{loss}",
                num_train_epochs=40,
                learning_rate=3e-3,
                per_device_train_batch_size=32,
                early_stopping_patience=8,
                mixed_precision="no",
                seed=seed,
                checkpoint_minutes=100,
            ),
            **run,
        }
    )
    arguments = Arguments(DataArguments(), ModelArguments(separate_heads=False), run)
    scorer = Scorer(stores["devel"].shares, LABELS)
    progress = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()
    print("   best epoch", progress.heads[0].best.epoch, end=" ")
    return {
        split: predict_votes(model, FeatureLoader(stores[split], model.config, 64, accelerator), accelerator)
        for split in ("devel", "test")
    }


def nll(pred, store, concentrations):
    n = store.listeners.astype(float)[:, None]
    return -log_likelihood(store.shares * n, n, np.clip(pred.shares, 0, 1), concentrations).mean()


def coverage(pred, store, concentrations):
    hits = []
    for n in np.unique(store.listeners):
        rows = store.listeners == n
        lo, hi = share_intervals(pred.shares[rows], concentrations[rows], int(n))
        y = store.shares[rows]
        hits.append(((lo <= y + 1e-6) & (y <= hi + 1e-6)).ravel())
    return np.concatenate(hits).mean()


def measure(predictions, stores):
    test, devel = predictions["test"], predictions["devel"]
    true = stores["test"].shares
    rho = np.mean([spearmanr(test.shares[:, i], true[:, i]).statistic for i in range(len(LABELS))])
    if test.concentrations is None:
        best = min(CONCENTRATIONS, key=lambda c: nll(devel, stores["devel"], c))
        c = np.full(test.shares.shape, best)
        s = best
    else:
        s = min(np.geomspace(0.05, 20, 60), key=lambda s: nll(devel, stores["devel"], devel.concentrations * s))
        c = test.concentrations
    return f"rho {rho:.3f} nll {nll(test, stores['test'], c):.4f} coverage {coverage(test, stores['test'], c):.3f} scale {s:.2f} -> nll {nll(test, stores['test'], c * s if test.concentrations is not None else c):.4f} cov {coverage(test, stores['test'], c * s if test.concentrations is not None else c):.3f}; c median {np.median(c):.1f}"


if __name__ == "__main__":
    main()
