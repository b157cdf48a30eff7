"""The frame feature store: what a frozen backbone made of every clip, unpadded, read from disk without copying."""

import errno
import json
import os
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
from datasets import DatasetInfo, Features, load_from_disk
from datasets.fingerprint import Hasher

# How features are kept. Arrow has no bfloat16, so that is kept as its bits.
FEATURE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ARROW_TYPES = {"float16": pa.float16(), "bfloat16": pa.int16(), "float32": pa.float32()}


class FrameFeatureStore(torch.utils.data.Dataset):
    """
    The frame features of a split, one item per window, in the order of the clips. On disk it is a dataset that
    `datasets.load_from_disk` reads, with a row per window.

    Attributes:
        clips: the split, a `datasets.Dataset`.
        labels: label names.
        shares: (clips, labels) float32, NaN where a share is not known.
        frames: (windows,) int64, each window's number of frames.
        fingerprint: changes with the features, the labels and their shares.
    """

    def __init__(self, folder, clips, labels):
        self.clips = clips
        self.labels = labels
        self.shares = np.array([clips[label] for label in labels], dtype=np.float32).T
        self.fingerprint = f"{folder.name}-{Hasher.hash((labels, self.shares))}"
        table = load_from_disk(str(folder)).data
        clip, start = (table.column(name).to_numpy() for name in ("clip", "start"))
        if set(clip) != set(range(len(clips))):
            raise ValueError(
                f"{folder}: holds features of other clips than the split's {len(clips)}; delete the folder"
            )
        self.rows = np.lexsort([start, clip])
        self.clip_of_window = clip[self.rows]
        self.num_samples = table.column("num_samples").to_numpy()[self.rows]
        self.shape = table.column("shape")
        self.features = table.column("features")
        (self.dtype,) = (name for name, kind in ARROW_TYPES.items() if kind == self.features.type.value_type)
        self.frames = np.array([shape[-2].as_py() for shape in self.shape])[self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = int(self.rows[index])
        return {
            "features": self.features[row].values.to_numpy().reshape(self.shape[row].as_py()),
            "shares": self.shares[self.clip_of_window[index]],
            "clip": self.clip_of_window[index],
            "num_samples": self.num_samples[index],
        }

    def collate(self, windows):
        """Items to one batch of tensors, features (batch, frames, width) zero-padded to the longest."""
        features = [window["features"] for window in windows]
        frames = [array.shape[-2] for array in features]
        batch = np.zeros(
            (len(features), *features[0].shape[:-2], max(frames), features[0].shape[-1]), features[0].dtype
        )
        for padded, array in zip(batch, features, strict=True):
            padded[..., : array.shape[-2], :] = array
        return {
            "features": torch.from_numpy(batch).view(FEATURE_DTYPES[self.dtype]),
            "lengths": torch.tensor(frames),
            "shares": torch.from_numpy(np.stack([window["shares"] for window in windows])),
            "clip": torch.tensor([window["clip"] for window in windows]),
            "num_samples": torch.tensor([window["num_samples"] for window in windows]),
        }


def as_stored(features, dtype):
    """
    A float32 array as the store keeps it.

    Raises:
        ValueError: if `dtype` cannot hold a value.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(features).bfloat16().view(torch.int16).numpy()
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    if not np.isfinite(stored).all():
        largest = np.abs(features).max()
        raise ValueError(f"the largest feature, {largest:.3g}, does not fit {dtype}; take another --feature_dtype")
    return stored


def shard_path(folder, clips, process, processes):
    """Where a process keeps the shard of `clips`, neighbours among its own, which are every `processes`-th."""
    return folder / f"shard-{process:05d}-of-{processes:05d}-{clips[0]:06d}-{clips[-1]:06d}.arrow"


def written_clips(folder, process, processes):
    """The clips of a process's whole shards, as a set."""
    clips = set()
    for path in folder.glob(f"shard-{process:05d}-of-{processes:05d}-*.arrow"):
        first, last = map(int, path.stem.split("-")[-2:])
        clips.update(range(first, last + 1, processes))
    return clips


def begin(folder, processes):
    """Makes a folder for shards, or leaves in one that is there the whole shards of as many processes."""
    folder.mkdir(exist_ok=True)
    for path in set(folder.iterdir()) - set(folder.glob(f"shard-*-of-{processes:05d}-*-*.arrow")):
        path.unlink()


def write_shard(path, windows, dtype):
    """
    Writes windows to a shard that is there whole or not at all.

    Args:
        path: of the shard.
        windows: dicts of `clip`, `start`, `num_samples` and `features`, an array as `as_stored` returns it.
        dtype: its name.

    Raises:
        OSError: if it cannot be written; says where.
    """
    unfinished = path.with_name(f"unfinished-{uuid4().hex}")
    schema = _schema(dtype)
    try:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for window in windows:
                writer.write_batch(_record_batch(window, schema))
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(
            error.errno or errno.EIO,
            f"frame features cannot be written to {path.parent}: {error}. Shards that are whole are kept, and the next "
            "start goes on from them",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def stored_bytes(windows, values, dtype):
    """The disk that a store takes: so many windows, with so many values of features in all."""
    dtype_of_values = ARROW_TYPES[dtype]
    empty = {"clip": 0, "start": 0, "num_samples": 0, "features": np.zeros((0, 0), dtype_of_values.to_pandas_dtype())}
    bytes_per_window = pa.ipc.get_record_batch_size(_record_batch(empty, _schema(dtype)))
    return windows * bytes_per_window + values * dtype_of_values.byte_width


def finish(folder, store, dtype):
    """Makes a folder of whole shards a dataset that `load_from_disk` reads, and gives it its final name."""
    shards = sorted(path.name for path in folder.glob("shard-*.arrow"))
    DatasetInfo(features=Features.from_arrow_schema(_schema(dtype))).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": store.name,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    folder.rename(store)


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
            ("shape", pa.list_(pa.int64())),  # of the features: frames, width; with layers in front for "weighted"
            ("features", pa.list_(ARROW_TYPES[dtype])),
        ]
    )
