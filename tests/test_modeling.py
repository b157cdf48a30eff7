import itertools
import re

import numpy as np
import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModel, AutoModelForAudioClassification

from emoshare import EmoShareConfig, EmoShareModel, EmotionHead
from emoshare.configuration_emoshare import ARCHITECTURES
from emoshare.pooling_emoshare import AttentiveStatisticsPooling, Standardization

MASKED_NORMALIZATIONS = ("frame", "none")


def padded(clips, value=0.0):
    """Clips (frames, width) or (samples,) to a padded batch and its mask."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value)
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).long()


def released_shares(head, frames, config):
    """
    One clip through the paper's network, step by step and unpadded: an oracle that shares no code with the model.
    """
    if config.architecture in ("statistics", "functionals"):
        scale = head.pooling.standardization
        summary = (CLIP_STATISTICS[config.architecture](frames.numpy()) - scale.mean) / scale.deviation
        return output_of(head, summary.clamp(-5, 5))
    maps = frames.T[None]  # (1, width, frames)
    for convolution in head.convolutions:
        maps = torch.relu(nn.functional.conv1d(maps, convolution.weight, convolution.bias, padding=1))
    steps = frames.shape[0] // 2
    pooled = torch.stack([maps[0, :, 2 * t : 2 * t + 2].max(dim=1).values for t in range(steps)])
    if config.normalization == "frame":
        pooled = nn.functional.layer_norm(pooled, pooled.shape[1:], head.lstm_norm.weight, head.lstm_norm.bias)
    if config.architecture == "transformer":
        for layer in head.transformer:
            pooled = transformer_layer(layer, pooled, heads=8)
        return output_of(head, pooled.sum(dim=0) / steps)
    stacked = nn.LSTM(pooled.shape[1], config.lstm_hidden_size, num_layers=2, batch_first=True)
    stacked.load_state_dict(
        {f"{name}_l{k}": getattr(head.lstm[k], f"{name}_l0") for k in (0, 1) for name in LSTM_WEIGHTS}
    )
    states, (last, _) = stacked(pooled[None])
    if config.architecture == "cnn_lstm":
        summary = states[0].sum(dim=0) / steps  # Eq. 1
    elif config.architecture == "cnn_lstm_statistics":
        first, _, second = head.attentive_statistics.scores
        scores = nn.functional.linear(states[0], first.weight, first.bias).tanh() @ second.weight.T + second.bias
        weights = scores.exp() / scores.exp().sum(dim=0)  # (steps, queries)
        parts = []
        for query in weights.T:
            mean = sum(weight * state for weight, state in zip(query, states[0], strict=True))
            variance = sum(weight * (state - mean) ** 2 for weight, state in zip(query, states[0], strict=True))
            parts += [mean, variance.clamp(min=1e-5).sqrt()]
        # Per query: its means, then its deviations.
        summary = torch.cat(parts)
    else:
        query = nn.functional.linear(
            torch.cat([last[0, 0], last[1, 0]]), head.attention.query.weight, head.attention.query.bias
        )
        scores = torch.stack([query @ state for state in states[0]]) / config.lstm_hidden_size**0.5
        weights = scores.exp() / scores.exp().sum()
        summary = sum(weight * state for weight, state in zip(weights, states[0], strict=True))
    return output_of(head, summary)


def clip_mean_and_deviation(frames):
    """(frames, width) -> (2 * width,)"""
    deviation = np.sqrt(np.maximum(frames.var(axis=0), 1e-5))
    return torch.from_numpy(np.concatenate([frames.mean(axis=0), deviation])).float()


def clip_functionals(frames):
    """What the `functionals` architecture documents, of the clip alone: (frames, width) -> (13 * width,)"""
    slopes = (frames[4:] - frames[:-4]) / 2 if len(frames) > 4 else np.zeros_like(frames[:1])
    parts = [clip_mean_and_deviation(frames)]
    parts += [torch.from_numpy(np.percentile(frames, percent, axis=0)) for percent in (5, 25, 50, 75, 95)]
    parts += [clip_mean_and_deviation(slopes)[frames.shape[1] :], torch.from_numpy(np.abs(slopes).mean(axis=0))]
    parts += [torch.from_numpy(np.percentile(slopes, percent, axis=0)) for percent in (5, 25, 75, 95)]
    return torch.cat(parts).float()


CLIP_STATISTICS = {"statistics": clip_mean_and_deviation, "functionals": clip_functionals}


def transformer_layer(layer, states, heads):
    """A post-norm encoder layer (Vaswani et al., 2017): (steps, width) -> (steps, width)."""
    steps, width = states.shape
    attention, per_head = layer.self_attn, width // heads
    projected = nn.functional.linear(states, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (part.view(steps, heads, per_head) for part in projected.chunk(3, dim=1))
    weights = torch.einsum("qhw,khw->hqk", query, key).div(per_head**0.5).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    attended = torch.einsum("hqk,khw->qhw", weights, value).reshape(steps, width)
    states = layer.norm1(states + attention.out_proj(attended))
    return layer.norm2(states + layer.linear2(layer.linear1(states).relu()))


def give_statistics_a_scale(model):
    """As training does."""
    for part in model.modules():
        if isinstance(part, Standardization):
            part.mean.copy_(0.1 * torch.randn_like(part.mean))
            part.deviation.copy_(0.5 + torch.rand_like(part.deviation))


def output_of(head, summary):
    hidden = summary
    for layer in head.ffn:
        hidden = layer(hidden)
    if head.architecture.has_shortcut:
        hidden = torch.cat([hidden, summary])
    return torch.sigmoid(head.output(hidden))


LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalization", MASKED_NORMALIZATIONS)
def test_a_head_computes_the_papers_network(architecture, normalization):
    model = small_model(architecture=architecture, normalization=normalization)
    give_statistics_a_scale(model)
    clips = [torch.randn(frames, 40) for frames in (2, 3, 4, 5, 6, 31, 60)]
    features, mask = padded(clips)
    logits = model(input_features=features, attention_mask=mask).logits
    for clip, shares in zip(clips, logits, strict=True):
        expected = torch.cat([released_shares(head, clip, model.config) for head in model.heads])
        torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=5), data=st.data())
def test_a_clips_shares_do_not_depend_on_its_batch(lengths, data):
    architecture = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    normalization = data.draw(st.sampled_from(MASKED_NORMALIZATIONS))
    separate = data.draw(st.booleans())
    model = small_model(architecture=architecture, normalization=normalization, separate_heads=separate)
    clips = [torch.randn(length, 40) for length in lengths]
    features, mask = padded(clips, value=data.draw(st.sampled_from([0.0, 1e3])))
    together = model(input_features=features, attention_mask=mask, output_attentions=True)
    for index, clip in enumerate(clips):
        alone = model(input_features=clip[None], output_attentions=True)
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=0)
        if model.config.has_attention:
            steps = len(clip) // 2
            torch.testing.assert_close(together.attentions[index, :, :steps], alone.attentions[0], atol=1e-5, rtol=0)
            assert (together.attentions[index, :, steps:] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_in_the_padding_reaches_shares_or_gradients(architecture):
    """Nor does the shortest clip, of one frame, make gradients that are not finite."""
    model = small_model(architecture=architecture, pool_size=1, id2label={0: "joy"})
    give_statistics_a_scale(model)
    clips = [torch.randn(frames, 40) for frames in (1, 2, 4, 5, 23)]
    features, mask = padded(clips)
    garbage = torch.tensor([torch.nan, torch.inf, -1e6, 1e6, 0])[:, None, None]
    features = features.where(mask[..., None] == 1, garbage).requires_grad_()
    together = model(input_features=features, attention_mask=mask).logits
    for clip, shares in zip(clips, together, strict=True):
        torch.testing.assert_close(shares, model(input_features=clip[None]).logits[0], atol=1e-5, rtol=0)
    together.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert features.grad.isfinite().all()
    assert (features.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_in_16_bits_give_nearly_the_same_shares(architecture):
    model = small_model(architecture=architecture)
    features, mask = padded([torch.randn(20, 40), torch.randn(7, 40)])
    expected = model(input_features=features, attention_mask=mask).logits
    shares = model(input_features=features.bfloat16(), attention_mask=mask).logits
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("architecture", ["statistics", "functionals"])
def test_statistics_are_computed_alike_with_gradients_and_without(architecture):
    model = small_model(architecture=architecture)
    features, mask = padded([torch.randn(20, 40), torch.randn(7, 40)])
    before = features.clone()
    with torch.no_grad():
        expected = model(input_features=features, attention_mask=mask).logits
    assert torch.equal(features, before)
    with_gradients = model(input_features=features.clone().requires_grad_(), attention_mask=mask).logits
    assert torch.equal(with_gradients, expected)


def test_steps_that_hardly_vary_have_the_least_deviation():
    """A difference of large squares would be wrong by more."""
    pooling = AttentiveStatisticsPooling(EmoShareConfig(), 6)
    states = 100 + 1e-3 * torch.randn(1, 9, 6)
    pooled, _ = pooling(states, None, torch.ones(1, 9, dtype=torch.bool))
    means, deviations = pooled.view(1, 4, 2, 6).unbind(2)
    torch.testing.assert_close(means, torch.full_like(means, 100), atol=0.01, rtol=0)
    torch.testing.assert_close(deviations, torch.full_like(means, 1e-5**0.5), atol=1e-5, rtol=0)


def test_the_released_architecture_2_has_as_many_parameters_as_the_authors_network():
    config = EmoShareConfig(feature_size=1024, normalization="sequence", output_activation="relu")
    unused_in_the_release = 2 * 199 * 512  # "ln2"
    count = sum(parameter.numel() for parameter in EmotionHead(config).parameters())
    assert count + unused_in_the_release == 7_992_527


def test_the_transformer_has_the_sizes_that_its_documentation_says():
    head = EmotionHead(EmoShareConfig(feature_size=1024, architecture="transformer"))
    layers = list(head.transformer)
    assert [layer.self_attn.embed_dim for layer in layers] == [192, 192]
    assert {(layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) for layer in layers} == {
        (8, 768, 0)
    }
    assert head.ffn[0].in_features == 192


def test_sequence_normalization_sees_the_padding_up_to_max_frames():
    model = small_model(normalization="sequence", max_frames=30)
    features = torch.randn(1, 30, 40)
    features[:, 20:] = 0
    mask = (torch.arange(30) < 20).long()[None]
    long = model(input_features=features, attention_mask=mask, output_attentions=True)
    short = model(input_features=features[:, :20], output_attentions=True)
    torch.testing.assert_close(long.logits, short.logits, atol=1e-6, rtol=0)
    assert long.attentions.shape == (1, 9, 15)
    assert (long.attentions[..., 10:] == 0).all()


def test_sequence_normalization_refuses_longer_inputs():
    with pytest.raises(ValueError, match=r"got 31 frames.*max_frames=30"):
        small_model(normalization="sequence", max_frames=30)(input_features=torch.randn(1, 31, 40))


def test_attention_weights_are_a_distribution_over_a_clips_steps():
    features, mask = padded([torch.randn(21, 40), torch.randn(8, 40)])
    attentions = small_model()(input_features=features, attention_mask=mask, output_attentions=True).attentions
    assert attentions.shape == (2, 9, 10)
    torch.testing.assert_close(attentions.sum(dim=-1), torch.ones(2, 9))


def test_a_shared_trunk_is_one_network_with_all_outputs():
    model = small_model(separate_heads=False)
    assert len(model.heads) == 1
    output = model(input_features=torch.randn(2, 20, 40), output_attentions=True)
    assert output.logits.shape == (2, 9)
    assert output.attentions.shape == (2, 9, 10)


def test_separate_heads_share_nothing():
    model = small_model()
    model(input_features=torch.randn(2, 20, 40)).logits[:, 4].sum().backward()
    for index, head in enumerate(model.heads):
        assert any((parameter.grad != 0).any() for parameter in head.parameters()) == (index == 4)


def test_unknown_shares_add_nothing_to_the_loss():
    model = small_model()
    features = torch.randn(3, 20, 40)
    labels = torch.rand(3, 9)
    labels[0, 2] = labels[1, :] = torch.nan
    output = model(input_features=features, labels=labels)
    known = ~labels.isnan()
    torch.testing.assert_close(output.loss, nn.functional.mse_loss(output.logits[known], labels[known]))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_only_unknown_shares_give_a_loss_of_zero():
    output = small_model()(input_features=torch.randn(1, 20, 40), labels=torch.full((1, 9), torch.nan))
    assert output.loss == 0


def test_output_activation():
    features = torch.randn(64, 20, 40)
    relu = small_model(output_activation="relu", id2label={0: "a", 1: "b"})
    for head in relu.heads:
        head.output.bias.data.fill_(-0.1)
    assert (relu(input_features=features).logits == 0).any()
    shares = small_model()(input_features=features).logits
    assert ((shares > 0) & (shares < 1)).all()


def test_return_dict_and_hidden_states():
    model = small_model(backbone_config=backbone_config())
    waveforms = torch.randn(2, 8000)
    output = model(input_values=waveforms, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    as_tuple = model(input_values=waveforms, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.logits)
    assert model(input_values=waveforms).hidden_states is None


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_backbone_layer_chooses_the_hidden_states(layer):
    model = small_model(backbone_config=backbone_config(), backbone_layer=layer)
    waveforms = torch.randn(1, 8000)
    plain = model.backbone(waveforms, output_hidden_states=True)
    expected = plain.last_hidden_state if layer == -1 else plain.hidden_states[layer]
    torch.testing.assert_close(model.frame_features(waveforms).by_layer[layer], expected)


def test_weighted_layers_are_learned_by_each_network():
    model = small_model(backbone_config=backbone_config(), backbone_layer="weighted")
    waveforms, mask = padded([torch.randn(8000), torch.randn(3000)])
    by_layer, lengths = model.frame_features(waveforms, mask)
    features = by_layer["weighted"]
    assert features.shape == (2, 3, 24, 32)
    frame_mask = (torch.arange(24) < lengths[:, None]).long()
    from_features = model(frame_features=features, attention_mask=frame_mask, labels=torch.rand(2, 9))
    torch.testing.assert_close(from_features.logits, model(input_values=waveforms, attention_mask=mask).logits)
    from_features.loss.backward()
    assert all(head.layer_weights.grad.abs().sum() > 0 for head in model.heads)


def test_acoustic_features_are_frame_features():
    model = small_model()
    features, mask = padded([torch.randn(20, 40), torch.randn(9, 40)])
    as_inputs = model(input_features=features, attention_mask=mask, output_hidden_states=True)
    assert as_inputs.hidden_states is None
    torch.testing.assert_close(model(frame_features=features, attention_mask=mask).logits, as_inputs.logits)
    with pytest.raises(ValueError, match="no backbone that could make frame features"):
        model.frame_features(features)


@pytest.mark.parametrize("layer", [-1, 1, "weighted"])
def test_frame_features_skip_the_backbone(layer, monkeypatch):
    model = small_model(backbone_config=backbone_config(), backbone_layer=layer)
    waveforms, mask = padded([torch.randn(8000), torch.randn(3000)])
    expected = model(input_values=waveforms, attention_mask=mask).logits
    by_layer, lengths = model.frame_features(waveforms, mask)
    assert list(by_layer) == [layer]
    monkeypatch.delattr(type(model.backbone), "forward")
    frame_mask = (torch.arange(24) < lengths[:, None]).long()
    from_features = model(frame_features=by_layer[layer], attention_mask=frame_mask, output_hidden_states=True)
    torch.testing.assert_close(from_features.logits, expected)
    assert from_features.hidden_states is None


def test_frame_features_of_several_layers_take_one_run_of_the_backbone():
    model = small_model(backbone_config=backbone_config(), backbone_layer=1)
    runs = []
    model.backbone.register_forward_hook(lambda *_: runs.append(1))
    waveforms, mask = padded([torch.randn(8000), torch.randn(7700)])
    by_layer, lengths = model.frame_features(waveforms, mask, ["weighted", 2, -1])
    assert runs == [1]
    assert list(by_layer) == ["weighted", 2, -1]
    assert lengths.tolist() == [24, 23]
    torch.testing.assert_close(by_layer["weighted"][:, 2], by_layer[2])

    layers = []
    for index, module in enumerate(model.backbone.encoder.layers):
        module.register_forward_hook(lambda *_, index=index: layers.append(index))
    model(input_values=waveforms, attention_mask=mask)
    assert layers == [0]
    alone = small_model(backbone_config=backbone_config(), backbone_layer=2)
    alone.load_state_dict(model.state_dict())
    torch.testing.assert_close(alone.frame_features(waveforms, mask).by_layer[2], by_layer[2])


def test_on_a_cpu_clips_of_other_lengths_go_through_the_backbone_in_passes_of_their_own():
    """Padded to the longest clip, a batch of clips of mixed length takes longer than one clip after another."""
    model = small_model(backbone_config=backbone_config())
    heard = []
    model.backbone.register_forward_hook(lambda _, inputs, outputs: heard.append(tuple(inputs[0].shape)))
    clips = [torch.randn(length) for length in (16000, 3000, 7900, 15500, 8000, 16000)]
    waveforms, mask = padded(clips)
    with torch.inference_mode():
        together = model.frame_features(waveforms, mask)
        output = model(waveforms, attention_mask=mask, output_hidden_states=True)
    assert heard[:3] == heard[3:] == [(1, 3000), (2, 8000), (3, 16000)]
    assert output.hidden_states[0].shape == together.by_layer[-1].shape == (6, 49, model.config.feature_size)
    for clip, features, frames in zip(clips, together.by_layer[-1], together.lengths, strict=True):
        alone = model.frame_features(clip[None]).by_layer[-1][0]
        assert len(alone) == frames
        torch.testing.assert_close(features[:frames], alone, atol=1e-5, rtol=0)
    model.requires_grad_(True)
    model.config.freeze_backbone = False
    heard.clear()
    model.train()(waveforms, attention_mask=mask)  # its dropout and masks are those of a batch
    assert heard == [(6, 16000)]


MODELS = [
    pytest.param(fields, id="-".join(map(str, fields.values())) or "default")
    for fields in (
        {},
        {"architecture": "transformer"},
        {"architecture": "cnn_lstm", "normalization": "sequence", "max_frames": 40},
    )
]


@pytest.mark.parametrize("layer", [None, -1, "weighted"])
@pytest.mark.parametrize("fields", MODELS)
def test_a_selection_of_labels_gives_their_columns(fields, layer):
    if layer is not None:
        fields = {**fields, "backbone_config": backbone_config(), "backbone_layer": layer}
    model = small_model(**fields)
    shape = (3, 3, 30, 32) if layer == "weighted" else (3, 30, 32 if layer else 40)
    features, labels = torch.randn(shape), torch.rand(3, 9)
    mask = (torch.arange(30) < torch.tensor([30, 12, 25])[:, None]).long()
    whole = model(frame_features=features, attention_mask=mask, output_attentions=True)
    view = model.select([7, 2])
    output = view(frame_features=features, attention_mask=mask, output_attentions=True, labels=labels[:, [7, 2]])
    torch.testing.assert_close(output.logits, whole.logits[:, [7, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss, model.loss(whole.logits[:, [7, 2]], labels[:, [7, 2]]))
    if model.config.has_attention:
        torch.testing.assert_close(output.attentions, whole.attentions[:, [7, 2]], atol=1e-6, rtol=0)
    assert view.config.labels == ["Sadness", "Calmness"]
    assert view.config.label2id == {"Sadness": 0, "Calmness": 1}
    assert view.select([1]).config.labels == ["Calmness"]


def test_a_selection_shares_the_heads_and_leaves_the_model_whole():
    model = small_model(backbone_config=backbone_config())
    names, config = set(model.state_dict()), model.config.to_dict()
    view = model.select([4])
    assert isinstance(view, EmoShareModel)
    assert view.backbone is None
    assert [id(parameter) for parameter in view.parameters()] == [id(p) for p in model.heads[4].parameters()]
    view.train()
    assert model.heads[4].training
    assert not model.heads[3].training
    view(frame_features=torch.randn(2, 20, 32), labels=torch.rand(2, 1)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.heads[4].parameters())
    optimizer = torch.optim.SGD(view.parameters(), lr=1.0)
    before = model.heads[4].output.weight.clone()
    optimizer.step()
    assert not torch.equal(model.heads[4].output.weight, before)

    assert set(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert model.backbone is not None
    assert model(input_values=torch.randn(1, 8000)).logits.shape == (1, 9)
    with pytest.raises(ValueError, match=r"^input_values: this model has no backbone; it takes frame_features$"):
        view(input_values=torch.randn(1, 8000))


def test_a_selection_of_a_shared_trunk_is_all_of_it():
    model = small_model(separate_heads=False)
    features = torch.randn(2, 20, 40)
    torch.testing.assert_close(
        model.select(range(9))(input_features=features).logits, model(input_features=features).logits
    )
    for labels in ([0], [1, 0, *range(2, 9)]):
        with pytest.raises(ValueError, match=r"^labels: got .*with separate_heads=False all labels share one head"):
            model.select(labels)


@pytest.mark.parametrize("separate_heads", [True, False])
def test_a_head_is_initialised_by_its_seed_alone(separate_heads):
    model = small_model(backbone_config=backbone_config(), backbone_layer="weighted", separate_heads=separate_heads)
    nn.init.ones_(model.heads[0].layer_weights)
    others = {name: weight.clone() for name, weight in model.state_dict().items() if not name.startswith("heads.0.")}
    torch.manual_seed(3)
    expected_random = torch.rand(3)
    torch.manual_seed(3)
    model.initialize_head(0, seed=7)
    torch.testing.assert_close(torch.rand(3), expected_random, atol=0, rtol=0)
    torch.manual_seed(7)
    expected = EmotionHead(model.config, num_outputs=1 if separate_heads else 9)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.heads[0].state_dict()[name], weight)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in others.items())
    assert (model.heads[0].layer_weights == 0).all()


def test_a_frozen_backbone_stays_frozen(tmp_path):
    def is_frozen(model):
        return not model.backbone.training and not any(p.requires_grad for p in model.backbone.parameters())

    model = EmoShareModel(EmoShareConfig(backbone_config=backbone_config(), **SMALL_HEAD))
    assert is_frozen(model)
    assert is_frozen(model.train())
    model.save_pretrained(tmp_path)
    loaded, info = EmoShareModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert is_frozen(loaded)
    assert is_frozen(loaded.train())
    assert loaded.heads.training
    assert all(parameter.requires_grad for parameter in loaded.heads.parameters())
    assert is_frozen(AutoModel.from_pretrained(tmp_path))


class LowRank(nn.Module):
    """A linear layer with a trainable addition of rank 2, as LoRA has it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = (nn.Parameter(torch.randn(shape)) for shape in [(2, 32), (32, 2)])

    def forward(self, rows):
        return self.linear(rows) + rows @ self.down.T @ self.up.T


