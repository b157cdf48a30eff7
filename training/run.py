"""The steps of a training run: from a corpus to a complete model repository, its scores and its card."""

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from transformers.utils import CONFIG_NAME

from ..dataset_script.whole_files import sync, sync_all, work_folder, writing
from ..evaluation.calibration import calibration_of
from ..evaluation.card import CALIBRATION_FIGURE, model_card, shown_settings
from ..evaluation.ceiling import NoiseCeiling, noise_ceiling
from ..evaluation.controls import report_controls
from ..evaluation.figures import plot_calibration, plot_shares
from ..evaluation.groups import resampled_units
from ..evaluation.intervals import write_intervals
from ..evaluation.predictions import predict_votes, write_predictions
from ..evaluation.scores import HISTORY, RESULTS, Scorer, report, score_table, write_history, write_scores
from ..finetuning_emoshare import stored_layer
from ..repository_emoshare import create_repository, publish_folder
from .batches import FeatureLoader
from .checkpoints import checkpoints_to_resume
from .concentrations import fit_concentrations
from .corpus import check_listeners, load_run_corpus
from .features import check_new_audio, extract_frame_features, extract_layers
from .inputs import InputStore, check_all_audio
from .model import build_model
from .store import ResplitFeatureStore
from .store_names import StoreNames, read_clips_together
from .trainer import HeadTrainer, predict_after_shuffling
from .user_errors import on_main_process, together

# Files in the folder of a run that are about its model, and that the next model may not have; some of them are written
# by `emoshare evaluate` and `emoshare export`. They are removed before the next model is put there, the results first.
OF_MODEL = (
    RESULTS,
    "eval_results_*.json",
    "model*.safetensors*",
    "onnx/model*.onnx*",
    "predictions_*.csv",
    "intervals_*.csv",
    CALIBRATION_FIGURE,
)


def train(arguments, accelerator, loaded=None):
    """
    One run, from the corpus to the model repository in `--output_dir`. A process can do several runs in turn.

    Args:
        arguments: `Arguments`.
        accelerator: what `start` returned.
        loaded: as in `load_run_corpus`.

    Raises:
        UserError: if something that the user gave is wrong: the corpus, the backbone, a clip, the checkpoint to resume
            from, ...
        OSError: if something cannot be written or fetched.
    """
    run = arguments.run
    # Before anything that takes long, so that a wrong folder, a missing token or a wrong name costs no time.
    on_main_process(partial(_check_folders, run), accelerator)
    if run.push_to_hub:
        create = partial(create_repository, run.hub_model_id, private=run.hub_private or None)
        on_main_process(create, accelerator)

    corpus = load_run_corpus(arguments.data, accelerator, loaded)
    read_clips_together(corpus, accelerator)
    together(partial(check_listeners, corpus, arguments.model.loss, run.listener_dropout))
    units = together(partial(resampled_units, corpus, "devel", run.resample))
    model, feature_extractor = together(partial(build_model, arguments, corpus.labels))

    # The frozen part of the backbone runs once over every clip; what is trained then runs on its output.
    stores, made_from = stores_of(corpus, model, feature_extractor, arguments, accelerator)

    # By default, each emotion keeps the weights of its own best epoch on devel.
    scorer = Scorer(corpus.shares("devel"), corpus.labels)
    progress = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()

    loaders = {
        split: FeatureLoader(store, model.config, run.per_device_train_batch_size, accelerator)
        for split, store in stores.items()
        if split != "train"
    }
    trained = model.trained_part()
    if model.config.has_concentrations:
        fit_concentrations(trained, loaders["devel"], accelerator)
    predictions = {split: predict_votes(trained, loader, accelerator) for split, loader in loaders.items()}
    shares = {split: of_split.shares for split, of_split in predictions.items()}

    if accelerator.is_main_process:  # the others wait, because intervals take seconds
        results = results_of(run, corpus, scorer, shares, units)
        save(arguments, model, feature_extractor, corpus, progress, predictions, results, made_from)
        report(results.scores, shares["devel"], progress.selected, results.ceiling, accelerator, run.selection)
        if results.of_fold is not None:
            print(f"\nSpearman's rho on test, the fold {arguments.data.fold}\n{score_table(results.of_fold)}")
    if run.controls:
        if arguments.model.tunes_backbone:  # the encoder has learned the true shares; the control needs a new one
            model, _ = together(partial(build_model, arguments, corpus.labels))
        shuffled = predict_after_shuffling(model, stores, scorer.rhos, arguments, accelerator)
        of_backbone = None if arguments.model.is_acoustic or arguments.model.finetune == "all" else stores
        report_controls(corpus, shares, shuffled, accelerator, of_backbone)
    accelerator.print(f"Model, predictions and results: {run.output_dir}")
    if run.push_to_hub and accelerator.is_main_process:
        commit = publish_folder(run.output_dir, run.hub_model_id, commit_message="EmoShare model")
        print(f"Published: {commit.commit_url}")


