"""
Errors that the user of a run can fix. They are reported once, whatever the number of processes, without a traceback,
and the exit code is 2.

Everything that is checked before the first step of training (flags, corpus, backbone, audio, features, checkpoint)
raises `ValueError`, which becomes `UserError`. A `ValueError` from anywhere else is a bug, of ours or of a library, and
keeps its traceback. An `OSError` always has an outside cause: a full disk, a folder without permission, a Hub that does
not respond.
"""

import os
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO

EXIT_CODE = 2  # as argparse has it for wrong arguments
# Seconds for which other processes wait while the main one reports an error. A launcher ends all processes as soon as
# one has ended, so none may end before the main one has reported; usually, they are then ended within a second.
TIME_TO_SPEAK = 30


class UserError(ValueError):
    """
    Args:
        message: what is wrong; names the flag, file or row.
        is_of_all: whether every process raises this error, so that only the main one reports it.
    """

    def __init__(self, message, is_of_all=False):
        super().__init__(message)
        self.is_of_all = is_of_all


@contextmanager
def checking(is_of_all=False):
    """Within this context, a `ValueError` becomes a `UserError`; `is_of_all` is as there."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error), is_of_all) from error


def together(function):
    """
    Calls a function on every process, and waits for all of them.

    Args:
        function: without arguments; must not communicate with other processes.

    Returns:
        What the function returned on this process.

    Raises:
        UserError: on every process, if the function raised `ValueError` or `OSError` on any of them; has the message of
            the first.
    """
    from accelerate.utils import gather_object  # takes seconds, which a message about wrong flags need not wait for

    result = failure = None
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = error
    messages = gather_object([None if failure is None else str(failure)])
    message = next((message for message in messages if message is not None), None)
    if message is not None:
        raise UserError(message, is_of_all=True) from failure
    return result


def on_main_process(function, accelerator):
    """As `together`, but only the main process calls the function; the others get `None`."""
    return together(function if accelerator.is_main_process else lambda: None)


def run_entry_point(name, parse, run, argv):
    """
    Runs a program, and reports errors that the user can fix.

    Args:
        name: of the program, for messages.
        parse: function of `argv` and `name` that returns the arguments, or ends the program as argparse does.
        run: function of the arguments that returns the exit code, or `None` for 0.
        argv: arguments without the program's name.

    Returns:
        The exit code: 2 after a `UserError` or `OSError`, whose message is then on stderr.
    """
    speaks = os.environ.get("RANK", "0") == "0"  # set by launchers; `accelerate` has not started yet
    try:
        return run(_parsed(partial(parse, argv, name), speaks)) or 0
    except (UserError, OSError) as error:
        _let_main_process_speak(speaks or not getattr(error, "is_of_all", False))
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_CODE


def _parsed(parse, speaks):
    try:
        if speaks:
            return parse()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return parse()
    except OSError as error:
        raise UserError(str(error), is_of_all=True) from error
    except SystemExit as end:  # after --help, all processes may end at once
        _let_main_process_speak(speaks or not end.code)
        raise


def _let_main_process_speak(speaks):
    """Ends a process that has nothing to report, but after the main one."""
    if not speaks:
        time.sleep(TIME_TO_SPEAK)
        sys.exit(EXIT_CODE)