def with_low_rank(model):
    for layer in model.backbone.encoder.layers:
        layer.attention.q_proj = LowRank(layer.attention.q_proj)


TRAINABLE = {
    "low rank": (with_low_rank, r"\.(down|up)$"),
    "last layer": (lambda model: model.backbone.encoder.layers[-1].requires_grad_(True), r"encoder\.layers\.1\."),
    "projection": (lambda model: model.backbone.feature_projection.requires_grad_(True), r"feature_projection\."),
    "front end": (lambda model: model.backbone.feature_extractor.requires_grad_(True), r"feature_extractor\."),
    "everything": (lambda model: model.backbone.requires_grad_(True), "^(?!masked_spec_embed)"),
}


@pytest.mark.parametrize("layer", [-1, "weighted"])
@pytest.mark.parametrize("fields", [{}, {"feat_extract_norm": "layer"}])
@pytest.mark.parametrize("name", TRAINABLE)
def test_what_is_made_trainable_in_a_frozen_backbone_trains_and_is_exact_in_a_batch(name, fields, layer):
    make_trainable, expected = TRAINABLE[name]
    config = backbone_config("wav2vec2" if fields else "hubert", **fields)
    model = small_model(backbone_config=config, backbone_layer=layer).train()
    make_trainable(model)
    assert not model.backbone.training
    clips, labels = [torch.randn(length) for length in (4000, 6400, 9000)], torch.rand(3, 9)

    def gradients(*rows):
        waveforms, mask = padded([clips[row] for row in rows], value=7.0)
        model.zero_grad()
        model(waveforms, attention_mask=mask, labels=labels[list(rows)]).loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.backbone.named_parameters()
            if parameter.grad is not None
        }

    together = gradients(0, 1, 2)
    trainable = {name for name, _ in model.backbone.named_parameters() if re.search(expected, name)}
    assert set(together) <= trainable
    # Not every kind of backbone applies its last norm to `hidden_states`, which "weighted" takes.
    assert trainable - set(together) <= {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    alone = [gradients(row) for row in range(3)]
    scale = max(gradient.abs().max() for gradient in together.values())
    assert scale > 0
    for parameter, gradient in together.items():
        mean = sum(own[parameter] for own in alone) / 3
        torch.testing.assert_close(gradient, mean, atol=1e-4 * scale, rtol=0)


def test_a_step_of_the_optimizer_changes_what_is_trainable_and_nothing_else():
    model = small_model(backbone_config=backbone_config()).train()
    with_low_rank(model)
    before = {name: weight.clone() for name, weight in model.backbone.state_dict().items()}
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    model(torch.randn(2, 8000), labels=torch.rand(2, 9)).loss.backward()
    optimizer.step()
    changed = {name for name, weight in model.backbone.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith((".down", ".up"))}
    with pytest.raises(ValueError, match="include_backbone=False: "):
        model.save_pretrained("nowhere", include_backbone=False)


def test_gradients_reach_a_waveform_through_a_frozen_backbone():
    model = small_model(backbone_config=backbone_config())
    waveform = torch.randn(1, 8000, requires_grad=True)
    model(waveform).logits[0, 0].backward()
    assert waveform.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_without_trainable_parameters_nothing_is_kept_for_gradients():
    model = small_model(backbone_config=backbone_config()).train()
    assert not model.frame_features(torch.randn(1, 8000)).by_layer[-1].requires_grad


@pytest.mark.parametrize("fields", [{}, {"backbone_config": backbone_config()}])
def test_a_trace_would_be_wrong_for_other_clips_and_is_refused(fields):
    model = small_model(**fields)
    inputs = torch.randn(1, 8000) if fields else torch.randn(1, 50, 40)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace: an EmoShare model cannot be traced"):
        torch.jit.trace(model, example_kwarg_inputs={model.main_input_name: inputs}, strict=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fields", [{}, {"backbone_config": backbone_config()}])
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_dynamic_quantisation_takes_every_linear_layer(architecture, fields):
    model = small_model(**fields, architecture=architecture, conv_channels=(8, 8))
    inputs = torch.randn(1, 8000) if fields else torch.randn(1, 50, 40)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    left = {type(module).__name__ for module in quantised.modules() if isinstance(module, nn.Linear)}
    assert left <= {"NonDynamicallyQuantizableLinear"}  # PyTorch's own, of nn.MultiheadAttention
    with torch.no_grad():
        shares, expected = (each(**{model.main_input_name: inputs}).logits for each in (quantised, model))
    torch.testing.assert_close(shares, expected, atol=2e-2, rtol=0)
    assert not torch.equal(shares, expected)


def test_a_free_backbone_trains(tmp_path):
    model = EmoShareModel(EmoShareConfig(backbone_config=backbone_config(), freeze_backbone=False, **SMALL_HEAD))
    model.save_pretrained(tmp_path)
    model = EmoShareModel.from_pretrained(tmp_path).train()
    assert model.backbone.training
    model(input_values=torch.randn(2, 8000), labels=torch.rand(2, 9)).loss.backward()
    assert model.backbone.feature_projection.projection.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_reaches_the_backbone():
    model = EmoShareModel(
        EmoShareConfig(
            backbone_config=backbone_config(
                hidden_dropout=0.0, attention_dropout=0.0, layerdrop=0.0, activation_dropout=0.0
            ),
            freeze_backbone=False,
            **SMALL_HEAD,
        )
    ).train()
    waveforms, labels = torch.randn(2, 8000), torch.rand(2, 9)
    weight = model.backbone.encoder.layers[0].attention.q_proj.weight
    model(input_values=waveforms, labels=labels).loss.backward()
    expected, weight.grad = weight.grad, None
    model.gradient_checkpointing_enable()
    assert model.backbone.is_gradient_checkpointing
    model(input_values=waveforms, labels=labels).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForAudioClassification])
