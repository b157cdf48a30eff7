"""
What the user of a run can mend: it is reported once, whatever the number of processes, without a traceback, and the
exit code is 2.

Whatever fails before the first step of training (flags, corpus, backbone, audio, features, checkpoint) is checked by
functions that raise `ValueError`, and so is `UserError`. A `ValueError` of any other place is a bug, of ours or of a
library, and keeps its traceback. An `OSError` always has an outside cause: a full disk, a folder that may not be read,
a Hub that does not answer.
"""

import os
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO

EXIT_CODE = 2  # as argparse has it for wrong arguments
# Seconds that the other processes leave the main one to say what is wrong. A launcher ends all processes as soon as one
# has ended, so none may end before the main one has spoken; it then ends them, usually within a second.
TIME_TO_SPEAK = 30


class UserError(ValueError):
    """
    Args:
        message: what is wrong; names flag, file or row.
        is_of_all: whether every process raises it, so that only the main one reports it.
    """

    def __init__(self, message, is_of_all=False):
        super().__init__(message)
        self.is_of_all = is_of_all


@contextmanager
def checking(is_of_all=False):
    """Makes `UserError` of the `ValueError` of checks; for `is_of_all` see there."""
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
        function: without arguments; must not exchange anything with other processes.

    Returns:
        What it returned on this process.

    Raises:
        UserError: on every process, if it raised `ValueError` or `OSError` on any; the message is the first process's.
    """
    from accelerate.utils import gather_object  # not for a message on wrong flags: this takes seconds

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
    """As `together`, of a function that only the main process calls; what it returned there, and `None` elsewhere."""
    return together(function if accelerator.is_main_process else lambda: None)


def run_entry_point(name, parse, run, argv):
    """
    Args:
        name: of the program, for messages.
        parse: function of `argv` and the name that returns the arguments, or ends the program as argparse does.
        run: function of the arguments; its result is the exit code, `None` for 0.
        argv: without the program's name.

    Returns:
        The exit code: 2 after a `UserError` or `OSError`, whose message is then on stderr.
    """
    speaks = os.environ.get("RANK", "0") == "0"  # where launchers put it, before `accelerate` knows
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
    except SystemExit as end:  # after --help, everybody may leave at once
        _let_main_process_speak(speaks or not end.code)
        raise


def _let_main_process_speak(speaks):
    """Ends a process that has nothing to say, later than the main one."""
    if not speaks:
        time.sleep(TIME_TO_SPEAK)
        sys.exit(EXIT_CODE)
