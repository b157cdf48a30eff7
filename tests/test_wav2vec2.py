"""The wav2vec 2.0 family: exact in a batch, fast, and otherwise what Transformers computes."""

import copy
import functools
import itertools
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_HEAD, backbone_config, small_model, speech, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.dataset_script import load_corpus
from emoshare.encoder_layers_emoshare import EncoderLayers, PackedLinear
from emoshare.frames_emoshare import length_mask
from emoshare.training import features as training_features
from emoshare.wav2vec2_convolutions_emoshare import FrontEnd, GroupNormConvLayer, in_groups_of_64, with_group_norm
from emoshare.wav2vec2_emoshare import Wav2Vec2Family

FAMILY = Wav2Vec2Family()

LENGTHS = (9600, 16000, 720, 12345)
GROUP_NORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False}

NORM_STYLES = [
    {"feat_extract_norm": norm, "do_stable_layer_norm": stable}
    for norm in ("group", "layer")
    for stable in (False, True)
]
BACKBONES = [
    *itertools.product(("hubert", "wav2vec2", "wavlm", "unispeech-sat"), NORM_STYLES),
    ("hubert", {"conv_pos_batch_norm": True}),
    ("data2vec-audio", {}),
    ("data2vec-audio", {"feat_extract_norm": "group"}),  # has no such choice, and takes no notice
]
BACKBONE_IDS = [f"{model_type}-{'-'.join(map(str, fields.values()))}" for model_type, fields in BACKBONES]
WITH_ATTENTION = [
    pytest.param(model_type, fields, attention, id=f"{name}-{attention}")
    for (model_type, fields), name in zip(BACKBONES, BACKBONE_IDS, strict=True)
    for attention in ("eager", "sdpa")
    if (model_type, attention) != ("wavlm", "sdpa")  # Transformers has none
]


def plain_backbone(model_type="hubert", fields=None, attention=None):
    """Transformers' own backbone; a BatchNorm gets running statistics as after training."""
    backbone = AutoModel.from_config(backbone_config(model_type, **fields or {}), attn_implementation=attention).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return backbone


def exact(backbone, fast=True):
    backbone = copy.deepcopy(backbone)
    FAMILY.prepare(backbone, fast)
    return backbone


def features_of(backbone, waveforms, lengths, layer=-1):
    """(batch, frames, width), or (batch, layers, frames, width) of all hidden states for "weighted"."""
    if layer != "weighted":
        return FAMILY.hidden_states(backbone, waveforms, lengths, [layer])[layer]
    states = FAMILY.hidden_states(backbone, waveforms, lengths, all_layers(backbone))
    return torch.stack(list(states.values()), dim=1)


def all_layers(backbone):
    return range(FAMILY.num_layers(backbone.config) + 1)


def padded(clips, value=0.0):
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value), lengths


def root_mean_square(values):
    return values.float().square().mean().sqrt().item()


@torch.no_grad()
def assert_exact_in_every_position(plain, clips, layer=-1, value=0.0, fast=True):
    """
    Every clip in every position of the batch gives what plain Transformers gives it alone: in float64, since in float32
    that is off by up to 7e-6 itself.
    """
    backbone, plain = exact(plain, fast), copy.deepcopy(plain).double()
    alone = []
    for clip in clips:
        outputs = plain(clip[None].double(), output_hidden_states=True)
        choices = {-1: outputs.last_hidden_state[0], "weighted": torch.stack(outputs.hidden_states, dim=1)[0]}
        alone.append(choices[layer] if layer in choices else outputs.hidden_states[layer][0])
    for shift in range(len(clips)):
        order = np.roll(np.arange(len(clips)), shift)
        waveforms, lengths = padded([clips[index] for index in order], value)
        num_frames = FAMILY.num_frames(backbone.config, lengths)
        together = features_of(backbone, waveforms, lengths, layer)
        for index, features, frames in zip(order, together, num_frames, strict=True):
            assert frames == alone[index].shape[-2]
            torch.testing.assert_close(features[..., :frames, :].double(), alone[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "fields", "attention"), WITH_ATTENTION)
