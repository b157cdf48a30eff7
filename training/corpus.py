"""The corpus of a run, loaded once and checked before anything is trained."""

from dataclasses import replace

import datasets

from ..dataset_script import load_corpus


def load_run_corpus(data, accelerator):
    """
    Args:
        data: `DataArguments`.
        accelerator: `accelerate.Accelerator`; the first process of each machine builds or downloads what the others
            then read.

    Returns:
        `Corpus`, its train split cut to `max_train_samples` clips.
    """
    with accelerator.local_main_process_first():
        corpus = load_corpus(data.dataset, data_dir=data.data_dir)
    if data.max_train_samples is not None:
        train = corpus.splits["train"]
        train = train.take(min(data.max_train_samples, len(train)))
        corpus = replace(corpus, splits=datasets.DatasetDict({**corpus.splits, "train": train}))
    accelerator.print("Clips: " + ", ".join(f"{len(clips)} {split}" for split, clips in corpus.splits.items()))
    return corpus
