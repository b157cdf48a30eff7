"""A task that tuned layers can solve, but heads on frozen random layers cannot. It is generated in seconds."""

import numpy as np
import torch

from emoshare.frames_emoshare import length_mask


class MemoryStore:
    """
    Frame features in memory, with the interface of a `FrameFeatureStore`.

    Args:
        features: a (frames, width) float32 tensor for each clip.
        shares: (clips, labels) float32.
    """

    input_name = "frame_features"
    reading_threads = 1
    fingerprint = "memory"

    def __init__(self, features, shares):
        self.features, self.shares, self.clips = features, shares, range(len(features))
        self.clip_of_window = np.arange(len(features))
        self.num_samples = self.num_frames = np.array([len(frames) for frames in features])
        self.weights = np.ones(len(features), dtype=np.float32)

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return index

    def collate(self, indices):
        lengths = torch.from_numpy(self.num_frames[indices])
        features = [self.features[index] for index in indices]
        return {
            "frame_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
            "attention_mask": length_mask(lengths, int(lengths.max())),
            "labels": torch.from_numpy(self.shares[indices]),
            "weights": torch.from_numpy(self.weights[indices]),
            "window": torch.tensor(indices),
        }


def marked_frames(clips, seed, width=32):
    """
    A `MemoryStore` of random frames with one marked frame per clip, whose values along two directions give the two
    shares. The mean and deviation over time hardly show these values; a layer that finds the mark can read them.
    """
    rng = np.random.default_rng(seed)
    (mark, *directions), _ = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))
    features, values = [], []
    for _ in range(clips):
        frames = rng.standard_normal((rng.integers(20, 50), width))
        frames -= np.outer(frames @ mark, mark)
        marked = rng.integers(len(frames))
        frames[marked] += 5 * mark
        features.append(torch.from_numpy(frames.astype(np.float32)))
        values.append([frames[marked] @ direction for direction in directions[:2]])
    return MemoryStore(features, (1 / (1 + np.exp(-2 * np.array(values)))).astype(np.float32))


def through(model, store):
    """The same clips as the outputs of a model's tuned layers in their present state."""
    upper_layers = model.eval().trained_part().upper_layers
    with torch.no_grad():
        features = [upper_layers(frames[None], torch.tensor([len(frames)]))[0] for frames in store.features]
    return MemoryStore(features, store.shares)
