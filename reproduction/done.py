"""Compares the cells of a grid that are done with the corpus that it has now."""

import sys

from ..evaluation.scores import read_made_from
from ..training.corpus import corpus_of_run, load_run_corpus
from ..training.user_errors import on_main_process


def check_done_cells(grid, corpus, accelerator):
    """
    Names, on stderr, the results that cannot be read, whose cells are not done and are trained again; and those of
    earlier versions, which do not say what they were made from and are kept. Changes nothing.

    Args:
        grid: `Grid`.
        corpus: the `Corpus` of its first cell.
        accelerator: `accelerate.Accelerator`.

    Raises:
        UserError: if a cell was made from another corpus; says which cells, and what differs.
    """
    done = [cell for cell in grid.cells if cell.is_done]
    corpora = {_key(grid.cells[0]): corpus.as_stored}
    for cell in done:
        if _key(cell) not in corpora:
            corpora[_key(cell)] = load_run_corpus(cell.arguments.data, accelerator).as_stored

    def check():
        for cell in grid.cells:
            if cell.has_damaged_results:
                print(f"{cell.results} cannot be read: the cell is trained again", file=sys.stderr)
        _compare(grid, done, corpora)

    on_main_process(check, accelerator)


def _key(cell):
    """What decides a cell's corpus, of which its fold may be a part."""
    data = cell.arguments.data
    return data.dataset, data.data_dir, data.max_train_samples


def _compare(grid, done, corpora):
    now, unknown, differences = {}, [], []
    for cell in done:
        then, key = read_made_from(cell.results), (_key(cell), cell.fold)
        if then is None:
            unknown.append(cell.folder.name)
            continue
        if key not in now:
            now[key] = corpus_of_run(corpora[_key(cell)], cell.arguments.data).fingerprints()
        if then != now[key]:
            differences.append(f"  {cell.folder.name}: {', '.join(_differences(then, now[key]))}")
    if unknown:
        print(
            f"{len(unknown)} finished cell(s) do not say what corpus they were made from, as results of earlier "
            f"versions do not: {', '.join(unknown)}. They are kept; to train one again, delete its folder",
            file=sys.stderr,
        )
    if differences:
        raise ValueError(
            "\n".join([f"{grid.output_dir}: {len(differences)} finished cell(s) are of another corpus:", *differences])
            + "\nTo train them again, delete their folders; to keep them, give the corpus that they were made from, or "
            "another output_dir"
        )


def _differences(then, now):
    """What differs between two `Corpus.fingerprints`, as texts."""
    for split in dict.fromkeys([*then, *now]):
        if split not in now:
            yield f"there is no {split} any more"
        elif split not in then:
            yield f"there was no {split}"
        else:
            yield from (f"other {part} in {split}" for part in now[split] if then[split].get(part) != now[split][part])
