"""
Runs GPU code on a fake GPU, which finds tensors on the wrong device without a real GPU.

Without a fake in PyTorch, or with one that asks the driver: cuDNN's LSTM (PyTorch's own runs in its place), autograd's
engine (gradients are zeros), `torch.Generator` and pinned memory. `fake_cuda` replaces them; nothing else of what a GPU
runs is left out.
"""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import backbone_config, small_model, speech, write_corpus
from fake_cuda import CUDA, convert, fake_cuda
from test_wav2vec2 import GROUP_NORM

from emoshare import EmoShareFeatureExtractor, EmotionSharePipeline
from emoshare.architectures_emoshare import ARCHITECTURES
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.predictions import predict_votes
from emoshare.losses_emoshare import LOSSES
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.features import extract_frame_features
from emoshare.training.trainer import HeadTrainer

LABELS = {0: "joy", 1: "awe"}
ACCELERATOR = SimpleNamespace(
    device=CUDA,
    num_processes=1,
    process_index=0,
    is_main_process=True,
    reduce=lambda tensor, **_: tensor,
    wait_for_everyone=lambda: None,
    print=lambda *_: None,
)


@pytest.fixture
def gpu():
    with fake_cuda():
        yield


def model_on_gpu(**fields):
    with torch.device(CUDA):
        return small_model(**{"id2label": LABELS, **fields})


def a_batch(frames=(12, 9), width=8):
    return {
        "frame_features": torch.randn(len(frames), max(frames), width, device=CUDA),
        "attention_mask": (torch.arange(max(frames)) < torch.tensor(frames)[:, None]).to(CUDA),
        "labels": torch.tensor([[0.1, torch.nan], [0.4, 0.2]]).to(CUDA),
    }


def is_on_gpu(*tensors):
    return all(tensor.device == CUDA for tensor in tensors if tensor is not None)


