"""Controls: devel scores that a model's own score should be compared with."""

import numpy as np
from accelerate.utils import tqdm

from ..audio_emoshare import load_audio
from ..feature_extraction_emoshare import EmoShareFeatureExtractor
from .scores import MEAN

# Each control takes the penalty that does best on devel, in favour of the control.
RIDGE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def report_controls(corpus, scorer, predictions, shuffled_predictions, accelerator):
    """
    Prints a model's mean devel ρ next to those of its controls: the noise ceiling, if the corpus has one; ridge
    regressions on simple statistics of a clip; and the same model after training on shuffled labels.

    Args:
        corpus: `Corpus` that the model was trained on.
        scorer: `Scorer` of its devel split.
        predictions: (clips, labels) devel shares that the model predicts.
        shuffled_predictions: (clips, labels) those of the model with shuffled labels.
        accelerator: `accelerate.Accelerator`; the main process alone reads the clips.
    """
    if not accelerator.is_main_process:
        return

    def score(shares):
        return scorer.scores(shares)[MEAN].rho

    own, rows = score(predictions), {}
    ceiling = corpus.info.noise_ceiling and corpus.info.noise_ceiling("devel")
    if ceiling is not None:
        rows["noise ceiling: true vote probabilities"] = ceiling
    rows["this model"] = own
    for name, control in ridge_predictions(corpus).items():
        rows[f"ridge regression on {name}"] = max(map(score, control))
    rows["the same model, trained on shuffled labels"] = score(shuffled_predictions)

    accelerator.print("\nMean Spearman's rho on devel, with controls")
    for name, rho in rows.items():
        accelerator.print(f"  {name:<58} {rho:.3f}")
    if ceiling is not None:
        accelerator.print(f"  this model reaches {own / ceiling:.2f} of the ceiling")
    if corpus.info.caution:
        accelerator.print(corpus.info.caution)


def ridge_predictions(corpus):
    """
    Ridge regressions of the shares on simple statistics of each clip.

    Args:
        corpus: `Corpus`.

    Returns:
        `dict[str, list[np.ndarray]]`: by the statistics' name, (clips, labels) predicted devel shares for each penalty.
    """
    train, devel = (_clip_statistics(corpus.splits[split]) for split in ("train", "devel"))
    shares = corpus.shares("train")
    return {name: [_ridge(train[name], shares, devel[name], penalty) for penalty in RIDGE_PENALTIES] for name in train}


def _clip_statistics(clips):
    """By name, (clips, statistics) float64."""
    extractor = EmoShareFeatureExtractor(feature_type="mel", do_normalize=False)
    log_mels, length_and_loudness = [], []
    for row in tqdm(clips, desc="Reading clips for the controls", unit=" clips", leave=False):
        waveform = load_audio(row["audio"], extractor.sampling_rate)
        windows = [waveform[start:end] for start, end in extractor.windows(len(waveform))]
        features = np.concatenate(
            [extractor(window, sampling_rate=extractor.sampling_rate)["input_features"][0] for window in windows]
        )
        log_mels.append(np.concatenate([features.mean(axis=0), features.std(axis=0)]))
        length_and_loudness.append([len(waveform), np.log(np.sqrt(np.mean(waveform**2)) + 1e-6)])
    return {
        "mean and deviation of the log-mels": np.array(log_mels),
        "length and loudness alone": np.array(length_and_loudness),
    }


def _ridge(train_inputs, train_shares, devel_inputs, penalty):
    mean, deviation = train_inputs.mean(axis=0), train_inputs.std(axis=0) + 1e-9
    train_inputs, devel_inputs = (train_inputs - mean) / deviation, (devel_inputs - mean) / deviation
    offset = train_shares.mean(axis=0)
    gram = train_inputs.T @ train_inputs + penalty * np.eye(train_inputs.shape[1])
    return devel_inputs @ np.linalg.solve(gram, train_inputs.T @ (train_shares - offset)) + offset
