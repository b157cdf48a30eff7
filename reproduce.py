"""
Reproduces the paper: a grid of features, architectures and seeds, and its tables and figures.

With the data of the ComParE 2023 challenge, on one GPU and on four:
    accelerate launch reproduce.py --config configs/paper_grid.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 4 reproduce.py --config configs/paper_grid.yaml --data_dir DIR
Without any data, on the synthetic corpus and small random backbones:
    accelerate launch reproduce.py --config configs/synthetic_grid.yaml

Each cell is a run of train.py in a folder of its own. A cell that is done is left alone, one that was interrupted goes
on, and one that fails does not lose the others.
"""

import argparse
import shutil
import sys
import traceback
from pathlib import Path

from emoshare.reproduction.grid import claim_folder, make_random_backbones, read_grid
from emoshare.reproduction.plan import describe, extract_swept_layers
from emoshare.reproduction.report import write_report
from emoshare.train import train
from emoshare.training.arguments import arguments_of, fixed_settings
from emoshare.training.checkpoints import checkpoints
from emoshare.training.corpus import load_splits
from emoshare.training.launch import start

ERROR = "error.txt"


def main(argv):
    """Returns the exit code: 1 if a cell is not done."""
    arguments, grid = _parse(argv)
    data, _, run, settings = _arguments(grid.cells[0])
    accelerator = start(run, settings)
    with accelerator.main_process_first():
        make_random_backbones(grid)
    splits, labels = load_splits(data, accelerator)
    if arguments.dry_run:
        accelerator.print(describe(grid, splits, labels, accelerator))
        return 0
    if accelerator.is_main_process:
        for cell in grid.cells:
            claim_folder(cell)
    accelerator.wait_for_everyone()

    extract_swept_layers(grid, splits, labels, accelerator)
    # What failed the last time waits until all others are done.
    unfinished = [cell for cell in grid.cells if not cell.is_done]
    for number, cell in enumerate(sorted(unfinished, key=lambda cell: (cell.folder / ERROR).is_file()), start=1):
        accelerator.print(f"\nCell {number} of {len(unfinished)}: {cell.folder.name}")
        run_cell(cell, accelerator)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        failed = {
            cell.folder.name: (cell.folder / ERROR).read_text(encoding="utf-8").strip().splitlines()[-1]
            for cell in grid.cells
            if not cell.is_done and (cell.folder / ERROR).is_file()
        }
        write_report(grid.output_dir, grid.title, data.dataset, grid.cells, failed, splits, labels)
        print(f"\nTables and figures: {grid.output_dir / 'README.md'}")
        for name, error in failed.items():
            print(f"failed: {name}: {error}", file=sys.stderr)
    accelerator.end_training()
    return int(not all(cell.is_done for cell in grid.cells))


def run_cell(cell, accelerator):
    """Trains a cell. What it fails with is kept in its folder; with several processes, all of them end with it."""
    try:
        data, model, run, settings = _arguments(cell)
        train(data, model, run, settings, start(run, settings))
        if accelerator.is_main_process:
            (cell.folder / ERROR).unlink(missing_ok=True)
            for checkpoint in checkpoints(cell.folder):  # of gigabytes, and of no more use
                shutil.rmtree(checkpoint)
    except Exception:
        (cell.folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
        if accelerator.num_processes > 1:  # the others may be waiting for this one in the middle of the cell
            raise
        traceback.print_exc()


def _arguments(cell):
    entries = {**cell.flags, "resume_from_checkpoint": "last" if checkpoints(cell.folder) else None}
    data, model, run = arguments_of(entries, cell.folder)
    return data, model, run, fixed_settings(data, model, run)


def _parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, help="the grid: a YAML file, see configs/*_grid.yaml")
    parser.add_argument("--data_dir", help="folder of the corpus")
    parser.add_argument("--output_dir", help="folder for all of it, instead of the grid's own")
    parser.add_argument("--sweep_layers", action="store_true", help="a cell for each layer of each backbone, too")
    parser.add_argument("--dry_run", action="store_true", help="list the cells, with the time and disk they may take")
    arguments = parser.parse_args(argv)
    try:
        grid = read_grid(arguments.config, arguments.data_dir, arguments.output_dir, arguments.sweep_layers)
    except ValueError as error:
        parser.error(str(error))
    return arguments, grid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