def test_a_tensor_on_the_wrong_device_is_found(gpu):
    with pytest.raises(RuntimeError, match="two different devices"):
        torch.ones(2, device=CUDA) + torch.ones(2)
    with pytest.raises(TypeError, match="can't convert cuda"):
        torch.ones(2, device=CUDA).numpy()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_forward_and_has_gradients(architecture, gpu):
    model = model_on_gpu(feature_size=8, architecture=architecture, dropout=0.1).train()
    batch = a_batch()
    batch["frame_features"] = batch["frame_features"].bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        output = model(**batch, output_attentions=True)
    assert is_on_gpu(*output.values())
    output.loss.backward()
    assert is_on_gpu(*(parameter.grad for parameter in model.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, gpu):
    model = model_on_gpu(feature_size=8, loss=loss, separate_heads=False, architecture="statistics", ffn_sizes=())
    batch = a_batch()
    listeners = torch.tensor([3.0, torch.nan]).to(CUDA)
    output = model(**batch, listeners=listeners)
    for weights in (torch.ones(2, device=CUDA), torch.ones(2, 2, device=CUDA)):
        weighted = model.loss(output.logits, batch["labels"], weights, listeners, output.concentrations)
        assert is_on_gpu(output.loss, weighted)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("hubert", GROUP_NORM),
        ("wavlm", {}),
        ("hubert", {"conv_pos_batch_norm": True}),
        ("data2vec-audio", {}),
        ("wav2vec2-bert", {}),
        ("wav2vec2-bert", {"position_embeddings_type": "relative"}),
        ("wav2vec2-bert", {"position_embeddings_type": "rotary"}),
        ("whisper", {"backbone_padding": "30s"}),
        ("whisper", {"backbone_padding": "clip"}),
    ],
)
def test_every_backbone_gives_a_batch_the_shares_of_the_cpu(model_type, fields):
    config = {"backbone_layer": "weighted", "separate_heads": False, "id2label": LABELS}
    on_cpu = small_model(backbone_config=backbone_config(model_type, **fields), **config)
    name, size = on_cpu.main_input_name, 4000 if on_cpu.main_input_name == "input_values" else 12
    inputs = torch.randn(2, size, *{"whisper": [80], "wav2vec2-bert": [160]}.get(model_type, []))
    mask = torch.arange(size) < torch.tensor([size, 3 * size // 4])[:, None]
    with torch.inference_mode():
        expected = on_cpu(**{name: inputs}, attention_mask=mask).logits.numpy()
    with fake_cuda():
        model = model_on_gpu(backbone_config=backbone_config(model_type, **fields), **config)
        model.load_state_dict(on_cpu.state_dict())
        inputs, mask = inputs.to(CUDA), mask.to(CUDA)
        with torch.inference_mode():
            output = model(**{name: inputs}, attention_mask=mask, output_hidden_states=True)
            assert is_on_gpu(output.logits, *output.hidden_states)
            np.testing.assert_allclose(output.logits.cpu().numpy(), expected, atol=1e-5)
            alone = model(**{name: inputs[:1]})  # without padding
            np.testing.assert_allclose(alone.logits.cpu().numpy(), expected[:1], atol=1e-5)
            convert(model.backbone, torch.bfloat16)
            rounded = model(**{name: inputs}, attention_mask=mask)
            np.testing.assert_allclose(rounded.logits.cpu().numpy(), expected, atol=2e-2)


def test_a_backbone_that_trains(gpu):
    model = model_on_gpu(backbone_config=backbone_config(**GROUP_NORM), freeze_backbone=False).train()
    batch = a_batch(frames=(4000, 3000))
    loss = model(batch["frame_features"][..., 0], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    loss.backward()
    assert is_on_gpu(loss, *(parameter.grad for parameter in model.backbone.parameters()))


def test_the_pipeline_gives_the_shares_of_the_cpu():
    on_cpu = small_model(backbone_config=backbone_config(), loss="beta_binomial", id2label=LABELS)
    clips, options = [speech(0.5), speech(0.3)], {"return_attention": True, "return_interval": True}
    extractor = EmoShareFeatureExtractor()
    expected = EmotionSharePipeline(model=on_cpu, feature_extractor=extractor, device="cpu")(clips, **options)
    with fake_cuda():
        model = model_on_gpu(backbone_config=backbone_config(), loss="beta_binomial")
        model.load_state_dict(on_cpu.state_dict())
        pipe = EmotionSharePipeline(model=model, feature_extractor=extractor, device=CUDA)
        for found, of_cpu in zip(pipe(clips, batch_size=2, **options), expected, strict=True):
            assert [share["label"] for share in found["shares"]] == [share["label"] for share in of_cpu["shares"]]
            for name in ("score", "interval"):
                values = [[share[name] for share in result["shares"]] for result in (found, of_cpu)]
                np.testing.assert_allclose(*values, atol=1e-5)
            np.testing.assert_allclose(found["attention"]["joy"], of_cpu["attention"]["joy"], atol=1e-5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", {"train": 3, "devel": 2}, labels=LABELS.values(), seconds=(0.3, 0.4))
    return load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")


def test_extraction_stores_the_features_of_the_cpu(corpus, tmp_path):
    config = {"backbone_config": backbone_config(), "architecture": "statistics", "ffn_sizes": ()}
    on_cpu = small_model(**config, id2label=LABELS)
    extract = partial(extract_frame_features, corpus, "train", feature_extractor=EmoShareFeatureExtractor())
    accelerator = copy.copy(ACCELERATOR)
    accelerator.device = torch.device("cpu")
    expected = extract(model=on_cpu, cache_dir=tmp_path / "cpu", accelerator=accelerator)
    with fake_cuda():
        model = model_on_gpu(**config)
        model.load_state_dict(on_cpu.state_dict())
        found = extract(model=model, cache_dir=tmp_path / "cuda", accelerator=ACCELERATOR)
    for index in range(len(expected)):
        of_cpu, of_gpu = (store[index]["frame_features"].astype(np.float32) for store in (expected, found))
        np.testing.assert_allclose(of_gpu, of_cpu, atol=5e-3)


@pytest.mark.parametrize(("mixed_precision", "architecture"), [("bf16", "cnn_lstm_attention"), ("no", "functionals")])
def test_training_and_prediction(mixed_precision, architecture, corpus, tmp_path):
    model, extractor = small_model(id2label=LABELS), EmoShareFeatureExtractor("mel")
    accelerator = copy.copy(ACCELERATOR)
    accelerator.device = torch.device("cpu")
    stores = {
        split: extract_frame_features(corpus, split, model, extractor, tmp_path, accelerator) for split in corpus.splits
    }
    for store in stores.values():
        store.listeners = np.full(len(store.shares), 9, dtype=np.float32)
    run = RunArguments(
        mixed_precision=mixed_precision,
        num_train_epochs=2,
        max_grad_norm=1.0,
        weight_decay=0.1,
        lr_scheduler="cosine",
        selection="average",
        label_weights="smoothed",
        mixup=0.4,
        time_mask=0.2,
        feature_mask=0.2,
        time_stretch=0.1,
        listener_dropout=0.5,
    )
    arguments = Arguments(DataArguments(), ModelArguments(), run)

    with fake_cuda():
        model = model_on_gpu(architecture=architecture, loss="beta_binomial", dropout=0.1)
        trainer = HeadTrainer(model, stores, None, arguments, ACCELERATOR)
        assert trainer.dtype == (torch.float32 if mixed_precision == "no" else torch.bfloat16)
        heads = trainer.progress.heads
        assert len(trainer.train_epoch(heads).losses) == 2
        with heads[0].weights_to_score():
            predicted = predict_votes(model, trainer.devel_loader, ACCELERATOR)
        assert predicted.shares.shape == predicted.concentrations.shape == (2, 2)
        trainer.progress.update([0.1, 0.1], np.array([0.2, 0.3]), np.array([False, False]))
        trainer.progress.restore_best()
        assert is_on_gpu(*model.parameters(), *model.buffers())