def test_both_auto_classes_give_the_model(auto_class, model_folder):
    model = auto_class.from_pretrained(model_folder)
    assert isinstance(model, EmoShareModel)
    assert not model.training


def test_saved_weights_come_back(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = EmoShareModel.from_pretrained(tmp_path)
    features = torch.randn(2, 30, 40)
    torch.testing.assert_close(loaded(input_features=features).logits, model(input_features=features).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_backbone(implementation, model_folder):
    model = EmoShareModel.from_pretrained(model_folder, attn_implementation=implementation)
    assert model.backbone.config._attn_implementation == implementation


def test_in_bfloat16_the_heads_stay_in_float32(model_folder):
    model = EmoShareModel.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.heads.parameters()} == {torch.float32}
    assert model(input_values=torch.randn(1, 8000)).logits.dtype == torch.float32
    assert model.bfloat16()(input_values=torch.randn(1, 8000)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields", [{}, {"architecture": "cnn_lstm"}, {"architecture": "transformer"}, {"backbone_layer": "weighted"}]
)
def test_bfloat16_features_rank_clips_as_float32_does(fields):
    model = small_model(backbone_config=backbone_config(), **fields)
    clips, frames, width = 60, 40, 32
    levels = torch.rand(clips, 1, width)  # clips differ, as those of a corpus do
    features = (levels + torch.randn(clips, frames, width)).bfloat16()
    if fields.get("backbone_layer") == "weighted":
        features = torch.stack([features, 2 * features, features], dim=1)
    with torch.inference_mode():
        exact = model(frame_features=features.float()).logits
        rounded = model(frame_features=features).logits
    assert rounded.dtype == torch.float32
    rhos = [spearmanr(a, b).statistic for a, b in zip(exact.T, rounded.T, strict=True)]
    assert min(rhos) > 0.999


def test_heads_start_from_pytorchs_initialisation():
    """Transformers' own would draw weights from N(0, 0.02), which a narrow convolution dies of."""
    convolution = small_model().heads[3].convolutions[0]
    bound = 1 / (40 * 3) ** 0.5
    assert convolution.weight.abs().max().item() <= bound
    assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_from_backbone_pretrained_keeps_the_backbones_weights(backbone_folder):
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, **SMALL_HEAD)
    plain = AutoModel.from_pretrained(backbone_folder)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.backbone.state_dict()[name], tensor, atol=0, rtol=0)
    assert model.config.backbone_name_or_path == str(backbone_folder)


