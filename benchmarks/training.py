"""
Training speed of the heads: nine emotions at once, against one network at a time as in the released scripts.

    python benchmarks/training.py

The peer is a plain reimplementation of the released design (Architecture 2, sizes of the paper): float32, every clip
padded to 398 frames, a packed LSTM, a Python loop over the clips of a batch for the softmax, Adam. Features are random,
with HuBERT Large's width; clips last 1 to 8 s, 4 s on average. Both sides use batches of 32 clips. Our epoch is
measured as a whole. The peer's is scaled from a few steps right before ours and a few right after it, because all its
steps cost the same, and the speed of a shared machine changes within minutes.

Then comes the devel Spearman in bfloat16 and in float32, on the synthetic corpus with five seeds.
"""

import math
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from machine import DEVICE, describe, matmul_rate, seconds_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import Corpus, load_emotion_share
from emoshare.dataset_script.synthetic import SyntheticCorpus
from emoshare.evaluation.scores import Scorer
from emoshare.frames_emoshare import length_mask
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer

CLIPS, CLIPS_PER_BATCH = 640, 32
WIDTH, MAX_FRAMES = 1024, 398
PEER_STEPS = 3
SEEDS = range(5)
SMALL = {"conv_channels": (24, 24), "pool_size": 4, "lstm_hidden_size": 24, "ffn_sizes": (16,)}


def main():
    print(describe())
    frames = speech_frames(CLIPS)
    print(f"{CLIPS} clips, {frames.mean() / 50:.2f} s on average, batches of {CLIPS_PER_BATCH}\n")
    step = peer_step(frames)
    step()  # warm-up
    steps = len(EMOTIONS) * len(frames) / CLIPS_PER_BATCH
    print("| ours | s an epoch | released design, one network at a time | | padding | waiting for data | limit, s |")
    print("|---|---|---|---|---|---|---|")
    before = seconds_of_peer(step)
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        rate = matmul_rate(dtype)
        for separate_heads in (True, False):
            model = EmoShareModel(EmoShareConfig(feature_size=WIDTH, separate_heads=separate_heads)).to(DEVICE)
            epoch, padding = our_epoch(model, frames, precision)
            after = seconds_of_peer(step)
            peer, before = steps * (before + after) / 2, after
            limit = operations(model.config) * frames.sum() * len(model.heads) / rate
            name = f"{'nine heads' if separate_heads else 'shared trunk'}, {str(dtype).removeprefix('torch.')}"
            print(
                f"| {name} | {epoch.seconds:.1f} | {peer:.1f} | {peer / epoch.seconds:.1f}x | {padding:.1%} | "
                f"{epoch.waiting:.2%} | {limit:.1f} |",
                flush=True,
            )
    print("\nThe limit: counted operations, without padding, at the rate of a large matrix product.\n")
    print_scores()


def speech_frames(clips):
    """Lengths in frames, 1 to 8 s with a mean of 4."""
    return np.clip(np.random.default_rng(0).gamma(6, 33.5, size=clips), 50, MAX_FRAMES).astype(int)


class RandomStore(torch.utils.data.Dataset):
    """Random float16 features with the interface of a `FrameFeatureStore`."""

    input_name = "frame_features"
    reading_threads = 2

    def __init__(self, frames):
        rng = np.random.default_rng(0)
        self.num_frames = frames
        self.clip_of_window = np.arange(len(frames))
        self.weights = np.ones(len(frames), dtype=np.float32)
        self.shares = rng.beta(0.6, 2.5, size=(len(frames), len(EMOTIONS))).astype(np.float32)
        self.features = [rng.standard_normal((length, WIDTH), dtype=np.float32).astype(np.float16) for length in frames]

    def __len__(self):
        return len(self.num_frames)

    def __getitem__(self, index):
        return index

    def collate(self, indices):
        longest = self.num_frames[indices].max()
        batch = np.zeros((len(indices), longest, WIDTH), dtype=np.float16)
        for padded, index in zip(batch, indices, strict=True):
            padded[: self.num_frames[index]] = self.features[index]
        return {
            "frame_features": torch.from_numpy(batch),
            "attention_mask": length_mask(torch.from_numpy(self.num_frames[indices]), longest),
            "labels": torch.from_numpy(self.shares[indices]),
            "weights": torch.from_numpy(self.weights[indices]),
            "window": torch.tensor(indices),
        }


def our_epoch(model, frames, precision):
    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    run = RunArguments(per_device_train_batch_size=CLIPS_PER_BATCH, mixed_precision=precision)
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    for store in (RandomStore(frames[:CLIPS_PER_BATCH]), RandomStore(frames)):  # the first is a warm-up
        trainer = HeadTrainer(model, {"train": store, "devel": store}, None, arguments, accelerator)
        epoch = trainer.train_epoch(trainer.progress.heads)
    return epoch, trainer.loader.padding


