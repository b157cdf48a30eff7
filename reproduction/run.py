"""Runs a grid: each cell is a run of `train.py` in a folder of its own."""

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
        grid: `Grid`, as `read_grid` gives it.
        dry_run: whether to list the cells only, with the time and disk space that they may take.

    Returns:
        The exit code: 1 if a cell is not done.

    Raises:
        UserError: if something that the user gave is wrong.
    """
    accelerator = start(grid.cells[0].arguments)
    with accelerator.main_process_first():
        make_random_backbones(grid)
    corpora = {}  # which cells share
    data = grid.cells[0].arguments.data
    corpus = load_run_corpus(data, accelerator, _loaded(data, corpora, accelerator))
    read_clips_together(corpus, accelerator)
    grid = together(partial(with_folds, grid, corpus.as_stored))
    together(partial(scored_on, grid, corpus))  # which must not fail when everything is trained
    check_done_cells(grid, corpus, accelerator)
    if dry_run:
        accelerator.print(describe(grid, corpus, accelerator))
        return 0
    on_main_process(partial(_claim_folders, grid), accelerator)

    prepare_features(grid, corpus, accelerator)
    if accelerator.is_main_process:
        for cell in grid.cells:
            if cell.is_done:
                _tidy(cell)  # in case that the run was killed before it could
    # Cells that failed the last time are run after all others.
    unfinished = [cell for cell in grid.cells if not cell.is_done]
    for number, cell in enumerate(sorted(unfinished, key=lambda cell: (cell.folder / ERROR).is_file()), start=1):
        accelerator.print(f"\nCell {number} of {len(unfinished)}: {cell.folder.name}")
        run_cell(cell, accelerator, corpora)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with checking():
            _report(grid, corpus)
    accelerator.end_training()
    return int(not all(cell.is_done for cell in grid.cells))


def _claim_folders(grid):
    for cell in grid.cells:
        claim_folder(cell)


def _loaded(data, corpora, accelerator):
    """The corpus of a cell's `DataArguments` with its own splits; `corpora` keeps each that was loaded."""
    key = data.dataset, data.data_dir, data.streaming
    if key not in corpora:
        corpora[key] = load_together(data, accelerator)
    return corpora[key]


def run_cell(cell, accelerator, corpora):
    """
    Trains a cell. If that fails, its folder gets the error; with several processes, all of them end with it.

    Args:
        cell: `Cell`.
        accelerator: `accelerate.Accelerator`.
        corpora: a dict, in which cells find the corpora that others have loaded.
    """
    is_interrupted = bool(checkpoints(cell.folder))
    run = replace(cell.arguments.run, resume_from_checkpoint="last" if is_interrupted else None)
    arguments = replace(cell.arguments, run=run)
    try:
        train(arguments, start(arguments), _loaded(arguments.data, corpora, accelerator))
        if accelerator.is_main_process:
            _tidy(cell)
    except Exception as error:
        is_users = isinstance(error, UserError | OSError)
        _note_error(cell, str(error) if is_users else traceback.format_exc())
        if accelerator.num_processes > 1:  # the others may be waiting for this one in the middle of the cell
            raise
        if not is_users:  # what the user can mend is in the list of failed cells at the end
            traceback.print_exc()


def _tidy(cell):
    """Removes what a finished cell does not need any more."""
    (cell.folder / ERROR).unlink(missing_ok=True)
    for checkpoint in checkpoints(cell.folder):  # gigabytes
        shutil.rmtree(checkpoint)


def _note_error(cell, text):
    try:
        with whole_file(cell.folder / ERROR, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # the disk is full: the other cells are tried all the same
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
    """The last line of a traceback; a message as a whole."""
    lines = [line.strip() for line in error.strip().splitlines()]
    return lines[-1] if lines[0].startswith("Traceback") else " ".join(lines)