@pytest.mark.parametrize("dtype", ["half precision", "int8", torch.int8, 16, None])
def test_a_dtype_that_is_none_is_refused_before_anything_is_fetched(dtype):
    with pytest.raises(ValueError, match=r"^dtype: got .*; expected a floating-point dtype"):
        EmoShareModel.from_backbone_pretrained("org/not-asked-for", dtype=dtype)


def test_a_backbone_checkpoint_without_weights_is_refused(tmp_path, backbone_folder):
    backbone = AutoModel.from_pretrained(backbone_folder)
    state = {name: tensor for name, tensor in backbone.state_dict().items() if "layers.1.attention" not in name}
    backbone.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 8 backbone weights"):
        EmoShareModel.from_backbone_pretrained(tmp_path, **SMALL_HEAD)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_values, input_features, frame_features; got none"),
        ({"input_values": torch.zeros(1, 8000)}, "no backbone"),
        ({"input_features": torch.zeros(1, 20, 41)}, "width 40"),
        ({"input_features": torch.zeros(20, 40)}, "expected \\(batch, frames, width\\)"),
        ({"input_features": torch.zeros(1, 1, 40)}, "1 frames; expected at least 2"),
        ({"input_features": torch.zeros(2, 9, 40), "attention_mask": torch.ones(2, 8)}, "attention_mask: got shape"),
        (
            {"input_features": torch.zeros(1, 3, 40), "attention_mask": torch.tensor([[0, 1, 1]])},
            "padding on the right",
        ),
        ({"input_features": torch.zeros(1, 9, 40), "labels": torch.zeros(1, 8)}, "labels: got shape"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_values, input_features, frame_features; got none"),
        (
            {"input_values": torch.zeros(1, 8000), "frame_features": torch.zeros(1, 24, 32)},
            "exactly one .*; got input_values, frame_features",
        ),
        (
            {"input_features": torch.zeros(1, 24, 32)},
            "^input_features: this model has a hubert backbone; it takes input_values or frame_features",
        ),
        ({"frame_features": torch.zeros(1, 24, 40)}, "width 32"),
        ({"frame_features": torch.zeros(1, 3, 24, 32)}, "expected \\(batch, frames, width\\)"),
        ({"frame_features": torch.zeros(1, 1, 32)}, "1 frames; expected at least 2"),
    ],
)
def test_wrong_inputs_of_a_model_with_a_backbone_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        small_model(backbone_config=backbone_config())(**inputs)


