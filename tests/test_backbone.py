"""Backbone families: every entry is complete, and a new one is one module and one entry."""

import inspect

import numpy as np
import pytest
import torch
from conftest import SMALL_HEAD, backbone_config, small_model, speech
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.backbone_emoshare import FAMILIES, BackboneFamily, commit_of, family_of, load_backbone, weights_hash
from emoshare.fields_emoshare import FEATURE_TYPES
from emoshare.frames_emoshare import length_mask

SUPPORTED = [model_type for family in FAMILIES for model_type in family.model_types]


def test_no_model_type_is_in_two_families():
    assert len(set(SUPPORTED)) == len(SUPPORTED)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_every_family_is_complete(family):
    assert family.model_types
    assert family.feature_type in FEATURE_TYPES
    assert family.input_name in ("input_values", "input_features")
    assert (family.feature_type == "waveform") == (family.input_name == "input_values")
    assert isinstance(family.optional_weights, tuple)
    assert type(family).__doc__
    for name, method in inspect.getmembers(BackboneFamily, inspect.isfunction):
        is_optional = name == "exportable" and not hasattr(family, name)
        if not name.startswith("_") and not is_optional:
            own = getattr(family, name)
            assert own.__doc__
            # Other code passes some of these by name.
            assert len(inspect.signature(own).parameters) == len(inspect.signature(method).parameters) - 1


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_model_type_is_found_and_has_consistent_numbers(model_type):
    config = backbone_config(model_type)
    family = family_of(config)
    assert model_type in family.model_types
    family.check(config, is_frozen=True)
    assert EmoShareConfig(backbone_config=config).feature_size == family.width(config) == 32
    assert family.num_layers(config) == 2
    frame_length, hop_length = family.frame_geometry(config)
    is_waveform = family.feature_type == "waveform"
    extractor = EmoShareFeatureExtractor(
        family.feature_type, frame_length=frame_length, hop_length=hop_length, min_frames=1
    )

    def num_frames_of(samples):
        inputs = extractor(np.zeros(samples), sampling_rate=16000)[family.input_name][0] if not is_waveform else None
        return family.num_frames(config, samples if is_waveform else len(inputs))

    for num_frames in (1, 2, 7):
        shortest = frame_length + (num_frames - 1) * hop_length
        assert num_frames_of(shortest) == extractor.num_frames(shortest) == num_frames
        if is_waveform or num_frames > 1:  # the extractor refuses clips too short for a frame
            assert num_frames_of(shortest - 1) == num_frames - 1
    lengths = torch.tensor([frame_length, 16000])
    assert family.num_frames(config, lengths).tolist() == [family.num_frames(config, int(own)) for own in lengths]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_adapters_find_all_linear_layers_of_attention(model_type):
    config = backbone_config(model_type)
    family = family_of(config)
    backbone = family.build(config)
    for layer in family.layers(backbone, 0, -1):
        (attention,) = {name.rpartition(".")[0] for name in family.attention_projections}
        modules = layer.get_submodule(attention).named_modules()
        linear = {name for name, module in modules if isinstance(module, nn.Linear)}
        # In WavLM's and w2v-BERT's attention, what positions go through has none.
        left = linear - {name.rpartition(".")[2] for name in family.attention_projections}
        assert left <= {"gru_rel_pos_linear", "linear_pos"}
        assert len(linear - left) == 4


def test_an_unsupported_backbone_is_named_with_those_that_are_supported():
    with pytest.raises(ValueError, match=r"^backbone_config: model type 'sew' is not supported; .*hubert, "):
        family_of(AutoConfig.for_model("sew"))


def test_the_hash_is_of_float32_and_of_what_frame_features_depend_on(backbone_folder):
    backbone = AutoModel.from_pretrained(backbone_folder)
    expected = weights_hash(backbone)
    assert len(expected) == 64
    assert weights_hash(AutoModel.from_pretrained(backbone_folder)) == expected
    assert weights_hash(small_model(backbone_config=backbone_config()).backbone) != expected
    prepared = AutoModel.from_pretrained(backbone_folder)
    family_of(prepared.config).prepare(prepared)
    assert weights_hash(prepared) == expected
    with torch.no_grad():
        backbone.masked_spec_embed = nn.Parameter(torch.ones(32))
        assert weights_hash(backbone) == expected
        backbone.encoder.layer_norm.weight[0] += 1e-6  # which bfloat16 would not hold
    assert weights_hash(backbone) != expected


