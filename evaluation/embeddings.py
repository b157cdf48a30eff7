"""Writes embeddings of clips to Parquet, row by row."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from ..dataset_script.tables import FILENAME
from ..dataset_script.whole_files import whole_file

ROWS_AT_A_TIME = 256  # of a few kB each, which are kept in memory before they are written


@contextmanager
def embeddings_parquet(path, widths):
    """
    Opens a Parquet file of embeddings with the columns `filename` and, for each emotion and for `backbone`, a
    fixed-size list of float32. The file appears at the end of the block when it is complete; if the block ends with an
    error or an interruption, it holds the rows so far.

    Args:
        path: path of the file.
        widths: widths of the vectors, `{name: int}`, as `embedding_widths` returns them.

    Yields:
        A function that takes a clip's name and its embedding, `{name: (width,) float32}`, and adds a row.
    """
    vectors = [(name, pa.list_(pa.float32(), width)) for name, width in widths.items()]
    schema = pa.schema([(FILENAME, pa.string()), *vectors])
    with whole_file(path, "wb") as file, ParquetWriter(file, schema) as writer:
        waiting = []

        def add(filename, embedding):
            # File names need not be valid UTF-8, but strings in Parquet must be.
            waiting.append({FILENAME: filename.encode("utf-8", "backslashreplace").decode(), **embedding})
            if len(waiting) == ROWS_AT_A_TIME:
                writer.write_table(_table(waiting, schema))
                waiting.clear()

        failure = None
        try:
            yield add
        except BaseException as error:  # noqa: BLE001  Ctrl-C, above all; raised again below
            failure = error
        writer.write_table(_table(waiting, schema))
    if failure is not None:
        raise failure


def _table(rows, schema):
    columns = [pa.array([row[FILENAME] for row in rows], pa.string())]
    for field in list(schema)[1:]:
        values = np.array([row[field.name] for row in rows], np.float32).reshape(-1)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type))
    return pa.table(columns, schema=schema)