def test_too_short_a_waveform_is_refused():
    model = small_model(backbone_config=backbone_config())
    with pytest.raises(ValueError, match="719 samples, 1 frames; expected at least 2"):
        model(input_values=torch.zeros(1, 719))


def test_pooling_sizes_drop_the_frames_that_fill_no_step():
    for pool_size, frames in itertools.product((1, 2, 3), (6, 7, 8)):
        model = small_model(pool_size=pool_size)
        attentions = model(input_features=torch.randn(1, frames, 40), output_attentions=True).attentions
        assert attentions.shape[-1] == frames // pool_size


def test_concentrations_are_a_second_output_of_each_head():
    features, mask = torch.randn(3, 30, 40), (torch.arange(30) < torch.tensor([30, 12, 25])[:, None]).long()
    for separate_heads in (True, False):
        model = small_model(loss="beta_binomial", separate_heads=separate_heads)
        output = model(input_features=features, attention_mask=mask)
        assert output.logits.shape == output.concentrations.shape == (3, 9)
        assert ((output.logits > 0) & (output.logits < 1)).all()
        assert (output.concentrations > 0).all()
        alone = model(input_features=features[1:2, :12])
        torch.testing.assert_close(alone.concentrations, output.concentrations[1:2], atol=1e-4, rtol=1e-5)
        for head in model.heads:
            head.rescale_concentrations(3.0, exponent=0.5)
        scaled = model(input_features=features, attention_mask=mask)
        torch.testing.assert_close(scaled.concentrations, 3 * output.concentrations.sqrt())
        torch.testing.assert_close(scaled.logits, output.logits)
    assert small_model()(input_features=features).concentrations is None


