"""Runs a grid, in which each cell is a run of `train.py` in its own folder."""

import shutil
import sys
import traceback
from dataclasses import replace
from functools import partial

from ..dataset_script.whole_files import whole_file
from ..training.checkpoints import checkpoints
from ..training.corpus import load_run_corpus, load_together
from ..training.launch import start
from ..training.run import train
from ..training.store_names import read_clips_together
from ..training.user_errors import UserError, checking, on_main_process, together
from .done import check_done_cells
from .grid import claim_folder, make_random_backbones, with_folds
from .plan import describe, prepare_features
from .report import write_report
from .scored import scored_on

ERROR = "error.txt"


def run(grid, dry_run=False):
    """
    Args:
        grid: `Grid`, as `read_grid` returns it.
        dry_run: whether to only list the cells, with their estimated time and disk space.

    Returns:
        The exit code: 1 if a cell is not done.

    Raises:
        UserError: if the user's input is wrong.
    """
    accelerator = start(grid.cells[0].arguments)
    with accelerator.main_process_first():
        make_random_backbones(grid)
    data = grid.cells[0].arguments.data
    loaded = load_together(data, accelerator)
    corpus = load_run_corpus(data, accelerator, loaded)
    read_clips_together(corpus, accelerator)
    grid = together(partial(with_folds, grid, loaded))
    together(partial(scored_on, grid, corpus))  # fails now rather than after training
    check_done_cells(grid, loaded, accelerator)
    if dry_run:
        accelerator.print(describe(grid, corpus, accelerator))
        return 0
    on_main_process(partial(_claim_folders, grid), accelerator)

    prepare_features(grid, corpus, accelerator)
    if accelerator.is_main_process:
        for cell in grid.cells:
            if cell.is_done:
                _tidy(cell)  # in case the run was killed before it did so
    # Cells that failed last time are run after all others.
    unfinished = [cell for cell in grid.cells if not cell.is_done]
    for number, cell in enumerate(sorted(unfinished, key=lambda cell: (cell.folder / ERROR).is_file()), start=1):
        accelerator.print(f"\nCell {number} of {len(unfinished)}: {cell.folder.name}")
        run_cell(cell, accelerator, loaded)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with checking():
            _report(grid, corpus)
    accelerator.end_training()
    return int(not all(cell.is_done for cell in grid.cells))


def _claim_folders(grid):
    for cell in grid.cells:
        claim_folder(cell)


def run_cell(cell, accelerator, loaded):
    """
    Trains a cell. If this fails, the error is written to its folder; with several processes, it also ends all of them.

    Args:
        cell: `Cell`.
        accelerator: `accelerate.Accelerator`.
        loaded: the grid's `Corpus` with its own splits, from `load_together`.
    """
    is_interrupted = bool(checkpoints(cell.folder))
    run = replace(cell.arguments.run, resume_from_checkpoint="last" if is_interrupted else None)
    arguments = replace(cell.arguments, run=run)
    try:
        train(arguments, start(arguments), loaded)
        if accelerator.is_main_process:
            _tidy(cell)
    except Exception as error:
        is_users = isinstance(error, UserError | OSError)
        _note_error(cell, (str(error) or type(error).__name__) if is_users else traceback.format_exc())
        if accelerator.num_processes > 1:  # the others may be waiting for this process
            raise
        if not is_users:  # user errors are listed at the end, without a traceback
            traceback.print_exc()


def _tidy(cell):
    """Removes the files that a finished cell no longer needs."""
    (cell.folder / ERROR).unlink(missing_ok=True)
    for checkpoint in checkpoints(cell.folder):  # gigabytes
        shutil.rmtree(checkpoint)


def _note_error(cell, text):
    try:
        with whole_file(cell.folder / ERROR, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # such as a full disk; the other cells are still tried
        print(f"{cell.folder.name} failed: {text}\n{error}", file=sys.stderr)


def _report(grid, corpus):
    failed = {
        cell.folder.name: _in_one_line((cell.folder / ERROR).read_text(encoding="utf-8"))
        for cell in grid.cells
        if not cell.is_done and (cell.folder / ERROR).is_file()
    }
    write_report(grid, corpus, failed)
    print(f"\nTables and figures: {grid.output_dir / 'README.md'}")
    for name, error in failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)


def _in_one_line(error):
    """The last line of a traceback, or a whole message."""
    lines = [line.strip() for line in error.strip().splitlines()]
    return lines[-1] if lines[0].startswith("Traceback") else " ".join(lines)