def test_a_folder_has_no_commit_and_keeps_the_revision_that_was_given(backbone_folder):
    assert commit_of(backbone_folder) is None
    assert commit_of(backbone_folder, "v1") == "v1"
    with pytest.raises(OSError, match="nowhere"):
        commit_of(backbone_folder.with_name("nowhere"))


def test_a_backbone_loads_in_float32_and_unprepared(backbone_folder):
    config = AutoConfig.from_pretrained(backbone_folder)
    backbone = load_backbone(backbone_folder, config)
    plain = AutoModel.from_pretrained(backbone_folder)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert [type(module).__name__ for module in backbone.modules()] == [type(m).__name__ for m in plain.modules()]


# A family of another shape: log-mels in, half as many frames out.


class ThrowAwayConfig(PreTrainedConfig):
    model_type = "throw-away-encoder"

    def __init__(self, bands=40, width=24, depth=3, **kwargs):
        self.bands, self.width, self.depth = bands, width, depth
        super().__init__(**kwargs)


class ThrowAwayEncoder(PreTrainedModel):
    """A convolution that pads at both ends, so that it sees past the end of a clip in a batch, and linear layers."""

    config_class = ThrowAwayConfig
    main_input_name = "input_features"

    def __init__(self, config):
        super().__init__(config)
        self.convolution = nn.Conv1d(config.bands, config.width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv1d | nn.Linear):
            module.reset_parameters()

    def forward(self, input_features):
        states = [self.convolution(input_features.transpose(1, 2)).transpose(1, 2)]
        for layer in self.layers:
            states.append(states[-1] + layer(states[-1]).tanh())
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class ThrowAwayFamily:
    model_types = ("throw-away-encoder",)
    feature_type = "mel"
    input_name = "input_features"
    optional_weights = ()
    paddings = ()

    def check(self, config, is_frozen):
        if config.bands != 40:
            raise ValueError(f"backbone_config: bands={config.bands} is not supported: log-mels have 40")

    def width(self, config):
        return config.width

    def num_layers(self, config):
        return config.depth

    def frame_geometry(self, config):
        return 400 + 2 * 160, 2 * 160

    def num_frames(self, config, lengths):
        return (lengths + 1) // 2

    def build(self, config):
        return AutoModel.from_config(config)

    def load(self, name_or_path, **kwargs):
        return AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)

    def prepare(self, backbone, fast=True):
        backbone.is_prepared = True

    def cut(self, backbone, layer):
        return backbone

    def hidden_states(self, backbone, inputs, lengths, layers):
        assert backbone.is_prepared
        own = length_mask(lengths, inputs.shape[1])[..., None]
        states = backbone(inputs * own).hidden_states
        return {layer: states[layer] for layer in layers}


@pytest.fixture
def family(monkeypatch):
    """What a user's module would add: one entry."""
    AutoConfig.register("throw-away-encoder", ThrowAwayConfig, exist_ok=True)
    AutoModel.register(ThrowAwayConfig, ThrowAwayEncoder, exist_ok=True)
    monkeypatch.setattr("emoshare.backbone_emoshare.FAMILIES", [*FAMILIES, ThrowAwayFamily()])


def log_mels(*lengths):
    return [torch.randn(length, 40) for length in lengths]


def padded(clips, value=0.0):
    lengths = torch.tensor([len(clip) for clip in clips])
    features = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value)
    return features, length_mask(lengths, features.shape[1]).long()


