"""The scale of statistics over time: that of the train split, whoever computes it, and part of the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import small_model, write_corpus

from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.pooling_emoshare import Standardization
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.features import extract_frame_features
from emoshare.training.standardization import fit_standardization
from emoshare.training.trainer import HeadTrainer

LABELS = {0: "joy", 1: "awe"}
ARCHITECTURES = ["statistics", "functionals"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Log-mels of clips of very different lengths, some of several windows."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", {"train": 9, "devel": 3}, labels=["joy", "awe"], seconds=(0.1, 1.5))
    corpus = load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")
    model, extractor = small_model(id2label=LABELS), EmoShareFeatureExtractor("mel", chunk_length_s=0.6)
    return {
        split: extract_frame_features(corpus, split, model, extractor, folder, Accelerator(cpu=True), "float32")
        for split in corpus.splits
    }


def process(index, processes, reduce):
    return SimpleNamespace(num_processes=processes, process_index=index, device=torch.device("cpu"), reduce=reduce)


def scale_of(model):
    scale = model.heads[0].pooling.standardization
    return torch.stack([scale.mean, scale.deviation])


def fit(model, store, processes=1, batch_size=3, share_weights=None):
    """As several processes would, one after the other: first what each has to add, then the fit with the sum."""
    added = []

    def loader(accelerator):
        return FeatureLoader(store, model.config, batch_size, accelerator, seed=1, share_weights=share_weights)

    def collect(sums):
        added.append(sums.clone())
        return sums

    for index in range(processes):
        accelerator = process(index, processes, collect)
        fit_standardization(model, loader(accelerator), accelerator)
    accelerator = process(0, processes, lambda sums: sum(added))
    fit_standardization(model, loader(accelerator), accelerator)


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_of_shares_do_not_change_the_scale(processes, stores):
    store, scales = stores["train"], []
    for share_weights in (None, 0.5 + np.random.default_rng(0).random(stores["train"].shares.shape)):
        model = small_model(id2label=LABELS, architecture="functionals")
        fit(model, store, processes, share_weights=share_weights)
        scales.append(scale_of(model))
    assert torch.equal(*scales)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_mean_and_deviation_are_those_of_the_train_split(architecture, processes, stores):
    model, store = small_model(id2label=LABELS, architecture=architecture), stores["train"]
    assert len(store) > len(store.clips)
    fit(model, store, processes)
    statistics = torch.cat(
        [
            model.heads[0].statistics_of(
                torch.from_numpy(np.array(item["frame_features"]))[None], torch.tensor([length])
            )
            for item, length in zip(store, store.num_frames, strict=True)
        ]
    ).double()
    weights = torch.from_numpy(store.weights).double()
    mean = (weights @ statistics) / weights.sum()
    deviation = ((weights @ (statistics - mean).square()) / weights.sum()).sqrt()
    for head in model.heads:
        torch.testing.assert_close(head.pooling.standardization.mean.double(), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.pooling.standardization.deviation.double(), deviation, atol=1e-5, rtol=1e-4)


def test_a_statistic_that_never_changes_is_not_blown_up(stores):
    model, store = small_model(id2label=LABELS, architecture="statistics"), stores["train"]

    class ConstantBand(FeatureLoader):
        def __iter__(self):
            for batch in super().__iter__():
                batch["frame_features"] = batch["frame_features"].clone()
                batch["frame_features"][..., 0] = 123.4
                yield batch

    accelerator = process(0, 1, lambda sums: sums)
    fit_standardization(model, ConstantBand(store, model.config, 3, accelerator, seed=1), accelerator)
    mean, deviation = scale_of(model)[:, 0]
    assert mean.item() == pytest.approx(123.4, abs=1e-3)
    # Rounding of float32, about 1e-5 here, stays far below 1.
    assert deviation.item() == pytest.approx(0.1234, rel=1e-3)


def trainer_of(model, stores, folder, **fields):
    run = RunArguments(output_dir=str(folder), per_device_train_batch_size=3, learning_rate=1e-2, **fields)
    arguments = Arguments(DataArguments(), ModelArguments(), run)
    return HeadTrainer(model, stores, spread, arguments, Accelerator(cpu=True))


def spread(shares, labels):
    return np.full(len(labels), 0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("separate_heads", [True, False])
def test_the_scale_is_fitted_before_training_and_is_part_of_the_model(architecture, separate_heads, stores, tmp_path):
    model = small_model(id2label=LABELS, architecture=architecture, separate_heads=separate_heads)
    assert [scale.unique().item() for scale in scale_of(model)] == [0, 1]
    trainer = trainer_of(model, stores, tmp_path / "run", num_train_epochs=2, selection="average")
    fitted = scale_of(model).clone()
    assert (fitted[0] != 0).any()
    assert torch.equal(scale_of(model.select([0, 1])), fitted)
    model.initialize_head(0, 7)
    assert torch.equal(scale_of(model), fitted)
    trainer.fit()
    assert torch.equal(scale_of(model), fitted)
    model.eval().save_pretrained(tmp_path / "model")
    loaded, info = EmoShareModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    features = torch.randn(2, 20, 40)
    assert torch.equal(loaded(input_features=features).logits, model(input_features=features).logits)
    in_16_bits = EmoShareModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(scale_of(in_16_bits), fitted)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(stores, tmp_path):
    weights = {}
    for name, epochs in [("whole", [3]), ("resumed", [1, 3])]:
        for number, num_train_epochs in enumerate(epochs):
            torch.manual_seed(0)
            model = small_model(id2label=LABELS, architecture="functionals", dropout=0.3)
            resume = {"resume_from_checkpoint": "last"} if number else {}
            trainer_of(model, stores, tmp_path / name, num_train_epochs=num_train_epochs, **resume).fit()
        weights[name] = model.state_dict()
    assert all(torch.equal(tensor, weights["resumed"][name]) for name, tensor in weights["whole"].items())


def test_a_checkpoint_without_a_scale_leaves_statistics_as_they_are(tmp_path):
    model = small_model(architecture="statistics")
    without = {name: tensor for name, tensor in model.state_dict().items() if "standardization" not in name}
    model.save_pretrained(tmp_path, state_dict=without)
    loaded = EmoShareModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    for part in loaded.modules():
        if isinstance(part, Standardization):
            assert (part.mean == 0).all()
            assert (part.deviation == 1).all()
