"""
How long a command takes to answer `--help`, or to report a wrong flag.

    python benchmarks/waiting/startup.py

The peers are commands of the underlying libraries. The limit is the start of Python itself. The imports for prediction
and training come after the arguments have been checked; the last row is the time of all of these imports.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
from machine import describe

ROUNDS = 3
PYTHON = [sys.executable, "-c"]
EMOSHARE = [sys.executable, "-m", "emoshare.cli"]
COMMANDS = {
    "Python alone": [*PYTHON, "pass"],
    "`emoshare --help`": [*EMOSHARE, "--help"],
    "`emoshare predict --help`": [*EMOSHARE, "predict", "--help"],
    "`emoshare train --help`": [*EMOSHARE, "train", "--help"],
    "`emoshare reproduce --help`": [*EMOSHARE, "reproduce", "--help"],
    "`emoshare train` with a wrong flag": [*EMOSHARE, "train", "--nonsense"],
    "`transformers --help`": [str(Path(sys.executable).with_name("transformers")), "--help"],
    "`accelerate launch --help`": [str(Path(sys.executable).with_name("accelerate")), "launch", "--help"],
    "import of all that `emoshare train` needs": [*PYTHON, "import emoshare.training.run, emoshare.training.launch"],
}


def main():
    print(describe())
    print("\n| | seconds | CPU seconds |\n|---|---|---|")
    for title, command in COMMANDS.items():
        wall, cpu = (min(of_rounds) for of_rounds in zip(*(times_of(command) for _ in range(ROUNDS)), strict=True))
        print(f"| {title} | {wall:.2f} | {cpu:.2f} |", flush=True)


def times_of(command):
    """Seconds and CPU seconds that a command takes."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return after.elapsed - before.elapsed, cpu


if __name__ == "__main__":
    main()
