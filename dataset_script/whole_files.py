"""
Files and folders that appear whole or not at all, whenever the process is killed, the power fails or the disk is full.

They are written next to their place, and get their name when every byte of them is on the disk: a file system may put a
new name there before the content that it stands for. What is unfinished has a name that follows from the final one, so
that what a killed process has left is overwritten by the next one, and does not stay for ever.
"""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What is in the RuntimeError of torch when it cannot write.
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error")


class NotWrittenError(OSError):
    """Something cannot be written; says what, and has the number that the system gave, `EIO` if there is none."""

    def __str__(self):
        return self.strerror


@contextmanager
def whole_file(path, mode="w", **options):
    """
    Opens a file for writing, which replaces `path` when the block ends without an error.

    Args:
        path: of the file, in an existing folder.
        mode, options: as in `open`.

    Raises:
        NotWrittenError: if it cannot be written. What was there before is left as it was.
    """
    path = Path(path)
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        with writing(path):
            with unfinished.open(mode, **options) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def work_folder(folder):
    """
    A new, empty folder (`Path`), which is removed in the end. What a killed process has left in it is removed before,
    so two processes must not use the same one at once.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_is_new(folder):
    """Raises FileExistsError if a folder (`Path`) has something in it."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; expected a new or empty folder")


def put_in_place(unfinished, folder):
    """Gives a folder (`Path`) its final name, which nothing or an empty folder has, when all in it is on the disk."""
    sync_all(unfinished)
    os.replace(unfinished, folder)
    sync(folder.parent)


def sync_all(folder):
    """Waits until a folder (`Path`) and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path):
    """Waits until a file's content, or the names in a folder, are on the disk."""
    is_folder = Path(path).is_dir()
    if os.name == "nt" and is_folder:
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what it may write
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks sync no folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path, note="", unfinished=None):
    """
    Makes `NotWrittenError` of what libraries raise when they cannot write.

    Args:
        path: of the file or folder, for the message, unless it comes from a `writing` inside this one.
        note: what else to say.
        unfinished: a folder that is removed then, because there is little room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, NotWrittenError):
            raise NotWrittenError(error.errno, f"{error.strerror}{note}") from error
        if isinstance(error, RuntimeError) and not any(writer in str(error) for writer in TORCH_WRITERS):
            raise
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or f"the disk may be full ({error})"
        raise NotWrittenError(number, f"{path} cannot be written: {reason}{note}") from error
