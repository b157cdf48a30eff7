"""Augmentation of training batches: shares of fewer listeners, stretching in time, mixing of clips, and masks."""

import numpy as np
import torch

from ..frames_emoshare import length_mask
from .randomness import AUGMENTATION, LISTENERS, generator_at

MASKS = 2  # spans of frames, and as many of features, in each clip
# Entries of a batch that are mixed like the features.
MIXED = ("labels", "weights", "listeners")


class Augmentation:
    """
    Changes the batches of a training run as its flags say, in the same way whenever an epoch is repeated.

    Args:
        run: `RunArguments`.
        config: `EmoShareConfig` of the model that takes the batches.
        store: `FrameFeatureStore` that they come from.
        accelerator: `accelerate.Accelerator`.
    """

    def __init__(self, run, config, store, accelerator):
        self.run = run
        self.store = store
        self.device = accelerator.device
        self.process = accelerator.process_index
        self.shortest = config.pool_size
        self.longest = config.max_frames if config.normalization == "sequence" else None
        self.epoch = self.drawn = None
        if run.listener_dropout:
            self.clip_of_window = torch.tensor(store.clip_of_window, device=self.device)

    def set_epoch(self, epoch):
        """Draws the listeners of all clips for an epoch: the same on all processes."""
        self.epoch = epoch
        if self.run.listener_dropout:
            rng = generator_at(self.run.seed, LISTENERS, epoch)
            drawn = drop_listeners(self.store.shares, self.store.listeners, self.run.listener_dropout, rng)
            self.drawn = [torch.from_numpy(values).to(self.device) for values in drawn]

    def __call__(self, batch, step):
        """
        Args:
            batch: of `FeatureLoader`, its features in the dtype to train in.
            step: number of the step in the epoch, on this process.

        Returns:
            The changed batch; the given one is not changed.
        """
        run, rng = self.run, generator_at(self.run.seed, AUGMENTATION, self.epoch, step, self.process)
        batch = dict(batch)
        if run.listener_dropout:
            clips = self.clip_of_window[batch["window"]]
            batch["labels"], listeners = (values[clips] for values in self.drawn)
            if "listeners" in batch:
                batch["listeners"] = listeners
        if run.time_stretch:
            stretch(batch, run.time_stretch, rng, self.shortest, self.longest)
        if run.mixup:
            mix(batch, run.mixup, rng)
        if run.time_mask or run.feature_mask:
            mask(batch, run.time_mask, run.feature_mask, rng)
        return batch


def drop_listeners(shares, listeners, probability, rng):
    """
    Leaves out listeners of each clip at random, and counts the votes of the others. The expected share does not change.

    Args:
        shares: (clips, labels) float32, NaN where unknown.
        listeners: (clips,) float32, number of listeners; clips where it is unknown (NaN) do not change.
        probability: that a listener is left out; one always remains.
        rng: `np.random.Generator`.

    Returns:
        New shares and numbers of listeners. Which listeners voted for which label is unknown, so votes are drawn for
        each label separately, from equally many listeners. A share that is not a whole number of votes is rounded up or
        down at random.
    """
    numbers = np.where(np.isnan(listeners), 1, np.maximum(np.round(np.nan_to_num(listeners)), 1)).astype(np.int64)
    kept = np.maximum(rng.binomial(numbers, 1 - probability), 1)
    votes = np.nan_to_num(shares).astype(np.float64) * numbers[:, None]
    votes = np.minimum(np.floor(votes + rng.random(shares.shape)).astype(np.int64), numbers[:, None])
    drawn = rng.hypergeometric(votes, numbers[:, None] - votes, kept[:, None]) / kept[:, None]
    is_known = ~np.isnan(listeners)
    new_shares = np.where(is_known[:, None] & ~np.isnan(shares), drawn, shares)
    return new_shares.astype(np.float32), np.where(is_known, kept, listeners).astype(np.float32)


def stretch(batch, most, rng, shortest=1, longest=None):
    """
    Stretches or shortens each clip in time, by linear interpolation between its frames: it is spoken more slowly or
    faster, and its spectra stay what they are.

    Args:
        batch: dict with `frame_features`, (clips, ..., frames, width), and `attention_mask`, (clips, frames), which are
            replaced.
        most: a clip gets 1 - most to 1 + most times as many frames, uniformly distributed.
        rng: `np.random.Generator`.
        shortest, longest: least and largest number of frames of a clip; `None` is no limit.
    """
    features, lengths = batch["frame_features"], batch["attention_mask"].sum(dim=1)
    factors = _tensor(rng.uniform(1 - most, 1 + most, len(lengths)), features.device)
    new_lengths = (lengths * factors).round().long().clamp(shortest, longest)
    frames = torch.arange(int(new_lengths.max()), device=features.device)
    last = (lengths - 1)[:, None]
    # The first and the last frame stay the first and the last.
    places = (frames * (last / (new_lengths - 1).clamp(min=1)[:, None])).minimum(last)
    left = places.floor()
    part = _broadcast((places - left).to(features.dtype), features)
    left = left.long()
    before, after = _frames_at(features, left), _frames_at(features, (left + 1).minimum(last))
    batch["frame_features"] = torch.lerp(before, after, part)
    batch["attention_mask"] = length_mask(new_lengths, len(frames))


