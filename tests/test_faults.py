"""The campaign of `benchmarks/faults.py`: it finds planted failures, and a small run of it finds none in EmoShare."""

import os
import signal
import sys
import time

import pytest
from conftest import ROOT, run_python

sys.path.append(str(ROOT / "benchmarks"))

from fault_campaign import forks, fuzz, kills, moments
from fault_campaign.fuzz_targets import Target
from fault_campaign.scenarios import Scenario


class Careful(Scenario):
    """Writes a number of files, each of them whole or not at all; started again, it writes those that are missing."""

    name = "careful"
    steps = 5

    def run(self):
        for step in range(self.steps):
            path = self.output / str(step)
            if not path.exists():
                self.write(path, str(step).encode() * 5000)

    def write(self, path, content):
        unfinished = path.with_name(f"unfinished-{path.name}")
        unfinished.write_bytes(content)
        time.sleep(0.04)
        os.replace(unfinished, path)


class Careless(Careful):
    """Does not notice a truncated file."""

    name = "careless"

    def write(self, path, content):
        with path.open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(0.04)
            file.write(content[len(content) // 2 :])


class Littering(Careful):
    """Leaves what is unfinished under another name each time."""

    name = "littering"

    def write(self, path, content):
        unfinished = path.with_name(f"unfinished-{os.urandom(4).hex()}")
        unfinished.write_bytes(content)
        time.sleep(0.04)
        os.replace(unfinished, path)


def test_kills_that_do_harm_are_found(tmp_path):
    log = tmp_path / "log"
    careful = kills.kill(Careful(tmp_path / "careful"), 6, 0, log)
    assert (careful.trials, careful.failures) == (6, [])
    for scenario, harm in [(Careless, "differs"), (Littering, "should not be there")]:
        failures = []
        for seed in range(10):  # on a busy machine, none of a few kills may come while a file is being written
            row = kills.kill(scenario(tmp_path / f"{scenario.name}{seed}"), 6, seed, log)
            assert row.trials == 6
            failures += row.failures
            if any(harm in failure for failure in failures):
                break
        assert any(harm in failure for failure in failures)


def test_every_moment_between_file_operations_is_found(tmp_path):
    log = tmp_path / "log"
    careful = moments.interrupt(Careful(tmp_path / "careful"), 1000, log)
    # Of each file: before it is opened, with half of it written, and before it is renamed.
    assert careful.trials == 3 * Careful.steps
    assert careful.failures == []
    careless = moments.interrupt(Careless(tmp_path / "careless"), 1000, log)
    assert len(careless.failures) == Careless.steps - 1  # what is left after the last operation is whole
    assert all("torn" in failure and "differs" in failure for failure in careless.failures)


def test_a_run_is_killed_with_all_of_its_processes(tmp_path):
    def run():
        (tmp_path / f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}").write_text(str(os.getpid()))
        time.sleep(60)

    started = forks.Run(run, tmp_path / "log", processes=2)
    names = {"0 of 2", "1 of 2"}
    while not names <= {path.name for path in tmp_path.iterdir() if path.stat().st_size}:
        assert started.wait(until=0) is None
        time.sleep(0.04)
    started.kill()
    assert started.code == -signal.SIGKILL
    for name in names:
        with pytest.raises(ProcessLookupError):
            while True:  # until it is reaped
                os.kill(int((tmp_path / name).read_text()), 0)
                time.sleep(0.04)


def test_fuzzing_finds_what_must_not_happen(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LONGEST_S", 1.5)
    monkeypatch.setattr(fuzz, "MOST_BYTES", 1 << 24)

    def read(content):
        kind = content[0]
        if kind == 1:
            raise ValueError("file: not one")
        if kind == 2:
            raise ValueError("not one")  # of which file?
        if kind == 3:
            raise KeyError("file")
        assert kind != 4
        if kind == 5:
            bytearray(1 << 30)
        elif kind == 6:
            time.sleep(60)
        elif kind == 7:
            os._exit(7)

    target = Target("fake", 1.0, [bytes([kind]) for kind in range(8)], lambda data, *_: data, read, names=("file",))
    row = fuzz.fuzz(target, 24, 19, tmp_path / "log")
    assert row.trials == 24
    found = {int(path.read_bytes()[0]): path for path in tmp_path.glob("fake-*")}
    assert set(found) == {2, 3, 4, 5, 6, 7}
    for kind, text in [
        (2, "does not say where"),
        (3, "KeyError"),
        (4, "AssertionError"),
        (5, "MemoryError"),
        (6, "no answer"),
    ]:
        assert any(str(found[kind]) in failure and text in failure for failure in row.failures)
    assert any("ended with 7" in failure for failure in row.failures)
    answers, errors = row.note.split()[0], row.note.split()[2]
    assert int(answers) + int(errors) + len(row.failures) == 24


@pytest.mark.slow
def test_the_campaign_in_small(tmp_path):
    numbers = ["--kills", "3", "--moments", "1", "--inputs", "60"]
    parts = ["--parts", "extraction", "fuzz"]
    result = run_python(ROOT / "benchmarks" / "faults.py", *numbers, *parts, cwd=tmp_path, TMPDIR=str(tmp_path))
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    trials = {row[0].removeprefix("| "): int(row[1]) for row in rows}
    assert trials["kills, extraction"] == 3
    assert trials["moments between file operations, extraction"] == 1
    assert trials["fuzzed: audio"] == 26
    assert sum(number for name, number in trials.items() if name.startswith("fuzzed: ")) >= 60
    assert {row[2] for row in rows} == {"0"}
    assert not list(tmp_path.glob("emoshare-faults-*"))  # it cleans up
