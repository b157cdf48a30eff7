"""Upper layers of the encoder that train on stored hidden states, or all of it on waveforms, with the heads."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_HEAD, backbone_config, write_corpus
from torch import nn
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.predictions import predict
from emoshare.training import trainer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.batches import FeatureLoader
from emoshare.training.features import extract_frame_features
from emoshare.training.inputs import InputStore
from emoshare.training.optimization import PLAIN
from emoshare.training.steps import EncoderInTraining, heads_in_training, train_step
from emoshare.training.trainer import HeadTrainer

LABELS = {0: "joy", 1: "awe"}
KINDS = [
    ("hubert", {}),  # whose last hidden state has passed a norm
    ("hubert", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    ("wav2vec2", {}),
    ("wavlm", {}),
    ("wavlm", {"do_stable_layer_norm": False}),
    ("unispeech-sat", {}),
    ("data2vec-audio", {}),
]
ACCELERATOR = Accelerator(cpu=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", {"train": 6, "devel": 4}, labels=["joy", "awe"], seconds=(0.3, 1.2))
    return load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")


def backbone_at(folder, model_type="hubert", **fields):
    """A small backbone of three layers; LayerDrop would leave out most of them."""
    torch.manual_seed(1)
    config = backbone_config(model_type, num_hidden_layers=3, layerdrop=0.9, mask_time_prob=0.5, **fields)
    AutoModel.from_config(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return backbone_at(tmp_path_factory.mktemp("backbone"))


def tuned_model(folder, **fields):
    torch.manual_seed(2)
    fields = {**SMALL_HEAD, "id2label": LABELS, "finetuned_layers": 2, **fields}
    return EmoShareModel.from_backbone_pretrained(folder, **fields)


def stores_of(corpus, model, folder, dtype="float32"):
    extractor = EmoShareFeatureExtractor.for_backbone(model.config.backbone_name_or_path, model.config.backbone_config)
    return {
        split: extract_frame_features(corpus, split, model, extractor, folder, ACCELERATOR, dtype)
        for split in corpus.splits
    }


def waveforms_of(corpus, model):
    extractor = EmoShareFeatureExtractor.for_backbone(model.config.backbone_name_or_path, model.config.backbone_config)
    return {split: InputStore(corpus, split, extractor, ACCELERATOR) for split in corpus.splits}


def loss_and_gradients(model, store, parts):
    """Of a batch of all clips, through heads and encoder as they are trained, but for dropout."""
    model.eval()
    batch = next(iter(FeatureLoader(store, model.config, len(store), ACCELERATOR, seed=0)))
    heads = heads_in_training(model, 1e-3)
    encoder = EncoderInTraining(parts, torch.float32, 1e-3, PLAIN, "best_epoch")

    def train_heads(batches):
        return torch.stack([head.compute_gradients(of_head) for head, of_head in zip(heads, batches, strict=True)])

    losses = encoder.compute_gradients(batch, train_heads)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(("model_type", "fields"), KINDS)
@pytest.mark.parametrize("layer", [-1, 2])
def test_losses_and_gradients_from_the_store_are_those_from_waveforms(model_type, fields, layer, corpus, tmp_path):
    folder = backbone_at(tmp_path / "backbone", model_type, **fields)
    model = tuned_model(folder, backbone_layer=layer)
    losses, gradients = loss_and_gradients(model, stores_of(corpus, model, tmp_path)["train"], model.trained_part())
    # The model as it is runs on waveforms, through its own forward pass.
    expected_losses, expected = loss_and_gradients(model, waveforms_of(corpus, model)["train"], model)
    torch.testing.assert_close(losses, expected_losses, atol=1e-6, rtol=0)
    assert gradients.keys() == expected.keys()
    tuned = {name for name in gradients if name.startswith("backbone.")}
    first = (3 if layer == -1 else layer) - 2
    assert {name.split(".")[3] for name in tuned} == {str(number) for number in range(first, first + 2)}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)
