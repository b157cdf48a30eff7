"""
Runs functions in forked processes, so that each run costs no imports, and can be killed at any moment.

A forked run begins where a new one is after its imports: nothing is written before that. The process that forks must
not compute anything itself, because threads do not survive a fork.
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
        function: without arguments. What it returns is the exit code, as in `sys.exit`.
        log (`Path`): gets what it prints.
        processes: number of processes that call the function, with the environment that torchrun gives them.
    """

    def __init__(self, function, log, processes=1):
        self.log = log
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            _redirect_output(log)
            os._exit(_call(function) if processes == 1 else _launch(function, processes))
        with suppress(OSError):  # here too, whichever is first; it may have ended already
            os.setpgid(self.pid, self.pid)
        self.code = None

    @property
    def seconds(self):
        """Since the start."""
        return time.monotonic() - self.started

    def wait(self, until=LONGEST_RUN_S):
        """The exit code; `None` if the run is still going so many seconds after its start. A signal is negative."""
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._kill_group()  # processes that it may have left
            elif self.seconds > until:
                return None
            else:
                time.sleep(min(POLL_S, max(until - self.seconds, 0)))
        return self.code

    def kill(self):
        """Kills the whole process group with SIGKILL, and waits for its end."""
        self._kill_group()
        if self.code is None:
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL

    def _kill_group(self):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def output(self, lines=12):
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def run_to_end(function, log, processes=1):
    """The finished `Run` of a function. One that does not end is killed."""
    run = Run(function, log, processes)
    if run.wait() is None:
        run.kill()
    return run


def prepare(function, log):
    """Runs a function that must not fail, in a forked process, because this one must not compute anything."""
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
    except BaseException:  # noqa: BLE001  (the process ends here, and its log says why)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _launch(function, processes):
    """What torchrun does: starts all processes, and ends with the first that fails."""
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