def test_a_clip_in_a_batch_has_the_features_of_plain_transformers_on_it_alone(model_type, fields, attention):
    plain = plain_backbone(model_type, fields, attention)
    assert plain.config._attn_implementation == attention
    clips = [torch.randn(length) for length in LENGTHS]
    for layer in (-1, 1, "weighted"):
        assert_exact_in_every_position(plain, clips, layer)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_without_speed_it_is_as_exact(model_type, fields):
    plain = plain_backbone(model_type, fields)
    clips = [torch.randn(length) for length in LENGTHS]
    for layer in (-1, 1, "weighted"):
        assert_exact_in_every_position(plain, clips, layer, value=100.0, fast=False)
    waveforms = padded(clips)
    lengths = FAMILY.num_frames(plain.config, waveforms[1])
    with torch.no_grad():
        fast, slow = (features_of(exact(plain, fast), *waveforms, "weighted") for fast in (True, False))
        for own, expected, frames in zip(fast, slow, lengths, strict=True):
            torch.testing.assert_close(own[:, :frames], expected[:, :frames], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_without_speed_only_what_exactness_asks_for_replaces_transformers_modules(model_type, fields, monkeypatch):
    plain = plain_backbone(model_type, fields)
    ours = {type(module) for module in exact(plain, fast=False).modules()} - {type(m) for m in plain.modules()}
    has_group_norm = any(isinstance(module, nn.GroupNorm) for module in plain.modules())
    assert ours == ({FrontEnd, GroupNormConvLayer} if has_group_norm else {FrontEnd})
    assert EncoderLayers in {type(module) for module in exact(plain, fast=True).modules()}
    monkeypatch.delattr(FrontEnd, "padded_batch")
    with torch.inference_mode():
        features_of(exact(plain, fast=False), *padded([torch.randn(length) for length in LENGTHS]))


@functools.cache
def cached_backbone(index):
    torch.manual_seed(index)
    return plain_backbone(*BACKBONES[index])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, len(BACKBONES) - 1),
    lengths=st.lists(st.integers(720, 8000), min_size=1, max_size=4),
    padding=st.sampled_from([0.0, 100.0]),
)
def test_neither_lengths_nor_what_stands_in_the_padding_matter(index, lengths, padding):
    assert_exact_in_every_position(cached_backbone(index), [torch.randn(length) for length in lengths], value=padding)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("model_type", "fields", "attention"), WITH_ATTENTION)
def test_bfloat16_loses_no_more_than_in_plain_transformers_and_a_batch_less(model_type, fields, attention, fast):
    """
    Kernels add in another order for another shape of batch, so that bfloat16 rounds differently. The measure is what
    bfloat16 itself costs, clip alone: a batch must change features by less than that.
    """
    plain = plain_backbone(model_type, fields, attention).requires_grad_(False)
    plain_bfloat16 = copy.deepcopy(plain).bfloat16()
    backbone = exact(plain_bfloat16, fast)
    clips = [torch.randn(length) for length in LENGTHS]
    half_clips = [clip.bfloat16() for clip in clips]
    with torch.no_grad():
        waveforms, lengths = padded(half_clips)
        num_frames = FAMILY.num_frames(backbone.config, lengths)
        together = features_of(backbone, waveforms, lengths)
        in_batch = torch.cat([own[:frames] for own, frames in zip(together, num_frames, strict=True)])
        alone = torch.cat([features_of(backbone, *padded([clip]))[0] for clip in half_clips])
        plain_alone = torch.cat([plain_bfloat16(clip[None]).last_hidden_state[0] for clip in half_clips])
        in_float32 = torch.cat([plain(clip[None]).last_hidden_state[0] for clip in clips])
    rounding = root_mean_square(plain_alone - in_float32)
    assert rounding < 0.03 * root_mean_square(in_float32)
    assert root_mean_square(in_batch - in_float32) < 1.1 * rounding
    assert root_mean_square(in_batch - alone) < rounding


FRONT_ENDS = [
    {},
    {"conv_bias": True},
    {"feat_extract_activation": "silu"},
    # Kernels below, equal to, above and at twice their stride, and channels that change.
    {
        "conv_kernel": (7, 5, 1, 2, 3, 4, 2),
        "conv_stride": (3, 2, 1, 3, 3, 2, 1),
        "conv_dim": (8, 24, 16, 8, 12, 20, 16),
    },
]


