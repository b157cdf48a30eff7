"""`emoshare ensemble`."""

from pathlib import Path

from ..evaluation.predictions import read_members, write_predictions
from ..evaluation.scores import MEAN, RESULTS, Scorer, score_table, write_scores
from .corpus import fingerprints_of, load_corpus


def run(arguments):
    """`emoshare ensemble`: checks the predictions of runs, averages them, and prints ρ of each and of their mean."""
    output_dir = Path(arguments.output_dir)
    folders = [Path(folder).resolve() for folder in arguments.run_dirs]
    if output_dir.resolve() in folders:
        raise ValueError(f"--output_dir: {output_dir} is one of the runs, whose predictions would be overwritten")
    if (output_dir / "config.json").exists():
        raise ValueError(f"--output_dir: {output_dir} holds a model, whose results would be overwritten")
    if len(set(folders)) < len(folders):
        raise ValueError(f"RUN_DIR: got a run more than once: {' '.join(arguments.run_dirs)}")
    corpus = load_corpus(arguments)
    members = read_members(arguments.run_dirs, corpus)
    means = {split: shares.mean(axis=0) for split, shares in members.items()}
    scorer = Scorer(corpus.shares("devel"), corpus.labels)
    scores = scorer.scores(means["devel"], arguments.bootstrap, arguments.seed)
    made_from = fingerprints_of(corpus, "devel", range(len(means["devel"])))
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, shares in means.items():
        path = output_dir / f"predictions_{split}.csv"
        write_predictions(path, corpus.filenames(split), shares, corpus.labels)
    write_scores(output_dir / RESULTS, scores, made_from)

    print(f"\nSpearman's rho on devel, {len(corpus.splits['devel'])} clips")
    for folder, shares in zip(arguments.run_dirs, members["devel"], strict=True):
        print(f"  {scorer.scores(shares)[MEAN].rho:.3f}   {folder}")
    print(f"  {scores[MEAN].rho:.3f}   their mean\n\nTheir mean, by emotion")
    print(score_table(scores))
    print(f"Predictions and results: {output_dir}")
    return 0