@pytest.mark.usefixtures("family")
def test_a_new_family_is_checked_by_the_config():
    config = EmoShareConfig(backbone_config=ThrowAwayConfig())
    assert config.feature_size == 24
    assert EmoShareConfig(backbone_config={"model_type": "throw-away-encoder", "width": 8}).feature_size == 8
    for fields, named in [
        ({"backbone_config": ThrowAwayConfig(bands=80)}, "backbone_config: bands=80 is not supported"),
        ({"backbone_config": ThrowAwayConfig(), "feature_size": 40}, "feature_size"),
        ({"backbone_config": ThrowAwayConfig(), "backbone_layer": 4}, "backbone_layer: got 4; .* 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=f"^{named}"):
            EmoShareConfig(**fields)
    with pytest.raises(ValueError, match=r"supported are hubert, .*, throw-away-encoder"):
        family_of(AutoConfig.for_model("sew"))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("layer", [-1, 0, 2, "weighted"])
@pytest.mark.parametrize("architecture", ["cnn_lstm_attention", "transformer"])
def test_a_new_family_gives_a_clip_the_same_shares_in_any_batch(layer, architecture):
    model = small_model(backbone_config=ThrowAwayConfig(), backbone_layer=layer, architecture=architecture)
    assert model.main_input_name == "input_features"
    clips = log_mels(50, 33, 80, 4)
    alone = [model(input_features=clip[None]).logits[0] for clip in clips]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        features, mask = padded([clips[index] for index in order], value=100.0)
        together = model(input_features=features, attention_mask=mask).logits
        for shares, index in zip(together, order, strict=True):
            torch.testing.assert_close(shares, alone[index], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"input_features: .* 2 input frames, 1 frames; expected at least 2 frames"):
        model(input_features=torch.randn(1, 2, 40))


@pytest.mark.usefixtures("family")
def test_a_new_family_has_frame_features():
    model = small_model(backbone_config=ThrowAwayConfig(), backbone_layer=1)
    clips = log_mels(9, 20)
    features, mask = padded(clips)
    by_layer, lengths = model.frame_features(features, mask, [-1, 0, "weighted"])
    assert lengths.tolist() == [5, 10]
    assert by_layer["weighted"].shape == (2, 4, 10, 24)
    plain = model.backbone(clips[0][None]).hidden_states
    torch.testing.assert_close(by_layer[-1][:1, :5], plain[3])
    torch.testing.assert_close(by_layer[0][:1, :5], plain[0])
    frames, _ = model.frame_features(features, mask)
    frame_mask = length_mask(lengths, 10).long()
    from_frames = model(frame_features=frames[1], attention_mask=frame_mask)
    from_inputs = model(input_features=features, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(from_frames.logits, from_inputs.logits)
    assert [states.shape for states in from_inputs.hidden_states] == [(2, 10, 24)] * 4
    with pytest.raises(ValueError, match=r"^input_values: .* throw-away-encoder .* input_features or frame_features"):
        model(input_values=torch.randn(1, 8000))


@pytest.mark.usefixtures("family")
def test_a_new_family_stays_frozen_or_trains():
    features, labels = torch.randn(2, 20, 40), torch.rand(2, 9)
    for is_frozen in (True, False):
        model = small_model(backbone_config=ThrowAwayConfig(), freeze_backbone=is_frozen).train()
        assert model.backbone.training is not is_frozen
        model(input_features=features, labels=labels).loss.backward()
        assert {parameter.grad is None for parameter in model.backbone.parameters()} == {is_frozen}


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("include_backbone", [True, False])
def test_a_new_family_is_saved_and_loaded_whole_or_as_heads_alone(include_backbone, tmp_path):
    AutoModel.from_config(ThrowAwayConfig()).save_pretrained(tmp_path / "backbone")
    model = EmoShareModel.from_backbone_pretrained(tmp_path / "backbone", **SMALL_HEAD).eval()
    model.save_pretrained(tmp_path / "model", include_backbone=include_backbone)
    loaded = EmoShareModel.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.config.backbone_config, ThrowAwayConfig)
    features = torch.randn(2, 20, 40)
    torch.testing.assert_close(loaded(input_features=features).logits, model(input_features=features).logits)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.usefixtures("family")
def test_a_new_family_runs_in_the_pipeline():
    model = small_model(backbone_config=ThrowAwayConfig())
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=EmoShareFeatureExtractor("mel", min_frames=4))
    clips = [speech(seconds, seed) for seed, seconds in enumerate([0.6, 1.0, 0.06])]

    def scores(result):
        return np.array([entry["score"] for entry in sorted(result, key=lambda entry: entry["label"])])

    one_by_one = [scores(emotion_share(clip)) for clip in clips]
    for result, expected in zip(emotion_share(clips, batch_size=3), one_by_one, strict=True):
        np.testing.assert_allclose(scores(result), expected, atol=1e-5)
