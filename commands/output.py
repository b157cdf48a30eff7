"""Output of commands: rows, warnings, and the files that could not be predicted."""

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
    Writes the result of each clip as soon as it arrives. Broken clips are listed at the end.

    Args:
        arguments: the command's arguments.
        number: number of clips.
        results: iterator of (clip, result), where a result may be an exception.
        write: function that takes a clip and its result.

    Returns:
        The exit code.
    """
    no_bar = arguments.output is None and os.isatty(1)  # rows on the terminal already show the progress
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
    """Prints warnings (of audio that is cut off, silent or clipped, for example) at the end, one line each."""
    with warnings.catch_warnings(record=True) as noted:
        try:
            yield
        finally:
            if noted:
                messages = [printable(str(warning.message)) for warning in noted]
                print("\nWarnings:", *messages, sep="\n  ", file=sys.stderr)


@contextmanager
def open_output(path):
    """Opens the output file or standard output, line by line, so that an interrupted run keeps all rows so far."""
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
        if error.filename is not None or error.errno is None:  # an error about audio, not the output
            raise
        raise OSError(error.errno, error.strerror, "standard output" if path is None else path) from error
