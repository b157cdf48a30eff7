"""A loaded corpus: its clips, their shares, and facts about them."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property

import datasets
import numpy as np

from .audio import Clip, clip_digests, fingerprint_of
from .corpora import CORPORA, corpus_named, is_published
from .emotion_share import EmotionShare, prepare
from .facts import LISTENERS, is_known
from .published import load_published
from .tables import AUDIO, FILENAME


@dataclass(frozen=True)
class Corpus:
    """
    Attributes:
        name: key of `CORPORA`. A published dataset has the key of the corpus that it is a copy of, or `"csv"`.
        splits (`datasets.DatasetDict`): `train`, `devel` and, where there is one, `test`. A row is a clip: `filename`,
            `audio` (`{"bytes", "path"}`, not decoded), a column per label and a column per fact.
        labels: label names, in their order.
        facts: names of the facts about clips.
        rows: by split, each clip's row in `lab/SPLIT.csv`, if the clips come from there.
        whole: the original `Corpus`, if its clips were split in another way here: see `resplit`.
        origins: by split, each clip's index among all clips of `whole`, split after split.
    """

    name: str
    splits: datasets.DatasetDict
    labels: list[str]
    facts: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    whole: "Corpus | None" = None
    origins: dict[str, list[int]] = field(default_factory=dict)

    @property
    def info(self):
        """`CorpusInfo`; if the corpus was resplit, without what only holds for its own splits."""
        info = CORPORA[self.name]
        if self.whole is None:
            return info
        return replace(info, split_sizes=None, is_papers=False, noise_ceiling=None)

    @property
    def as_stored(self):
        """The `Corpus` by whose splits frame features are stored: `whole`, if this corpus was resplit."""
        return self if self.whole is None else self.whole

    def resplit(self, clips):
        """
        Args:
            clips: for each new split, the indices of its clips among all clips of the corpus, split after split.

        Returns:
            `Corpus` with these splits, whose `whole` is this one.
        """
        all_clips = datasets.concatenate_datasets(list(self.splits.values()))
        splits = datasets.DatasetDict({split: all_clips.select(indices) for split, indices in clips.items()})
        origins = {split: [int(index) for index in indices] for split, indices in clips.items()}
        return replace(self, splits=splits, rows={}, whole=self, origins=origins)

    def column(self, split, name):
        """
        A whole column of a split, (clips,), as Arrow converts it to NumPy: null is NaN in a column of numbers, and
        `None` in a column of text. Reading it value by value would take a thousand times as long.
        """
        if self.whole is None:
            return self.splits[split].with_format("arrow")[name][:].to_numpy()
        # `datasets` reads a selection of rows, such as a fold, row by row, but a whole column at once.
        of_whole = [self.whole.column(own, name) for own in self.whole.splits]
        return np.concatenate(of_whole)[self.origins[split]]

    def filenames(self, split):
        """List of the names of a split's clips."""
        return self.column(split, FILENAME).tolist()

    @cached_property
    def metadata(self):
        """The facts: {split: {fact: list with a value per clip}}, `None` where a value is not known."""
        return {split: {fact: self._fact(split, fact) for fact in self.facts} for split in self.splits}

    def _fact(self, split, fact):
        return [value if is_known(value) else None for value in self.column(split, fact).tolist()]

    def shares(self, split):
        """The true shares of a split's clips: (clips, labels) float64, NaN where one is not known; read-only."""
        return self._shares[split]

    @cached_property
    def _shares(self):
        shares = {}
        for split, clips in self.splits.items():
            # Column-major, because the fingerprints of stores in existing checkpoints depend on it.
            shares[split] = np.empty((len(clips), len(self.labels)), order="F")
            for index, label in enumerate(self.labels):
                shares[split][:, index] = self.column(split, label)
            shares[split].flags.writeable = False  # all callers get the same array
        return shares

    def fingerprints(self):
        """
        Fingerprints by which results identify their corpus. For each split, `clips` changes with the names and the
        content of its clips, and `shares` with the labels and their shares.
        """
        return {
            split: {"clips": fingerprint_of(digests), "shares": self._shares_fingerprint(split)}
            for split, digests in self._digests().items()
        }

    def _digests(self):
        """`clip_digests` of each split, taken from those of `whole`: published clips take long to read."""
        if self.whole is None:
            return {split: clip_digests(clips) for split, clips in self.splits.items()}
        of_whole = [digest for digests in self.whole._digests().values() for digest in digests]
        return {split: [of_whole[index] for index in indices] for split, indices in self.origins.items()}

    def _shares_fingerprint(self, split):
        shares = self.shares(split)
        numbers = np.where(np.isnan(shares), -1.0, shares).astype("<f8").tobytes()
        return hashlib.blake2b(json.dumps(self.labels).encode() + numbers, digest_size=16).hexdigest()

    def place(self, split, index):
        """The file or split where a clip is listed, and the row in it, for messages."""
        if self.whole is not None:
            split, index = self.whole.split_of(self.origins[split][index])
            return self.whole.place(split, index)
        rows = self.rows.get(split)
        return (f"lab/{split}.csv", rows[index]) if rows else (split, index)

    def split_of(self, index):
        """The split, and the index in it, of the clip with this index among all clips, split after split."""
        for split, clips in self.splits.items():
            if index < len(clips):
                return split, index
            index -= len(clips)
        raise IndexError(f"there is no clip {index} after the last one")

    def audio(self, split):
        """The split's clips as a list of `Clip`, which read their audio on access."""
        clips = self.splits[split].select_columns([AUDIO])
        return [Clip(clips, index, filename) for index, filename in enumerate(self.filenames(split))]

    def listeners(self, split):
        """Number of listeners who heard each clip: (clips,) float64, NaN where it is not known."""
        if LISTENERS not in self.facts:
            return np.full(len(self.splits[split]), np.nan)
        return np.array(self.metadata[split][LISTENERS], dtype=np.float64)


def load_corpus(dataset, data_dir=None, cache_dir=None, streaming=False):
    """
    Args:
        dataset: a key of `CORPORA`, or a published dataset: its Hub id `ORG/NAME` or its folder of Parquet files.
        data_dir: the corpus's folder, for those that need one.
        cache_dir: where Arrow files and generated corpora are kept; the cache of `datasets` by default.
        streaming: whether the audio of a published dataset stays in its Parquet files, and is read when needed.

    Returns:
        `Corpus`.

    Raises:
        ValueError, FileNotFoundError: if anything is wrong with the corpus; names file, split and row.
        datasets.exceptions.DatasetNotFoundError: if there is no such dataset on the Hub, or no access to it.
    """
    if not is_published(dataset):
        return built(EmotionShare(dataset, data_dir=data_dir, cache_dir=cache_dir))
    if data_dir is not None:
        raise ValueError(f"data_dir: got {data_dir}, but {dataset} is a published dataset, which needs none")
    splits, labels, facts = load_published(dataset, cache_dir, streaming)
    return Corpus(corpus_named(splits["train"].info.config_name), splits, labels, facts)


def built(builder):
    """The `Corpus` that an `EmotionShare` builds."""
    prepare(builder)
    tables = builder.tables
    rows = {split: table.rows for split, table in tables.splits.items()}
    return Corpus(builder.config.name, builder.as_dataset(), tables.labels, tables.facts, rows)
