"""The place of each window in a store: a table that is read at once, however many windows there are."""

import json
import mmap
from dataclasses import dataclass, fields
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from ..dataset_script.whole_files import whole_file

DIGEST_SIZE = 16
# Number of files that a store keeps mapped; a process may have about 65,000 maps (vm.max_map_count).
MAPS = 1024


@dataclass
class WindowIndex:
    """
    A row per window, ordered by clip and start.

    Args:
        clip, start, num_samples, num_frames: (windows,) int64: the window's clip, first sample and lengths.
        shard: (windows,) int64, the position of the window's file in `sizes`.
        offset: (windows,) int64, the position of its features in that file, in bytes.
        sizes: the size of each file in bytes, by name.
        form: the shape of all features without frames: (width,), or (layers, width) for `"weighted"`.
        dtype: NumPy's name for the dtype of the features in the file.
    """

    clip: np.ndarray
    start: np.ndarray
    num_samples: np.ndarray
    num_frames: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    sizes: dict[str, int]
    form: tuple[int, ...]
    dtype: str

    def save(self, path):
        """Writes the index and a digest, by which `load` finds any damage."""
        about = json.dumps({"sizes": self.sizes, "form": self.form, "dtype": self.dtype})
        columns = {name: getattr(self, name) for name in COLUMNS}
        batch = pa.record_batch(columns).replace_schema_metadata({"about": about})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        content = sink.getvalue()
        with whole_file(path, "wb") as file:
            file.write(content)
            file.write(blake2b(content, digest_size=DIGEST_SIZE).digest())

    @classmethod
    def load(cls, path):
        """What `save` wrote, mapped and not copied; `None` if it is missing or damaged."""
        try:
            content = memoryview(mapped(path))
        except (OSError, ValueError):  # ValueError: it is empty
            return None
        content, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        if blake2b(content, digest_size=DIGEST_SIZE).digest() != digest:
            return None
        batch = pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch()
        about = json.loads(batch.schema.metadata[b"about"])
        columns = {name: batch.column(name).to_numpy() for name in COLUMNS}
        return cls(**columns, sizes=about["sizes"], form=tuple(about["form"]), dtype=about["dtype"])

    @classmethod
    def join(cls, indexes):
        """Joins several indexes, whose windows are in different files."""
        first_shard = np.cumsum([0, *(len(index.sizes) for index in indexes)])
        columns = {name: np.concatenate([getattr(index, name) for index in indexes]) for name in COLUMNS}
        columns["shard"] += np.repeat(first_shard[:-1], [len(index.clip) for index in indexes])
        order = np.lexsort([columns["start"], columns["clip"]])
        sizes = {name: size for index in indexes for name, size in index.sizes.items()}
        columns = {name: column[order] for name, column in columns.items()}
        return cls(**columns, sizes=sizes, form=indexes[0].form, dtype=indexes[0].dtype)


COLUMNS = [field.name for field in fields(WindowIndex) if field.type is np.ndarray]


def scan(shard):
    """
    The `WindowIndex` of a shard (`Path`), found without reading the features.

    Raises:
        OSError, pa.ArrowInvalid, ValueError: if it is damaged.
    """
    rows, form, dtype = [], (), None
    with pa.memory_map(str(shard)) as file:
        content = file.read_buffer()
        for batch in pa.ipc.open_stream(content):
            *facts, shape, features = (column[0] for column in batch.columns)
            *layers, num_frames, width = shape.as_py()
            form, dtype = (*layers, width), features.type.value_type.to_pandas_dtype()
            values = features.values
            offset = values.buffers()[1].address + values.offset * values.type.byte_width - content.address
            rows.append([*(fact.as_py() for fact in facts), num_frames, 0, offset])
    if not rows:
        raise ValueError(f"{shard}: holds no windows")
    columns = np.array(rows, dtype=np.int64).T
    return WindowIndex(*columns, sizes={shard.name: shard.stat().st_size}, form=form, dtype=np.dtype(dtype).name)


def mapped(path):
    """The content of a file, mapped."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class MappedFiles:
    """
    Files that are mapped on reading. The `MAPS` most recently used ones stay mapped.

    Args:
        paths: of the files.
    """

    def __init__(self, paths):
        self.paths = paths
        self.maps = {}  # in the order of their last use

    def __getitem__(self, place):
        content = self.maps.pop(place, None) or mapped(self.paths[place])
        self.maps[place] = content
        if len(self.maps) > MAPS:
            self.maps.pop(next(iter(self.maps)), None)
        return content
