"""Batches of windows of similar length, with hardly any padding, and their transfer to the device."""

import time
from itertools import count, cycle, islice

import numpy as np
import torch
from torch.utils.data import Sampler

from .read_ahead import ReadAhead

# Batches that are buffered for an accelerator. Threads read them: worker processes would need space in /dev/shm.
BATCHES_AHEAD = 4
# Relative noise on lengths before sorting, so that clips have other neighbours in each epoch.
LENGTH_JITTER = 0.02


def batches_by_length(lengths, budget, rng=None):
    """
    Divides clips into batches of similar length. A batch holds at most `budget` frames, including padding, or one clip.

    Args:
        lengths: (clips,) lengths, in frames or any other unit.
        budget: largest size of a batch, in the same unit: its longest length times its number of clips.
        rng: `np.random.Generator` that shuffles clips of similar length, and the order of the batches.

    Returns:
        `list[np.ndarray]`: the indices of each batch.
    """
    lengths = np.asarray(lengths)
    keys = lengths.astype(float)
    if rng is not None:
        keys *= rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, size=len(keys))
    order = np.argsort(keys, kind="stable")
    lengths = lengths[order]
    batches, first = [], 0
    while first < len(order):
        most = int(budget // lengths[first]) + 1  # more of this length, or longer ones, never fit
        longest = np.maximum.accumulate(lengths[first : first + most])
        held = np.count_nonzero(longest * np.arange(1, len(longest) + 1) <= budget)
        batches.append(order[first : first + max(held, 1)])
        first += len(batches[-1])
    if rng is not None:
        rng.shuffle(batches)
    return batches


class LengthBatchSampler(Sampler):
    """
    The part of one process of the batches of clips of similar length.

    Args:
        lengths: (clips,) frames.
        clips_per_batch: average number of clips; a batch holds this many times the mean length.
        accelerator: `accelerate.Accelerator`, which knows the processes.
        seed: of the shuffling, together with the epoch. Every process then has the same number of batches: if these
            cannot be divided evenly, some of the first batches are repeated. Without a seed, nothing is shuffled or
            repeated.

    Attributes:
        all_batches: the batches of an epoch, of all processes, with repetitions at the end.
        num_distinct: number of batches without repetitions.
    """

    def __init__(self, lengths, clips_per_batch, accelerator, seed=None):
        self.lengths = np.asarray(lengths)
        self.budget = clips_per_batch * self.lengths.mean()
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        self.all_batches = batches_by_length(self.lengths, self.budget, rng)
        self.num_distinct = len(self.all_batches)
        if self.seed is not None:
            self.all_batches += list(islice(cycle(self.all_batches), -len(self.all_batches) % self.processes))

    @property
    def padding(self):
        """Fraction of padding in all frames of an epoch."""
        held = sum(len(batch) * self.lengths[batch].max() for batch in self.all_batches)
        return 1 - sum(self.lengths[batch].sum() for batch in self.all_batches) / held

    def __len__(self):
        return len(range(self.process, len(self.all_batches), self.processes))

    def __iter__(self):
        return iter(self.all_batches[self.process :: self.processes])


class FeatureLoader:
    """
    Batches of a store on the device; measures how long the caller waits for them.

    A batch holds what `FrameFeatureStore.collate` returns, and `weight_per_step`, (labels,): the sum of the weights of
    all windows whose share of a label is known, divided by the number of batches in the epoch. If a loss, summed over
    the windows of a batch by weight, is divided by it, each clip has the same influence on an epoch, however many clips
    its batch holds, and the mean over the steps is the mean over the clips. A batch that is repeated, so that all
    processes have equally many, has zero weights the second time. With `share_weights`, the `weights` of a batch are
    those of the windows times these: (batch, labels).

    Args:
        store: `FrameFeatureStore`.
        config: `EmoShareConfig` of the model that takes the batches.
        clips_per_batch, accelerator, seed: as in `LengthBatchSampler`.
        share_weights: (clips, labels) weight of each share; `None` weighs all alike.

    Attributes:
        padding: fraction of padding in all frames of an epoch.
        waited: total seconds spent waiting for batches.
    """

    def __init__(self, store, config, clips_per_batch, accelerator, seed=None, share_weights=None):
        self.store = store
        self.share_weights = None  # of windows, (windows, labels)
        if share_weights is not None:
            self.share_weights = torch.from_numpy(share_weights[store.clip_of_window]).float()
        self.device = accelerator.device
        frames = store.num_frames
        if config.normalization == "sequence":
            frames = np.full_like(frames, config.max_frames)  # the model pads every clip to this length
        self.sampler = LengthBatchSampler(frames, clips_per_batch, accelerator, seed)
        self.padding = self.sampler.padding
        counted = ~np.isnan(store.shares[store.clip_of_window])  # (windows, labels)
        if self.share_weights is not None:
            counted = counted * self.share_weights.numpy()
        self.known_weight = store.weights.astype(np.float64) @ counted
        self.waited = 0.0

    def __len__(self):
        return len(self.sampler)

    def set_epoch(self, epoch):
        self.sampler.set_epoch(epoch)

    def _read(self, windows):
        batch = self.store.collate([self.store[window] for window in windows])
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def __iter__(self):
        batches = map(self._read, self.sampler)
        if self.device.type != "cpu":  # the CPU is free
            num_threads = self.store.reading_threads
            batches = iter(ReadAhead(self._read, list(self.sampler), lambda batch: 1, BATCHES_AHEAD, num_threads))
        weight_per_step = torch.tensor(self.known_weight / len(self.sampler.all_batches), dtype=torch.float32)
        for number in count(self.sampler.process, self.sampler.processes):
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is not None:
                if self.share_weights is not None:
                    batch["weights"] = batch["weights"][:, None] * self.share_weights[batch["window"]]
                if number >= self.sampler.num_distinct:
                    batch["weights"] = torch.zeros_like(batch["weights"])
                batch["weight_per_step"] = weight_per_step
                batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch
