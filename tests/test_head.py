"""Heads and the table of their architectures: every entry is complete, and a new one is one entry."""

import re

import pytest
import torch
from conftest import SMALL_HEAD, small_model
from torch import nn

from emoshare import EmoShareConfig, EmoShareModel, EmotionHead
from emoshare.architectures_emoshare import ARCHITECTURES, POOLINGS_OF_FRAMES, Architecture
from emoshare.fields_emoshare import NORMALIZATIONS
from emoshare.head_emoshare import ENCODERS, POOLINGS, Dropout


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_complete(name):
    architecture = ARCHITECTURES[name]
    assert architecture.encoder in ENCODERS
    assert architecture.pooling in POOLINGS
    for text in (architecture.title, architecture.summary, architecture.description):
        assert text and text == text.strip()
    assert not architecture.description.endswith(".")
    assert type(architecture.ffn_sizes) is tuple
    assert all(type(size) is int and size > 0 for size in architecture.ffn_sizes)
    assert f'"{name}"' in EmoShareConfig.__doc__


@pytest.mark.parametrize("field", ["title", "summary", "description"])
def test_no_two_architectures_are_called_the_same(field):
    texts = [getattr(architecture, field) for architecture in ARCHITECTURES.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("separate_heads", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_what_its_entry_says(name, normalization, separate_heads):
    architecture, fields = ARCHITECTURES[name], {"architecture": name, "normalization": normalization, "max_frames": 20}
    if normalization == "sequence" and not architecture.is_released:
        with pytest.raises(ValueError, match=rf"^normalization: got 'sequence', .* they released no '{name}'"):
            EmoShareConfig(**fields)
        return
    assert EmoShareConfig(**fields).ffn_sizes == architecture.ffn_sizes
    assert EmoShareConfig(**fields).has_attention == architecture.has_attention
    model = small_model(**fields, separate_heads=separate_heads)
    output = model(input_features=torch.randn(2, 20, 40), output_attentions=True, labels=torch.rand(2, 9))
    assert output.logits.shape == (2, 9)
    assert (output.attentions is not None) == architecture.has_attention
    if architecture.has_attention:
        assert output.attentions.shape == (2, 9, 10)
    output.loss.backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_head_keeps_its_parts_under_the_names_of_the_table(name):
    """Checkpoints have these names."""
    architecture = ARCHITECTURES[name]
    head = EmotionHead(EmoShareConfig(architecture=name, **SMALL_HEAD))
    assert isinstance(head.encoder, ENCODERS[architecture.encoder])
    assert isinstance(head.pooling, POOLINGS[architecture.pooling])
    parts = {key.split(".")[0] for key in head.state_dict()}
    stem = {"no_stem": set(), "convolutions": {"convolutions", "lstm_norm"}}[architecture.stem]
    encoder = {architecture.encoder} - {"no_encoder"}
    assert parts - {architecture.pooling} == {*stem, *encoder, "ffn", "output"}
    assert (architecture.pooling in parts) == bool(head.pooling.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_feed_forward_network_may_have_no_hidden_layer(name):
    model = small_model(architecture=name, ffn_sizes=())
    assert model.heads[0].output.in_features == model.heads[0].pooling.width
    assert model(input_features=torch.randn(2, 20, 40)).logits.shape == (2, 9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropout_acts_in_training_alone_and_has_no_weights(name):
    torch.manual_seed(0)
    plain = small_model(architecture=name)
    model = small_model(architecture=name, dropout=0.5)
    model.load_state_dict(plain.state_dict())
    features = torch.randn(2, 20, 40)
    expected = plain(input_features=features).logits
    assert torch.equal(model(input_features=features).logits, expected)
    assert torch.equal(plain.train()(input_features=features).logits, expected)
    first, second = (model.train()(input_features=features).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_place_of_dropout_is_used(name):
    model = small_model(architecture=name, dropout=0.5, id2label={0: "joy"}).train()
    places = [part for part in model.modules() if isinstance(part, Dropout)]
    seen = []
    for place in places:
        place.register_forward_hook(lambda part, states, dropped: seen.append((part, states[0], dropped)))
    model(input_features=torch.randn(3, 20, 40)).logits.sum().backward()
    assert {id(part) for part, _, _ in seen} == {id(part) for part in places}
    assert all((dropped == 0).any() for _, _, dropped in seen)
    # Steps, if a stem makes them; what each linear layer and the output take; what is between or within the encoder's
    # layers.
    of_head = [states.dim() for part, states, _ in seen if part is model.heads[0].dropout]
    assert of_head == ([2, 2] if ARCHITECTURES[name].stem == "no_stem" else [3, 2, 2])


def test_dropout_keeps_the_mean_with_a_generator_of_its_own():
    dropout = Dropout(0.25).train()
    dropout.generator = torch.Generator().manual_seed(1)
    states = torch.ones(100_000, requires_grad=True)
    dropped = dropout(states)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped.detach())


def test_a_head_begins_its_documentation_with_its_parts():
    assert re.match(r"\s*CNN > LSTM > attention > feed-forward", EmotionHead.__doc__)


def assert_batch_does_not_matter(model):
    clips = [torch.randn(length, 40) for length in (20, 7, 31)]
    features = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.arange(31) < torch.tensor([20, 7, 31])[:, None]
    together = model(input_features=features, attention_mask=mask).logits
    for shares, clip in zip(together, clips, strict=True):
        torch.testing.assert_close(shares, model(input_features=clip[None]).logits[0], atol=1e-5, rtol=0)


def assert_comes_back(model, folder):
    model.save_pretrained(folder)
    loaded, info = EmoShareModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    features = torch.randn(2, 20, 40)
    torch.testing.assert_close(loaded(input_features=features).logits, model(input_features=features).logits)
    return loaded


def throw_away(pooling):
    """Of existing parts, with sizes of its own."""
    has_stem = pooling not in POOLINGS_OF_FRAMES
    return Architecture(
        stem="convolutions" if has_stem else "no_stem",
        encoder="lstm" if has_stem else "no_encoder",
        pooling=pooling,
        ffn_sizes=(24, 6),
        title="Throw-away",
        summary="CNN, LSTM, a smaller feed-forward network",
        description="An architecture of existing parts",
        has_attention=pooling.startswith("attenti"),
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("separate_heads", [True, False])
def test_a_new_architecture_of_existing_parts_is_one_entry(separate_heads, pooling, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"^architecture: got 'throw_away'; expected one of cnn_lstm"):
        EmoShareConfig(architecture="throw_away")
    monkeypatch.setitem(ARCHITECTURES, "throw_away", throw_away(pooling))
    config = EmoShareConfig(architecture="throw_away", separate_heads=separate_heads, **SMALL_HEAD)
    assert EmoShareConfig(architecture="throw_away").ffn_sizes == (24, 6)
    assert config.has_attention == pooling.startswith("attenti")
    with pytest.raises(ValueError, match=r"^normalization: got 'sequence'"):
        EmoShareConfig(architecture="throw_away", normalization="sequence")
    model = EmoShareModel(config).eval()
    attentions = model(input_features=torch.randn(1, 20, 40), output_attentions=True).attentions
    assert (attentions is not None) == config.has_attention
    assert_batch_does_not_matter(model)
    loaded = assert_comes_back(model, tmp_path)
    assert loaded.config.architecture == "throw_away"
    loaded(input_features=torch.randn(4, 20, 40), labels=torch.rand(4, 9)).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"pooling": "statistics", "encoder": "no_encoder"},
            "pooling: got 'statistics' after stem ",
        ),
        ({"pooling": "functionals", "stem": "no_stem", "encoder": "lstm"}, "pooling: got 'functionals' after "),
        ({"pooling": "attention", "encoder": "transformer"}, "pooling: got 'attention', whose query needs last states"),
        ({"pooling": "mean", "stem": "no_stem", "encoder": "transformer"}, "stem: got 'no_stem'; a transformer"),
        ({"pooling": "attention", "stem": "no_stem", "encoder": "lstm", "has_attention": True}, "stem: got 'no_stem'"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Architecture(ffn_sizes=(), title="A", summary="B", description="C", **parts)


class Maximum(nn.Module):
    """A pooling that the table does not have."""

    def __init__(self, config, width):
        super().__init__()
        self.width = width

    def forward(self, states, last_states, mask):
        return states.masked_fill(~mask[..., None], -torch.inf).amax(dim=1), None


@pytest.mark.parametrize("parts", [{"encoder": "lstm"}, {"encoder": "no_encoder", "stem": "no_stem"}])
def test_a_new_pooling_is_one_more_entry(parts, monkeypatch, tmp_path):
    monkeypatch.setitem(POOLINGS, "maximum", Maximum)
    new = Architecture(
        pooling="maximum", ffn_sizes=(12,), title="Max", summary="max", description="The maximum", **parts
    )
    monkeypatch.setitem(ARCHITECTURES, "maximum_over_time", new)
    model = small_model(architecture="maximum_over_time")
    assert_batch_does_not_matter(model)
    assert_comes_back(model, tmp_path)


class GRUEncoder(nn.Module):
    """A part that the table does not have: one GRU layer."""

    def __init__(self, config, width):
        super().__init__()
        self.layer = nn.GRU(width, 10, batch_first=True)
        self.width = 10

    def forward(self, steps, lengths, mask):
        return self.layer(steps)[0], None


def test_a_new_part_is_one_more_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "gru", GRUEncoder)
    architecture = Architecture("gru", "mean", (12,), "GRU", "CNN, GRU", "Convolutions, a GRU and the mean over time")
    monkeypatch.setitem(ARCHITECTURES, "cnn_gru", architecture)
    model = small_model(architecture="cnn_gru")
    assert_batch_does_not_matter(model)
    assert "heads.8.gru.layer.weight_hh_l0" in model.state_dict()
    assert_comes_back(model, tmp_path)


def test_weights_that_a_checkpoint_lacks_are_drawn_by_pytorch_for_any_part(monkeypatch, tmp_path):
    """Transformers builds a model in uninitialised memory."""
    monkeypatch.setitem(ENCODERS, "gru", GRUEncoder)
    architecture = Architecture("gru", "mean", (12,), "GRU", "CNN, GRU", "Convolutions, a GRU and the mean over time")
    monkeypatch.setitem(ARCHITECTURES, "cnn_gru", architecture)
    model = small_model(architecture="cnn_gru")
    lacking = {name: weight for name, weight in model.state_dict().items() if ".gru." not in name}
    model.save_pretrained(tmp_path, state_dict=lacking)
    loaded, info = EmoShareModel.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert len(info["missing_keys"]) == 9 * 4
    bound = 10**-0.5
    for head in loaded.heads:
        weight = head.gru.layer.weight_hh_l0
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
