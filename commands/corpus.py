"""Loads the corpus that a command was given."""

from dataclasses import replace

import datasets

from .. import dataset_script
from ..training.arguments import DataArguments


def load_corpus(arguments):
    """The `Corpus` of `--dataset` and `--data_dir`, which are checked as those of a training run."""
    data = DataArguments(dataset=arguments.dataset, data_dir=arguments.data_dir)
    corpus = dataset_script.load_corpus(data.dataset, data_dir=data.data_dir)
    print("Clips: " + ", ".join(f"{len(clips)} {split}" for split, clips in corpus.splits.items()))
    return corpus


def fingerprints_of(corpus, split, indices):
    """`Corpus.fingerprints` of the clips that were scored, given by a split and indices in it."""
    return replace(corpus, splits=datasets.DatasetDict({split: corpus.splits[split].select(indices)})).fingerprints()
