"""A published corpus whose audio stays in its local or remote Parquet files: a row refers to its audio."""

import hashlib
import os
import re
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from .tables import AUDIO

# Replaces the path of an audio file: the Parquet file, the row group, and the row in the group.
REFERENCE = re.compile(r"(.+\.parquet)::([0-9]+)::([0-9]+)")
_lock = Lock()  # so that threads that decode neighbouring clips read their row group once


def streamed(builder, name):
    """
    Args:
        builder: `datasets.DatasetBuilder` of a published dataset, not prepared.
        name: name of the dataset, for messages.

    Returns:
        `dict`: by split, a `datasets.Dataset` with all columns; `audio` holds references, which `audio_of` resolves.

    Raises:
        ValueError: if the dataset is not in Parquet files with a column `audio`.
        OSError: if they cannot be read.
    """
    splits = {}
    for split, files in (builder.config.data_files or {}).items():
        tables = [_without_audio(str(file), name) for file in files]
        features = tables[0].schema.metadata and datasets.Features.from_arrow_schema(tables[0].schema)
        features = {**(features or {}), **(builder.info.features or {}), AUDIO: datasets.Audio(decode=False)}
        features = datasets.Features({column: features[column] for column in tables[0].column_names})
        table = pa.concat_tables(tables).cast(features.arrow_schema)
        info = datasets.DatasetInfo(features=features, config_name=builder.config.name)
        splits[str(split)] = datasets.Dataset(table, info=info)
    return splits


def _without_audio(file, name):
    """Reads the table of a Parquet file with references in place of the audio."""
    if not file.endswith(".parquet"):
        raise ValueError(f"{name}: is not in Parquet files, which --streaming needs; got {file}")
    with _parquet(file) as parquet:
        columns = parquet.schema_arrow.names
        if AUDIO not in columns:
            raise ValueError(f"{name}: {file}: got the columns {columns}; expected 'audio' among them")
        table = parquet.read(columns=[column for column in columns if column != AUDIO])
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    references = [f"{file}::{group}::{row}" for group, size in enumerate(rows) for row in range(size)]
    arrays = [pa.nulls(len(references), pa.binary()), pa.array(references, type=pa.string())]
    audio = pa.StructArray.from_arrays(arrays, names=["bytes", "path"])
    return table.add_column(columns.index(AUDIO), pa.field(AUDIO, audio.type), audio)


def is_reference(audio):
    """Whether the audio of a row is a reference into a Parquet file."""
    return audio["bytes"] is None and REFERENCE.fullmatch(audio["path"] or "") is not None


def audio_of(audio):
    """
    The audio of a row, `{"bytes": ..., "path": ...}`. A reference is resolved by reading it; other audio is returned as
    it is.

    Raises:
        ValueError, OSError: if its file is damaged, or cannot be read.
    """
    if not is_reference(audio):
        return audio
    file, group, row = REFERENCE.fullmatch(audio["path"]).groups()
    with _lock:
        column = _row_group(file, int(group))
    return column[int(row)].as_py()


@lru_cache(maxsize=2)
def _row_group(file, group):
    with _parquet(file) as parquet:
        return parquet.read_row_group(group, columns=[AUDIO]).column(AUDIO).combine_chunks()


def reference_digests(references):
    """
    Yields, for each reference, `bytes` that change with the place of the audio and, for a local file, with its size and
    time. The address of a file on the Hub names its commit.
    """
    states = {}
    for reference in references:
        file = REFERENCE.fullmatch(reference)[1]
        if file not in states:
            stat = None if "://" in file else os.stat(file)
            states[file] = stat and [stat.st_size, stat.st_mtime_ns]
        yield hashlib.blake2b(f"{reference} {states[file]}".encode("utf-8", "surrogateescape")).digest()


@contextmanager
def _parquet(file):
    """Opens a `pyarrow.parquet.ParquetFile`. If it is damaged, raises a `ValueError` that names it."""
    try:
        with fsspec.open(file, "rb") as opened:
            yield pq.ParquetFile(opened)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: {error}") from error
