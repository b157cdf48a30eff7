"""From a trained model to shares per clip, their score, and the files that hold them."""

import csv
import json
import math
from pathlib import Path

import evaluate
import numpy as np
import torch

METRIC = Path(__file__).resolve().parent.parent / "metrics" / "emotion_share_spearman"

# Shares of different clips that are no further apart are the same but for float32's rounding. An untrained network
# that lives may be as flat as 1e-5.
CONSTANT_SPREAD = 1e-7


def predict_shares(heads, loader, accelerator):
    """
    Predicts every clip of a store in float32, on all processes together; windows of a clip are averaged by duration.

    Args:
        heads: the `EmotionHead`s to run.
        loader: `FeatureLoader` without a seed.
        accelerator: `accelerate.Accelerator`.

    Returns:
        `np.ndarray`: (clips, labels of the heads) float64, in the order of the clips; the same on each process.
    """
    sums = np.zeros((len(loader.store.clips), sum(head.output.out_features for head in heads)))
    samples = np.zeros((len(sums), 1))
    for head in heads:
        head.eval()
    for batch in loader:
        features = batch["features"].float()
        with torch.no_grad():
            shares = torch.cat([head(features, batch["lengths"])[0] for head in heads], dim=1)
        clips, num_samples = batch["clip"].cpu().numpy(), batch["num_samples"].cpu().numpy()[:, None]
        np.add.at(sums, clips, shares.cpu().numpy() * num_samples.astype(np.float64))
        np.add.at(samples, clips, num_samples)
    if accelerator.num_processes > 1:
        sums, samples = (
            accelerator.reduce(torch.from_numpy(part).to(accelerator.device)).cpu().numpy() for part in (sums, samples)
        )
    return sums / samples


class Scorer:
    """
    The challenge's score of predicted shares against a split's true ones.

    Args:
        references: (clips, labels) true shares.
        labels: label names.
    """

    def __init__(self, references, labels):
        self.references = references
        self.labels = labels
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def scores(self, predictions, bootstrap=0, seed=0):
        """The metric's results, see `metrics/emotion_share_spearman`."""
        return self.metric.compute(
            predictions=predictions, references=self.references, label_names=self.labels, bootstrap=bootstrap, seed=seed
        )

    def rhos(self, predictions, labels):
        """Spearman's ρ (n,) of the predictions (clips, n) for the labels with these n indices."""
        names = [self.labels[index] for index in labels]
        scores = self.metric.compute(predictions=predictions, references=self.references[:, labels], label_names=names)
        return np.array([scores[f"spearman_{name}"] for name in names])


def is_constant(shares):
    """Which labels have the same share for every clip: (clips, labels) -> (labels,) bool. One clip tells nothing."""
    return (np.ptp(shares, axis=0) < CONSTANT_SPREAD) & (len(shares) > 1)


def score_table(results, labels, notes=None):
    """
    Args:
        results: of `Scorer.scores`.
        labels: label names.
        notes: text that follows a label's score, by label.

    Returns:
        `str`: a line for the mean and one for each label, with confidence intervals where there are any.
    """
    lines = []
    for name, key in [("mean", "spearman"), *((label, f"spearman_{label}") for label in labels)]:
        low, high = results.get(f"{key}_ci95", (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   95 % CI {low:.3f} to {high:.3f}"
        lines.append(f"  {name:<15} {results[key]:.3f}{interval}{(notes or {}).get(name, '')}")
    return "\n".join(lines)


def report(results, shares, labels, best_epochs, accelerator):
    """
    Prints the devel scores with their confidence intervals, the epoch that each emotion's weights are of, and which
    emotions' networks are dead.

    Args:
        results: of `Scorer.scores`.
        shares: (clips, labels) predicted devel shares.
        labels: label names.
        best_epochs: the epoch of each network's weights, 0 where there was no ρ to select by.
        accelerator: `accelerate.Accelerator`.
    """
    accelerator.print("\nSpearman's rho on devel (epochs are selected on devel, so a little optimistic)")
    epochs = best_epochs * len(labels) if len(best_epochs) == 1 else best_epochs
    of_label = {
        label: (f"   epoch {epoch}" if epoch else "   last epoch: none to select") + ("   dead" if is_dead else "")
        for label, epoch, is_dead in zip(labels, epochs, is_constant(shares), strict=True)
    }
    accelerator.print(score_table(results, labels, of_label))
    dead = [label for label, is_dead in zip(labels, is_constant(shares), strict=True) if is_dead]
    if dead:
        accelerator.print(
            f"\nDead: {', '.join(dead)}. The same share for every clip: the rho counts as 0. Where the last ReLU of an "
            "emotion's network has closed, a new run with --restart_dead_heads N starts such a network anew with "
            "another seed, at most N times; with --output_activation sigmoid it cannot die in this way."
        )


def write_history(path, history, labels):
    """Writes `Progress.history`: the training loss and the devel ρ of each label in each epoch; no ρ is left empty."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", "label", "train_loss", "devel_spearman"])
        for epoch, label, loss, rho in history:
            writer.writerow([epoch, labels[label], f"{loss:.6g}", "" if math.isnan(rho) else f"{rho:.6f}"])


def write_results(path, results):
    """Writes results as JSON; a score that does not exist (NaN) becomes null."""
    Path(path).write_text(json.dumps(_without_nan(results), indent=2) + "\n", encoding="utf-8")


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
