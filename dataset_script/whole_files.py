"""
Files and folders that appear whole or not at all, whenever the process is killed, the power fails or the disk is full.

They are written next to their final place, and renamed when every byte is on the disk: a file system may write a new
name before the content. The name of an unfinished file follows from the final one, so that the remains of a killed
process are overwritten by the next one instead of staying forever.
"""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Parts of torch's RuntimeError messages when it cannot write.
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error")


class NotWrittenError(OSError):
    """Something cannot be written. Its message names it, and its errno is the system's, or `EIO` if there is none."""

    def __str__(self):
        return self.strerror


@contextmanager
def whole_file(path, mode="w", **options):
    """
    Opens a file for writing, which replaces `path` when the block ends without an error.

    Args:
        path: path of the file, in an existing folder.
        mode, options: as in `open`.

    Raises:
        NotWrittenError: if the file cannot be written. A previous file is left unchanged.
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
    Yields a new, empty folder (`Path`), which is removed at the end. The remains of a killed process are removed first,
    so two processes must not use the same folder at once.
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
    """Renames a folder (`Path`) when all in it is on the disk. The new name must be free or an empty folder's."""
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
    Turns the errors that libraries raise when they cannot write into `NotWrittenError`.

    Args:
        path: the file or folder that the message names, unless an inner `writing` has named one.
        note: text to append to the message.
        unfinished: a folder to remove on an error, because there is little room on the disk.
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
