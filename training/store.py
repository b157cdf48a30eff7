"""The frame feature store: unpadded frame features of all clips, read from disk without copying."""

import json
import math
import os
import re
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo, Features
from datasets.fingerprint import Hasher

from ..dataset_script.whole_files import NotWrittenError, put_in_place, whole_file, writing
from ..frames_emoshare import length_mask
from .window_index import MappedFiles, WindowIndex, scan

# The dtypes of stored features. Arrow has no bfloat16, so its bits are stored as integers.
FEATURE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATE = "state.json"  # names the shards of a store
INDEX = "windows.arrow"  # says where each window of a store is
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream
ARROW_TYPES = {"float16": pa.float16(), "bfloat16": pa.int16(), "float32": pa.float32()}


class FrameFeatureStore(torch.utils.data.Dataset):
    """
    The frame features of a split, one item per window, in the order of the clips. On disk, this is a dataset that
    `datasets.load_from_disk` reads, with a row per window. Labels and facts about the clips come from the corpus and
    are not stored, so that changing them does not require a new extraction.

    Args:
        folder (`Path`): the store.
        corpus: `Corpus`.
        split: name of the split.

    Attributes:
        clips: the split, a `datasets.Dataset`.
        labels: label names.
        shares: (clips, labels) float32, NaN where unknown.
        listeners: (clips,) float32, how many listeners rated a clip, NaN where unknown.
        metadata: facts about the clips: by name, a value per clip.
        clip_of_window: (windows,) int64, index of each window's clip.
        num_samples: (windows,) int64, each window's length in samples.
        num_frames: (windows,) int64, each window's number of frames.
        weights: (windows,) float32, each window's fraction of its clip's duration, by which its shares count in the
            clip's prediction; those of a clip sum to 1.
        fingerprint: changes with the features, the labels, the shares and, if any are known, the numbers of listeners.
        input_name: argument of `EmoShareModel.forward` that takes the features.
    """

    input_name = "frame_features"
    reading_threads = 2  # that read ahead for an accelerator

    def __init__(self, folder, corpus, split):
        self._take_clips(corpus, split)
        votes = (self.labels, self.shares)
        if not np.isnan(self.listeners).all():
            votes += (self.listeners,)
        self.fingerprint = f"{folder.name}-{Hasher.hash(votes)}"
        index = index_of(folder)
        if index is None:
            raise ValueError(f"{folder}: is damaged; delete the folder")
        clips_found = np.flatnonzero(np.diff(index.clip, prepend=-1))
        if not np.array_equal(index.clip[clips_found], np.arange(len(self.clips))):
            raise ValueError(
                f"{folder}: holds features of other clips than the split's {len(self.clips)}; delete the folder"
            )
        self.clip_of_window, self.num_samples, self.num_frames = index.clip, index.num_samples, index.num_frames
        self.weights = weights_of_windows(self.clip_of_window, self.num_samples)
        self.shard, self.offset, self.form = index.shard, index.offset, index.form
        self.files = MappedFiles([folder / name for name in index.sizes])
        (self.dtype,) = (name for name, kind in ARROW_TYPES.items() if kind.to_pandas_dtype() == np.dtype(index.dtype))

    def _take_clips(self, corpus, split):
        self.clips = corpus.splits[split]
        self.labels = corpus.labels
        self.shares = corpus.shares(split).astype(np.float32)
        self.listeners = corpus.listeners(split).astype(np.float32)
        self.metadata = corpus.metadata[split]

    def __len__(self):
        return len(self.clip_of_window)

    def __getitem__(self, index):
        return {
            self.input_name: self._features(index),
            "labels": self.shares[self.clip_of_window[index]],
            "listeners": self.listeners[self.clip_of_window[index]],
            "weights": self.weights[index],
            "window": index,
        }

    def _features(self, index):
        """The features of a window, a view of the mapped file."""
        *layers, width = self.form
        shape = (*layers, int(self.num_frames[index]), width)
        content, offset = self.files[int(self.shard[index])], int(self.offset[index])
        dtype = ARROW_TYPES[self.dtype].to_pandas_dtype()
        return np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)

    def collate(self, windows):
        """
        Combines items into a batch of tensors: features, zero-padded to the longest, `attention_mask`, `labels` and
        `listeners` as `EmoShareModel.forward` takes them, `weights` as `EmoShareModel.loss` takes them, and `window`,
        (batch,), the index of each window.
        """
        return {
            **self._padded([window[self.input_name] for window in windows]),
            "labels": torch.from_numpy(np.stack([window["labels"] for window in windows])),
            "listeners": torch.tensor([window["listeners"] for window in windows]),
            "weights": torch.tensor([window["weights"] for window in windows]),
            "window": torch.tensor([window["window"] for window in windows]),
        }

    def _padded(self, features):
        """The features of several windows and their mask as a batch of tensors."""
        lengths = torch.tensor([array.shape[-2] for array in features])
        longest = int(lengths.max())
        batch = np.zeros((len(features), *features[0].shape[:-2], longest, features[0].shape[-1]), features[0].dtype)
        for padded, array in zip(batch, features, strict=True):
            padded[..., : array.shape[-2], :] = array
        return {
            "frame_features": torch.from_numpy(batch).view(FEATURE_DTYPES[self.dtype]),
            "attention_mask": length_mask(lengths, longest),
        }


