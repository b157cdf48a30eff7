import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import Corpus, load_emotion_share
from emoshare.dataset_script.synthetic import SyntheticCorpus
from emoshare.evaluation.controls import report_controls, ridge_predictions
from emoshare.evaluation.predictions import predict
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import arguments_of
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer, predict_after_shuffling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the controls print after a short training on a small synthetic corpus, as {name: ρ}."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("controls")
    small = SyntheticCorpus(train=300, devel=200, test=1)
    splits = load_emotion_share("synthetic", cache_dir=folder, synthetic=small)
    corpus = Corpus("synthetic", splits, list(EMOTIONS))
    accelerator = Accelerator(cpu=True)
    fields = {"conv_channels": (24, 24), "pool_size": 4, "lstm_hidden_size": 24, "ffn_sizes": (16,)}
    model = EmoShareModel(EmoShareConfig(separate_heads=False, **fields))
    extractor = EmoShareFeatureExtractor("mel")
    stores = {
        split: extract_frame_features(corpus, split, model, extractor, folder / "store", accelerator)
        for split in ("train", "devel")
    }
    scorer = Scorer(corpus.shares("devel"), corpus.labels)
    flags = {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "separate_heads": False}
    flags["seed"] = 2  # the control with shuffled labels scatters by about 0.1 between seeds
    arguments = arguments_of({"output_dir": str(folder), **flags}, "test")
    trainer = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator)
    trainer.fit()
    predictions = predict(model, trainer.devel_loader, accelerator)
    shuffled = predict_after_shuffling(model, stores, scorer.rhos, arguments, accelerator)
    lines = []
    accelerator.print = lines.append
    report_controls(corpus, {"devel": predictions}, shuffled, accelerator)
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


def test_a_clip_that_was_cut_is_named(wav):
    cut = {"audio": {"bytes": wav.read_bytes()[:8000], "path": "cut.wav"}}
    with pytest.raises(ValueError, match=r"cut\.wav: its header promises"):
        ridge_predictions(SimpleNamespace(splits={"train": [cut], "devel": []}))
