import os
from pathlib import Path

import pytest
import torch
from conftest import full_disk
from safetensors.torch import save_file

from emoshare.dataset_script.whole_files import NotWrittenError, put_in_place, whole_file, work_folder, writing


@pytest.fixture
def calls(monkeypatch):
    """What is synced and renamed, in order."""
    made = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        made.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(source, target):
        made.append(("rename", Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_file_gets_its_name_when_it_is_on_the_disk_and_then_the_name_too(tmp_path, calls):
    with whole_file(tmp_path / "a.txt", encoding="utf-8") as file:
        file.write("ü")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ü"
    assert [kind for kind, _ in calls] == ["sync", "rename", "sync"]
    assert calls[0][1].parent == tmp_path
    assert calls[2][1] == tmp_path


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_folder_gets_its_name_when_all_in_it_is_on_the_disk(tmp_path, calls):
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "a").touch()
    (tmp_path / "new" / "b").touch()
    inside = {tmp_path / "new" / name for name in ("", "deep", "deep/a", "b")}
    put_in_place(tmp_path / "new", tmp_path / "old")
    (rename,) = (index for index, (kind, _) in enumerate(calls) if kind == "rename")
    assert {path for _, path in calls[:rename]} == inside
    assert calls[rename + 1 :] == [("sync", tmp_path)]
    assert (tmp_path / "old" / "deep" / "a").is_file()


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.txt") as file:
        file.write("half")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


def test_what_a_killed_process_left_does_not_stay(tmp_path):
    (tmp_path / "unfinished-a.txt").write_text("half a fi")
    with whole_file(tmp_path / "a.txt") as file:
        file.write("whole")
    with work_folder(tmp_path / "work") as folder:
        (folder / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "a").touch()
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "work") as folder:
        assert not list(folder.iterdir())
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "a.txt").write_text("before")
    message = r"a\.txt cannot be written: No space left on device\. It is kept$"
    with (
        pytest.raises(NotWrittenError, match=message),
        writing(tmp_path, ". It is kept"),
        whole_file(tmp_path / "a.txt") as file,
    ):
        file.write("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"x" * 10**6),
        lambda path: torch.save(torch.zeros(10**6), path),
        lambda path: save_file({"a": torch.zeros(10**6)}, path),
    ],
    ids=["Python", "torch", "safetensors"],
)
def test_every_library_says_in_the_same_way_that_it_cannot_write(write, tmp_path):
    message = "the folder cannot be written: "
    with pytest.raises(NotWrittenError, match=message), writing("the folder"), full_disk(1000):
        write(tmp_path / "file")


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("a bug"), ValueError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error), match="a bug") as raised, writing("folder"):
            raise error
        assert raised.value is error