class ResplitFeatureStore(FrameFeatureStore):
    """
    The frame features of a split of a corpus that was split anew: a view of the stores of the original splits.

    Args:
        stores: the `FrameFeatureStore` of each split of `corpus.whole`, by split.
        corpus: `Corpus` that `Corpus.resplit` returned.
        split: name of a split of this corpus.
    """

    def __init__(self, stores, corpus, split):
        self._take_clips(corpus, split)
        stores = [stores[name] for name in corpus.whole.splits]
        names = "+".join(store.fingerprint for store in stores)
        self.fingerprint = f"{names}-{Hasher.hash((self.labels, self.shares, corpus.origins[split]))}"
        place = np.full(sum(len(store.clips) for store in stores), -1)  # of each clip of the whole corpus in this split
        place[corpus.origins[split]] = np.arange(len(self.clips))
        clip = place[_joined(stores, "clip_of_window", indices_of=lambda store: store.clips)]
        # The windows of each clip are in order already.
        windows = np.argsort(clip, kind="stable")[np.count_nonzero(clip < 0) :]
        self.clip_of_window = clip[windows]
        self.num_samples, self.num_frames, self.weights, self.offset = (
            _joined(stores, name)[windows] for name in ("num_samples", "num_frames", "weights", "offset")
        )
        self.shard = _joined(stores, "shard", indices_of=lambda store: store.files.paths)[windows]
        self.files = MappedFiles([path for store in stores for path in store.files.paths])
        self.form, self.dtype = stores[0].form, stores[0].dtype


def weights_of_windows(clip_of_window, num_samples):
    """(windows,) float32: each window's fraction of its clip's duration."""
    samples_of_clip = np.bincount(clip_of_window, weights=num_samples)
    return (num_samples / samples_of_clip[clip_of_window]).astype(np.float32)


def _joined(stores, name, indices_of=None):
    """
    Concatenates an array of each store. If it holds indices, `indices_of` returns the sequence of a store to which they
    refer; they then refer to the concatenation of these sequences.
    """
    before = np.cumsum([0, *(len(indices_of(store)) if indices_of else 0 for store in stores[:-1])])
    return np.concatenate([getattr(store, name) + start for store, start in zip(stores, before, strict=True)])


