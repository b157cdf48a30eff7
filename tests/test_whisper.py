"""Whisper's encoder as a backbone equals Transformers' on each clip, padded with silence or not, in any batch."""

import copy
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL_HEAD,
    SMALL_HEAD_FLAGS,
    backbone_config,
    read_csv,
    run_python,
    run_script,
    small_model,
    write_corpus,
)
from safetensors.torch import load_file, save_file
from test_wav2vec2_bert import WITHOUT_THE_PACKAGE
from torch import nn
from transformers import (
    AutoModel,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
    pipeline,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.cli import main
from emoshare.frames_emoshare import length_mask
from emoshare.training.store_names import StoreNames
from emoshare.whisper_emoshare import WhisperFamily

FAMILY = WhisperFamily()
PADDINGS = FAMILY.paddings
# In samples: of odd and even numbers of log-mels, the shortest clip, and such as leave no silence in 30 s.
LENGTHS = (9600, 16159, 480, 12345)
NEARLY_30_S = (479999, 479841, 479200)
TINY, LARGE_V3 = 80, 128  # mel bands


def plain_encoder(bands=TINY, attention="sdpa", num_layers=3):
    """As Transformers makes it, with weights large enough for differences to show."""
    config = backbone_config("whisper", num_mel_bins=bands, num_hidden_layers=num_layers)
    config._attn_implementation = attention
    encoder = WhisperEncoder(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "embed_positions.weight":
                parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
    return encoder


def exact(plain, padding, fast=True):
    backbone = copy.deepcopy(plain)
    backbone.config.backbone_padding = padding
    FAMILY.prepare(backbone, fast)
    return backbone


def clips_of(lengths):
    """Noise that grows, so that the end of a clip is not quiet."""
    noise = np.random.default_rng(0).normal(size=max(lengths)).astype(np.float32)
    return [noise[:length] * np.linspace(0.01, 0.3, length, dtype=np.float32) for length in lengths]


def extractor(bands=TINY, **fields):
    return EmoShareFeatureExtractor("whisper_log_mels", num_mel_bins=bands, **fields)


def log_mels_of(clip, bands=TINY):
    """By Transformers, (1, bands, 3000)."""
    return WhisperFeatureExtractor(feature_size=bands)(clip, sampling_rate=16000, return_tensors="pt").input_features


def batch_of(clips, bands=TINY, value=0.0):
    """Padded log-mels, and the number of each clip's own."""
    own = [torch.from_numpy(extractor(bands)(clip, sampling_rate=16000)["input_features"][0]) for clip in clips]
    return nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=value), torch.tensor([len(o) for o in own])


@torch.no_grad()
def states_alone(plain, clip, padding, bands=TINY):
    """Each hidden state by Transformers on a clip alone, (frames, width); -1 is `last_hidden_state`."""
    log_mels, encoder = log_mels_of(clip, bands), copy.deepcopy(plain)
    own = len(clip) // 160
    if padding == "clip":  # its check of the length and its positions are those of another length then
        log_mels = log_mels[..., :own]
        encoder.config.__dict__["max_source_positions"] = own / 2
        encoder.embed_positions.num_embeddings = (own + 1) // 2
    outputs = encoder(log_mels, output_hidden_states=True)
    states = {**dict(enumerate(outputs.hidden_states)), -1: outputs.last_hidden_state}
    return {layer: of_layer[0, : (own + 1) // 2] for layer, of_layer in states.items()}


@pytest.mark.parametrize("bands", [TINY, LARGE_V3])
def test_log_mels_are_those_of_transformers_with_silence_after_them(bands):
    clips = clips_of((*LENGTHS, *NEARLY_30_S))
    for clip in clips:
        (made,) = extractor(bands, chunk_length_s=30.0)(clip, sampling_rate=16000)["input_features"]
        expected, own = log_mels_of(clip, bands)[0].T.numpy(), len(clip) // 160
        assert made.dtype == np.float32
        assert made.shape == (own + 4, bands)
        np.testing.assert_allclose(made[:3000], expected[: own + 4], atol=1e-6)
        if own + 4 < 3000:
            assert (made[-1] == expected[-1]).all()  # nothing but silence
            assert (made[-2] != made[-1]).any() or len(clip) % 160 <= 120


@pytest.mark.parametrize(
    ("padding", "bands", "attention"),
    [*itertools.product(PADDINGS, (TINY, LARGE_V3), ["sdpa"]), ("clip", TINY, "eager")],
)
@torch.no_grad()
def test_a_clip_has_the_frames_of_plain_transformers_alone_and_in_every_position_of_a_batch(bands, padding, attention):
    plain, clips = plain_encoder(bands, attention), clips_of(LENGTHS)
    backbone, layers = exact(plain, padding), [-1, 0, 1, 2, 3]
    expected = [states_alone(plain, clip, padding, bands) for clip in clips]
    for order in [[index] for index in range(len(clips))] + [list(np.roll(range(len(clips)), n)) for n in range(4)]:
        log_mels, lengths = batch_of([clips[index] for index in order], bands, value=100.0)
        num_frames = FAMILY.num_frames(backbone.config, lengths)
        states = FAMILY.hidden_states(backbone, log_mels, lengths, layers)
        assert {of_layer.shape[1] for of_layer in states.values()} == {int(num_frames.max())}
        for row, index in enumerate(order):
            assert num_frames[row] == extractor().num_frames(len(clips[index])) == len(expected[index][0])
            for layer in layers:
                own = states[layer][row, : num_frames[row]]
                torch.testing.assert_close(own, expected[index][layer], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_clip_of_nearly_30_s_has_the_frames_of_plain_transformers():
    plain = plain_encoder(num_layers=1)
    for clip in clips_of(NEARLY_30_S):
        for padding in PADDINGS:
            expected = states_alone(plain, clip, padding)[-1]
            states = FAMILY.hidden_states(exact(plain, padding), *batch_of([clip]), [-1])[-1]
            torch.testing.assert_close(states[0], expected, atol=1e-5, rtol=0)


def test_the_two_ways_differ():
    plain, (clip,) = plain_encoder(), clips_of([9600])
    first, second = (states_alone(plain, clip, padding)[-1] for padding in PADDINGS)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", PADDINGS)
@torch.no_grad()
def test_16_bits_lose_no_more_than_in_plain_transformers(padding, dtype):
    plain, clips = plain_encoder(), clips_of(LENGTHS)
    backbone = exact(plain.requires_grad_(False), padding).to(dtype)
    log_mels, lengths = batch_of(clips)
    states = FAMILY.hidden_states(backbone, log_mels.to(dtype), lengths, [-1])[-1]
    expected = [states_alone(plain, clip, padding)[-1] for clip in clips]
    rounded = [own[: len(of_clip)].float() for own, of_clip in zip(states, expected, strict=True)]
    error = (torch.cat(rounded) - torch.cat(expected)).norm() / torch.cat(expected).norm()
    assert error < {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


@torch.no_grad()
def test_no_layer_runs_above_the_one_that_is_asked_for():
    backbone, runs = exact(plain_encoder(), "clip"), []
    for index, layer in enumerate(backbone.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    for layers, expected in {(0,): [], (1,): [0], (2, 0): [0, 1], (1, -1): [0, 1, 2], (3,): [0, 1, 2]}.items():
        runs.clear()
        assert FAMILY.hidden_states(backbone, *batch_of(clips_of(LENGTHS)), layers).keys() == set(layers)
        assert runs == expected


@pytest.mark.parametrize(("first", "layer"), [(0, -1), (1, -1), (1, 2), (2, 3), (1, 1), (3, -1)])
def test_upper_layers_give_states_and_gradients_of_a_pass_through_all(first, layer):
    backbone = exact(plain_encoder(), "clip")
    log_mels, lengths = batch_of(clips_of(LENGTHS))
    num_frames = FAMILY.num_frames(backbone.config, lengths)
    own, modules = length_mask(num_frames, int(num_frames.max())), FAMILY.layers(backbone, first, layer)
    assert modules == list(backbone.layers)[first : None if layer == -1 else layer]
    expected = FAMILY.hidden_states(backbone, log_mels, lengths, [first, layer])
    stored = expected[first].detach().masked_fill(~own[..., None], 7.0)
    states = FAMILY.upper_states(backbone, stored, num_frames, first, layer)
    torch.testing.assert_close(states[own], expected[layer][own], atol=1e-6, rtol=0)
    alone = FAMILY.upper_states(backbone, stored[1:2, : num_frames[1]], num_frames[1:2], first, layer)
    torch.testing.assert_close(states[1, : num_frames[1]], alone[0], atol=1e-6, rtol=0)
    weights = [weight for module in modules for weight in module.parameters()]
    if weights:
        ours, theirs = (
            torch.autograd.grad((s * own[..., None]).square().sum(), weights) for s in (states, expected[layer])
        )
        for gradient, of_all in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, of_all, atol=1e-6 * float(of_all.abs().max()) + 1e-6, rtol=1e-5)


def test_upper_layers_that_hear_silence_need_more_than_the_clips_frames():
    backbone = exact(plain_encoder(), "30s")
    with pytest.raises(ValueError, match=r"^backbone_padding: got '30s'; .* expected 'clip'"):
        FAMILY.upper_states(backbone, torch.randn(1, 9, 32), torch.tensor([9]), 1, -1)


def shares(model, clips=None):
    inputs = extractor()(clips or clips_of(LENGTHS), sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer", [-1, "weighted"])
def test_a_model_gives_a_clip_the_same_shares_in_every_position(padding, layer):
    model = small_model(backbone_config=backbone_config("whisper"), backbone_padding=padding, backbone_layer=layer)
    clips = clips_of(LENGTHS)
    alone = torch.cat([shares(model, [clip]) for clip in clips])
    for shift in range(len(clips)):
        order = list(np.roll(range(len(clips)), shift))
        torch.testing.assert_close(shares(model, [clips[i] for i in order]), alone[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
def test_gradients_of_a_backbone_that_trains_are_those_of_each_clip_alone(checkpointing):
    config = backbone_config("whisper")
    model = small_model(backbone_config=config, backbone_padding="clip", freeze_backbone=False).train()
    log_mels, lengths = batch_of(clips_of(LENGTHS))
    weights = [model.backbone.conv1.weight, model.backbone.layers[1].fc1.weight]
    for own, length in zip(log_mels, lengths, strict=True):
        model(input_features=own[None, :length]).logits.sum().backward()
    expected = [weight.grad for weight in weights]
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    mask = length_mask(lengths, log_mels.shape[1])
    model(input_features=log_mels, attention_mask=mask).logits.sum().backward()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("layer", "kept"), [(0, 0), (1, 1), (2, 2), (3, 3), (-1, 3), ("weighted", 3)])
def test_a_model_that_reads_a_layer_is_stored_without_those_above_it(layer, kept, tmp_path):
    config = backbone_config("whisper", num_hidden_layers=3)
    model = small_model(backbone_config=config, backbone_layer=layer, id2label={0: "joy"}, backbone_padding="clip")
    expected = shares(model)
    model.save_pretrained(tmp_path)
    stored = {name.split(".")[2] for name in load_file(tmp_path / "model.safetensors") if "backbone.layers." in name}
    assert stored == {str(number) for number in range(kept)}
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.backbone_config.encoder_layers == len(loaded.backbone.layers) == kept
    assert torch.equal(shares(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(shares(AutoModel.from_pretrained(tmp_path / "again").eval()), expected)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A whole Whisper with random weights, saved as on the Hub."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(backbone_config("whisper")).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [WhisperForConditionalGeneration, WhisperModel, WhisperForAudioClassification])
def test_every_form_of_checkpoint_gives_its_encoder_without_a_word_about_the_rest(kind, tmp_path, caplog):
    whole = kind(backbone_config("whisper"))
    whole.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = EmoShareModel.from_backbone_pretrained(tmp_path, **SMALL_HEAD)
    assert caplog.text == ""
    encoder = next(module for module in whole.modules() if isinstance(module, WhisperEncoder))
    assert model.backbone.state_dict().keys() == encoder.state_dict().keys()
    for name, weight in encoder.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight)
    model.backbone.save_pretrained(tmp_path / "again")
    again = WhisperEncoder.from_pretrained(tmp_path / "again")
    assert torch.equal(again.layers[1].fc2.weight, encoder.layers[1].fc2.weight)


def test_a_checkpoint_that_lacks_weights_of_the_encoder_is_refused(whisper, tmp_path):
    weights = load_file(whisper / "model.safetensors")
    del weights["model.encoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((whisper / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks 1 backbone weights: \['layers.1.fc1.weight'\]"):
        EmoShareModel.from_backbone_pretrained(tmp_path, **SMALL_HEAD)


@pytest.fixture(scope="module", params=PADDINGS)
def model_folder(request, whisper, tmp_path_factory):
    """Two model repositories: with the backbone, and in `heads` without it."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(2)
    model = EmoShareModel.from_backbone_pretrained(whisper, backbone_padding=request.param, **SMALL_HEAD)
    own = EmoShareFeatureExtractor.for_backbone(whisper, model.config.backbone_config)
    for name, include_backbone in [("whole", True), ("heads", False)]:
        model.save_pretrained(folder / name, include_backbone=include_backbone)
        own.save_pretrained(folder / name)
    return folder


def test_both_pipelines_and_heads_alone_give_the_same_scores(model_folder):
    clips, scores = clips_of(LENGTHS), []
    for name in ("whole", "heads"):
        model = AutoModel.from_pretrained(model_folder / name)
        assert model.config.backbone_padding == model.backbone.config.backbone_padding == model_folder.name[:-1]
        for task, options in [("emotion-share", {}), ("audio-classification", {"top_k": 9})]:
            pipe = pipeline(task, model=str(model_folder / name))
            batch_size = 1 if name == "whole" else 3
            results = pipe(clips, batch_size=batch_size, **options)
            scores.append([{share["label"]: share["score"] for share in result} for result in results])
    for of_way in scores:
        for own, expected in zip(of_way, scores[0], strict=True):
            assert own == pytest.approx(expected, abs=1e-5)


def test_heads_alone_know_their_backbone(model_folder, whisper, tmp_path):
    weights = load_file(whisper / "model.safetensors")
    weights["model.encoder.conv1.bias"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((whisper / "config.json").read_bytes())
    with pytest.raises(ValueError, match="the backbone's weights have the hash"):
        EmoShareModel.from_pretrained(model_folder / "heads", backbone_name_or_path=str(tmp_path))


def test_steps_are_at_the_middle_of_their_frames(model_folder):
    (clip,) = clips_of([16000])
    times = pipeline("emotion-share", model=str(model_folder / "whole"))(clip, return_attention=True)["attention"][
        "time"
    ]
    assert times[:2] == pytest.approx([0.01, 0.05])  # of two frames each, at 0 and 0.02 s, and so on
    assert len(times) == 25


def test_the_padding_is_a_choice_of_whispers_alone(whisper):
    config = EmoShareConfig(backbone_config=backbone_config("whisper"))
    assert config.backbone_padding == "30s"
    assert EmoShareConfig(**config.to_dict()).backbone_padding == "30s"
    config.backbone_padding = "clip"
    assert EmoShareConfig(**config.to_dict()).backbone_padding == "clip"
    for backbone, padding, message in [
        (backbone_config("whisper"), "8s", "got '8s'; expected one of 30s, clip"),
        (backbone_config("hubert"), "clip", "got 'clip', but a hubert backbone has no choice"),
        (None, "clip", "got 'clip', but backbone_config is None"),
    ]:
        with pytest.raises(ValueError, match=f"^backbone_padding: {message}"):
            EmoShareConfig(backbone_config=backbone, backbone_padding=padding)
    for fields, message in [
        ({"max_source_positions": 750}, "max_source_positions=750 is not supported"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1 is not supported with freeze_backbone=False"),
    ]:
        with pytest.raises(ValueError, match=f"^backbone_config: {message}"):
            EmoShareConfig(backbone_config=backbone_config("whisper", **fields), freeze_backbone=False)


@pytest.mark.parametrize("bands", [TINY, LARGE_V3])
def test_settings_are_read_from_the_backbones_repository(bands, tmp_path, caplog):
    config = backbone_config("whisper", num_mel_bins=bands)
    with caplog.at_level(logging.WARNING):
        by_default = EmoShareFeatureExtractor.for_backbone(tmp_path, config, chunk_length_s=30.0)
    assert "has no preprocessor config; log-mels at 16 kHz are made as Transformers does by default" in caplog.text
    WhisperFeatureExtractor(feature_size=bands).save_pretrained(tmp_path)
    read = EmoShareFeatureExtractor.for_backbone(tmp_path, config, chunk_length_s=30.0)
    assert read.to_dict() == by_default.to_dict()
    assert (read.feature_size, read.num_mel_bins, read.frame_length, read.hop_length) == (bands, bands, 160, 320)
    read.save_pretrained(tmp_path / "saved")
    assert EmoShareFeatureExtractor.from_pretrained(tmp_path / "saved").to_dict() == read.to_dict()
    for fields, message in [
        ({"feature_size": 64}, f"feature_size=64; expected {bands}"),
        ({"n_fft": 512}, "n_fft=512; expected 400"),
        ({"hop_length": 80}, "hop_length=80; expected 160"),
        ({"chunk_length": 15}, "chunk_length=15; expected 30"),
        ({"sampling_rate": 8000}, "sampling_rate=8000; expected 16000"),
    ]:
        WhisperFeatureExtractor(**{"feature_size": bands, **fields}).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"other: its preprocessor config has {message}"):
            EmoShareFeatureExtractor.for_backbone(tmp_path / "other", config)


def test_what_is_longer_than_30_s_is_refused():
    with pytest.raises(ValueError, match=r"^chunk_length_s: got 30.1 s; expected at most 30 s"):
        extractor(chunk_length_s=30.1)
    with pytest.raises(ValueError, match=r"^raw_speech: got 30.1 s; Whisper hears 30 s at most"):
        extractor(chunk_length_s=30.0)(np.zeros(481600, dtype=np.float32), sampling_rate=16000)
    with pytest.raises(ValueError, match=r"^hop_length: got 160; with Whisper's log-mels, it is 320"):
        extractor(hop_length=160)
    model = small_model(backbone_config=backbone_config("whisper"))
    with pytest.raises(ValueError, match=r"^input_features: got 128 bands; expected 80"):
        model(input_features=torch.randn(1, 50, 128))
    with pytest.raises(ValueError, match=r"^input_features: .* 3 input frames, 0 frames; expected at least 2"):
        model(input_features=torch.randn(1, 3, 80))


@pytest.mark.slow
def test_trained_by_the_command_it_predicts_with_and_without_the_package(whisper, wav, tmp_path):
    """Heads alone, so that each load fetches the encoder."""
    corpus, output_dir = write_corpus(tmp_path / "corpus", {"train": 4, "devel": 4, "test": 2}), tmp_path / "output"
    flags = ["--dataset", "compare2023", "--data_dir", corpus, "--backbone", whisper, *SMALL_HEAD_FLAGS]
    flags += ["--num_train_epochs", "1", "--bootstrap", "0", "--mixed_precision", "no", "--feature_dtype", "float32"]
    flags += ["--backbone_padding", "clip", "--push_backbone", "false", "--output_dir", output_dir]
    run_script(ROOT / "train.py", *flags, cwd=tmp_path)
    assert "| backbone_padding | clip |" in (output_dir / "README.md").read_text()
    emotion_share = pipeline("emotion-share", model=str(output_dir))
    assert emotion_share.model.backbone.config.backbone_padding == "clip"
    header, *rows = read_csv(output_dir / "predictions_devel.csv")
    for filename, *predicted in rows:
        scores = {share["label"]: share["score"] for share in emotion_share(str(corpus / "wav" / filename))}
        assert scores == pytest.approx(dict(zip(header[1:], map(float, predicted), strict=True)), abs=1e-5)

    expected = emotion_share(str(wav))
    assert main(["predict", "--model", str(output_dir), str(wav), "--output", str(tmp_path / "shares.csv")]) == 0
    header, row = read_csv(tmp_path / "shares.csv")
    predicted = dict(zip(header[1:], map(float, row[1:]), strict=True))
    assert predicted == {share["label"]: pytest.approx(share["score"], abs=1e-5) for share in expected}

    script = tmp_path / "downstream.py"
    script.write_text(WITHOUT_THE_PACKAGE.replace("Wav2Vec2BertFamily", "WhisperFamily"))
    result = run_python(script, output_dir, wav, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    for shares in json.loads(result.stdout):
        assert shares == [{**own, "score": pytest.approx(own["score"], abs=1e-5)} for own in expected]


def test_stores_of_either_way_have_names_of_their_own():
    models = [small_model(backbone_config=backbone_config("whisper"), backbone_padding=padding) for padding in PADDINGS]
    models[1].load_state_dict(models[0].state_dict())
    names = [StoreNames(model, extractor(), "float32")._name("clips", -1) for model in models]
    assert names[0] != names[1]


def test_layers_are_tuned_on_the_clips_frames_alone():
    fields = {"backbone_config": backbone_config("whisper"), "finetuned_layers": 1}
    with pytest.raises(ValueError, match=r"^backbone_padding: got '30s' with 1 finetuned_layers, .* expected 'clip'"):
        EmoShareConfig(**fields)
    model = small_model(**fields, backbone_padding="clip")
    log_mels, lengths = batch_of(clips_of(LENGTHS))
    mask = length_mask(lengths, log_mels.shape[1])
    by_layer, num_frames = model.frame_features(log_mels, mask, [1])
    mask_of_frames = length_mask(num_frames, by_layer[1].shape[1])
    from_states = model.trained_part()(frame_features=by_layer[1].detach(), attention_mask=mask_of_frames).logits
    from_inputs = model(input_features=log_mels, attention_mask=mask).logits
    torch.testing.assert_close(from_states, from_inputs, atol=1e-6, rtol=0)
    weights = list(model.backbone.layers[1].parameters())
    ours, theirs = (torch.autograd.grad(logits.square().sum(), weights) for logits in (from_states, from_inputs))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
