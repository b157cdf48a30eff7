"""
How long a run waits for labels, facts and names of a corpus of ComParE 2023's size, 51,813 clips.

    python benchmarks/waiting/labels.py

The peer is the obvious code with `datasets`: `clips[label]`, a column that NumPy reads value by value. For a fold,
which selects clips, it is `clips[label][:]`, which reads a column at once if no rows are selected, and row by row if
they are. Label files are compared with pandas, which only reads them, without checking values or clips. The clips are
empty files.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from datasets.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
from machine import describe, least_cpu_seconds

from emoshare import EMOTIONS
from emoshare.dataset_script import load_corpus
from emoshare.dataset_script.folds import fold_of

SIZES = {"train": 31745, "devel": 9925, "test": 10143}
SPEAKERS = 1000
ROUNDS = 3


def main():
    print(describe())
    disable_progress_bar()
    print(f"\n{sum(SIZES.values()):,} clips, {len(EMOTIONS)} emotions\n\n| | peer | EmoShare | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_corpus(folder / "corpus")
        load = lambda: load_corpus("compare2023", folder / "corpus", folder / "cache")  # noqa: E731
        corpus = load()  # fills the cache of `datasets`
        files = sorted((folder / "corpus" / "lab").iterdir())
        row("label files and facts, read and checked", lambda: [pd.read_csv(file) for file in files], load)
        row("shares", lambda: [by_value(clips) for clips in corpus.splits.values()], lambda: shares(corpus))
        names = [list(clips["filename"]) for clips in corpus.splits.values()]
        assert names == [corpus.filenames(split) for split in corpus.splits]
        row(
            "names of clips",
            lambda: [list(clips["filename"]) for clips in corpus.splits.values()],
            lambda: [corpus.filenames(split) for split in corpus.splits],
        )
        fold = fold_of(corpus, 0, 5, "speaker")
        row("shares of a fold", lambda: [by_column(clips) for clips in fold.splits.values()], lambda: shares(fold))


def write_corpus(folder):
    rng = np.random.default_rng(0)
    for name in ("wav", "lab"):
        (folder / name).mkdir(parents=True)
    facts = ["filename,speaker,age,listeners"]
    for split, size in SIZES.items():
        lines = [",".join(["filename", *EMOTIONS])]
        for clip, own in enumerate(rng.beta(0.6, 2.5, (size, len(EMOTIONS)))):
            name = f"{split}_{clip:05d}.wav"
            (folder / "wav" / name).touch()
            lines.append(",".join([name, *(f"{share:.4f}" for share in own)]))
            facts.append(f"{name},speaker {clip % SPEAKERS},{20 + clip % 50},{5 + clip % 15}")
        (folder / "lab" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (folder / "lab" / "clips.csv").write_text("\n".join(facts) + "\n")


def by_value(clips):
    return np.array([clips[label] for label in EMOTIONS], dtype=np.float64).T


def by_column(clips):
    return np.array([clips[label][:] for label in EMOTIONS], dtype=np.float64).T


def shares(corpus):
    """Reads shares as a new corpus does, without those that it has cached."""
    vars(corpus).pop("_shares", None)
    return [corpus.shares(split) for split in corpus.splits]


def row(name, peer, ours):
    theirs, own = least_cpu_seconds(peer, 1), least_cpu_seconds(ours, ROUNDS)
    if isinstance(own[1], list) and isinstance(own[1][0], np.ndarray):
        for one, other in zip(theirs[1], own[1], strict=True):
            np.testing.assert_array_equal(one, other)
    print(f"| {name} | {theirs[0]:.3f} s | {own[0]:.3f} s | {theirs[0] / own[0]:.3g}x |", flush=True)


if __name__ == "__main__":
    main()