def _check_folders(run):
    """Raises ValueError if there is no checkpoint to resume from; OSError if `--output_dir` cannot be written to."""
    checkpoints_to_resume(run)
    output_dir = Path(run.output_dir)
    # A run that ends before it trains leaves no folder, so the folder in which this one would be made is tried.
    there = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    with writing(output_dir):
        TemporaryFile(dir=there).close()


def stores_of(corpus, model, feature_extractor, arguments, accelerator):
    """
    The inputs of the model's `trained_part` for all clips.

    Args:
        corpus: `Corpus`.
        model, feature_extractor: what `build_model` returned.
        arguments, accelerator: as in `train`; so are the errors.

    Returns:
        `dict` from split to `FrameFeatureStore`, or to `InputStore` if the whole encoder is trained; and
        `Corpus.fingerprints` of the clips as they are now, since they may be changed or moved before the results are
        written.
    """
    cache_dir, dtype = arguments.feature_cache_dir, arguments.data.feature_dtype
    layers, whole = [stored_layer(model.config)], corpus.as_stored
    is_stored = arguments.model.finetune != "all"
    if is_stored:
        names = StoreNames(model, feature_extractor, dtype, model.config.backbone_hash)
        check_new_audio(whole, model, feature_extractor, arguments.data, cache_dir, accelerator, layers, names)
    else:
        check_all_audio(whole, feature_extractor, arguments.data, accelerator)
    made_from = on_main_process(corpus.fingerprints, accelerator)
    if not is_stored:
        return {split: InputStore(corpus, split, feature_extractor, accelerator) for split in corpus.splits}, made_from
    stores = {
        split: extract_frame_features(whole, split, model, feature_extractor, cache_dir, accelerator, dtype, names)
        for split in whole.splits
    }
    if whole is not corpus:
        stores = {split: ResplitFeatureStore(stores, corpus, split) for split in corpus.splits}
    return stores, made_from


def extract(arguments, accelerator):
    """
    Extracts the `--part` of a run's frame features, and does nothing else.

    Args:
        arguments, accelerator: as in `train`; so are the errors.
    """
    corpus = load_run_corpus(arguments.data, accelerator).as_stored
    read_clips_together(corpus, accelerator)
    model, feature_extractor = together(partial(build_model, arguments, corpus.labels))
    cache_dir, dtype, layers = arguments.feature_cache_dir, arguments.data.feature_dtype, [stored_layer(model.config)]
    names = StoreNames(model, feature_extractor, dtype, model.config.backbone_hash)
    check_new_audio(corpus, model, feature_extractor, arguments.data, cache_dir, accelerator, layers, names)
    of_all = (model, feature_extractor, cache_dir, accelerator, dtype, layers, names, arguments.data.chosen_part)
    for split, clips in corpus.splits.items():
        extract_layers(clips, split, *of_all)


