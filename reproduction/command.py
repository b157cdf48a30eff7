"""The command line of a grid, which reports wrong flags before it imports anything slow."""

import argparse
from pathlib import Path

from ..training.user_errors import run_entry_point

DESCRIPTION = (
    "Reproduces the paper: trains a grid of features, architectures and seeds, and makes tables and figures. Each cell "
    "is a run of train.py in its own folder. Finished cells are left alone, interrupted ones are resumed, and a cell "
    "that fails does not stop the others."
)


def main(argv, name="reproduce.py"):
    """
    Runs `reproduce.py`, or `emoshare reproduce`; error messages begin with `name`. Returns the exit code: 1 if a cell
    is not done, 2 if the user's input is wrong.
    """
    return run_entry_point(name, _parse, _run, argv)


def _run(parsed):
    from .run import run

    flags, grid = parsed
    return run(grid, flags.dry_run)


def _parse(argv, name):
    parser = argparse.ArgumentParser(prog=name, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", required=True, type=Path, help="the grid: a YAML file, see configs/*_grid.yaml")
    parser.add_argument("--data_dir", help="folder of the corpus")
    parser.add_argument("--output_dir", help="output folder, instead of the one in the grid")
    parser.add_argument("--sweep_layers", action="store_true", help="add a cell for each layer of each backbone")
    parser.add_argument(
        "--dry_run", action="store_true", help="only list the cells, with an estimate of their time and disk space"
    )
    flags = parser.parse_args(argv)

    from .grid import read_grid  # imports Transformers, which takes seconds

    try:
        grid = read_grid(flags.config, flags.data_dir, flags.output_dir, flags.sweep_layers)
    except ValueError as error:
        parser.error(str(error))
    return flags, grid
