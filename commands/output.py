"""What a command writes, and what it says of what it could not do."""

import os
import sys
import warnings
from contextlib import contextmanager

from transformers.utils.logging import tqdm

from ..evaluation.clips import printable

BROKEN_CLIPS = 1  # exit code


def reason_of(error):
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def write_each(arguments, number, results, write):
    """
    Writes what was predicted of each clip as soon as it is there. Broken clips are listed at the end.

    Args:
        arguments: of the command.
        number: of clips.
        results: iterator of (clip, result), where a result may be an exception.
        write: function of a clip and its result.

    Returns:
        The exit code.
    """
    no_bar = arguments.output is None and os.isatty(1)  # rows on the terminal show the progress themselves
    broken = []
    try:
        with warnings_at_the_end(), tqdm(total=number, unit=" clips", disable=no_bar) as progress:
            for clip, result in results:
                if isinstance(result, Exception):
                    broken.append(printable(f"{clip}: {reason_of(result).removeprefix(f'{clip}: ')}"))
                else:
                    write(clip, result)
                progress.update()
    finally:
        if broken:
            summary = f"\n{len(broken)} of {number} files could not be predicted:"
            print(summary, *broken, sep="\n  ", file=sys.stderr)
    return BROKEN_CLIPS if broken else 0


@contextmanager
def warnings_at_the_end():
    """Warnings, of audio that is cut off, silent or clipped above all, one line each: not amid rows and progress."""
    with warnings.catch_warnings(record=True) as noted:
        try:
            yield
        finally:
            if noted:
                messages = [printable(str(warning.message)) for warning in noted]
                print("\nWarnings:", *messages, sep="\n  ", file=sys.stderr)


@contextmanager
def open_output(path):
    """The output file, or standard output: written line by line, so that an interrupted run leaves all rows so far."""
    if path is None and sys.stdout is None:
        raise ValueError("standard output is closed; expected --output FILE")
    try:
        with open(
            sys.stdout.fileno() if path is None else path,
            "w",
            buffering=1,
            newline="",
            encoding="utf-8",
            errors="surrogateescape",  # names of files need not be UTF-8
            closefd=path is not None,
        ) as file:
            yield file
    except OSError as error:
        if error.filename is not None or error.errno is None:  # of the audio
            raise
        raise OSError(error.errno, error.strerror, "standard output" if path is None else path) from error
