"""The corpus that a command was given."""

from dataclasses import replace

import datasets
from accelerate import PartialState

from ..training.arguments import DataArguments
from ..training.corpus import load_run_corpus


def load_corpus(arguments):
    return load_run_corpus(DataArguments(dataset=arguments.dataset, data_dir=arguments.data_dir), PartialState())


def fingerprints_of(corpus, split, indices):
    """`Corpus.fingerprints` of what was scored: the clips of a split with these indices."""
    return replace(corpus, splits=datasets.DatasetDict({split: corpus.splits[split].select(indices)})).fingerprints()