@pytest.mark.parametrize("fields", FRONT_ENDS)
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_front_end_gives_what_its_modules_give(dtype, norm, fields, monkeypatch):
    plain = plain_backbone("wav2vec2", {"feat_extract_norm": norm, **fields}).to(dtype)
    for parameter in plain.feature_extractor.parameters():
        nn.init.normal_(parameter, std=0.5)
    backbone = exact(plain)
    waveforms = (torch.randn(2, 9600) + 0.5).to(dtype)
    expected = plain.feature_extractor(waveforms).detach()
    torch.testing.assert_close(backbone.feature_extractor(waveforms).detach(), expected, atol=0, rtol=0)

    monkeypatch.delattr(FrontEnd, "_modules_forward")
    with torch.inference_mode():
        frames = backbone.feature_extractor(waveforms)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert root_mean_square(frames - expected) < tolerance * root_mean_square(expected)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_the_front_end_of_accelerators_gives_the_frames_of_each_clip_alone(model_type, fields):
    """They run a whole padded batch at a time, where a CPU runs clip by clip."""
    plain = plain_backbone(model_type, fields)
    front_end = exact(plain).feature_extractor
    clips = [torch.randn(length) for length in LENGTHS]
    waveforms, lengths = padded(clips, value=100.0)
    with torch.inference_mode():
        frames = front_end.padded_batch(waveforms, lengths, front_end.weights())
        for own, clip in zip(frames, clips, strict=True):
            alone = plain.feature_extractor(clip[None])[0].T
            torch.testing.assert_close(own[: len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(("kernels", "strides"), [((10, 3, 2), (5, 2, 2)), ((10, 5, 2, 1), (5, 2, 2, 1))])
def test_what_is_exported_gives_the_frames_of_each_clip_alone(kernels, strides, norm):
    """Kernels as long as their stride, longer, and more than twice as long."""
    fields = {"conv_dim": [16] * len(kernels), "conv_kernel": kernels, "conv_stride": strides}
    plain = plain_backbone(fields={**fields, "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"})
    exportable = FAMILY.exportable(exact(plain))
    clips = [torch.randn(length) for length in LENGTHS]
    with torch.inference_mode():
        for own, clip in zip(features_of(exportable, *padded(clips, value=100.0)), clips, strict=True):
            alone = plain(clip[None]).last_hidden_state[0]
            torch.testing.assert_close(own[: len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("groups", "width"), [(16, 768), (16, 1024), (3, 15), (1, 70)])
@pytest.mark.parametrize("kernel", [5, 8])
def test_groups_that_are_filled_up_give_the_same_positional_convolution(groups, width, kernel):
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
    frames = torch.randn(2, 11, width).mT  # as Transformers hands them over
    with torch.inference_mode():
        filled_up = in_groups_of_64(convolution, frames, convolution.weight, convolution.bias)
        torch.testing.assert_close(filled_up, convolution(frames), atol=1e-5, rtol=1e-5)


def test_a_filter_that_cancels_nearly_all_of_a_window_keeps_its_variance():
    """A constant under a quiet signal, and a filter for differences: in float32 sums, the signal would be lost."""
    backbone = exact(plain_backbone(fields=GROUP_NORM))
    layer = backbone.feature_extractor.conv_layers[0]
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[:, 0, 0], layer.conv.weight[:, 0, 1] = 1, -1
        layer.layer_norm.eps = 0.0
        signal = torch.randn(1, 9600, dtype=torch.float64).cumsum(dim=1) * 1e-4
        windows = (100 + signal).float().double().unfold(1, 10, 5)
        differences = windows[0, :, 0] - windows[0, :, 1]
        weight, _ = with_group_norm(layer.conv.weight[:, 0], layer.layer_norm, windows, torch.tensor([1919]))
    torch.testing.assert_close(weight[0, 0, 0], 1 / differences.std(correction=0), rtol=1e-4, atol=0)


GROUP_NORM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(400, 3000), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from(list(GROUP_NORM_TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_the_masked_group_norm_is_that_of_each_clip_with_all_gradients(lengths, offset, dtype, seed):
    torch.manual_seed(seed)
    config = backbone_config("wav2vec2", **GROUP_NORM, conv_bias=True)
    plain = AutoModel.from_config(config).feature_extractor.conv_layers[0].to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, mean=0.5)
    clips = [(torch.randn(length) + offset).to(dtype).requires_grad_() for length in lengths]
    weights, num_frames = list(plain.parameters()), [(length - 10) // 5 + 1 for length in lengths]
    upstream = [torch.randn(frames, 16, dtype=dtype) for frames in num_frames]

    def with_gradients(outputs):
        return outputs, torch.autograd.grad(outputs, [*clips, *weights], upstream)

    expected, expected_gradients = with_gradients([plain(clip[None, None])[0].T for clip in clips])
    waveforms, samples = padded(clips, value=7.0)
    batch = GroupNormConvLayer(plain)(waveforms[:, None], samples).transpose(1, 2)
    assert batch.dtype == dtype
    for frames, own in zip(num_frames, batch, strict=True):
        assert (own[frames:] == 0).all()
    outputs, gradients = with_gradients([own[:frames] for own, frames in zip(batch, num_frames, strict=True)])
    # The gradient of the bias cancels, and what is left of it is the rounding of the others: one scale for all.
    for ours, theirs in ((outputs, expected), (gradients, expected_gradients)):
        scale = max(tensor.abs().max().item() for tensor in theirs)
        difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        assert difference <= GROUP_NORM_TOLERANCE[dtype] * scale


@pytest.mark.parametrize("fields", [{}, GROUP_NORM])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_weights_that_change_are_seen_at_once(dtype, tolerance, fields):
    plain, other = (plain_backbone(fields=fields).to(dtype).requires_grad_(False) for _ in range(2))
    backbone = exact(plain)
    clip = torch.randn(1, 8000, dtype=dtype)
    expected = other(clip).last_hidden_state

    def is_seen(changed):
        error = root_mean_square(changed(clip).last_hidden_state - expected)
        return error < tolerance * root_mean_square(expected)

    assert not is_seen(backbone)
    copied, assigned = copy.deepcopy(backbone), copy.deepcopy(backbone)
    assert not is_seen(copied)
    assert not is_seen(assigned)
    backbone.load_state_dict(other.state_dict())
    assert is_seen(backbone)
    assert not is_seen(copied)
    # A copy's weights are as new as those that were packed: they differ by where they lie alone.
    assigned.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)
    assert is_seen(assigned)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_weights_give_what_weights_as_they_are_give(shape, widths, bias, seed):
    torch.manual_seed(seed)
    linear = PackedLinear(*widths, bias=bias).bfloat16().requires_grad_(False)
    rows = torch.randn(*shape, widths[0]).bfloat16()
    expected = nn.functional.linear(rows.double(), linear.weight.double(), linear.bias.double() if bias else None)
    # Sums are in float32, so that the result alone is rounded to 8 bits.
    torch.testing.assert_close(linear(rows).double(), expected, rtol=2**-8, atol=1e-5)


def test_weights_are_packed_once_and_not_while_they_train(monkeypatch):
    packed = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w: packed.append(w) or reorder(w))
    linear = PackedLinear(16, 16).bfloat16()
    rows = torch.randn(3, 16).bfloat16()
    linear(rows).sum().backward()
    assert linear.weight.grad is not None
    assert packed == []
    is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.optim.Adam(linear.parameters(), lr=0.1).step()
    with torch.no_grad():  # such as to score an epoch
        before = linear(rows)
    assert len(packed) == is_supported
    torch.optim.Adam(linear.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert not torch.equal(linear(rows), before)
        torch.testing.assert_close(linear(rows), nn.functional.linear(rows, linear.weight, linear.bias))
    assert len(packed) == 2 * is_supported
    linear.requires_grad_(False)
    with torch.inference_mode():
        linear(rows), linear(rows)
    assert len(packed) == 2 * is_supported
    with torch.no_grad():
        linear.weight.data[3] *= 2  # which the weight's version does not count
        torch.testing.assert_close(linear(rows), nn.functional.linear(rows, linear.weight, linear.bias))
        assert len(packed) == 3 * is_supported
    torch.compile(linear, backend="eager", fullgraph=True)(rows)
    rows.requires_grad_()
    linear(rows).sum().backward()
    assert rows.grad is not None


@pytest.mark.parametrize("fields", [{}, GROUP_NORM])
def test_autocast_works_as_in_plain_transformers(fields):
    plain = plain_backbone(fields=fields)
    clip = torch.randn(1, 8000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = features_of(exact(plain), *padded(list(clip)))
        torch.testing.assert_close(features, plain(clip).last_hidden_state)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_no_layer_runs_above_the_one_that_is_asked_for(model_type, fields):
    backbone = exact(plain_backbone(model_type, {**fields, "num_hidden_layers": 4}))
    runs = []
    for index, layer in enumerate(backbone.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    waveforms = padded([torch.randn(length) for length in LENGTHS])
    with torch.no_grad():
        everything = FAMILY.hidden_states(backbone, *waveforms, all_layers(backbone))
        assert runs == [0, 1, 2, 3]
        # hidden_states[0] is the first layer's input.
        for layer, expected in {0: [0], 1: [0], 2: [0, 1], 4: [0, 1, 2, 3], -1: [0, 1, 2, 3]}.items():
            runs.clear()
            features = features_of(backbone, *waveforms, layer)
            assert runs == expected
            if layer >= 0:
                torch.testing.assert_close(features, everything[layer], atol=1e-6, rtol=0)
        for layers, expected in {(0,): [0], (2, 0): [0, 1], (1, -1): [0, 1, 2, 3]}.items():
            runs.clear()
            states = FAMILY.hidden_states(backbone, *waveforms, layers)
            assert runs == expected
            assert states.keys() == set(layers)
            for layer, features in states.items():
                torch.testing.assert_close(features, features_of(backbone, *waveforms, layer), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("hubert", GROUP_NORM), ("hubert", {"conv_pos_batch_norm": True}), ("data2vec-audio", {})],
)
def test_plain_transformers_leaks_padding(model_type, fields):
    """Why `prepare` exists: if this test fails one day, that part of `prepare` is no longer needed."""
    plain = plain_backbone(model_type, fields)
    clip = torch.randn(1, 8000)
    batch = torch.cat([nn.functional.pad(clip, (0, 8000)), torch.randn(1, 16000)])
    with torch.no_grad():
        alone = plain(clip).last_hidden_state[0]
        mask = length_mask(torch.tensor([8000, 16000]), 16000).long()
        in_batch = plain(batch, attention_mask=mask).last_hidden_state[0, : len(alone)]
    assert (alone - in_batch).abs().max() > 1e-2


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_weights_go_to_and_from_plain_transformers_unchanged(model_type, fields, tmp_path):
    plain = plain_backbone(model_type, fields)
    plain.save_pretrained(tmp_path / "plain")
    model = EmoShareModel.from_backbone_pretrained(tmp_path / "plain", **SMALL_HEAD).eval()
    assert model.backbone.state_dict().keys() == plain.state_dict().keys()
    model.backbone.save_pretrained(tmp_path / "saved")
    back = AutoModel.from_pretrained(tmp_path / "saved").eval()
    clip = torch.randn(1, 5000)
    with torch.no_grad():
        expected = plain(clip).last_hidden_state
        torch.testing.assert_close(model.frame_features(clip).by_layer[-1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(back(clip).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_a_model_gives_a_clip_the_same_shares_in_every_position(model_type, fields):
    config = backbone_config(model_type, **fields)
    model = small_model(backbone_config=config)
    clips = [torch.randn(length) for length in LENGTHS]
    alone = [model(input_values=clip[None], output_attentions=True) for clip in clips]
    for shift in range(len(clips)):
        order = np.roll(np.arange(len(clips)), shift)
        waveforms, lengths = padded([clips[index] for index in order])
        mask = length_mask(lengths, waveforms.shape[1]).long()
        together = model(input_values=waveforms, attention_mask=mask, output_attentions=True)
        for row, index in enumerate(order):
            steps = alone[index].attentions.shape[-1]
            torch.testing.assert_close(together.logits[row], alone[index].logits[0], atol=1e-5, rtol=0)
            weights = together.attentions[row]
            torch.testing.assert_close(weights[:, :steps], alone[index].attentions[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(weights[:, :steps].sum(dim=-1), torch.ones(9), atol=1e-5, rtol=0)
            assert (weights[:, steps:] == 0).all()


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_the_pipeline_gives_the_same_scores_at_every_batch_size(model_type, fields):
    model = small_model(backbone_config=backbone_config(model_type, **fields))
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor())
    clips = [speech(seconds, seed) for seed, seconds in enumerate([0.6, 1.0, 0.05, 0.8])]

    def scores(results):
        return np.array(
            [[entry["score"] for entry in sorted(result, key=lambda entry: entry["label"])] for result in results]
        )

    one_by_one = scores([emotion_share(clip) for clip in clips])
    for batch_size in (2, 3, 4):
        np.testing.assert_allclose(scores(emotion_share(clips, batch_size=batch_size)), one_by_one, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def mixed_lengths(tmp_path_factory):
    folder = write_corpus(
        tmp_path_factory.mktemp("corpus") / "data", {"train": 4, "devel": 1}, labels=["joy"], seconds=(0.05, 1.0)
    )
    return load_corpus("csv", data_dir=folder, cache_dir=folder / "cache")


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES, ids=BACKBONE_IDS)
def test_extraction_for_training_gives_the_features_of_each_clip_alone(
    model_type, fields, mixed_lengths, tmp_path, monkeypatch
):
    model = small_model(backbone_config=backbone_config(model_type, **fields), id2label={0: "joy"})
    stores = []
    for seconds in (0, 3):
        monkeypatch.setitem(training_features.SECONDS_PER_PASS, "cpu", seconds)
        folder, accelerator = tmp_path / str(seconds), Accelerator(cpu=True)
        store = training_features.extract_frame_features(
            mixed_lengths, "train", model, EmoShareFeatureExtractor(), folder, accelerator, "float32"
        )
        stores.append([window["frame_features"] for window in store])
    for alone, in_batch in zip(*stores, strict=True):
        np.testing.assert_allclose(in_batch, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradients_of_a_backbone_that_trains_are_those_of_each_clip_alone(checkpointing):
    """Gradient checkpointing runs layers again in the backward pass: the lengths must still be known there."""
    config = backbone_config(
        **GROUP_NORM, hidden_dropout=0.0, attention_dropout=0.0, layerdrop=0.0, feat_proj_dropout=0.0
    )
    config.activation_dropout = 0.0
    model = small_model(backbone_config=config, freeze_backbone=False).train()
    clips = [torch.randn(length) for length in LENGTHS]
    layers = model.backbone.feature_extractor.conv_layers
    weights = [layers[0].layer_norm.weight, *(layer.conv.weight for layer in layers)]

    for clip in clips:
        model(input_values=clip[None]).logits.sum().backward()
    expected = [weight.grad for weight in weights]
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    waveforms, lengths = padded(clips)
    model(input_values=waveforms, attention_mask=length_mask(lengths, waveforms.shape[1])).logits.sum().backward()
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)


def test_the_front_end_of_a_group_norm_backbone_can_be_frozen_by_itself():
    model = small_model(backbone_config=backbone_config("wav2vec2", **GROUP_NORM), freeze_backbone=False)
    model.backbone.freeze_feature_encoder()
    frozen = {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.backbone.named_parameters() if name.startswith("feature_extractor.")}


def test_batch_statistics_cannot_be_exact_in_training():
    config = backbone_config(conv_pos_batch_norm=True)
    EmoShareConfig(backbone_config=config)
    with pytest.raises(ValueError, match=r"^backbone_config: conv_pos_batch_norm=True is not supported with freeze"):
        EmoShareConfig(backbone_config=config, freeze_backbone=False)


def test_wavlm_falls_back_to_eager_and_says_so(tmp_path, caplog):
    small_model(backbone_config=backbone_config("wavlm")).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = EmoShareModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert model.backbone.config._attn_implementation == "eager"
    assert "WavLM has no 'sdpa'" in caplog.text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_backbones_take_the_attention_that_was_asked_for(attention, tmp_path):
    small_model(backbone_config=backbone_config("hubert")).save_pretrained(tmp_path)
    model = EmoShareModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.backbone.config._attn_implementation == attention


@pytest.mark.parametrize("fields", [{}, GROUP_NORM])
def test_hidden_states_come_padded_to_the_batch(fields):
    backbone = exact(plain_backbone(fields=fields))
    with torch.no_grad():
        waveforms = padded([torch.randn(length) for length in LENGTHS])
        states = FAMILY.hidden_states(backbone, *waveforms, [-1, *all_layers(backbone)])
    assert list(states) == [-1, 0, 1, 2]
    assert {features.shape for features in states.values()} == {(4, 49, 32)}


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16000, 127759, 127760])
def test_num_frames_is_that_of_transformers(num_samples):
    backbone = AutoModel.from_config(backbone_config())
    expected = int(backbone._get_feat_extract_output_lengths(torch.tensor(num_samples)))
    assert FAMILY.num_frames(backbone.config, num_samples) == expected