def mix(batch, alpha, rng):
    """
    Mixes each clip with another one of its batch: features, shares, weights and numbers of listeners become `part`
    times the clip's own plus 1 - `part` times the other's. Batches hold clips of similar length; the mixture is as long
    as the shorter of the two. Its share is unknown if one of the two is.

    Args:
        batch: dict with `frame_features`, (clips, ..., frames, width), `attention_mask`, (clips, frames), and the
            entries in `MIXED`, (clips, ...), all of which are replaced.
        alpha: `part` is drawn from Beta(alpha, alpha) for each clip.
        rng: `np.random.Generator`.
    """
    device, clips = batch["labels"].device, len(batch["labels"])
    other = torch.from_numpy(rng.permutation(clips)).to(device)
    part = _tensor(rng.beta(alpha, alpha, clips), device)
    if "listeners" in batch:
        batch["listeners"] = batch["listeners"].nan_to_num(nan=1.0)  # as losses treat an unknown number
    for name in ("frame_features", *(name for name in MIXED if name in batch)):
        own = batch[name]
        own_part = part.view(-1, *[1] * (own.dim() - 1)).to(own.dtype)
        batch[name] = torch.lerp(own[other], own, own_part)
    batch["attention_mask"] = batch["attention_mask"] & batch["attention_mask"][other]


def mask(batch, most_frames, most_features, rng):
    """
    Masks `MASKS` spans of frames and as many of features in each clip, at random places; spans may overlap. A masked
    frame becomes the mean of the clip's frames. A masked feature becomes its mean over all frames of the batch, because
    its mean over the clip would reveal what is to be hidden.

    Args:
        batch: dict with `frame_features`, (clips, ..., frames, width), which is replaced, and `attention_mask`,
            (clips, frames).
        most_frames, most_features: largest fraction of a clip's frames, and of the features, that is masked. The width
            of a span is from 0 to 1 / `MASKS` times this.
        rng: `np.random.Generator`.
    """
    features, own = batch["frame_features"], batch["attention_mask"]
    lengths = own.sum(dim=1)
    # (clips, ..., 1, width), as a matrix product, which is faster than masking all features
    sums = _matrix(own.to(features.dtype), features) @ features
    if most_frames:
        means = sums / lengths.to(features.dtype).view(-1, *[1] * (features.dim() - 1))
        masked = _spans(lengths, features.shape[-2], most_frames, rng)
        features = torch.where(_broadcast(masked, features), means, features)
    if most_features:
        means = sums.sum(dim=0) / lengths.sum()
        widths = torch.full_like(lengths, features.shape[-1])
        masked = _spans(widths, features.shape[-1], most_features, rng)
        features = torch.where(_matrix(masked, features), means.to(features.dtype), features)
    batch["frame_features"] = features


def _spans(lengths, longest, most, rng):
    """(clips, longest) bool: `MASKS` random spans in each clip, which together cover at most `most` of its length."""
    numbers = _tensor(rng.random((2, MASKS, len(lengths))), lengths.device)
    most_wide = (lengths * (most / MASKS)).floor()
    widths = (numbers[0] * (most_wide + 1)).floor().minimum(most_wide)
    starts = (numbers[1] * (lengths - widths + 1)).floor().minimum(lengths - widths)
    places = torch.arange(longest, device=lengths.device)
    return ((places >= starts[..., None]) & (places < (starts + widths)[..., None])).any(dim=0)


def _frames_at(features, places):
    """The frames at `places`, (clips, frames) int64, of features (clips, ..., frames, width)."""
    rows = features.flatten(0, -2)  # copying whole rows is several times as fast as copying values
    frames = features.shape[-2]
    starts = torch.arange(0, len(rows), frames, device=features.device).view(*features.shape[:-2], 1)
    places = starts + places.view(len(places), *[1] * (features.dim() - 3), -1)
    return rows.index_select(0, places.flatten()).view(*places.shape, features.shape[-1])


def _broadcast(of_frames, features):
    """(clips, frames) -> (clips, ..., frames, 1) as in features (clips, ..., frames, width)"""
    return of_frames.view(len(of_frames), *[1] * (features.dim() - 3), -1, 1)


def _matrix(rows, features):
    """(clips, n) -> (clips, ..., 1, n), to go with features (clips, ..., frames, width)"""
    return rows.view(len(rows), *[1] * (features.dim() - 3), 1, -1)


def _tensor(numbers, device):
    return torch.from_numpy(numbers).to(device, torch.float32)
