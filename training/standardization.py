"""Standardisation of the statistics over time in some heads: zero mean and unit deviation over the training set."""

import torch
from accelerate.utils import tqdm

from ..pooling_emoshare import StatisticsPooling

# Least deviation, absolute and relative to the mean, so that a nearly constant statistic, or its rounding error, is not
# amplified.
LEAST_DEVIATION, LEAST_RELATIVE_DEVIATION = 1e-4, 1e-3


def fit_standardization(model, loader, accelerator, encoder=None):
    """
    Sets the mean and deviation of `Standardization` in a model's heads, if they have one. A clip of several windows
    counts as much as one of a single window.

    Args:
        model: `EmoShareModel`.
        loader: `FeatureLoader` of the train split.
        accelerator: `accelerate.Accelerator`; each process sees its part of the clips.
        encoder: `EncoderInTraining`, if there is one. The scale is that of the features before it is tuned.
    """
    heads = [head for head in model.heads if isinstance(head.pooling, StatisticsPooling)]
    if not heads:
        return
    # All heads take the same statistics, of the frames as they are.
    width = len(heads[0].pooling.standardization.mean)
    sums = torch.zeros(1 + 2 * width, dtype=torch.float64)  # of weights, statistics, and their squares
    loader.set_epoch(0)
    model.eval()
    with torch.no_grad():
        for batch in tqdm(loader, desc="Scale of the statistics", unit=" batches", leave=False):
            if encoder is None:
                features, lengths = batch["frame_features"].float(), batch["attention_mask"].sum(dim=1)
            else:
                features, lengths = encoder.frame_features(batch)
            statistics = heads[0].statistics_of(features, lengths).double().cpu()
            is_counted = batch["weights"].view(len(statistics), -1).any(dim=1).cpu()  # false for a repeated batch
            weights = torch.from_numpy(loader.store.weights)[batch["window"].cpu()].double() * is_counted
            sums += torch.cat([weights.sum()[None], weights @ statistics, weights @ statistics.square()])
    if accelerator.num_processes > 1:  # not for a single process, whose device may lack float64
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    total, first, second = sums.split([1, width, width])
    mean = first / total
    least = (LEAST_RELATIVE_DEVIATION * mean.abs()).clamp(min=LEAST_DEVIATION)
    deviation = (second / total - mean.square()).clamp(min=0).sqrt().maximum(least)
    for head in heads:
        head.pooling.standardization.mean.copy_(mean)
        head.pooling.standardization.deviation.copy_(deviation)
