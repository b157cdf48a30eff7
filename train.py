"""
Trains an EmoShare model: the story of a run, from audio files to a complete Hugging Face model repository.

The embedded demo, on whatever this machine has:
    accelerate launch --config_file accelerate_config.yaml train.py
The paper's best system on ComParE 2023, on one GPU, on four, and on two machines with four each:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 4 train.py configs/compare2023_hubert_large.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 8 --num_machines 2 --machine_rank R --main_process_ip HOST \
        --main_process_port 29500 train.py configs/compare2023_hubert_large.yaml --data_dir DIR
The same, published on the Hub:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --data_dir DIR \
        --push_to_hub --hub_model_id ORG/NAME
On a copy of the corpus that is on the Hub:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --dataset ORG/CORPUS
A corpus of one's own, on two CPU processes:
    torchrun --nproc_per_node 2 train.py --dataset csv --data_dir DIR --backbone facebook/hubert-base-ls960
"""

import sys
from pathlib import Path

from emoshare.evaluation.predictions import write_predictions
from emoshare.training.arguments import fixed_settings, parse_arguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.card import model_card
from emoshare.training.controls import report_controls
from emoshare.training.corpus import load_splits
from emoshare.training.evaluation import Scorer, predict_shares, report, write_history, write_results
from emoshare.training.features import extract_frame_features
from emoshare.training.figures import plot_shares
from emoshare.training.heads import train_heads
from emoshare.training.hub import create_repository, publish
from emoshare.training.launch import start
from emoshare.training.model import build_model


def main(argv):
    data, model_arguments, run = parse_arguments(argv)
    settings = fixed_settings(data, model_arguments, run)
    accelerator = start(run, settings)
    train(data, model_arguments, run, settings, accelerator)
    accelerator.end_training()


def train(data, model_arguments, run, settings, accelerator):
    """One run, with what `parse_arguments` returns; several may follow each other."""
    output_dir = Path(run.output_dir)
    if run.push_to_hub and accelerator.is_main_process:
        create_repository(run)

    splits, labels = load_splits(data, accelerator)
    model, feature_extractor = build_model(model_arguments, labels, run.head_seeds)

    # The frozen backbone runs once over every clip; the heads are then trained on what it gave.
    cache_dir = data.feature_cache_dir or output_dir / "features"
    stores = {
        split: extract_frame_features(
            clips, split, model, feature_extractor, cache_dir, accelerator, data.feature_dtype
        )
        for split, clips in splits.items()
    }

    # Each emotion keeps the weights of its own best epoch on devel.
    scorer = Scorer(stores["devel"].shares, labels)
    progress = train_heads(model, stores["train"], stores["devel"], scorer.rhos, run, accelerator, settings)

    loaders = {
        split: FeatureLoader(store, model.config, run.per_device_train_batch_size, accelerator)
        for split, store in stores.items()
        if split != "train"
    }
    predictions = {split: predict_shares(model.heads, loader, accelerator) for split, loader in loaders.items()}
    results = scorer.scores(predictions["devel"], bootstrap=run.bootstrap, seed=run.seed)

    if accelerator.is_main_process:
        model.save_pretrained(output_dir, include_backbone=run.push_backbone)
        feature_extractor.save_pretrained(output_dir)
        for split, shares in predictions.items():
            write_predictions(output_dir / f"predictions_{split}.csv", splits[split]["filename"], shares, labels)
        write_history(output_dir / "training_history.csv", progress.history, labels)
        title = f"Predicted and true shares on devel ({data.dataset})"
        plot_shares(output_dir / "shares_devel.png", scorer.references, predictions["devel"], labels, results, title)
        clips = {split: len(store.clips) for split, store in stores.items()}
        corpus = splits["train"].info.config_name
        card = model_card(data, model_arguments, run, model, feature_extractor, results, clips, corpus)
        card.save(output_dir / "README.md")
        # Last, for who finds results finds a whole run.
        write_results(output_dir / "eval_results.json", {f"eval_{name}": value for name, value in results.items()})
    report(results, predictions["devel"], labels, [network.best.epoch for network in progress.networks], accelerator)
    if run.controls:
        report_controls(model, stores, scorer, data, run, accelerator)
    accelerator.print(f"Model, predictions and results: {output_dir}")
    if run.push_to_hub and accelerator.is_main_process:
        print(f"Published: {publish(run)}")


if __name__ == "__main__":
    main(sys.argv[1:])