class Results(NamedTuple):
    """
    The measurements at the end of a run.

    Attributes:
        scores: `Scorer.scores` on devel, with intervals.
        ceiling: `NoiseCeiling` of devel.
        of_fold: `Scorer.scores` on test if that is a fold of the corpus, otherwise `None`.
    """

    scores: dict
    ceiling: NoiseCeiling
    of_fold: dict | None


def results_of(run, corpus, scorer, shares, units):
    """
    Args:
        run: `RunArguments`.
        corpus: `Corpus`.
        scorer: `Scorer` of devel.
        shares: by split, (clips, labels) predicted shares.
        units: `resampled_units` of devel.

    Returns:
        `Results`.
    """
    scores = scorer.scores(shares["devel"], run.bootstrap, run.seed, units)
    ceiling = noise_ceiling(corpus.shares("devel"), corpus.listeners("devel"), corpus.labels)
    if corpus.whole is None:
        return Results(scores, ceiling, None)
    return Results(scores, ceiling, Scorer(corpus.shares("test"), corpus.labels).scores(shares["test"]))


def save(arguments, model, feature_extractor, corpus, progress, predictions, results, made_from):
    """
    Writes the model repository, its card and the results. The files of an earlier run are replaced once all new ones
    are on the disk. The results come last: their presence marks a finished run.
    """
    output_dir = Path(arguments.run.output_dir)
    note = ". What was there before is left as it was"
    with writing(output_dir), work_folder(output_dir / "unfinished-model") as folder:
        with writing(output_dir, note):
            model.save_pretrained(folder, include_backbone=arguments.run.push_backbone)
            feature_extractor.save_pretrained(folder)
            for split, of_split in predictions.items():
                path = folder / f"predictions_{split}.csv"
                write_predictions(path, corpus.filenames(split), of_split.shares, corpus.labels)
            selected = None if arguments.run.selection == "best_epoch" else progress.selected
            write_history(folder / HISTORY, progress.history, corpus.labels, selected)
            dataset, shares = shown_settings(arguments)["dataset"], predictions["devel"].shares
            title = f"Predicted and true shares on devel ({dataset})"
            plot_shares(folder / "shares_devel.png", corpus.shares("devel"), shares, results.scores, title)
            calibrations = {}
            if model.config.has_concentrations:
                calibrations = _save_intervals(folder, corpus, predictions, f"Calibration ({dataset})")
            scores, ceiling, of_fold = results
            card = model_card(arguments, model, feature_extractor, scores, corpus, ceiling, calibrations, of_fold)
            card.save(folder / "README.md")
            measured = {"ceiling": ceiling, "calibrations": calibrations, "of_fold": of_fold}
            write_scores(folder / RESULTS, scores, made_from, **measured)
            sync_all(folder)
        _replace_run(folder, output_dir, model.config)


def _save_intervals(folder, corpus, predictions, title):
    """Writes the extra files of a model with concentrations; returns the `Calibration` of each split that has one."""
    calibrations = {}
    for split, of_split in predictions.items():
        listeners, filenames = corpus.listeners(split), corpus.filenames(split)
        write_intervals(folder / f"intervals_{split}.csv", filenames, of_split, listeners, corpus.labels)
        calibration = calibration_of(of_split, corpus.shares(split), listeners)
        if calibration is not None:
            calibrations[split] = calibration
    if calibrations:
        plot_calibration(folder / CALIBRATION_FIGURE, calibrations, title)
    return calibrations


def _replace_run(new, output_dir, config):
    """Moves the files of a run to `output_dir`, in place of those of an earlier one."""
    for pattern in OF_MODEL:
        for path in output_dir.glob(pattern):
            path.unlink()
    sync(output_dir)
    for path in new.iterdir():
        if path.name != RESULTS:
            os.replace(path, output_dir / path.name)
    if not config.include_backbone:
        config.save_pretrained(output_dir)  # the relative path of a local backbone differs here
        sync(output_dir / CONFIG_NAME)
    sync(output_dir)
    os.replace(new / RESULTS, output_dir / RESULTS)
    sync(output_dir)
