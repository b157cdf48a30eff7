"""The story of a training run: from a corpus to a complete model repository, its scores and its card."""

import os
from functools import partial
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..dataset_script.tables import FILENAME
from ..dataset_script.whole_files import sync, sync_all, work_folder, writing
from ..evaluation.card import model_card, shown_settings
from ..evaluation.ceiling import noise_ceiling
from ..evaluation.controls import report_controls
from ..evaluation.figures import plot_shares
from ..evaluation.groups import resampled_units
from ..evaluation.predictions import predict, write_predictions
from ..evaluation.scores import HISTORY, RESULTS, Scorer, report, write_history, write_scores
from ..repository_emoshare import create_repository, publish_folder
from .arguments import parse_arguments
from .batches import FeatureLoader
from .corpus import load_run_corpus
from .features import check_new_audio, extract_frame_features
from .launch import start
from .model import build_model
from .trainer import HeadTrainer, predict_after_shuffling
from .user_errors import checking, run_entry_point, together


def main(argv, name="train.py"):
    """
    `train.py`, and `emoshare train`, whose name messages begin with. Returns the exit code: 2 if something that the
    user gave is wrong.
    """
    return run_entry_point(name, parse_arguments, _run, argv)


def _run(arguments):
    accelerator = start(arguments)
    train(arguments, accelerator)
    accelerator.end_training()


def train(arguments, accelerator):
    """
    One run, from the corpus to the model repository in `--output_dir`; several may follow each other in a process.

    Args:
        arguments: `Arguments`.
        accelerator: of `start`.

    Raises:
        UserError: if something that the user gave is wrong: the corpus, the backbone, a clip, the checkpoint to resume
            from, ...
        OSError: if something cannot be written or fetched.
    """
    run = arguments.run
    if run.push_to_hub:
        # Before anything is trained, so that a missing token or a wrong name costs no time.
        create = partial(create_repository, run.hub_model_id, private=run.hub_private or None)
        together(create if accelerator.is_main_process else lambda: None)

    corpus = load_run_corpus(arguments.data, accelerator)
    with checking(is_of_all=True):
        units = resampled_units(corpus, "devel", run.resample)
    model, feature_extractor = together(partial(build_model, arguments, corpus.labels))

    # The frozen backbone runs once over every clip; the heads are then trained on its features.
    cache_dir, dtype = arguments.feature_cache_dir, arguments.data.feature_dtype
    layers = [model.config.backbone_layer]
    check_new_audio(corpus, model, feature_extractor, arguments.data, cache_dir, accelerator, layers)
    # Of the clips as they are now: until the results are written, somebody may change them or move them away.
    made_from = together(corpus.fingerprints if accelerator.is_main_process else lambda: None)
    stores = {
        split: extract_frame_features(corpus, split, model, feature_extractor, cache_dir, accelerator, dtype)
        for split in corpus.splits
    }

    # Each emotion keeps the weights of its own best epoch on devel.
    scorer = Scorer(corpus.shares("devel"), corpus.labels)
    progress = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()

    loaders = {
        split: FeatureLoader(store, model.config, run.per_device_train_batch_size, accelerator)
        for split, store in stores.items()
        if split != "train"
    }
    predictions = {split: predict(model, loader, accelerator) for split, loader in loaders.items()}
    scores = scorer.scores(predictions["devel"], run.bootstrap, run.seed, units)

    ceiling = noise_ceiling(corpus.shares("devel"), corpus.listeners("devel"), corpus.labels)

    if accelerator.is_main_process:
        save(arguments, model, feature_extractor, corpus, progress, predictions, scores, ceiling, made_from)
    report(scores, predictions["devel"], [head.best.epoch for head in progress.heads], ceiling, accelerator)
    if run.controls:
        shuffled = predict_after_shuffling(model, stores, scorer.rhos, arguments, accelerator)
        of_backbone = None if arguments.model.is_acoustic else stores
        report_controls(corpus, predictions, shuffled, accelerator, of_backbone)
    accelerator.print(f"Model, predictions and results: {run.output_dir}")
    if run.push_to_hub and accelerator.is_main_process:
        commit = publish_folder(run.output_dir, run.hub_model_id, commit_message="EmoShare model")
        print(f"Published: {commit.commit_url}")


def save(arguments, model, feature_extractor, corpus, progress, predictions, scores, ceiling, made_from):
    """
    Writes the model repository, its card, and what the run measured. What an earlier run left is replaced when all of
    the new is on the disk, and the results come last: their presence marks a finished run.
    """
    output_dir = Path(arguments.run.output_dir)
    note = ". What was there before is left as it was"
    with writing(output_dir), work_folder(output_dir / "unfinished-model") as folder:
        with writing(output_dir, note):
            model.save_pretrained(folder, include_backbone=arguments.run.push_backbone)
            feature_extractor.save_pretrained(folder)
            for split, shares in predictions.items():
                filenames = corpus.splits[split][FILENAME]
                write_predictions(folder / f"predictions_{split}.csv", filenames, shares, corpus.labels)
            write_history(folder / HISTORY, progress.history, corpus.labels)
            title = f"Predicted and true shares on devel ({shown_settings(arguments)['dataset']})"
            plot_shares(folder / "shares_devel.png", corpus.shares("devel"), predictions["devel"], scores, title)
            model_card(arguments, model, feature_extractor, scores, corpus, ceiling).save(folder / "README.md")
            write_scores(folder / RESULTS, scores, made_from, ceiling=ceiling)
            sync_all(folder)
        _replace_run(folder, output_dir, model.config)


def _replace_run(new, output_dir, config):
    """Moves the files of a run to where another may have left its own."""
    for path in [output_dir / RESULTS, *output_dir.glob("model*.safetensors*")]:  # weights may be in other files now
        path.unlink(missing_ok=True)
    sync(output_dir)
    for path in new.iterdir():
        if path.name != RESULTS:
            os.replace(path, output_dir / path.name)
    if not config.include_backbone:
        config.save_pretrained(output_dir)  # the path of a local backbone is another one from here
        sync(output_dir / CONFIG_NAME)
    sync(output_dir)
    os.replace(new / RESULTS, output_dir / RESULTS)
    sync(output_dir)
