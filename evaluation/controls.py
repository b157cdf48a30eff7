"""Controls: scores that a model's own should be compared with."""

import numpy as np
from accelerate.utils import tqdm

from ..audio_emoshare import load_audio
from ..feature_extraction_emoshare import EmoShareFeatureExtractor
from .ceiling import noise_ceiling
from .ridge import ridge
from .scores import MEAN, Scorer

# Of the ridge regressions; from too weak to too strong for a hundred clips and for some ten thousand.
PENALTIES = 10.0 ** np.arange(-1, 7, 0.5)
PERCENTILES = (5, 25, 50, 75, 95)
# Seconds of a clip whose log-mels are brought to zero mean and unit variance together: a clip, as a rule.
LONGEST_S = 600.0
NAMES = 66  # characters of the table's first column


def report_controls(corpus, predictions, shuffled, accelerator, stores=None):
    """
    Prints a model's mean ρ on devel, and on test where its shares are known, next to those of its controls: the noise
    ceiling, if there is one; ridge regressions on functionals of a clip; and the same model after training on shuffled
    labels. The penalty of each ridge regression is the one that does best on devel.

    Args:
        corpus: `Corpus` that the model was trained on.
        predictions: by split, (clips, labels) shares that the model predicts.
        shuffled: (clips, labels) devel shares of the model with shuffled labels.
        accelerator: `accelerate.Accelerator`; the main process alone reads the clips.
        stores: `FrameFeatureStore` of each split, where they hold the features of a backbone: one more ridge regression
            is on these.
    """
    if not accelerator.is_main_process:
        return
    scorers = _scorers(corpus, predictions)
    if "devel" not in scorers:
        accelerator.print("No controls: no label's shares differ on devel")
        return

    def scores(shares):
        return {split: scorers[split].scores(shares[split])[MEAN].rho for split in scorers if split in shares}

    name, ceilings = _ceilings(corpus, scorers)
    own = scores(predictions)
    rows = {name: ceilings, "this model": own} if ceilings else {"this model": own}
    for name, of_penalties in ridge_predictions(corpus, [*scorers], stores).items():
        on_devel = [scores({"devel": shares})["devel"] for shares in of_penalties["devel"]]
        best = int(np.argmax(on_devel))
        rows[f"ridge regression on {name}"] = scores({split: shares[best] for split, shares in of_penalties.items()})
    rows["the same model, trained on shuffled labels"] = scores({"devel": shuffled})
    for line in _table(rows, [*scorers]):
        accelerator.print(line)
    for split, ceiling in ceilings.items():
        accelerator.print(f"  this model reaches {own[split] / ceiling:.2f} of the ceiling on {split}")
    if corpus.info.caution:
        accelerator.print(corpus.info.caution)


def _scorers(corpus, splits):
    """A `Scorer` for each split in which a label's shares are known, and differ."""
    scorers = {}
    for split in splits:
        shares = corpus.shares(split)
        if any(len(np.unique(column[~np.isnan(column)])) > 1 for column in shares.T):
            scorers[split] = Scorer(shares, corpus.labels)
    return scorers


def _ceilings(corpus, splits):
    """How the noise ceiling is known, and the best mean ρ to expect on each split, as far as anything says."""
    if corpus.info.noise_ceiling is not None:
        return "noise ceiling: true vote probabilities", {split: corpus.info.noise_ceiling(split) for split in splits}
    estimates = {
        split: noise_ceiling(corpus.shares(split), corpus.listeners(split), corpus.labels).rhos for split in splits
    }
    return "noise ceiling, estimated from votes", {split: rhos[MEAN] for split, rhos in estimates.items() if rhos}


def _table(rows, splits):
    if splits == ["devel"]:
        yield "\nMean Spearman's rho on devel, with controls"
    else:
        yield "\nMean Spearman's rho, with controls (penalties are chosen on devel)"
        yield "  ".join(["", " " * NAMES, *(f"{split:>6}" for split in splits)])
    for name, rhos in rows.items():
        numbers = [f"{rhos[split]:.3f}" if split in rhos else "" for split in splits]
        yield "".join([f"  {name:<{NAMES}}", *(f" {number:>7}" for number in numbers)]).rstrip()


def ridge_predictions(corpus, splits=("devel",), stores=None):
    """
    Ridge regressions of the shares on functionals of each clip, fitted on train.

    Args:
        corpus: `Corpus`.
        splits: those to predict.
        stores: as in `report_controls`.

    Returns:
        `dict[str, dict[str, np.ndarray]]`: by what they are on, and split, (penalties, clips, labels) shares.
    """
    inputs = {split: clip_functionals(corpus.splits[split]) for split in ("train", *splits)}
    if stores is not None:
        for split, of_split in inputs.items():
            of_split["mean and deviation of the backbone's features"] = _moments(stores[split])
    shares = corpus.shares("train")
    return {
        name: dict(
            zip(
                splits,
                ridge(inputs["train"][name], shares, [inputs[split][name] for split in splits], PENALTIES),
                strict=True,
            )
        )
        for name in inputs["train"]
    }


def clip_functionals(clips):
    """
    What the ridge regressions see of clips, rows with `audio`: by name, (clips, functionals) float64. The log-mels
    are at zero mean and unit variance over the clip, which is better for speakers that were not heard in training.
    """
    extractor = EmoShareFeatureExtractor(feature_type="mel", chunk_length_s=LONGEST_S)
    log_mels, length_and_loudness = [], []
    for row in tqdm(clips, desc="Reading clips for the controls", unit=" clips", leave=False):
        waveform = load_audio(row["audio"], extractor.sampling_rate)
        windows = [waveform[start:end] for start, end in extractor.windows(len(waveform))]
        features = np.concatenate(
            [extractor(window, sampling_rate=extractor.sampling_rate)["input_features"][0] for window in windows]
        )
        log_mels.append(np.append(_functionals(features.astype(np.float64)), np.log(len(waveform))))
        length_and_loudness.append([len(waveform), np.log(np.sqrt(np.mean(waveform**2)) + 1e-6)])
    return {
        "functionals of its log-mels, and length": np.array(log_mels),
        "length and loudness alone": np.array(length_and_loudness),
    }


def _functionals(log_mels):
    """(frames, bands), two frames or more -> (9 * bands,)."""
    deltas = np.abs(np.diff(log_mels, axis=0))
    percentiles = np.percentile(log_mels, PERCENTILES, axis=0)
    moments = [log_mels.mean(axis=0), log_mels.std(axis=0), deltas.mean(axis=0), deltas.std(axis=0)]
    return np.concatenate([*percentiles, *moments])


def _moments(store):
    """
    Mean and deviation over a clip's frames of the features in a store, (clips, 2 * width) float64; of all layers, if
    it holds those, their average, with which training begins.
    """
    sums = None
    for index, clip in enumerate(tqdm(store.clip_of_window, desc="Features for the controls", leave=False)):
        features = store.collate([store[index]])["frame_features"][0].double().numpy()  # ([layers,] frames, width)
        if features.ndim == 3:
            features = features.mean(axis=0)
        if sums is None:
            sums = np.zeros((2, len(store.clips), features.shape[1]))
        sums[:, clip] += store.weights[index] * np.stack([features.mean(axis=0), (features**2).mean(axis=0)])
    mean, square = sums
    return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0.0))], axis=1)
