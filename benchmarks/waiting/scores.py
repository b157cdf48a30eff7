"""
How long an epoch and the end of a run wait for scores and intervals of predictions for ComParE 2023.

    python benchmarks/waiting/scores.py

The peer of a score is the metric as `evaluate` calls it, which writes all shares to Arrow and reads them back; its
scores must be the same to the last bit. The peer of a bootstrap is SciPy's `spearmanr` in a loop over the same
resamples. It runs a few of them, and its time is scaled to the number of EmoShare's. Shares have ties, like those of
votes. The script fails if the intervals of the two differ by more than 1e-12.
"""

import sys
from pathlib import Path

import evaluate
import numpy as np
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
from machine import copy_rate, describe, least_cpu_seconds

from emoshare import EMOTIONS
from emoshare.evaluation.scores import MEAN, Scorer
from emoshare.metrics.emotion_share_spearman.spearman import resamples

CLIPS = {"devel": 9925, "all clips": 51813}
RESAMPLES, OF_PEER = 1000, 10
ROUNDS = 3


def main():
    print(describe())
    metric = evaluate.load(str(Path(__file__).parents[2] / "metrics" / "emotion_share_spearman"))
    print("\n| | peer | EmoShare | |\n|---|---|---|---|")
    for name, clips in CLIPS.items():
        predictions, references = draw(clips)
        scorer = Scorer(references, EMOTIONS)
        data = {"predictions": predictions, "references": references, "label_names": EMOTIONS}
        seconds, by_metric = least_cpu_seconds(lambda: metric.compute(**data), ROUNDS)  # noqa: B023
        own, scores = least_cpu_seconds(lambda: scorer.scores(predictions), ROUNDS)  # noqa: B023
        assert scores[MEAN].rho == by_metric["spearman"]
        print(f"| score of {name}, {clips:,} | {seconds:.4f} s | {own:.4f} s | {seconds / own:.1f}x |", flush=True)

        seconds, by_scipy = least_cpu_seconds(lambda: bootstrap_by_scipy(predictions, references), 1)  # noqa: B023
        few = scorer.scores(predictions, OF_PEER)
        assert np.abs(np.percentile(by_scipy, [2.5, 97.5]) - [few[MEAN].low, few[MEAN].high]).max() < 1e-12
        seconds *= RESAMPLES / OF_PEER
        own, _ = least_cpu_seconds(lambda: scorer.scores(predictions, RESAMPLES), 1)  # noqa: B023
        print(
            f"| {RESAMPLES:,} resamples of {name} | {seconds:.1f} s | {own:.2f} s | {seconds / own:.1f}x |", flush=True
        )
    # Each column of predictions and references is read once for its counts and once for its ranks.
    passes = 2 * 2 * len(EMOTIONS) * CLIPS["devel"] * 8 * RESAMPLES
    print(f"\nReading devel's shares from memory twice per resample would take {passes / copy_rate():.2f} s.")


def draw(clips):
    rng = np.random.default_rng(0)
    true = rng.standard_normal((clips, len(EMOTIONS)))
    references = np.round(20 / (1 + np.exp(1.5 - true))) / 20
    return 1 / (1 + np.exp(1.5 - true - rng.standard_normal(true.shape))), references


def bootstrap_by_scipy(predictions, references):
    """The mean ρ of each resample."""
    return [
        np.mean(
            [spearmanr(predictions[own, label], references[own, label]).statistic for label in range(len(EMOTIONS))]
        )
        for own in resamples(len(predictions), None, OF_PEER, seed=0)
    ]


if __name__ == "__main__":
    main()
