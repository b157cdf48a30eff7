"""
Digests of files, kept from run to run in a small database in the cache of the Hugging Face libraries.

A digest is valid until the size or time of a file changes. Both mtime and ctime are compared: copying may set mtime to
anything, but nobody can set ctime. As in Git's index, the digest of a file that was changed just before it was read is
not kept: the file might change again within the same tick of the clock.
"""

import hashlib
import os
import sqlite3
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from datasets.utils import tqdm
from huggingface_hub import cached_assets_path

# If a file has not changed for this long, a change now gives it another time: the coarsest clocks tick every 2 seconds.
SETTLED_NS = 2 * 10**9
LONGEST_WAIT_S = 60  # how long to wait for another process that writes
NAMES_PER_QUERY = 500
FILES_AT_ONCE = 20_000
DATABASE = "digests.sqlite"
TABLE = "CREATE TABLE IF NOT EXISTS digests (name BLOB PRIMARY KEY, state BLOB, digest BLOB) WITHOUT ROWID"


@dataclass(frozen=True)
class Entry:
    """
    Attributes:
        name (`bytes`): name of the content, such as the path of a file.
        state (`bytes`): state of the content, for which the digest is valid.
        digest (`bytes`): the digest.
        is_settled: whether the digest may be kept.
    """

    name: bytes
    state: bytes
    digest: bytes
    is_settled: bool = True


def kept(states):
    """
    Args:
        states: dict from each name to its current state.

    Returns:
        `dict`: by name, the stored digests that are still valid.
    """
    names = list(states)

    def find(database):
        found = {}
        for first in range(0, len(names), NAMES_PER_QUERY):
            some = names[first : first + NAMES_PER_QUERY]
            marks = ",".join("?" * len(some))
            rows = database.execute(f"SELECT name, state, digest FROM digests WHERE name IN ({marks})", some)
            found.update({name: digest for name, state, digest in rows if state == states[name]})
        return found

    return _use_database(find) or {}


def keep(entries):
    """Stores the digests of those `Entry`s that are settled, for this process and all others."""
    settled = [(entry.name, entry.state, entry.digest) for entry in entries if entry.is_settled]
    if settled:
        insert = "INSERT OR REPLACE INTO digests VALUES (?, ?, ?)"
        _use_database(lambda database: database.executemany(insert, settled))


def file_digests(paths):
    """
    Args:
        paths: paths of files.

    Returns:
        `list[bytes]`: the digest of each file's content. Files without a valid stored digest are read.
    """
    digests = []
    for some in blocks(paths):
        names = list(map(_name, some))
        found = kept({name: state_of([path]) for name, path in zip(names, some, strict=True)})
        entries = read_files([path for name, path in zip(names, some, strict=True) if name not in found])
        keep(entries)
        found.update({entry.name: entry.digest for entry in entries})
        digests += [found[name] for name in names]
    return digests


def blocks(paths):
    """Yields a list in parts, so that memory does not grow with it, and a killed process keeps what it has read."""
    return (paths[first : first + FILES_AT_ONCE] for first in range(0, len(paths), FILES_AT_ONCE))


def unknown_files(paths):
    """Returns those of the files that have no valid stored digest."""
    unknown = []
    for some in blocks(paths):
        names = {path: _name(path) for path in some}
        found = kept({name: state_of([path]) for path, name in names.items()})
        unknown += [path for path, name in names.items() if name not in found]
    return unknown


def read_files(paths):
    """Reads all of the files, in parallel, and returns their `Entry`s."""
    if not paths:
        return []
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(_read, paths), total=len(paths), desc="Fingerprinting audio", unit=" clips"))


def _read(path):
    state, is_settled = state_of([path]), are_settled([path])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, hashlib.blake2b).digest()
    return Entry(_name(path), state, digest, is_settled and state_of([path]) == state)


def state_of(paths):
    """Sizes, mtimes and ctimes of files, as bytes."""
    stats = [os.stat(path) for path in paths]
    return b" ".join(b"%d %d %d" % (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def are_settled(paths):
    """Whether none of the files has changed in the last seconds."""
    latest = time.time_ns() - SETTLED_NS
    return all(max(stat.st_mtime_ns, stat.st_ctime_ns) < latest for stat in map(os.stat, paths))


def _name(path):
    return os.fsencode(os.path.abspath(path))


def _use_database(function):
    """
    Calls a function with the database, and returns its result. If the database cannot be used, for example because the
    cache is read-only, warns and returns `None`.
    """
    path = "the cache of the Hugging Face libraries"
    try:
        path = cached_assets_path("emoshare", "fingerprints") / DATABASE
        with closing(sqlite3.connect(path, timeout=LONGEST_WAIT_S)) as database, database:
            database.execute(TABLE)
            return function(database)
    except (OSError, sqlite3.Error) as error:
        warnings.warn(f"{path}: {error}; digests of files are computed again", stacklevel=2)
        return None
