"""The corpus of a run, loaded once and checked before anything is trained."""

from dataclasses import replace
from functools import partial

import datasets
import numpy as np

from ..dataset_script import load_corpus
from ..dataset_script.facts import CLIPS_CSV, LISTENERS
from ..losses_emoshare import takes
from .user_errors import together


def check_votes(corpus, loss):
    """
    Args:
        corpus: `Corpus`.
        loss: `--loss`.

    Raises:
        ValueError: if the loss needs the number of listeners of clips, and no training clip's is known.
    """
    if takes(loss, "concentrations") and np.isnan(corpus.listeners("train")).all():
        raise ValueError(
            f"--loss {loss}: needs to know how many listeners voted, and no clip of train has a number of them; "
            f"expected a column {LISTENERS!r} in {CLIPS_CSV}"
        )


def load_run_corpus(data, accelerator):
    """
    Args:
        data: `DataArguments`.
        accelerator: `accelerate.Accelerator`; the first process of each machine builds or downloads what the others
            then read.

    Returns:
        `Corpus`, its train split cut to `max_train_samples` clips.

    Raises:
        UserError: if anything is wrong with the corpus; names file, split and row.
    """
    load = partial(load_corpus, data.dataset, data_dir=data.data_dir)
    is_first = accelerator.is_local_main_process
    corpus = together(lambda: load() if is_first else None)
    corpus = together(lambda: corpus if is_first else load())
    if data.max_train_samples is not None:
        train = corpus.splits["train"]
        train = train.take(min(data.max_train_samples, len(train)))
        corpus = replace(corpus, splits=datasets.DatasetDict({**corpus.splits, "train": train}))
    accelerator.print("Clips: " + ", ".join(f"{len(clips)} {split}" for split, clips in corpus.splits.items()))
    return corpus
