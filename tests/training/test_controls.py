import re

import pytest
import torch
from accelerate import Accelerator

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_emotion_share
from emoshare.dataset_script.synthetic import SyntheticCorpus
from emoshare.training.arguments import DataArguments, RunArguments
from emoshare.training.controls import report_controls
from emoshare.training.evaluation import Scorer
from emoshare.training.features import extract_frame_features
from emoshare.training.heads import train_heads


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the controls print after a short training on a small synthetic corpus, as {name: ρ}."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("controls")
    corpus = SyntheticCorpus(train=300, devel=200, test=1)
    splits = load_emotion_share("synthetic", cache_dir=folder, synthetic=corpus)
    accelerator = Accelerator(cpu=True)
    fields = {"conv_channels": (24, 24), "pool_size": 4, "lstm_hidden_size": 24, "ffn_sizes": (16,)}
    model = EmoShareModel(EmoShareConfig(separate_heads=False, **fields))
    extractor = EmoShareFeatureExtractor("mel")
    stores = {
        split: extract_frame_features(splits[split], split, model, extractor, folder / "store", accelerator)
        for split in ("train", "devel")
    }
    scorer = Scorer(stores["devel"].shares, stores["devel"].labels)
    run = RunArguments(output_dir=str(folder), num_train_epochs=8, per_device_train_batch_size=8, learning_rate=3e-3)
    train_heads(model, stores["train"], stores["devel"], scorer.rhos, run, accelerator, {})
    lines = []
    accelerator.print = lines.append
    report_controls(model, stores, scorer, DataArguments(), run, accelerator)
    return {m[1]: float(m[2]) for line in lines if (m := re.match(r"  (\S.*\S)\s+(-?[01]\.\d{3})$", line))}


def rho_of(report, name):
    (value,) = (rho for key, rho in report.items() if name in key)
    return value


def test_a_short_training_learns_the_corpus(report):
    assert rho_of(report, "this model") > 0.3


def test_the_ridge_regression_is_a_serious_control(report):
    assert 0.2 < rho_of(report, "log-mels") < rho_of(report, "noise ceiling")


def test_length_and_loudness_alone_tell_little(report):
    assert rho_of(report, "length and loudness") < 0.5 * rho_of(report, "this model")


def test_shuffled_labels_tell_nothing(report):
    assert abs(rho_of(report, "shuffled labels")) < 0.12