def test_a_model_with_concentrations_is_selected_initialised_saved_and_quantised_as_any_other(tmp_path):
    model = small_model(loss="beta_binomial")
    features, labels, listeners = torch.randn(2, 20, 40), torch.rand(2, 9), torch.tensor([3.0, 20.0])
    whole = model(input_features=features)
    view = model.select([7, 2])(input_features=features, labels=labels[:, [7, 2]], listeners=listeners)
    torch.testing.assert_close(view.concentrations, whole.concentrations[:, [7, 2]], atol=1e-5, rtol=1e-5)
    expected = model.loss(whole.logits[:, [7, 2]], labels[:, [7, 2]], None, listeners, whole.concentrations[:, [7, 2]])
    torch.testing.assert_close(view.loss, expected)

    model.save_pretrained(tmp_path)
    loaded = EmoShareModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_features=features).concentrations, whole.concentrations)
    in_16_bits = loaded(input_features=features.bfloat16())
    assert in_16_bits.concentrations.dtype == torch.float32
    torch.testing.assert_close(in_16_bits.concentrations, whole.concentrations, rtol=0.05, atol=0)
    quantised = torch.ao.quantization.quantize_dynamic(loaded, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(
        quantised(input_features=features).concentrations, whole.concentrations, rtol=0.1, atol=0
    )

    weights = model.heads[0].output.weight.clone()
    model.initialize_head(0, seed=1)
    assert model.heads[0].output.weight.shape == weights.shape
    assert not torch.equal(model.heads[0].output.weight, weights)
