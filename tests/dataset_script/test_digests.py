"""Digests of files: computed once, and never out of date."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from emoshare.dataset_script import digests
from emoshare.dataset_script.digests import Entry, file_digests, keep, kept, read_files, unknown_files


def digest(content):
    return hashlib.blake2b(content).digest()


@pytest.fixture
def read(monkeypatch):
    """The paths of the files that are read."""
    paths, read_file = [], digests._read
    monkeypatch.setattr(digests, "_read", lambda path: paths.append(path) or read_file(path))
    return paths


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once, and are read two by two."""
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    monkeypatch.setattr(digests, "FILES_AT_ONCE", 2)


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_until_it_changes(tmp_path, read):
    paths = [tmp_path / "a.wav", tmp_path / "b\udcff.wav", tmp_path / "a.wav"]
    for path in paths:
        path.write_bytes(path.name.encode("utf-8", "surrogateescape"))
    expected = [digest(b"a.wav"), digest(b"b\xff.wav"), digest(b"a.wav")]
    assert file_digests(paths) == expected
    read.clear()
    assert file_digests(paths) == expected
    assert file_digests([os.path.relpath(path) for path in paths]) == expected
    assert unknown_files(paths) == read == []
    time = paths[0].stat().st_mtime_ns
    paths[0].write_bytes(b"b.wav")
    os.utime(paths[0], ns=(time, time))  # as after a copy that keeps times
    assert unknown_files(paths[:2]) == paths[:1]
    assert file_digests(paths[:2]) == [digest(b"b.wav"), expected[1]]
    assert read == paths[:1]


def test_a_file_that_may_change_within_the_tick_of_the_clock_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"before")
    monkeypatch.setattr(digests, "state_of", lambda _: b"the same size and times")
    assert file_digests([path]) == [digest(b"before")]
    path.write_bytes(b"after!")
    assert file_digests([path]) == [digest(b"after!")]


@pytest.mark.usefixtures("settled")
def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"before")
    hash_file = hashlib.file_digest

    def changed_meanwhile(*args):
        path.write_bytes(b"afterwards")
        return hash_file(*args)

    monkeypatch.setattr(hashlib, "file_digest", changed_meanwhile)
    (entry,) = read_files([path])
    keep([entry])
    assert not entry.is_settled
    assert unknown_files([path]) == [path]


def test_nothing_is_lost_when_many_write_at_once():
    entries = [[Entry(b"%d of writer %d" % (index, writer), b"", b"!") for index in range(300)] for writer in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(keep, [of_writer[first : first + 30] for of_writer in entries for first in range(0, 300, 30)]))
    names = [entry.name for of_writer in entries for entry in of_writer]
    assert kept(dict.fromkeys(names, b"")) == dict.fromkeys(names, b"!")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", ["no database", "no folder"])
def test_without_the_database_files_are_read_each_time(damage, tmp_path, monkeypatch, read):
    (tmp_path / "cache").write_bytes(b"something else")
    if damage == "no database":
        (tmp_path / "digests.sqlite").write_bytes(b"something else" * 100)
    else:
        monkeypatch.setattr(digests, "DATABASE", "cache/digests.sqlite")
    monkeypatch.setattr(digests, "cached_assets_path", lambda *_: tmp_path)
    path = tmp_path / "a.wav"
    path.write_bytes(b"audio")
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{tmp_path}.*digests.sqlite: .*are computed again"):
            assert file_digests([path]) == [digest(b"audio")]
    assert read == [path, path]
