"""Folds of a corpus for cross-validation: parts of about equal size that share no group of clips, such as a speaker."""

from itertools import chain

import numpy as np

from .tables import Problems

LEAST_FOLDS = 3  # one is test, the next one devel, and the others train


def fold_of(corpus, fold, num_folds=None, group_by=None):
    """
    Args:
        corpus: `Corpus`.
        fold: number of the fold that becomes test, from 0. The next one (after the last, the first) becomes devel, and
            all others become train.
        num_folds, group_by: as in `divide`.

    Returns:
        `Corpus` with these splits, each in the order of the corpus.

    Raises:
        ValueError: as in `divide`, and if there is no such fold.
    """
    folds = divide(corpus, num_folds, group_by)
    if fold >= len(folds):
        raise ValueError(f"fold: got {fold}; expected 0 to {len(folds) - 1}, as there are {len(folds)} folds")
    devel = (fold + 1) % len(folds)
    train = [clips for number, clips in enumerate(folds) if number not in (fold, devel)]
    return corpus.resplit({"train": np.sort(np.concatenate(train)), "devel": folds[devel], "test": folds[fold]})


def divide(corpus, num_folds=None, group_by=None, seed=0):
    """
    Divides the clips of all splits of a corpus into folds with about equally many clips. Test clips with an unknown
    share are left out.

    Args:
        corpus: `Corpus`.
        num_folds: number of folds, at least 3; `None` for one fold per group.
        group_by: a fact about the clips. Clips with the same value are a group, which stays in one fold. `None`: each
            clip is a group.
        seed: seed of the order in which groups of equal size are assigned; unused with one fold per group.

    Returns:
        `list[np.ndarray]`: for each fold, the ascending indices of its clips among all clips of the corpus, split after
        split. Folds of one group each are in the order of the groups' names.

    Raises:
        ValueError: if the corpus has no such fact, has clips whose value is not known, or has too few groups.
    """
    clips = _clips_with_shares(corpus)
    groups = np.arange(len(clips)) if group_by is None else _groups(corpus, clips, group_by)
    names, group_of_clip, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    least = LEAST_FOLDS if num_folds is None else num_folds
    if len(names) < least:
        what = "clips whose shares are known" if group_by is None else f"values of {group_by!r}"
        raise ValueError(f"folds: got {len(names)} {what}; expected at least {least}, one for each fold")
    if num_folds is None:
        num_folds, fold_of_group = len(names), np.arange(len(names))
    else:
        fold_of_group = _deal_out(sizes, num_folds, seed)
    return [clips[fold_of_group[group_of_clip] == fold] for fold in range(num_folds)]


def num_unknown(corpus):
    """How many clips of a corpus's test split are in no fold, because they have an unknown share."""
    return sum(map(len, corpus.splits.values())) - len(_clips_with_shares(corpus))


def _clips_with_shares(corpus):
    """Indices of all clips of train and devel, and of those of test whose shares are all known."""
    is_in = [
        ~np.isnan(corpus.shares(split)).any(axis=1) if split == "test" else np.ones(len(clips), dtype=bool)
        for split, clips in corpus.splits.items()
    ]
    return np.flatnonzero(np.concatenate(is_in))


def _groups(corpus, clips, group_by):
    """The value of the fact `group_by` for each of these clips."""
    if not corpus.facts:
        raise ValueError(f"group_by: got {group_by!r}, but the corpus has no facts about its clips")
    if group_by not in corpus.facts:
        raise ValueError(f"group_by: got {group_by!r}; expected a fact of the corpus: {', '.join(corpus.facts)}")
    values = list(chain.from_iterable(facts[group_by] for facts in corpus.metadata.values()))
    filenames = list(chain.from_iterable(map(corpus.filenames, corpus.splits)))
    problems = Problems(f"group_by {group_by}")
    for clip in clips:
        if values[clip] is None:
            problems.add(*corpus.place(*corpus.split_of(clip)), f"{filenames[clip]}: its {group_by} is not known")
    problems.raise_if_any()
    return np.array([values[clip] for clip in clips])


def _deal_out(sizes, num_folds, seed):
    """Assigns groups of these sizes (in clips), largest first, each to the fold that has the fewest clips so far."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    clips, fold_of_group = np.zeros(num_folds, dtype=int), np.empty(len(sizes), dtype=int)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of_group[group] = clips.argmin()
        clips[fold_of_group[group]] += sizes[group]
    return fold_of_group
