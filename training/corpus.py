"""The corpus of a run, loaded once and checked before anything is trained."""

import numpy as np

from ..dataset_script import load_emotion_share, load_published
from ..dataset_script.labels import FILENAME
from .arguments import is_published


def load_splits(data, accelerator):
    """
    Args:
        data: `DataArguments`.
        accelerator: `accelerate.Accelerator`; the first process of each machine builds or downloads what the others
            then read.

    Returns:
        `datasets.DatasetDict` with `train`, `devel` and, where there is one, `test`; and the label names.
    """
    with accelerator.local_main_process_first():
        if is_published(data.dataset):
            splits = load_published(data.dataset)
        else:
            splits = load_emotion_share(data.dataset, data_dir=data.data_dir)
    if data.max_train_samples is not None:
        splits["train"] = splits["train"].take(min(data.max_train_samples, len(splits["train"])))
    accelerator.print("Clips: " + ", ".join(f"{len(clips)} {split}" for split, clips in splits.items()))
    return splits, [column for column in splits["train"].column_names if column not in (FILENAME, "audio")]


def known_shares(clips, labels):
    """The true shares (clips, labels) of a split of `load_splits`, float64; NaN where one is not known."""
    return np.array([clips[label] for label in labels], dtype=np.float64).T
