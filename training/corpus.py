"""The corpus of a run, loaded once and checked before anything is trained."""

from dataclasses import replace
from functools import partial

import datasets
import numpy as np

from ..dataset_script import load_corpus
from ..dataset_script.facts import CLIPS_CSV, LISTENERS
from ..dataset_script.folds import fold_of, num_unknown
from ..losses_emoshare import takes
from .user_errors import together


def check_listeners(corpus, loss, listener_dropout):
    """
    Checks that the number of listeners is known if it is needed.

    Args:
        corpus: `Corpus`.
        loss, listener_dropout: `--loss` and `--listener_dropout`.

    Raises:
        ValueError: if one of them needs the number of listeners, and it is unknown for all training clips.
    """
    needs = []
    if takes(loss, "concentrations"):
        needs.append(f"--loss {loss}: needs to know how many listeners voted")
    if listener_dropout:
        needs.append("--listener_dropout: needs the number of listeners of each clip")
    if needs and np.isnan(corpus.listeners("train")).all():
        raise ValueError(
            f"{needs[0]}, and no clip of train has a number of them; expected a column {LISTENERS!r} in {CLIPS_CSV}"
        )


def load_run_corpus(data, accelerator, loaded=None):
    """
    Loads and checks the corpus of a run.

    Args:
        data: `DataArguments`.
        accelerator: `accelerate.Accelerator`; the first process of each machine builds or downloads what the others
            then read.
        loaded: what `load_together` returned for a run on the same corpus.

    Returns:
        `Corpus`, as `corpus_of_run` returns it.

    Raises:
        UserError: if anything is wrong with the corpus, or it cannot be divided into folds; names file, split and row.
    """
    corpus = loaded or load_together(data, accelerator)
    corpus = together(partial(corpus_of_run, corpus, data))
    accelerator.print("Clips: " + ", ".join(f"{len(clips)} {split}" for split, clips in corpus.splits.items()))
    unknown = num_unknown(corpus.as_stored) if data.folds is not None else 0
    if unknown:
        accelerator.print(f"{unknown} clips of the corpus's own test split are in no fold: not all shares are known")
    return corpus


def load_together(data, accelerator):
    """The `Corpus` of a run with its original splits; arguments and errors as of `load_run_corpus`."""
    load = partial(load_corpus, data.dataset, data_dir=data.data_dir, streaming=data.streaming)
    is_first = accelerator.is_local_main_process
    corpus = together(lambda: load() if is_first else None)
    return together(lambda: corpus if is_first else load())


def corpus_of_run(corpus, data):
    """
    Args:
        corpus: `Corpus`, with its original splits.
        data: `DataArguments`.

    Returns:
        `Corpus`, split into `--folds` if the run is on one of them, with at most `max_train_samples` clips in train.

    Raises:
        ValueError: if the corpus cannot be divided into such folds.
    """
    if data.folds is not None:
        corpus = fold_of(corpus, data.fold, data.num_folds, data.group_by)
    if data.max_train_samples is None:
        return corpus
    train = corpus.splits["train"]
    train = train.take(min(data.max_train_samples, len(train)))
    origins = {split: clips[: len(train)] if split == "train" else clips for split, clips in corpus.origins.items()}
    return replace(corpus, splits=datasets.DatasetDict({**corpus.splits, "train": train}), origins=origins)
