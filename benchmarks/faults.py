"""
The fault campaign: kills, interrupted writes, damaged inputs, and a Hub that fails.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 5 --moments 20 --inputs 500 --requests 2     # a small run
    python benchmarks/faults.py --parts fuzz --inputs 100000 --seed 1

Prints a table, and below it all failures; the exit code is 1 if there are any. It takes about 40 minutes on two cores.
Everything is written to a temporary folder, which is kept if something failed. `docs/reliability.md` has the promises
that it tests, and `benchmarks/fault_campaign/` its parts.

Each part runs in a process of its own, which imports everything once and forks for each run, so a kill costs a second.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from fault_campaign.report import HEADER, Row, failures_of

# In the order in which they start: the longest first.
PARTS = ("grid", "training", "hub-loading", "fuzz", "hub-publishing", "publishing", "two-processes", "extraction")
ORDER = ("extraction", "training", "two-processes", "grid", "publishing", "fuzz", "hub-publishing", "hub-loading")
WITH_HUB = ("publishing", "hub-publishing", "hub-loading")


def main():
    arguments = _parse()
    if arguments.part:
        _run_part(arguments.part, arguments)
        return 0
    started = time.time()
    place = Path(tempfile.mkdtemp(prefix="emoshare-faults-"))
    parts = [part for part in PARTS if part in arguments.parts]
    cores = Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with ThreadPoolExecutor(max_workers=cores.qsize()) as pool:
        rows = dict(zip(parts, pool.map(lambda part: _start_part(part, place / part, cores), parts), strict=True))
    machine = next(iter(place.glob("*/machine")), None)
    print(f"{machine.read_text() if machine else 'unknown'}; {(time.time() - started) / 60:.0f} minutes\n\n{HEADER}")
    in_order = [row for part in ORDER if part in rows for row in rows[part]]
    print(*in_order, sep="\n")
    if not any(row.failures for row in in_order):
        shutil.rmtree(place)
        return 0
    print(f"\nFailed; logs and inputs are in {place}\n\n{failures_of(in_order)}")
    return 1


def _start_part(part, place, cores):
    """Runs a part in a process of its own, on a free core; returns its `Row`s."""
    place.mkdir()
    core = cores.get()
    made = place / "made"
    for name in ("home", "tmp"):
        (made / name).mkdir(parents=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(made / "home"),
        "TMPDIR": str(made / "tmp"),
        "HF_HUB_OFFLINE": "0" if part in WITH_HUB else "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with (place / "log").open("w") as log:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--place", str(place), "--core", str(core)]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
    cores.put(core)
    rows = place / "rows.json"
    if code != 0 or not rows.is_file():
        lines = "\n".join((place / "log").read_text(errors="replace").splitlines()[-30:])
        return [Row(part, failures=[f"the campaign itself failed:\n{lines}"])]
    return [Row(**fields) for fields in json.loads(rows.read_text())]


def _run_part(part, arguments):
    """Runs in the process of a part, and writes its rows to a file."""
    place = arguments.place
    os.sched_setaffinity(0, {arguments.core})  # so that parts do not slow down each other's threads
    if part in WITH_HUB:
        from fault_campaign.faulty_hub import HubClient

        hub = HubClient()  # before importing anything that reads its address
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    else:
        hub = None
    try:
        if part == "fuzz":
            rows = _fuzz(place, arguments)
        elif part.startswith("hub-"):
            rows = _fail_at_requests(part, place, hub, arguments)
        else:
            rows = _kill(part, place, hub, arguments)
    finally:
        if hub is not None:
            hub.close()
    from machine import describe

    (place / "machine").write_text(describe())
    (place / "rows.json").write_text(json.dumps([vars(row) for row in rows]))


def _kill(part, place, hub, arguments):
    from fault_campaign import scenarios
    from fault_campaign.forks import prepare
    from fault_campaign.kills import kill
    from fault_campaign.moments import interrupt

    import emoshare.dataset_script.__main__  # so that forked processes need not import them
    import emoshare.reproduction.run  # noqa: F401
    from emoshare.training import features

    features.CLIPS_PER_SHARD = scenarios.CLIPS_PER_SHARD
    scenario = scenarios.SCENARIOS[part](place, hub)
    log = place / "run.log"
    prepare(scenario.prepare, log)
    rows = [kill(scenario, arguments.kills, arguments.seed, log)]
    if scenario.processes == 1 and arguments.moments:
        rows.append(interrupt(scenario, arguments.moments, log))
    return rows


def _fuzz(place, arguments):
    from fault_campaign import fixtures
    from fault_campaign.forks import prepare
    from fault_campaign.fuzz import fuzz
    from fault_campaign.fuzz_targets import targets

    import emoshare.reproduction.run  # noqa: F401  (so that forked processes need not import it)

    prepare(lambda: fixtures.make_everything(place), place / "run.log")
    return [
        fuzz(target, max(round(arguments.inputs * target.fraction), 1), arguments.seed, place / "run.log")
        for target in targets(place)
    ]


def _fail_at_requests(part, place, hub, arguments):
    # Not emoshare: one of the runs must work without it.
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torchaudio  # noqa: F401
    from fault_campaign import fixtures, hub_faults
    from fault_campaign.forks import prepare
    from transformers import pipeline  # noqa: F401

    log = place / "run.log"
    prepare(lambda: fixtures.make_everything(place), log)
    hub_faults.fill(place, hub, log)
    return [
        hub_faults.fail_at_each_request(conversation(place, hub), arguments.requests, log)
        for conversation in hub_faults.CONVERSATIONS
        if conversation.is_upload == (part == "hub-publishing")
    ]


def _parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50, help="number of kills of each kind of run (default: 50)")
    parser.add_argument(
        "--moments",
        type=int,
        default=80,
        help="most interruptions between file operations, for each kind of run (default: 80)",
    )
    parser.add_argument(
        "--inputs", type=int, default=10_000, help="number of damaged inputs in total (default: 10,000)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=1000,
        help="most requests at which the Hub fails, for each command (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and damage (default: 0)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="run only these parts (default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