def as_stored(features, dtype):
    """
    Converts a window's features, a tensor on the CPU, to the array that is stored.

    Raises:
        ValueError: if `dtype` cannot hold a value.
    """
    stored = features.to(FEATURE_DTYPES[dtype])
    if not all(extreme.isfinite() for extreme in stored.aminmax()):  # both extremes are NaN if any value is
        largest = features.abs().max()
        raise ValueError(f"the largest feature, {largest:.3g}, does not fit {dtype}; choose another --feature_dtype")
    return stored.view(torch.int16).numpy() if dtype == "bfloat16" else stored.numpy()


def shard_path(folder, clips, process, processes):
    """
    Path of a shard, whose name says which clips it holds: every `processes`-th one, from the first to the last of
    `clips`. `process` is the remainder modulo `processes`, which all have in common.
    """
    return folder / f"shard-{process:05d}-of-{processes:05d}-{clips[0]:06d}-{clips[-1]:06d}.arrow"


def written_shards(folder):
    """The clips of each shard in a folder, as ranges."""
    return [_clips_of(shard) for shard in _shards(folder)]


def _clips_of(shard):
    """The clips that a shard holds by its name; none if it has no such name, as shards of the first versions."""
    numbers = re.fullmatch(r"shard-[0-9]+-of-([0-9]+)-([0-9]+)-([0-9]+)\.arrow", shard.name)
    step, first, last = map(int, numbers.groups()) if numbers else (0, 0, 0)
    return range(first, last + 1, step) if step else range(0)


def is_whole(store):
    """Whether a store (`Path`) is complete, as far as can be told without reading the features."""
    try:
        names = [file["filename"] for file in json.loads((store / STATE).read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return names == [shard.name for shard in _shards(store)] and index_of(store) is not None


def index_of(store):
    """
    The `WindowIndex` of a store (`Path`); `None` if the store is damaged, as far as can be told. If an earlier version
    made the store, which wrote no index, it is made from the shards.
    """
    shards = _shards(store)
    if not (store / INDEX).exists():
        return _index_of_all(shards)
    index = WindowIndex.load(store / INDEX)
    if index is None or list(index.sizes) != [shard.name for shard in shards]:
        return None
    return index if all(_has_size(shard, index.sizes[shard.name]) for shard in shards) else None


def _shards(folder):
    return sorted(folder.glob("shard-*.arrow"))


def _has_size(shard, size):
    """Whether a shard has this size and ends with the end-of-stream mark, which data loss on the disk would destroy."""
    with shard.open("rb") as file:
        if file.seek(0, os.SEEK_END) != size or size < len(END_OF_STREAM):
            return False
        file.seek(-len(END_OF_STREAM), os.SEEK_END)
        return file.read() == END_OF_STREAM


def _index_of_all(shards):
    indexes = [_index_of_shard(shard) for shard in shards]
    return None if not indexes or None in indexes else WindowIndex.join(indexes)


def _index_of_shard(path):
    """The `WindowIndex` of a shard; `None` if it is damaged. The features are not read."""
    try:
        if not _has_size(path, path.stat().st_size):
            return None
        index = WindowIndex.load(_noted(path))
        if index is None or index.sizes != {path.name: path.stat().st_size}:
            index = scan(path)
    except (OSError, ValueError, pa.ArrowInvalid):
        return None
    found, named = np.unique(index.clip), _clips_of(path)
    return index if len(found) == len(named) and (found == np.asarray(named)).all() else None


def _noted(shard):
    """Path of the index of a shard in an unfinished store, so that the next run need not scan the shard."""
    return shard.with_name(f"index-of-{shard.stem}")


def begin(folder, is_alone=True):
    """
    Makes a folder for shards. In an existing folder, whole shards are kept, whatever number of processes or parts wrote
    them, as their names say which clips they hold. Of shards that hold the same clip, the largest is kept. All other
    files are removed; if other processes may be at work there, only other shards are.

    Returns:
        The names of the shards that were removed.
    """
    folder.mkdir(exist_ok=True)
    shards = _shards(folder)
    whole = [(_clips_of(shard), shard) for shard in shards if _index_of_shard(shard) is not None]
    is_taken = np.zeros(max((clips.stop for clips, _ in whole), default=0), dtype=bool)
    kept = set()
    for clips, shard in sorted(whole, key=lambda item: (-len(item[0]), item[1])):
        is_taken_here = is_taken[clips.start : clips.stop : clips.step]
        if not is_taken_here.any():
            kept |= {shard, _noted(shard)}
            is_taken_here[:] = True
    for path in set(folder.iterdir() if is_alone else shards) - kept:
        path.unlink(missing_ok=True)
    return [shard.name for shard in shards if shard not in kept]


def clips_missing(folder, num_clips):
    """How many of `num_clips` clips are in no shard of a folder."""
    return int((_times_written(folder, num_clips)[:num_clips] == 0).sum())


def is_complete(folder, num_clips):
    """Whether the shards in a folder hold each of `num_clips` clips once."""
    times = _times_written(folder, num_clips)
    return len(times) == num_clips and bool((times == 1).all())


def _times_written(folder, num_clips):
    """In how many shards each clip is, by their names; longer than `num_clips` if there are further clips."""
    clips = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, written_shards(folder))]).astype(np.int64)
    return np.bincount(clips, minlength=num_clips)


