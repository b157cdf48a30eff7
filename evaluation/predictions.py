"""Predicted shares of clips."""

import numpy as np
import torch

from ..windows_emoshare import average_by_duration


def predict(model, loader, accelerator):
    """
    Predicts every clip of a store in float32, on all processes together; windows of a clip are averaged by duration.

    Args:
        model: `EmoShareModel`, which need not have its backbone.
        loader: `FeatureLoader` without a seed.
        accelerator: `accelerate.Accelerator`.

    Returns:
        `np.ndarray`: (clips, labels) float64, in the order of the clips; the same on each process.
    """
    store = loader.store
    shares = np.zeros((len(store), model.config.num_labels))  # of windows
    model.eval()
    for batch in loader:
        with torch.no_grad():
            logits = model(
                frame_features=batch["frame_features"].float(), attention_mask=batch["attention_mask"]
            ).logits
        shares[batch["window"].cpu().numpy()] = logits.cpu().numpy()
    if accelerator.num_processes > 1:  # each window was predicted on one of them
        shares = accelerator.reduce(torch.from_numpy(shares).to(accelerator.device)).cpu().numpy()
    return average_by_duration(shares, store.num_samples, store.clip_of_window, len(store.clips))
