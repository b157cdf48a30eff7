"""Controls: scores on devel that a model's own score should be read beside."""

import copy

import numpy as np
from accelerate.utils import tqdm

from ..audio_emoshare import load_audio
from ..dataset_script.synthetic import SyntheticCorpus
from ..feature_extraction_emoshare import EmoShareFeatureExtractor
from .batches import FeatureLoader
from .evaluation import predict_shares
from .heads import networks_of, train_epoch
from .launch import training_dtype

RIDGE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
SHUFFLED_EPOCHS = 3


def report_controls(model, stores, scorer, data, run, accelerator):
    """
    Prints the model's mean devel ρ beside what it should be compared with.

    Args:
        model: the trained `EmoShareModel`.
        stores: `FrameFeatureStore` of `train` and `devel`.
        scorer: `Scorer` of devel.
        data, run: `DataArguments`, `RunArguments`.
        accelerator: `accelerate.Accelerator`.
    """
    train, devel = stores["train"], stores["devel"]
    devel_loader = FeatureLoader(devel, model.config, run.per_device_train_batch_size, accelerator)

    def score(shares):
        return scorer.scores(shares)["spearman"]

    rows = {"this model": score(predict_shares(model.heads, devel_loader, accelerator))}
    if data.dataset == "synthetic":
        ceiling = SyntheticCorpus().noise_ceiling("devel")
        rows = {"noise ceiling: true vote probabilities": ceiling, **rows}
    if accelerator.is_main_process:
        rows.update(_ridge_scores(train, devel, score))
    rows[f"the same network, {SHUFFLED_EPOCHS} epochs on shuffled labels"] = _shuffled_labels_score(
        model, train, devel_loader, score, run, accelerator
    )
    accelerator.print("\nMean Spearman's rho on devel, beside its controls")
    for name, rho in rows.items():
        accelerator.print(f"  {name:<58} {rho:.3f}")
    if data.dataset == "synthetic":
        accelerator.print(f"  this model reaches {rows['this model'] / ceiling:.2f} of the ceiling")
        accelerator.print(
            "  Synthetic voices and listeners: this shows that the software works, and nothing about people."
        )


def _ridge_scores(train, devel, score):
    """
    Ridge regressions of the shares on simple statistics of each clip: mean devel ρ by name. Each takes the penalty that
    does best on devel, in favour of the control.
    """
    train_statistics, devel_statistics = _clip_statistics(train.clips), _clip_statistics(devel.clips)
    controls = {
        "ridge regression on mean and deviation of the log-mels": "log_mels",
        "ridge regression on length and loudness alone": "length_and_loudness",
    }
    return {
        name: max(
            score(_ridge(train_statistics[kind], train.shares, devel_statistics[kind], penalty))
            for penalty in RIDGE_PENALTIES
        )
        for name, kind in controls.items()
    }


def _shuffled_labels_score(model, train, devel_loader, score, run, accelerator):
    """
    Mean devel ρ of a fresh model of the same kind, trained for a few epochs on shares that belong to other clips, drawn
    anew for each emotion. Nothing is selected on devel, so it should be near 0.
    """
    model = type(model)(model.config)
    model.backbone = None
    train = copy.copy(train)
    train.shares = np.random.default_rng(run.seed).permuted(train.shares, axis=0)
    networks = networks_of(model, run, accelerator)
    loader = FeatureLoader(train, model.config, run.per_device_train_batch_size, accelerator, seed=run.seed)
    dtype = training_dtype(run, accelerator.device)
    for epoch in range(SHUFFLED_EPOCHS):
        loader.set_epoch(epoch)
        train_epoch(networks, loader, accelerator, dtype, f"Shuffled labels {epoch + 1}/{SHUFFLED_EPOCHS}")
    return score(predict_shares(model.heads, devel_loader, accelerator))


def _clip_statistics(clips):
    extractor = EmoShareFeatureExtractor(feature_type="mel", do_normalize=False)
    rows = []
    for row in tqdm(clips, desc="Reading clips for the controls", unit=" clips", leave=False):
        waveform = load_audio(row["audio"], extractor.sampling_rate)
        windows = [waveform[start:end] for start, end in extractor.windows(len(waveform))]
        log_mels = np.concatenate(
            [extractor(window, sampling_rate=extractor.sampling_rate)["input_features"][0] for window in windows]
        )
        loudness = np.log(np.sqrt(np.mean(waveform**2)) + 1e-6)
        rows.append((np.concatenate([log_mels.mean(axis=0), log_mels.std(axis=0)]), [len(waveform), loudness]))
    log_mels, length_and_loudness = zip(*rows, strict=True)
    return {"log_mels": np.array(log_mels), "length_and_loudness": np.array(length_and_loudness)}


def _ridge(train_inputs, train_shares, devel_inputs, penalty):
    mean, deviation = train_inputs.mean(axis=0), train_inputs.std(axis=0) + 1e-9
    train_inputs, devel_inputs = (train_inputs - mean) / deviation, (devel_inputs - mean) / deviation
    offset = train_shares.mean(axis=0)
    gram = train_inputs.T @ train_inputs + penalty * np.eye(train_inputs.shape[1])
    return devel_inputs @ np.linalg.solve(gram, train_inputs.T @ (train_shares - offset)) + offset