@contextmanager
def shard_writer(path, dtype):
    """
    Writes a shard, which appears whole when the block ends without an error, or not at all.

    Args:
        path: path of the shard.
        dtype: name of the features' dtype.

    Yields:
        A function that adds a window: a dict of `clip`, `start`, `num_samples` and `features`, an array as `as_stored`
        returns it.

    Raises:
        OSError: if the shard cannot be written; names its folder. Nothing else in the block may raise one.
    """
    schema = _schema(dtype)
    try:
        with whole_file(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            yield lambda window: writer.write_batch(_record_batch(window, schema))
        scan(path).save(_noted(path))
    except OSError as error:
        raise NotWrittenError(
            error.errno,
            f"frame features cannot be written to {path.parent}: {error}. Finished shards are kept, and the next "
            "run continues from them",
        ) from error


def stored_bytes(windows, values, dtype):
    """Bytes on disk of a store with this many windows and feature values."""
    dtype_of_values = ARROW_TYPES[dtype]
    empty = {"clip": 0, "start": 0, "num_samples": 0, "features": np.zeros((0, 0), dtype_of_values.to_pandas_dtype())}
    bytes_per_window = pa.ipc.get_record_batch_size(_record_batch(empty, _schema(dtype)))
    return windows * bytes_per_window + values * dtype_of_values.byte_width


def finish(folder, store, dtype):
    """Turns a folder of shards into a dataset that `load_from_disk` can read, and gives it its final name."""
    shards = _shards(folder)
    state = {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": store.name,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    index = _index_of_all(shards)
    with writing(store):
        for path in set(folder.iterdir()) - set(shards):
            path.unlink(missing_ok=True)
        if index is not None:
            index.save(folder / INDEX)
        DatasetInfo(features=Features.from_arrow_schema(_schema(dtype))).write_to_directory(str(folder))
        (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        put_in_place(folder, store)


def _record_batch(window, schema):
    features = window["features"]
    values = pa.array(features.ravel(), type=schema.field("features").type.value_type)
    columns = [pa.array([window[name]]) for name in ("clip", "start", "num_samples")]
    columns.append(pa.array([list(features.shape)]))
    columns.append(pa.ListArray.from_arrays(np.array([0, features.size], dtype=np.int32), values))
    return pa.record_batch(columns, schema=schema)


def _schema(dtype):
    return pa.schema(
        [
            ("clip", pa.int64()),  # row of the clip in its split
            ("start", pa.int64()),  # first sample of the window in the clip
            ("num_samples", pa.int64()),
            ("shape", pa.list_(pa.int64())),  # of the features: (frames, width); (layers, frames, width) for "weighted"
            ("features", pa.list_(ARROW_TYPES[dtype])),
        ]
    )
