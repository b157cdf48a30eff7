"""
Runs functions in forked processes, so that a run needs no imports and can be killed at any moment.

A forked run begins in the state of a new process after its imports, before which nothing is written. The process that
forks must not compute anything itself, because threads do not survive a fork.
"""

import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress

LONGEST_RUN_S = 300
POLL_S = 0.005


class Run:
    """
    A function that runs in a process group of its own.

    Args:
        function: takes no arguments and returns the exit code, as in `sys.exit`.
        log (`Path`): file for its output.
        processes: number of processes that call the function, each with the environment that torchrun sets.
    """

    def __init__(self, function, log, processes=1):
        self.log = log
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            _redirect_output(log)
            os._exit(_call(function) if processes == 1 else _launch(function, processes))
        with suppress(OSError):  # parent and child both do this, whichever is first; the child may have ended
            os.setpgid(self.pid, self.pid)
        self.code = None

    @property
    def seconds(self):
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait(self, until=LONGEST_RUN_S):
        """The exit code (negative for a signal), or `None` if the run is not over `until` seconds after its start."""
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._kill_group()  # processes that it may have left behind
            elif self.seconds > until:
                return None
            else:
                time.sleep(min(POLL_S, max(until - self.seconds, 0)))
        return self.code

    def kill(self):
        """Kills the whole process group with SIGKILL, and waits until it has ended."""
        self._kill_group()
        if self.code is None:
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL

    def _kill_group(self):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def output(self, lines=12):
        """The last lines of its output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def run_to_end(function, log, processes=1):
    """Returns the finished `Run` of a function. Kills it if it does not end."""
    run = Run(function, log, processes)
    if run.wait() is None:
        run.kill()
    return run


def prepare(function, log):
    """Runs a function in a forked process, because this one must not compute anything. Raises if it fails."""
    run = run_to_end(function, log)
    if run.code != 0:
        raise RuntimeError(f"ended with {run.code}:\n{run.output(40)}")


def _redirect_output(log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _call(function):
    """The exit code of a function's process."""
    code = 1
    try:
        code = function() or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:  # noqa: BLE001  (the process ends here, and its log has the reason)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _launch(function, processes):
    """Does what torchrun does: starts all processes, and ends with the first one that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        if os.fork() == 0:
            size = str(processes)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(_call(function))
    for _ in range(processes):
        _, status = os.wait()
        if code := os.waitstatus_to_exitcode(status):
            return code if code > 0 else 1
    return 0
