"""`emoshare evaluate`."""

import sys
from pathlib import Path

import numpy as np
from transformers.utils.logging import tqdm

from ..dataset_script.audio import message_of
from ..dataset_script.facts import are_names
from ..dataset_script.tables import FILENAME
from ..evaluation.ceiling import noise_ceiling
from ..evaluation.clips import predict_each, shares_of
from ..evaluation.groups import as_json, as_text, check_fact, compare, resampled_units
from ..evaluation.predictions import write_predictions
from ..evaluation.scores import Scorer, score_table, write_scores
from .corpus import fingerprints_of, load_corpus
from .loading import load_pipeline
from .output import BROKEN_CLIPS, warnings_at_the_end


def run(arguments):
    """
    `emoshare evaluate`: predicts a split of a corpus, writes the predictions, and prints Spearman's ρ. Broken clips are
    listed at the end, and the others scored.
    """
    split = arguments.split
    corpus = load_corpus(arguments)
    if split not in corpus.splits:
        raise ValueError(f"--split: got {split!r}; the corpus has {', '.join(corpus.splits)}")
    if np.isnan(corpus.shares(split)).all():
        raise ValueError(f"--split: {split!r} has no known shares; there is nothing to score against")
    for fact in arguments.by:
        check_fact("--by", fact, corpus)
    units = resampled_units(corpus, split, arguments.resample)
    emotion_share = load_pipeline(arguments)
    of_model = emotion_share.model.config.labels
    if sorted(of_model) != sorted(corpus.labels):
        raise ValueError(f"the model {arguments.model} has the labels {of_model}; the corpus has {corpus.labels}")
    if arguments.output_dir:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)

    clips = corpus.audio(split)
    shares, broken = {}, {}
    with warnings_at_the_end():
        results = predict_each(emotion_share, clips, strict=True)
        for clip, result in tqdm(results, total=len(clips), unit=" clips"):
            if isinstance(result, Exception):
                table, row = corpus.place(split, clip.index)
                broken[clip.index] = f"{table}, row {row}: {clip.filename}: {message_of(result, clip)}"
            else:
                shares[clip.index] = shares_of(result, corpus.labels)
    try:
        if not shares:
            raise ValueError(f"none of the {len(clips)} clips of {split} could be predicted")
        predicted = sorted(shares)
        _score(arguments, corpus, predicted, np.array([shares[index] for index in predicted]), units)
    finally:
        if broken:
            summary = f"\n{len(broken)} of {len(clips)} clips could not be predicted, and are not in the scores:"
            print(summary, *(broken[index] for index in sorted(broken)), sep="\n  ", file=sys.stderr)
    return BROKEN_CLIPS if broken else 0


def _score(arguments, corpus, predicted, shares, units):
    """
    Scores the shares (clips, labels) of the clips with the indices `predicted`, and prints and writes the results.
    `units` names the group of each clip of the split that is resampled as a whole; `None` resamples single clips.
    """
    split, labels = arguments.split, corpus.labels
    references, listeners = corpus.shares(split)[predicted], corpus.listeners(split)[predicted]

    units = units and [units[index] for index in predicted]
    scores = Scorer(references, labels).scores(shares, arguments.bootstrap, arguments.seed, units)
    ceiling = noise_ceiling(references, listeners, labels)
    output_dir = arguments.output_dir and Path(arguments.output_dir)
    if output_dir:
        filenames = corpus.column(split, FILENAME)[predicted]
        write_predictions(output_dir / f"predictions_{split}.csv", filenames, shares, labels)
    print(f"\nSpearman's rho of {arguments.model} on {split}, {len(predicted)} clips")
    print(score_table(scores, ceiling=ceiling))
    if ceiling.text:
        print(ceiling.text)
    groups = {}
    for fact in arguments.by:
        values = [corpus.metadata[split][fact][index] for index in predicted]
        resampling = arguments.bootstrap, arguments.seed, units
        comparison = compare(
            values, shares, references, labels, *resampling, fact == arguments.resample or are_names(fact)
        )
        print(as_text(fact, comparison))
        groups[fact] = as_json(comparison)
    if output_dir:
        made_from, left_out = fingerprints_of(corpus, split, predicted), len(corpus.splits[split]) - len(predicted)
        write_scores(output_dir / f"eval_results_{split}.json", scores, made_from, left_out, ceiling, groups)
        print(f"Predictions and results: {output_dir}")
