"""Checks that the finished cells of a grid were made from its current corpus."""

import sys

from ..evaluation.scores import read_made_from
from ..training.corpus import corpus_of_run
from ..training.user_errors import on_main_process


def check_done_cells(grid, corpus, accelerator):
    """
    Checks that the finished cells were made from this corpus, and changes nothing. Lists on stderr the results that
    cannot be read, whose cells will be trained again, and the results of earlier versions, which do not record their
    corpus and are kept.

    Args:
        grid: `Grid`.
        corpus: its `Corpus`, with its own splits.
        accelerator: `accelerate.Accelerator`.

    Raises:
        UserError: if a cell was made from another corpus; lists these cells and the differences.
    """

    def check():
        for cell in grid.cells:
            if cell.has_damaged_results:
                print(f"{cell.results} cannot be read: the cell is trained again", file=sys.stderr)
        _compare(grid, corpus)

    on_main_process(check, accelerator)


def _compare(grid, corpus):
    now, unknown, differences = {}, [], []
    for cell in grid.cells:
        if not cell.is_done:
            continue
        data = cell.arguments.data
        then, key = read_made_from(cell.results), (data.max_train_samples, data.fold)
        if then is None:
            unknown.append(cell.folder.name)
            continue
        if key not in now:
            now[key] = corpus_of_run(corpus, data).fingerprints()
        if then != now[key]:
            differences.append(f"  {cell.folder.name}: {', '.join(_differences(then, now[key]))}")
    if unknown:
        print(
            f"{len(unknown)} finished cell(s) do not say what corpus they were made from, because they are results of "
            f"earlier versions: {', '.join(unknown)}. They are kept; to train one again, delete its folder",
            file=sys.stderr,
        )
    if differences:
        raise ValueError(
            "\n".join([f"{grid.output_dir}: {len(differences)} finished cell(s) are of another corpus:", *differences])
            + "\nTo train them again, delete their folders; to keep them, use the corpus that they were made from, or "
            "another output_dir"
        )


def _differences(then, now):
    """Yields descriptions of the differences between two `Corpus.fingerprints`."""
    for split in dict.fromkeys([*then, *now]):
        if split not in now:
            yield f"there is no {split} any more"
        elif split not in then:
            yield f"there was no {split}"
        else:
            yield from (f"other {part} in {split}" for part in now[split] if then[split].get(part) != now[split][part])