def operations(config):
    """Multiplications and additions of one head for one frame, forward and backward."""
    convolutions = [
        2 * config.conv_kernel_size * inputs * outputs
        for inputs, outputs in zip((config.feature_size, *config.conv_channels), config.conv_channels, strict=False)
    ]
    hidden = config.lstm_hidden_size
    lstm = sum(2 * 4 * hidden * (width + hidden) for width in (config.conv_channels[-1], hidden)) / config.pool_size
    # Backward costs twice the forward pass, but the features need no gradient.
    return 3 * (sum(convolutions) + lstm) - convolutions[0]


class ReleasedNetwork(nn.Module):
    """The released Architecture 2, in its released sizes."""

    def __init__(self):
        super().__init__()
        widths = (WIDTH, 768, 384, 192)
        layers = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv1d(width_in, width_out, 3, padding=1), nn.ReLU()]
        self.cnn = nn.Sequential(*layers, nn.MaxPool1d(2, 2))
        self.map_norm = nn.LayerNorm((MAX_FRAMES // 2, 192))
        self.lstm = nn.LSTM(192, 512, num_layers=2, batch_first=True)
        self.query = nn.Linear(1024, 512)
        self.weight_norm = nn.LayerNorm((1, MAX_FRAMES // 2))
        layers = []
        for width_in, width_out in ((512, 256), (256, 128), (128, 64)):
            layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.LayerNorm(width_out)]
        self.ffn = nn.Sequential(*layers, nn.Linear(64, 1), nn.ReLU())

    def forward(self, features, lengths):
        """(batch, width, frames), (batch,) steps -> (batch, 1)"""
        maps = self.map_norm(self.cnn(features).transpose(1, 2))
        packed = pack_padded_sequence(maps, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        states, _ = pad_packed_sequence(states, batch_first=True)
        query = self.query(torch.cat([last[0], last[1]], dim=1))
        scores = (query[:, None] @ states.transpose(1, 2)) / math.sqrt(512)  # (batch, 1, steps)
        weights = torch.zeros(len(features), 1, MAX_FRAMES // 2, device=features.device)
        for index, steps in enumerate(lengths.tolist()):
            weights[index, 0, :steps] = scores[index, 0, :steps].softmax(dim=0)
        weights = self.weight_norm(weights)[:, :, : states.shape[1]]
        return self.ffn((weights @ states)[:, 0])


def peer_step(frames):
    """Returns a function that trains one network on a batch."""
    network = ReleasedNetwork().to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    lengths = frames[:CLIPS_PER_BATCH]
    features = torch.zeros(CLIPS_PER_BATCH, WIDTH, MAX_FRAMES)
    for clip, length in zip(features, lengths, strict=True):
        clip[:, :length] = torch.randn(WIDTH, length)
    features, shares = features.to(DEVICE), torch.rand(CLIPS_PER_BATCH, 1, device=DEVICE)
    steps = torch.from_numpy(lengths // 2)

    def step():
        loss = nn.functional.mse_loss(network(features, steps), shares)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds_of_peer(step):
    """Mean seconds of a few steps."""
    return sum(seconds_of(step) for _ in range(PEER_STEPS)) / PEER_STEPS


def print_scores():
    """Prints whether bfloat16 loses accuracy: devel ρ of small heads on log-mels of the synthetic corpus."""
    print("Synthetic corpus, mean devel rho (compares precisions, and says nothing about people):")
    print("| seed | bfloat16 | float32 |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        synthetic = SyntheticCorpus(train=400, devel=200, test=1)
        splits = load_emotion_share("synthetic", cache_dir=folder, synthetic=synthetic)
        corpus = Corpus("synthetic", splits, list(EMOTIONS))
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        accelerator.print = lambda *_: None
        extractor, model = EmoShareFeatureExtractor("mel"), EmoShareModel(EmoShareConfig(**SMALL))
        stores = {
            split: extract_frame_features(corpus, split, model, extractor, Path(folder), accelerator, "float32")
            for split in ("train", "devel")
        }
        scorer = Scorer(stores["devel"].shares, list(EMOTIONS))
        scores = []
        for seed in SEEDS:
            scores.append(
                [best_score(seed, precision, stores, scorer, folder, accelerator) for precision in ("bf16", "no")]
            )
            print(f"| {seed} | {scores[-1][0]:.3f} | {scores[-1][1]:.3f} |", flush=True)
        difference = np.subtract(*np.transpose(scores))
        error = difference.std(ddof=1) / math.sqrt(len(SEEDS))
        print(f"bfloat16 minus float32: {difference.mean():+.3f}, standard error {error:.3f}")


def best_score(seed, precision, stores, scorer, folder, accelerator):
    torch.manual_seed(seed)
    model = EmoShareModel(EmoShareConfig(**SMALL))
    output_dir = Path(folder) / f"{precision}-{seed}"
    run = RunArguments(
        output_dir=str(output_dir),
        num_train_epochs=5,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        mixed_precision=precision,
        seed=seed,
    )
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    progress = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()
    return float(np.mean([head.best.score for head in progress.heads]))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
