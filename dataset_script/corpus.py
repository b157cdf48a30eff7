"""A loaded corpus: its clips, their shares, and what else is known about them."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import datasets
import numpy as np

from .audio import Clip, clips_fingerprint
from .corpora import CORPORA, corpus_named, is_published
from .emotion_share import EmotionShare, prepare
from .facts import LISTENERS, is_known
from .published import load_published
from .tables import FILENAME


@dataclass(frozen=True)
class Corpus:
    """
    Attributes:
        name: key of `CORPORA`. A published dataset has that of the corpus it is a copy of, or `"csv"`.
        splits (`datasets.DatasetDict`): `train`, `devel` and, where there is one, `test`. A row is a clip: `filename`,
            `audio` (`{"bytes", "path"}`, not decoded), a column per label and a column per fact.
        labels: label names, in their order.
        facts: names of the facts about clips.
        rows: by split, each clip's row in `lab/SPLIT.csv`, where the clips are from there.
    """

    name: str
    splits: datasets.DatasetDict
    labels: list[str]
    facts: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def info(self):
        """`CorpusInfo`."""
        return CORPORA[self.name]

    @cached_property
    def metadata(self):
        """The facts: {split: {fact: list of a value per clip}}, `None` where a value is not known."""
        return {
            split: {fact: [value if is_known(value) else None for value in clips[fact][:]] for fact in self.facts}
            for split, clips in self.splits.items()
        }

    def shares(self, split):
        """The true shares of a split's clips: (clips, labels) float64, NaN where one is not known."""
        return known_shares(self.splits[split], self.labels)

    def fingerprints(self):
        """
        Of each split, `clips`, which changes with the names and the content of its clips, and `shares`, which changes
        with the labels and their shares: what results say of the corpus that they were made from.
        """
        return {
            split: {"clips": clips_fingerprint(clips), "shares": self._shares_fingerprint(split)}
            for split, clips in self.splits.items()
        }

    def _shares_fingerprint(self, split):
        shares = self.shares(split)
        numbers = np.where(np.isnan(shares), -1.0, shares).astype("<f8").tobytes()
        return hashlib.blake2b(json.dumps(self.labels).encode() + numbers, digest_size=16).hexdigest()

    def place(self, split, index):
        """Where a clip is listed, for messages: the file or split, and the row in it."""
        rows = self.rows.get(split)
        return (f"lab/{split}.csv", rows[index]) if rows else (split, index)

    def audio(self, split):
        """The split's clips as a list of `Clip`, of which none holds its audio before that is asked for."""
        filenames = self.splits[split][FILENAME][:]
        return [Clip(self.splits[split], index, filename) for index, filename in enumerate(filenames)]

    def listeners(self, split):
        """How many listeners heard each clip: (clips,) float64, NaN where that is not known."""
        if LISTENERS not in self.facts:
            return np.full(len(self.splits[split]), np.nan)
        return np.array(self.metadata[split][LISTENERS], dtype=np.float64)


def known_shares(clips, labels):
    """The shares in a `datasets.Dataset`: (clips, labels) float64, NaN where one is not known."""
    # The slice reads a column in one go; without it NumPy would read the column value by value.
    return np.array([clips[label][:] for label in labels], dtype=np.float64).T


def load_corpus(dataset, data_dir=None, cache_dir=None):
    """
    Args:
        dataset: a key of `CORPORA`, or a published dataset: its Hub id `ORG/NAME` or its folder of Parquet files.
        data_dir: the corpus's folder, for those that need one.
        cache_dir: where Arrow files and corpora that are made are kept; the cache of `datasets` by default.

    Returns:
        `Corpus`.

    Raises:
        ValueError, FileNotFoundError: if anything is wrong with the corpus; names file, split and row.
        datasets.exceptions.DatasetNotFoundError: if there is no such dataset on the Hub, or it is private and not ours.
    """
    if not is_published(dataset):
        builder = EmotionShare(dataset, data_dir=data_dir, cache_dir=cache_dir)
        prepare(builder)
        tables = builder.tables
        rows = {split: table.rows for split, table in tables.splits.items()}
        return Corpus(dataset, builder.as_dataset(), tables.labels, tables.facts, rows)
    if data_dir is not None:
        raise ValueError(f"data_dir: got {data_dir}, but {dataset} is a published dataset, which needs none")
    splits, labels, facts = load_published(dataset, cache_dir)
    return Corpus(corpus_named(splits["train"].info.config_name), splits, labels, facts)
