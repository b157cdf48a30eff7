"""Kills runs at random moments, restarts them, and compares their results with those of an undisturbed run."""

import random

from .forks import Run
from .report import Row
from .scenarios import differences, undisturbed


def kill(scenario, kills, seed, log):
    """
    Kills runs of a scenario, with SIGKILL to their whole process group, and restarts them until `kills` kills have
    happened; then lets the last run finish. The moments are drawn uniformly from the duration of an undisturbed run. If
    a run finishes before its kill, its result is compared, and everything begins again from nothing.

    Args:
        scenario: `Scenario`.
        kills: number of kills.
        seed: seed of the moments.
        log: file for the output of runs.

    Returns:
        `Row`.
    """
    expected, seconds = undisturbed(scenario, log)
    rng = random.Random(seed)
    row = Row(f"kills, {scenario.name}")
    done = finished = 0
    scenario.reset()
    while True:
        run = Run(scenario.run, log, scenario.processes)
        moment = rng.uniform(0, seconds) if done < kills else None
        code = run.wait() if moment is None else run.wait(until=moment)
        if code is None and moment is not None:
            run.kill()
            done += 1
            for problem in scenario.problems_after_kill():
                row.fail(f"kill {done}, after {moment:.2f} s: {problem}")
            continue
        finished += 1
        if code != 0:
            run.kill()
            row.fail(f"after {done} kills, a run ended with {code}:\n{run.output()}")
        elif (result := scenario.result()) != expected:
            row.fail(f"after {done} kills: {differences(expected, result)}")
        if moment is None:
            break
        scenario.reset()
    row.trials = done
    row.note = f"{finished} runs finished between them; an undisturbed one takes {seconds:.1f} s"
    return row
