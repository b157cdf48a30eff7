"""Loads a published emotion share corpus, and checks it as strictly as one in a local folder."""

import datasets
import numpy as np

from ..configuration_emoshare import EMOTIONS
from .emotion_share import warn_of_other_sizes
from .labels import FILENAME, SPLITS, Problems


def load_published(name):
    """
    Args:
        name: a dataset on the Hugging Face Hub (`ORG/NAME`) or a folder, written by `python -m emoshare.dataset_script`
            or by anybody else: the splits `train`, `devel` and perhaps `test` (others are left alone); a column
            `filename`, a column `audio`, and one column of numbers per label.

    Returns:
        `datasets.DatasetDict` with these splits, audio not decoded.

    Raises:
        ValueError: if anything is wrong with it; says what came, and what was expected.
        DatasetNotFoundError: if there is no such dataset, or it is private and not ours.
    """
    published = datasets.load_dataset(name)
    splits = datasets.DatasetDict({split: published[split] for split in SPLITS if split in published})
    if not {"train", "devel"} <= set(splits):
        raise ValueError(f"{name}: got the splits {list(published)}; expected train, devel and, if there is one, test")
    # `datasets` sees to it that all splits have the same columns.
    labels = _checked_labels(name, splits["train"].info)
    _check_rows(name, splits, labels)
    if splits["train"].info.config_name == "compare2023":
        warn_of_other_sizes({split: len(clips) for split, clips in splits.items()})
    return splits.cast_column("audio", datasets.Audio(decode=False))


def _checked_labels(name, info):
    """Returns the labels; wrong columns make every row meaningless, so they raise at once."""
    kinds = {
        column: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for column, feature in info.features.items()
    }
    labels = [column for column in kinds if column not in (FILENAME, "audio")]
    is_right = kinds.get(FILENAME) in ("string", "large_string") and kinds.get("audio") == "Audio" and labels
    if not is_right or not all(kinds[label].startswith(("float", "int", "uint")) for label in labels):
        raise ValueError(
            f"{name}: got the columns {kinds}; expected 'filename' (string), 'audio' (Audio), a column of numbers for "
            "each label, and nothing else"
        )
    if info.config_name == "compare2023" and labels != list(EMOTIONS):
        raise ValueError(f"{name}: got the labels {labels}; its configuration is compare2023: expected {EMOTIONS}")
    return labels


def _check_rows(name, splits, labels):
    problems, first_seen = Problems(name), {}
    for split, clips in splits.items():
        for row, filename in enumerate(clips[FILENAME]):
            if not filename:
                problems.add(split, row, f"filename is {filename!r}; expected text")
            elif filename in first_seen:
                problems.add(split, row, f"{filename} is listed again; first in {first_seen[filename]}")
            first_seen.setdefault(filename, f"{split}, row {row}")
        for label in labels:
            shares = np.array(clips[label][:], dtype=np.float64)  # null becomes NaN
            is_right = (shares >= 0) & (shares <= 1)
            if split == "test":
                is_right |= np.isnan(shares)
            for row in np.flatnonzero(~is_right):
                problems.add(split, row, f"{label} is {shares[row]:g}; expected a number in [0, 1]")
    problems.raise_if_any()
