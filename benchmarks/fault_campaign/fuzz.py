"""
Fuzzed inputs: damages real files of each kind, and reads them as the product does.

Each input must give a right answer, or one of the errors documented for its kind, within 10 s and 1 GiB. Chunks of
inputs are read in forked processes, so that a crash or a hang can be attributed to one input and ends nothing else.
"""

import json
import os
import random
import resource
import select
import time
import traceback
from collections import Counter
from pathlib import Path

from .forks import Run
from .report import Row

CHUNK = 200  # inputs per process
LONGEST_S = 10
MOST_BYTES = 1 << 30
SHOWN_LINES = 6  # of a failure's traceback


def fuzz(target, inputs, seed, log):
    """
    Args:
        target: `Target` of `fuzz_targets`.
        inputs: number of damaged inputs.
        seed: seed of the damage.
        log: file for the output of processes; failing inputs are kept next to it.

    Returns:
        `Row`.
    """
    row, outcomes, first = Row(f"fuzzed: {target.name}", inputs), Counter(), 0
    slowest, largest = 0.0, 0
    while first < inputs:
        last = min(first + CHUNK, inputs)
        for number, outcome, seconds, added in _read_chunk(target, first, last, seed, log):
            first = number + 1
            outcomes[outcome.split("\n")[0] if not outcome.startswith("failed") else "failed"] += 1
            slowest, largest = max(slowest, seconds), max(largest, added)
            if outcome.startswith("failed"):
                kept = log.with_name(f"{target.name}-{number}{target.suffix}".replace("/", "-").replace(" ", "-"))
                kept.write_bytes(target.damaged(random.Random(f"{seed} {number}")))
                row.fail(f"input {number} ({kept}): {outcome}")
    answers, errors = outcomes.pop("answer", 0), sum(count for name, count in outcomes.items() if name != "failed")
    row.note = (
        f"{answers:,} answers, {errors:,} documented errors; slowest {slowest:.1f} s, most memory {largest >> 20} MiB"
    )
    return row


def _read_chunk(target, first, last, seed, log):
    """Yields number, outcome, seconds and added bytes of each input, up to the first one that ends the process."""
    reader, writer = os.pipe()

    def run():
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            _limit_memory()
            for number in range(first, last):
                data = target.damaged(random.Random(f"{seed} {number}"))
                print(json.dumps(_read(target, data)), file=file, flush=True)

    process = Run(run, log)
    os.close(writer)
    number, buffer = first, b""
    while number < last:
        if not select.select([reader], [], [], LONGEST_S)[0]:
            process.kill()
            yield number, f"failed: no answer in {LONGEST_S} s", LONGEST_S, 0
            break
        received = os.read(reader, 1 << 16)
        buffer += received
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            yield number, *json.loads(line)
            number += 1
        if not received and number < last:
            yield number, f"failed: the process ended with {process.wait()}\n{process.output()}", 0.0, 0
            break
    os.close(reader)
    process.wait()


def _read(target, data):
    """Reads an input; returns the outcome, the seconds and the added bytes of memory."""
    before, started = _reset_peak(), time.perf_counter()
    try:
        target.read(data)
        outcome = "answer"
    except target.errors as error:
        is_clear = str(error).strip() and any(name in str(error) for name in target.names)
        outcome = type(error).__name__ if is_clear else f"failed: the message does not say where: {error!r}"
    except BaseException as error:  # noqa: BLE001  (any other error is a finding)
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        outcome = "failed: " + "\n".join(lines[-1:] + lines[-SHOWN_LINES:-1])[:1500]
    added = _peak() - before
    if added > MOST_BYTES:
        outcome = f"failed: it took {added >> 20} MiB"
    return outcome, time.perf_counter() - started, added


def _limit_memory():
    """Limits the address space, so that large allocations fail here instead of ending other processes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MOST_BYTES, resource.RLIM_INFINITY))


def _reset_peak():
    """Resets the peak that `_peak` measures; returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
