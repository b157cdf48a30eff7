"""A store of any number of windows with the lengths of real clips, but with narrow features that fit on any disk."""

import shutil
from dataclasses import dataclass

import numpy as np

from emoshare.training.features import SHARDS
from emoshare.training.store import begin, finish, shard_path, shard_writer

WIDTH = 1
SAMPLING_RATE = 16000
FRAME_RATE = 50
LABELS = [f"label {number}" for number in range(9)]


@dataclass
class FabricatedCorpus:
    """The parts of a corpus that a store needs, without audio."""

    windows: int
    labels = LABELS

    def __post_init__(self):
        self.splits = {"train": range(self.windows)}
        self.metadata = {"train": {}}
        self.beta = np.random.default_rng(0).beta(0.6, 2.5, size=(self.windows, len(LABELS)))

    def shares(self, split):
        return self.beta

    def listeners(self, split):
        return np.full(self.windows, np.nan)


def speech_seconds(clips):
    """Clip lengths of 1 to 8 s with a mean of 4. Some are always the longest, which determines a batch's memory."""
    seconds = np.clip(np.random.default_rng(clips).gamma(6, 0.67, size=clips), 1, 8)
    seconds[:32:8] = 8
    return seconds


def fabricate(folder, windows):
    """Writes a store of one window per clip, as an extraction does, to `folder / "store"`; returns its path."""
    unfinished, store = folder / "store.unfinished", folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    begin(unfinished)
    seconds = speech_seconds(windows)
    per_shard = max(128, -(-windows // SHARDS))
    for first in range(0, windows, per_shard):
        clips = range(first, min(first + per_shard, windows))
        with shard_writer(shard_path(unfinished, clips, 0, 1), "float16") as write:
            for clip in clips:
                features = np.full((int(seconds[clip] * FRAME_RATE), WIDTH), clip % 1000, np.float16)
                samples = int(seconds[clip] * SAMPLING_RATE)
                write({"clip": clip, "start": 0, "num_samples": samples, "features": features})
    finish(unfinished, store, "float16")
    return store
