import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_HEAD

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import Corpus, load_corpus, load_emotion_share
from emoshare.dataset_script.synthetic import SyntheticCorpus
from emoshare.evaluation import controls
from emoshare.evaluation.controls import PENALTIES, report_controls, ridge_predictions
from emoshare.evaluation.predictions import predict
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import arguments_of
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer, predict_after_shuffling


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


@pytest.mark.slow
def test_a_short_training_learns_the_corpus(report):
    assert rho_of(report, "this model") > 0.3


@pytest.mark.slow
def test_the_ridge_regression_is_a_serious_control(report):
    assert 0.2 < rho_of(report, "log-mels") < rho_of(report, "noise ceiling")


@pytest.mark.slow
def test_length_and_loudness_alone_tell_little(report):
    assert rho_of(report, "length and loudness") < 0.5 * rho_of(report, "this model")


@pytest.mark.slow
def test_shuffled_labels_tell_nothing(report):
    assert abs(rho_of(report, "shuffled labels")) < 0.12


def test_a_clip_that_was_cut_is_named(wav):
    cut = {"audio": {"bytes": wav.read_bytes()[:8000], "path": "cut.wav"}}
    with pytest.raises(ValueError, match=r"cut\.wav: its header promises"):
        ridge_predictions(SimpleNamespace(splits={"train": [cut], "devel": []}))


class TwoSplits:
    """A stand-in for a corpus, with what the controls need."""

    labels = ("joy", "awe")
    info = SimpleNamespace(noise_ceiling=None, caution="")

    def __init__(self, **shares):
        self.of_split = shares
        self.splits = dict.fromkeys(shares)

    def shares(self, split):
        return self.of_split[split]

    def listeners(self, split):
        return np.full(len(self.of_split[split]), np.nan)


def lines_of_report(corpus, predictions, monkeypatch, of_penalties):
    monkeypatch.setattr(controls, "ridge_predictions", lambda corpus, splits, stores: {"something": of_penalties})
    lines = []
    accelerator = SimpleNamespace(is_main_process=True, print=lines.append)
    report_controls(corpus, predictions, np.zeros((40, 2)), accelerator)
    return lines


@pytest.mark.filterwarnings("ignore:.*same for every clip")
def test_the_penalty_is_chosen_on_devel_and_scored_on_test(monkeypatch):
    rng = np.random.default_rng(0)
    corpus = TwoSplits(train=rng.random((40, 2)), devel=rng.random((40, 2)), test=rng.random((40, 2)))
    devel, test = corpus.shares("devel"), corpus.shares("test")
    by_penalty = {
        "devel": np.stack([-devel, devel, *[0 * devel] * (len(PENALTIES) - 2)]),
        "test": np.stack([test, -test, *[0 * test] * (len(PENALTIES) - 2)]),  # the first would be better here
    }
    lines = lines_of_report(corpus, {"devel": devel, "test": test}, monkeypatch, by_penalty)
    assert lines[1].split() == ["devel", "test"]
    assert [line.split()[-2:] for line in lines[2:4]] == [["1.000", "1.000"], ["1.000", "-1.000"]]
    assert lines[4].split()[-1] == "0.000"  # shuffled labels, on devel


@pytest.mark.filterwarnings("ignore:.*same for every clip")
def test_a_test_split_without_known_shares_is_not_scored(monkeypatch):
    rng = np.random.default_rng(0)
    corpus = TwoSplits(train=rng.random((40, 2)), devel=rng.random((40, 2)), test=np.full((40, 2), np.nan))
    devel = corpus.shares("devel")
    by_penalty = {"devel": np.stack([devel] * len(PENALTIES))}
    lines = lines_of_report(corpus, {"devel": devel, "test": devel}, monkeypatch, by_penalty)
    assert lines[0] == "\nMean Spearman's rho on devel, with controls"
    assert [line.split()[-1] for line in lines[1:]] == ["1.000", "1.000", "0.000"]


def test_a_backbones_features_are_one_more_control(corpus_folder, backbone_folder, tmp_path):
    """Mean and deviation over all frames of a clip, whose windows count by their duration."""
    corpus = load_corpus("csv", data_dir=corpus_folder, cache_dir=tmp_path / "cache")
    torch.manual_seed(0)
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, **SMALL_HEAD)
    extractor = EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config, chunk_length_s=0.5)
    stores = {
        split: extract_frame_features(corpus, split, model, extractor, tmp_path / "store", Accelerator(cpu=True))
        for split in ("train", "devel")
    }
    moments = controls._moments(stores["devel"])
    is_of_clip = stores["devel"].clip_of_window == 1
    of_clip = [stores["devel"][window]["frame_features"] for window in np.flatnonzero(is_of_clip)]
    assert len(of_clip) > 1
    frames = np.concatenate(of_clip).astype(np.float64)
    np.testing.assert_allclose(moments[1], np.concatenate([frames.mean(axis=0), frames.std(axis=0)]), atol=0.05)
    predicted = ridge_predictions(corpus, ["devel"], stores)
    assert [name.split()[-1] for name in predicted] == ["length", "alone", "features"]
    for of_split in predicted.values():
        assert of_split["devel"].shape == (len(PENALTIES), 8, 9)
