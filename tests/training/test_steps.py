"""Training upper layers of the encoder on stored hidden states, or the whole encoder on waveforms, with the heads."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL_HEAD, backbone_config, write_corpus
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.predictions import predict
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.augmentation import Augmentation
from emoshare.training.batches import FeatureLoader
from emoshare.training.features import extract_frame_features
from emoshare.training.inputs import InputStore
from emoshare.training.optimization import PLAIN
from emoshare.training.steps import Accumulation, EncoderInTraining, heads_in_training, train_step
from emoshare.training.trainer import HeadTrainer, Progress

sys.path.append(str(ROOT / "benchmarks"))

from marked_frames import marked_frames, through

LABELS = {0: "joy", 1: "awe"}
KINDS = [
    ("hubert", {}),  # whose last hidden state is normalised
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


def extractor_of(model):
    config = model.config
    return EmoShareFeatureExtractor.for_backbone(config.backbone_name_or_path, config.backbone_config)


def stores_of(corpus, model, folder, dtype="float32"):
    extractor = extractor_of(model)
    return {
        split: extract_frame_features(corpus, split, model, extractor, folder, ACCELERATOR, dtype)
        for split in corpus.splits
    }


def waveforms_of(corpus, model):
    return {split: InputStore(corpus, split, extractor_of(model), ACCELERATOR) for split in corpus.splits}


def gradients_of(heads, batches):
    return torch.stack([head.compute_gradients(batch) for head, batch in zip(heads, batches, strict=True)])


def loss_and_gradients(model, store, parts):
    """Of a batch of all clips, through heads and encoder as they are trained, but for dropout."""
    model.eval()
    batch = next(iter(FeatureLoader(store, model.config, 10 * len(store), ACCELERATOR)))
    heads = heads_in_training(model, 1e-3)
    encoder = EncoderInTraining(parts, torch.float32, 1e-3, PLAIN, "best_epoch")
    losses = encoder.compute_gradients(batch, partial(gradients_of, heads))
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_store_in_16_bits_costs_its_rounding(dtype, corpus, backbone, tmp_path):
    """Losses differ by as much as those of the rounded features do, computed in float32."""
    model = tuned_model(backbone)
    losses, _ = loss_and_gradients(model, stores_of(corpus, model, tmp_path, dtype)["train"], model.trained_part())
    exact = stores_of(corpus, model, tmp_path)["train"]
    expected, _ = loss_and_gradients(model, exact, model.trained_part())
    torch.testing.assert_close(losses, expected, atol=2e-3, rtol=0)
    rounded, collate = getattr(torch, dtype), exact.collate

    def collate_rounded(windows):
        batch = collate(windows)
        return {**batch, "frame_features": batch["frame_features"].to(rounded)}

    exact.collate = collate_rounded
    assert torch.equal(losses, loss_and_gradients(model, exact, model.trained_part())[0])


def test_losses_and_gradients_do_not_depend_on_the_other_clips_of_a_batch(corpus, backbone, tmp_path):
    model = tuned_model(backbone)
    store = stores_of(corpus, model, tmp_path)["train"]
    _, together = loss_and_gradients(model, store, model.trained_part())
    alone = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    heads = heads_in_training(model, 1e-3)
    encoder = EncoderInTraining(model.trained_part(), torch.float32, 1e-3, PLAIN, "best_epoch")
    # Batches of one clip; the mean over the steps of an epoch is the mean over its clips.
    loader = FeatureLoader(store, model.config, 1e-9, ACCELERATOR)
    for batch in loader:
        encoder.compute_gradients(batch, partial(gradients_of, heads))
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            alone[name] = weight.grad / len(loader)
    assert len(loader) == len(store)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-4, msg=name)


def fit(model, stores, output_dir, **fields):
    if model.config.tunes_backbone:
        fields = {"finetune_learning_rate": 1e-2, **fields}
    fields = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, **fields}
    run = RunArguments(output_dir=str(output_dir), mixed_precision="no", **fields)
    tunes = {"finetune": "none" if model.config.freeze_backbone else "all"}
    tunes["finetune_last_layers"] = model.config.finetuned_layers
    arguments = Arguments(DataArguments(), ModelArguments(backbone="a/b", **tunes), run)
    scorer = Scorer(stores["devel"].shares, list(LABELS.values()))
    return HeadTrainer(model, stores, scorer.rhos, arguments, Accelerator(cpu=True)).fit()


@pytest.fixture(scope="module")
def layer_stores(corpus, backbone, tmp_path_factory):
    return stores_of(corpus, tuned_model(backbone), tmp_path_factory.mktemp("stores"))


@pytest.mark.slow
@pytest.mark.parametrize("what", [{"finetuned_layers": 2}, {"finetuned_layers": 2, "lora_rank": 2}, "all"])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(what, corpus, backbone, layer_stores, tmp_path):
    """With dropout in the encoder and the heads, and gradients of several batches in a step."""
    what = {"finetuned_layers": 0, "freeze_backbone": False} if what == "all" else what
    start = tuned_model(backbone, dropout=0.2, **what)
    stores = waveforms_of(corpus, start) if what.get("finetuned_layers") == 0 else layer_stores
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "selection": "average", "weight_decay": 0.01}

    def run(folder, seed, epochs, **fields):
        model = tuned_model(backbone, dropout=0.2, **what)
        torch.manual_seed(seed)  # nothing is drawn from PyTorch's own generator as it is
        return model, fit(model, stores, tmp_path / folder, num_train_epochs=epochs, **options, **fields)

    whole, progress = run("whole", 1, 3)
    run("parts", 2, 1)
    resumed, resumed_progress = run("parts", 3, 3, resume_from_checkpoint="last")
    assert resumed_progress.history == progress.history
    before, after = start.state_dict(), whole.state_dict()
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, after[name]), name
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in whole.named_parameters() if weight.requires_grad} - UNUSED
    assert any(name.startswith("backbone.") for name in changed)
    assert len(set(progress.selected)) == 1


UNUSED = {"backbone.masked_spec_embed"}


def test_checkpointed_gradients_are_the_same(layer_stores, backbone, tmp_path):
    weights = []
    for number, checkpointing in enumerate([False, True]):
        model = tuned_model(backbone)
        fit(model, layer_stores, tmp_path / str(number), num_train_epochs=2, gradient_checkpointing=checkpointing)
        assert model.backbone.encoder.layers[1].gradient_checkpointing == checkpointing
        weights.append(model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("tuned", [True, False])
def test_a_step_of_several_batches_is_that_of_all_their_clips(tuned, layer_stores, backbone):
    store, updated = layer_stores["train"], []
    for clips in (2, 4):
        model = tuned_model(backbone, finetuned_layers=2 if tuned else 0).eval()
        heads, encoder = heads_in_training(model, 1e-2), None
        if tuned:
            encoder = EncoderInTraining(model.trained_part(), torch.float32, 1e-2, PLAIN, "best_epoch")
        steps = 4 // clips
        for step in range(steps):
            batch = store.collate([store[index] for index in range(step * clips, (step + 1) * clips)])
            batch["weight_per_step"] = torch.full((2,), float(clips))
            train_step(heads, batch, ACCELERATOR, 1, None, encoder, Accumulation.at(step, 2, steps))
        updated.append({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    for name, weight in updated[0].items():
        torch.testing.assert_close(weight, updated[1][name], atol=1e-5, rtol=0, msg=name)


def test_the_last_step_of_an_epoch_may_have_fewer_batches():
    found = [Accumulation.at(batch, 3, 8) for batch in range(8)]
    assert [where.batches for where in found] == [3] * 6 + [2] * 2
    assert [where.is_last for where in found] == [False, False, True] * 2 + [False, True]


def test_stored_features_are_changed_in_float32(corpus, backbone, tmp_path, monkeypatch):
    """Below tuned layers, whatever dtype they are stored in."""
    model, seen = tuned_model(backbone), []
    stores = stores_of(corpus, model, tmp_path / "stores", "float16")
    change = Augmentation.__call__

    def note(augmentation, batch, step):
        changed = change(augmentation, batch, step)
        seen.append((batch["frame_features"], changed["frame_features"]))
        return changed

    monkeypatch.setattr(Augmentation, "__call__", note)
    options = {"mixup": 0.5, "time_mask": 0.2, "feature_mask": 0.1, "time_stretch": 0.2}
    fit(model, stores, tmp_path / "run", num_train_epochs=1, **options)
    assert seen
    for before, after in seen:
        assert before.dtype == after.dtype == torch.float32
        assert before.shape != after.shape or not torch.equal(before, after)


def test_all_emotions_keep_the_epoch_of_the_best_mean(backbone):
    model = tuned_model(backbone)
    state = Progress(model, RunArguments(early_stopping_patience=2))
    layer = model.backbone.encoder.layers[2].final_layer_norm
    trained = []
    for epoch, rhos in enumerate([[0.1, 0.5], [0.4, 0.3], [0.6, 0.0], [0.0, 0.6]], start=1):
        for weight in (layer.bias, *(head.output.bias for head in model.heads)):
            weight.data.fill_(epoch)
        trained.append(len(state.training))
        state.update([0.1, 0.1], np.array(rhos), np.array([False, False]))
    assert state.selected == [2, 2]
    assert trained == [2, 2, 2, 2]
    assert state.training == []
    state.restore_best()
    assert layer.bias.unique().item() == 2
    assert [head.output.bias.item() for head in model.heads] == [2, 2]


@pytest.mark.slow
def test_tuned_layers_solve_what_heads_on_frozen_random_ones_cannot(tmp_path):
    fields = {"backbone_config": backbone_config(), "architecture": "statistics", "id2label": LABELS}
    tuned = EmoShareModel(EmoShareConfig(finetuned_layers=2, **fields))
    frozen = EmoShareModel(EmoShareConfig(**fields))
    frozen.load_state_dict(tuned.state_dict())
    below = {"train": marked_frames(400, seed=1), "devel": marked_frames(200, seed=2)}
    above = {split: through(tuned, store) for split, store in below.items()}
    before = {name: weight.clone() for name, weight in tuned.state_dict().items()}
    rhos = {}
    for name, model, stores in (("frozen", frozen, above), ("tuned", tuned, below)):
        rate = {"finetune_learning_rate": 3e-3} if name == "tuned" else {}
        fields = {"num_train_epochs": 8, "per_device_train_batch_size": 32, "learning_rate": 3e-3, **rate}
        best = [head.best.score for head in fit(model, stores, tmp_path / name, **fields).heads]
        loader = FeatureLoader(stores["devel"], model.config, 32, ACCELERATOR)
        shares = predict(model.trained_part(), loader, ACCELERATOR)
        rhos[name] = Scorer(stores["devel"].shares, list(LABELS.values())).rhos(shares, [0, 1]).mean()
        if name == "tuned":
            assert rhos[name] == pytest.approx(best[0])
    assert rhos["frozen"] < 0.3
    assert rhos["tuned"] > rhos["frozen"] + 0.4
    for name, weight in tuned.state_dict().items():
        is_trained = name.startswith(("backbone.encoder.layers.", "heads."))
        assert is_trained or torch.equal(weight, before[name]), name
