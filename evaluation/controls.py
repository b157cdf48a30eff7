"""Controls: baseline scores to compare a model's scores with."""

import numpy as np
from accelerate.utils import tqdm

from ..audio_emoshare import load_audio
from ..feature_extraction_emoshare import EmoShareFeatureExtractor
from .ceiling import noise_ceiling
from .ridge import ridge
from .scores import MEAN, Scorer

# Penalties of the ridge regressions, from too weak to too strong for a hundred clips as well as for ten thousand.
PENALTIES = 10.0 ** np.arange(-1, 7, 0.5)
PERCENTILES = (5, 25, 50, 75, 95)
# Seconds of audio whose log-mels are normalised together; few clips are longer, so this is usually the whole clip.
LONGEST_S = 600.0
NAMES = 66  # width of the table's first column, in characters


def report_controls(corpus, predictions, shuffled, accelerator, stores=None):
    """
    Prints a model's mean ρ on devel, and on test if its shares are known, next to those of its controls: the noise
    ceiling, if there is one; ridge regressions on functionals of a clip; and the same model trained on shuffled labels.
    The penalty of each ridge regression is the one with the highest mean ρ on devel.

    Args:
        corpus: `Corpus` that the model was trained on.
        predictions: by split, (clips, labels) shares that the model predicts.
        shuffled: (clips, labels) devel shares of the model with shuffled labels.
        accelerator: `accelerate.Accelerator`; only the main process reads the clips.
        stores: `FrameFeatureStore` of each split, if they hold the features of a backbone; one more ridge regression
            uses these.
    """
    if not accelerator.is_main_process:
        return
    scorers = _scorers(corpus, predictions)
    if "devel" not in scorers:
        accelerator.print("No controls: on devel, every label has the same share for all clips")
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
    """A `Scorer` for each split in which the known shares of some label differ."""
    scorers = {}
    for split in splits:
        shares = corpus.shares(split)
        if any(len(np.unique(column[~np.isnan(column)])) > 1 for column in shares.T):
            scorers[split] = Scorer(shares, corpus.labels)
    return scorers


def _ceilings(corpus, splits):
    """How the noise ceiling was obtained, and its value for each split that has one."""
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
        splits: splits to predict.
        stores: as in `report_controls`.

    Returns:
        `dict[str, dict[str, np.ndarray]]`: predicted shares (penalties, clips, labels), by the name of the inputs and
        by split.
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
    The inputs of the ridge regressions.

    Args:
        clips: rows with `audio`.

    Returns:
        `dict[str, np.ndarray]`: (clips, functionals) float64, by name. Log-mels are normalised over each clip, which
        generalises better to unseen speakers.
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
    """Functionals (9 * bands,) of log-mels (frames, bands) with two or more frames."""
    deltas = np.abs(np.diff(log_mels, axis=0))
    percentiles = np.percentile(log_mels, PERCENTILES, axis=0)
    moments = [log_mels.mean(axis=0), log_mels.std(axis=0), deltas.mean(axis=0), deltas.std(axis=0)]
    return np.concatenate([*percentiles, *moments])


def _moments(store):
    """
    Mean and standard deviation of the features in a store over the frames of each clip, (clips, 2 * width) float64. If
    the store holds all layers, they are averaged first, as they are at the start of training.
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
