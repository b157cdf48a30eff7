"""
The value of knowing how many listeners voted: heads trained on votes against heads trained on shares.

    python benchmarks/votes.py

For each synthetic clip, four hidden numbers determine how likely a listener is to perceive each of three emotions, and
the features show these numbers with noise. A panel votes on each clip. There are two kinds of panels: 3 to 20
listeners, all equally often; and very unequal ones, with 3 listeners for 60 % of the clips and 20 for the others. The
trainer trains the same small heads with each loss on 400 clips, and they are tested on 2,000 others, over five seeds.
Nothing is chosen on test. Losses other than `beta_binomial` have no concentration for the intervals, so they get the
constant that is best on devel.

Then comes the cost of each loss: the time of a training step, relative to that with `mse`.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from machine import describe
from scipy.stats import spearmanr

from emoshare import EmoShareConfig, EmoShareModel
from emoshare.dataset_script import Corpus
from emoshare.evaluation.intervals import clip_intervals
from emoshare.evaluation.predictions import VotePredictions, predict_votes
from emoshare.evaluation.scores import Scorer
from emoshare.losses_emoshare import LOSSES
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.concentrations import fit_concentrations
from emoshare.training.steps import heads_in_training, train_step
from emoshare.training.store import FrameFeatureStore, begin, finish, shard_path, shard_writer
from emoshare.training.trainer import HeadTrainer
from emoshare.votes_emoshare import log_likelihood

LABELS = ["joy", "awe", "calm"]
MEAN_LOGITS = (-1.5, -2.0, -2.5)  # most shares are low, as in real corpora
CLIPS = {"train": 400, "devel": 200, "test": 2000}
FRAMES, WIDTH, HIDDEN = 24, 16, 4
UNSEEN, NOISE = 0.3, 0.2  # standard deviation of a logit's part that features do not show, and of the features' noise
HEAD = {"architecture": "cnn_lstm", "conv_channels": (16,), "pool_size": 4, "lstm_hidden_size": 16, "ffn_sizes": (16,)}
PANELS = {
    "3 to 20": lambda rng, clips: rng.integers(3, 21, clips),
    "3 or 20": lambda rng, clips: rng.choice([3, 20], clips, p=[0.6, 0.4]),
}
SEEDS = range(5)
RESAMPLES = 200
ROUNDING = 1e-6  # tolerance for shares in float32
CONCENTRATIONS = np.geomspace(0.5, 5000, 200)
STEP = {"clips": 32, "frames": 200, "head": {"conv_channels": (32, 32, 32), "pool_size": 4, "lstm_hidden_size": 32}}
STEPS = 60


def main():
    print(describe())
    accelerator = Accelerator(cpu=True)
    accelerator.print = lambda *_: None
    for title, panel in PANELS.items():
        print(f"\nPanels of {title} listeners; {CLIPS['test']} test clips, mean over {len(SEEDS)} seeds")
        print_comparison(panel, accelerator)
    print("\nSeconds of a training step, relative to `mse`\n| loss | nine heads | shared trunk |\n|---|---|---|")
    costs = [step_costs(separate_heads) for separate_heads in (True, False)]
    for loss in LOSSES:
        print(f"| `{loss}` | {costs[0][loss]:.3f} | {costs[1][loss]:.3f} |")


def print_comparison(panel, accelerator):
    stores, tested = [], {loss: [] for loss in LOSSES}  # for each seed
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            of_split = make_stores(Path(folder), seed, panel)
            for loss in LOSSES:
                tested[loss].append(trained_predictions(loss, of_split, seed, folder, accelerator))
            stores.append(of_split["test"])
    rhos = {loss: list(map(mean_rho, stores, of_seeds)) for loss, of_seeds in tested.items()}
    print("| loss | rho | gain over mse | each seed | log-likelihood of votes | shares in 90 % intervals | each seed |")
    print("|---|---|---|---|---|---|---|")
    for loss, of_seeds in tested.items():
        low, high = interval_of_difference(stores, of_seeds, tested["mse"])
        gains = np.subtract(rhos[loss], rhos["mse"])
        likelihoods, held = (list(map(measure, stores, of_seeds)) for measure in (mean_log_likelihood, held_part))
        print(
            f"| `{loss}` | {np.mean(rhos[loss]):.3f} | {gains.mean():+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{' '.join(f'{gain:+.3f}' for gain in gains)} | {np.mean(likelihoods):.3f} | {np.mean(held):.1%} | "
            f"{' '.join(f'{part:.1%}' for part in held)} |",
            flush=True,
        )


def make_stores(folder, seed, panel):
    rng = np.random.default_rng(seed)
    to_logits, to_features = rng.normal(size=(HIDDEN, len(LABELS))), rng.normal(size=(HIDDEN, WIDTH))
    stores = {}
    for split, clips in CLIPS.items():
        hidden = rng.normal(size=(clips, HIDDEN))
        logits = hidden @ to_logits + MEAN_LOGITS + UNSEEN * rng.normal(size=(clips, len(LABELS)))
        listeners = panel(rng, clips)
        votes = rng.binomial(listeners[:, None], 1 / (1 + np.exp(-logits)))
        seen = (hidden + NOISE * rng.normal(size=hidden.shape)) @ to_features
        features = (seen[:, None] + rng.normal(size=(clips, FRAMES, WIDTH))).astype(np.float32)
        columns = {"filename": [f"{clip}.wav" for clip in range(clips)], "listeners": listeners}
        columns |= {label: votes[:, index] / listeners for index, label in enumerate(LABELS)}
        corpus = Corpus("csv", DatasetDict({split: Dataset.from_dict(columns)}), LABELS, ["listeners"])
        stores[split] = write_store(folder, features, corpus, split)
    return stores


def write_store(folder, features, corpus, split):
    unfinished, store = folder / f"{split}.unfinished", folder / split
    begin(unfinished)
    with shard_writer(shard_path(unfinished, range(len(features)), 0, 1), "float32") as write:
        for clip, own in enumerate(features):
            write({"clip": clip, "start": 0, "num_samples": 1, "features": own})
    finish(unfinished, store, "float32")
    return FrameFeatureStore(store, corpus, split)


def trained_predictions(loss, stores, seed, folder, accelerator):
    """`VotePredictions` on test, with the constant concentration best on devel if the loss gives none."""
    torch.manual_seed(seed)
    fields = {"id2label": dict(enumerate(LABELS)), "separate_heads": False, "loss": loss, **HEAD}
    model = EmoShareModel(EmoShareConfig(feature_size=WIDTH, **fields))
    run = RunArguments(
        output_dir=f"{folder}/{loss}",
        num_train_epochs=40,
        learning_rate=3e-3,
        early_stopping_patience=20,
        mixed_precision="no",
        seed=seed,
        checkpoint_minutes=60,
    )
    arguments = Arguments(DataArguments(), ModelArguments(separate_heads=False), run)
    scorer = Scorer(stores["devel"].shares, LABELS)
    HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()
    loaders = {split: FeatureLoader(stores[split], model.config, 64, accelerator) for split in ("devel", "test")}
    if model.config.has_concentrations:
        fit_concentrations(model, loaders["devel"], accelerator)
        return predict_votes(model, loaders["test"], accelerator)
    devel, test = (predict_votes(model, loader, accelerator) for loader in loaders.values())
    best = max(CONCENTRATIONS, key=lambda value: mean_log_likelihood(stores["devel"], with_constant(devel, value)))
    return with_constant(test, best)


def with_constant(predictions, concentration):
    return VotePredictions(predictions.shares, np.full(predictions.shares.shape, concentration))


def mean_rho(store, predictions, clips=slice(None)):
    pairs = zip(predictions.shares[clips].T, store.shares[clips].T, strict=True)
    return np.mean([spearmanr(predicted, true).statistic for predicted, true in pairs])


def mean_log_likelihood(store, predictions):
    """Mean log-likelihood of the votes on a clip and label, in nats."""
    listeners = store.listeners[:, None].astype(np.float64)
    return log_likelihood(store.shares * listeners, listeners, *predictions).mean()


def held_part(store, predictions):
    """The fraction of true shares that lie in their 90 % intervals, including the ends."""
    low, high, _ = clip_intervals(predictions, store.listeners)
    return np.mean((low - ROUNDING <= store.shares) & (store.shares <= high + ROUNDING))


def interval_of_difference(stores, predictions, baseline):
    """95 % interval, over test clips, of the difference in ρ, averaged over seeds and labels; resamples are paired."""
    rng, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        clips = rng.integers(0, CLIPS["test"], CLIPS["test"])
        pairs = zip(stores, predictions, baseline, strict=True)
        differences.append(np.mean([mean_rho(s, own, clips) - mean_rho(s, other, clips) for s, own, other in pairs]))
    return np.percentile(differences, [2.5, 97.5])


def step_costs(separate_heads):
    """For each loss, the time of the fastest training step relative to that of mse; the losses take turns."""
    accelerator, clips, frames = Accelerator(cpu=True), STEP["clips"], STEP["frames"]
    batch = {
        "frame_features": torch.randn(clips, frames, 40),
        "attention_mask": torch.ones(clips, frames, dtype=torch.bool),
        "labels": torch.rand(clips, 9),
        "listeners": torch.randint(3, 21, (clips,)).float(),
        "weights": torch.ones(clips),
        "weight_per_step": torch.full((9,), float(clips)),
    }
    heads = {
        loss: heads_in_training(
            EmoShareModel(EmoShareConfig(separate_heads=separate_heads, loss=loss, **STEP["head"])), 1e-3
        )
        for loss in LOSSES
    }
    times = {loss: [] for loss in LOSSES}
    for _ in range(STEPS):
        for loss, own in heads.items():
            started = time.perf_counter()
            train_step(own, batch, accelerator, num_threads=1)
            times[loss].append(time.perf_counter() - started)
    return {loss: min(of_loss) / min(times["mse"]) for loss, of_loss in times.items()}


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
