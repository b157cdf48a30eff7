"""
Digests of files, kept from run to run in a small database in the cache of the Hugging Face libraries.

A digest holds until its files have another size or time of change. Both times count that a file system knows: that of
the content, which copying may set to anything, and that of the file itself, which nobody can set. As in Git's index,
what was changed just before it was read is not kept: it might change again within the same tick of the clock.
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

# A file that has not changed for this long gets another time if it changes now: the coarsest clocks have two seconds.
SETTLED_NS = 2 * 10**9
LONGEST_WAIT_S = 60  # for another process that writes
NAMES_PER_QUERY = 500
FILES_AT_ONCE = 20_000
DATABASE = "digests.sqlite"
TABLE = "CREATE TABLE IF NOT EXISTS digests (name BLOB PRIMARY KEY, state BLOB, digest BLOB) WITHOUT ROWID"


@dataclass(frozen=True)
class Entry:
    """
    Attributes:
        name (`bytes`): of what the digest is of, such as the path of a file.
        state (`bytes`): what must be the same for the digest to hold.
        digest (`bytes`): the digest.
        is_settled: whether it may be kept.
    """

    name: bytes
    state: bytes
    digest: bytes
    is_settled: bool = True


def kept(states):
    """
    Args:
        states: a dict, the state that each name has now.

    Returns:
        `dict`: by name, the digests that are kept and hold.
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
    """Keeps the digests of those `Entry`s that are settled, for this process and all others."""
    settled = [(entry.name, entry.state, entry.digest) for entry in entries if entry.is_settled]
    if settled:
        insert = "INSERT OR REPLACE INTO digests VALUES (?, ?, ?)"
        _use_database(lambda database: database.executemany(insert, settled))


def file_digests(paths):
    """
    Args:
        paths: of files.

    Returns:
        `list[bytes]`: of each file, the digest of its content. Files whose digests are not kept are read.
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
    """Parts of a list, so that memory does not grow with it, and what was read before a process was killed is kept."""
    return (paths[first : first + FILES_AT_ONCE] for first in range(0, len(paths), FILES_AT_ONCE))


def unknown_files(paths):
    """Those of these files whose digests are not kept."""
    unknown = []
    for some in blocks(paths):
        names = {path: _name(path) for path in some}
        found = kept({name: state_of([path]) for path, name in names.items()})
        unknown += [path for path, name in names.items() if name not in found]
    return unknown


def read_files(paths):
    """The `Entry`s of files, all of which are read, side by side."""
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
    """The sizes of files and the times of their last changes, as bytes."""
    stats = [os.stat(path) for path in paths]
    return b" ".join(b"%d %d %d" % (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def are_settled(paths):
    """Whether none of these files has changed in the last seconds."""
    latest = time.time_ns() - SETTLED_NS
    return all(max(stat.st_mtime_ns, stat.st_ctime_ns) < latest for stat in map(os.stat, paths))


def _name(path):
    return os.fsencode(os.path.abspath(path))


def _use_database(function):
    """
    What a function of the database returns. If that cannot be used, as in a cache that may not be written, a warning
    says so, and the result is `None`.
    """
    path = "the cache of the Hugging Face libraries"
    try:
        path = cached_assets_path("emoshare", "fingerprints") / DATABASE
        with closing(sqlite3.connect(path, timeout=LONGEST_WAIT_S)) as database, database:
            database.execute(TABLE)
            return function(database)
    except (OSError, sqlite3.Error) as error:
        warnings.warn(f"{path}: {error}; what is kept there is made again", stacklevel=2)
        return None
