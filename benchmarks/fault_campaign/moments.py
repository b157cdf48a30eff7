"""
Restarts a run from each state of the disk that a kill between two of its file operations would leave.

A kill leaves what has been written so far. So an audit hook copies everything that a run has made before each operation
that changes a file or folder: one run gives the states of all moments. The hook does not see writes within a file; for
these, there are also states in which a new file is cut in half.
"""

import hashlib
import os
import shutil
import sys

from .forks import run_to_end
from .report import Row
from .scenarios import differences, undisturbed

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def interrupt(scenario, most, log):
    """
    Restarts a scenario's run from each state that a kill between two of its file operations would leave, and compares
    the result with that of an undisturbed run.

    Args:
        scenario: `Scenario`.
        most: most states to try; if there are more, every n-th is tried.
        log: file for the output of runs.

    Returns:
        `Row`.
    """
    expected, _ = undisturbed(scenario, log)
    row = Row(f"moments between file operations, {scenario.name}")
    states = _states(scenario, log)
    chosen = states[:: -(-len(states) // most)]
    for number, state in enumerate(chosen):
        scenario.reset()
        _restore(scenario, state)
        run = run_to_end(scenario.run, log, scenario.processes)
        if run.code != 0:
            row.fail(f"{state.name}: the run ended with {run.code}:\n{run.output()}")
        elif (result := scenario.result()) != expected:
            row.fail(f"{state.name}: {differences(expected, result)}")
        row.trials = number + 1
    row.note = f"of {len(states)} different states that a kill can leave"
    return row


def _states(scenario, log):
    """The folders of all distinct states, in order; each is named after the operation that would have come next."""
    folder = scenario.place / "states"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    scenario.reset()

    def run():
        _photograph_before_changes(scenario.made, folder)
        scenario.run()

    finished = run_to_end(run, log)
    if finished.code != 0:
        raise RuntimeError(f"{scenario.name}: an undisturbed run failed:\n{finished.output(40)}")
    states, seen, before = [], set(), {}
    for state in sorted(folder.iterdir(), key=lambda state: int(state.name.split("-")[0])):
        files = _contents(state)
        for torn in _torn(state, before, files):
            states.append(torn)
        digest = hashlib.sha256(repr(sorted(files.items())).encode()).digest()
        if digest not in seen:
            states.append(state)
            seen.add(digest)
        before = files
    return states


def _photograph_before_changes(made, folder):
    """From now on, copies `made` to a new folder in `folder` before each change in it."""
    is_busy, count = False, 0

    def hook(event, arguments):
        nonlocal is_busy, count
        if is_busy or not _changes(event, arguments, str(made)):
            return
        is_busy = True
        name = f"{event} {os.path.relpath(str(arguments[0]), made)}".replace("/", "|")
        shutil.copytree(made, folder / f"{count}-{name}"[:200], symlinks=True)
        count += 1
        is_busy = False

    sys.addaudithook(hook)


def _changes(event, arguments, made):
    """Whether an audit event changes something in `made`."""
    if event == "open":
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and _is_below(path, made)
    return event in CHANGES and any(_is_below(path, made) for path in arguments)


def _is_below(path, made):
    return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(made + os.sep)


def _contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.endswith(".pyc")
    }


def _torn(state, before, files):
    """Yields copies of a state, in each of which one new file is cut in half."""
    known = set(before.values())
    for number, (name, content) in enumerate(files.items()):
        if content and content not in known:
            torn = state.with_name(f"{state.name}, {number} torn")
            shutil.copytree(state, torn, symlinks=True)
            (torn / name).write_bytes(content[: len(content) // 2])
            yield torn


def _restore(scenario, state):
    shutil.rmtree(scenario.made)
    shutil.copytree(state, scenario.made, symlinks=True)
