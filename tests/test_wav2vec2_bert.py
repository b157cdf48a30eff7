"""The w2v-BERT 2.0 family: its input is Transformers', a clip is the same in any batch, and a model goes everywhere."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL_HEAD,
    SMALL_HEAD_FLAGS,
    read_csv,
    run_python,
    run_script,
    small_model,
    speech,
    write_corpus,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.backbone_emoshare import family_of
from emoshare.cli import main
from emoshare.encoder_layers_emoshare import EncoderLayers
from emoshare.frames_emoshare import length_mask
from emoshare.wav2vec2_bert_emoshare import Wav2Vec2BertFamily

FAMILY = Wav2Vec2BertFamily()
POSITIONS = ["relative_key", "relative", "rotary", None]
LENGTHS = (50, 33, 80, 2)  # frames


def bert_config(positions="relative_key", **fields):
    """The published shape (two windows of 80 bands, kernels of 31, 64 frames back and 8 ahead), small."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return AutoConfig.for_model("wav2vec2-bert", **{**sizes, "position_embeddings_type": positions, **fields})


def plain_backbone(positions="relative_key", attention=None, **fields):
    return AutoModel.from_config(bert_config(positions, **fields), attn_implementation=attention).eval()


def exact(plain, fast=True):
    backbone = copy.deepcopy(plain)
    FAMILY.prepare(backbone, fast)
    return backbone


def padded(clips, value=0.0):
    lengths = torch.tensor([len(clip) for clip in clips])
    return nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value), lengths


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A small w2v-BERT 2.0 with random weights, saved as the published one is."""
    folder = tmp_path_factory.mktemp("w2v-bert")
    torch.manual_seed(1)
    plain_backbone().save_pretrained(folder)
    SeamlessM4TFeatureExtractor(padding_value=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_extractor(bert_folder):
    torch.manual_seed(2)
    model = EmoShareModel.from_backbone_pretrained(bert_folder, backbone_layer=2, **SMALL_HEAD).eval()
    return model, EmoShareFeatureExtractor.for_backbone(bert_folder, model.config.backbone_config)


# What it takes


@pytest.mark.parametrize("samples", [880, 1040, 1199, 16000, 16160, 127999])  # of odd and even numbers of windows
def test_filter_banks_are_those_of_transformers(samples):
    clip = speech(8.0)[:samples]
    extractor = EmoShareFeatureExtractor("filter_banks")
    ours = extractor(clip, sampling_rate=16000)["input_features"][0]
    theirs = SeamlessM4TFeatureExtractor()(clip, sampling_rate=16000, return_tensors="np")
    own = theirs["attention_mask"][0].astype(bool)  # which leaves out an odd window at the end, filled up with padding
    np.testing.assert_array_equal(ours, theirs["input_features"][0][own])
    assert ours.shape == (extractor.num_frames(samples), 160)
    assert ours.dtype == np.float32


def test_a_batch_of_clips_holds_each_clips_own_filter_banks():
    clips = [speech(0.5), speech(1.31, seed=1), speech(0.3, seed=2)]
    extractor = EmoShareFeatureExtractor("filter_banks")
    batch = extractor(clips, sampling_rate=16000, return_tensors="np")
    for clip, features, mask in zip(clips, batch["input_features"], batch["attention_mask"], strict=True):
        alone = extractor(clip, sampling_rate=16000)["input_features"][0]
        np.testing.assert_array_equal(features[: mask.sum()], alone)
        assert (features[mask.sum() :] == 0).all()


def test_equal_samples_are_silence():
    for value in (0.0, 0.1, -1.0):
        clip = np.full(16000, value, np.float32)
        features = EmoShareFeatureExtractor("filter_banks")(clip, sampling_rate=16000)["input_features"][0]
        assert np.abs(features).max() < 0.01


def test_the_extractor_follows_the_backbones_own(tmp_path, bert_folder, caplog):
    published = EmoShareFeatureExtractor.for_backbone(bert_folder, bert_config())
    assert (published.feature_type, published.num_mel_bins, published.feature_size) == ("filter_banks", 80, 160)
    assert (published.frame_length, published.hop_length, published.min_samples) == (560, 320, 880)
    SeamlessM4TFeatureExtractor(40, num_mel_bins=40, stride=3).save_pretrained(tmp_path)
    config = bert_config(feature_projection_input_dim=120)
    other = EmoShareFeatureExtractor.for_backbone(tmp_path, config)
    assert (other.num_mel_bins, other.feature_size, other.frame_length, other.hop_length) == (40, 120, 720, 480)
    clip = speech(1.0)
    theirs = AutoFeatureExtractor.from_pretrained(tmp_path)(clip, sampling_rate=16000, return_tensors="np")
    ours = other(clip, sampling_rate=16000)["input_features"][0]
    np.testing.assert_array_equal(ours, theirs["input_features"][0][: len(ours)])
    other.save_pretrained(tmp_path / "saved")
    assert EmoShareFeatureExtractor.from_pretrained(tmp_path / "saved").to_dict() == other.to_dict()
    (tmp_path / "nothing").mkdir()
    caplog.clear()
    assumed = EmoShareFeatureExtractor.for_backbone(tmp_path / "nothing", bert_config())
    assert assumed.to_dict() == published.to_dict()
    assert "has no preprocessor config; filter banks at 16 kHz are made" in caplog.text


def test_an_extractor_that_does_not_fit_is_named(tmp_path, bert_folder):
    with pytest.raises(ValueError, match=r"w2v-bert.*frames of 2 x 80 values.* feature_projection_input_dim=80"):
        EmoShareFeatureExtractor.for_backbone(bert_folder, bert_config(feature_projection_input_dim=80))
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a Wav2Vec2FeatureExtractor, which has no num_mel_bins"):
        EmoShareFeatureExtractor.for_backbone(tmp_path, bert_config())
    with pytest.raises(ValueError, match="of a SeamlessM4TFeatureExtractor, which has no do_normalize"):
        EmoShareFeatureExtractor.for_backbone(bert_folder, AutoConfig.for_model("hubert"))
    for fields, named in [
        ({"hop_length": 200}, "frame_length: got 560 with hop_length 200"),
        ({"frame_length": 400}, "frame_length: got 400 with hop_length 320"),
        ({"num_mel_bins": 0}, "num_mel_bins: got 0"),
        ({"feature_type": "mel", "num_mel_bins": 80}, "num_mel_bins: got 80"),
    ]:
        with pytest.raises(ValueError, match=f"^{named}"):
            EmoShareFeatureExtractor(**{"feature_type": "filter_banks", **fields})


# What it computes


@torch.no_grad()
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_clip_in_a_batch_has_the_states_of_plain_transformers_on_it_alone(positions, attention, fast):
    """In float64, since in float32 plain Transformers is off by up to 2e-6 itself."""
    plain = plain_backbone(positions, attention)
    assert plain.config._attn_implementation == attention
    backbone, double = exact(plain, fast), copy.deepcopy(plain).double()
    clips = [torch.randn(length, 160) for length in LENGTHS]
    expected = [double(clip[None].double(), output_hidden_states=True) for clip in clips]
    for shift in range(len(clips)):
        order = np.roll(np.arange(len(clips)), shift)
        features, lengths = padded([clips[index] for index in order], value=100.0)
        states = FAMILY.hidden_states(backbone, features, lengths, [-1, 0, 1, 2, 3])
        for row, index in enumerate(order):
            own = slice(0, LENGTHS[index])
            for layer in range(4):
                of_plain = expected[index].hidden_states[layer][0]
                torch.testing.assert_close(states[layer][row, own].double(), of_plain, atol=1e-5, rtol=0)
            torch.testing.assert_close(states[-1][row, own].double(), of_plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
def test_upper_layers_from_states_are_those_of_the_whole_encoder_with_all_gradients(positions):
    backbone = exact(plain_backbone(positions))
    features, lengths = padded([torch.randn(length, 160) for length in LENGTHS])
    mask = length_mask(lengths, features.shape[1])[..., None]
    for first in range(4):
        for layer in [-1, *range(first, 4)]:
            modules = FAMILY.layers(backbone, first, layer)
            assert modules == list(backbone.encoder.layers.children())[first : 3 if layer == -1 else layer]
            whole = FAMILY.hidden_states(backbone, features, lengths, [first, layer])
            below = whole[first].detach().masked_fill(~mask, 100.0)
            upper = FAMILY.upper_states(backbone, below, lengths, first, layer)
            torch.testing.assert_close(upper * mask, whole[layer] * mask, atol=1e-6, rtol=0)
    weights = list(FAMILY.layers(backbone, 1, 2)[0].parameters())
    below = FAMILY.hidden_states(backbone, features, lengths, [1])[1].detach()
    upstream = torch.randn_like(below) * mask
    in_batch = torch.autograd.grad((FAMILY.upper_states(backbone, below, lengths, 1, 2) * upstream).sum(), weights)
    alone = [torch.zeros_like(weight) for weight in weights]
    for states, own, length in zip(below, upstream, lengths, strict=True):
        output = FAMILY.upper_states(backbone, states[None, :length], length[None], 1, 2)
        for total, gradient in zip(alone, torch.autograd.grad((output * own[:length]).sum(), weights), strict=True):
            total += gradient
    scale = max(gradient.abs().max() for gradient in alone)
    for ours, expected in zip(in_batch, alone, strict=True):
        torch.testing.assert_close(ours / scale, expected / scale, atol=1e-6, rtol=0)


@torch.no_grad()
def test_no_layer_runs_above_the_one_that_is_asked_for():
    backbone, runs = exact(plain_backbone()), []
    for index, layer in enumerate(backbone.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    features, lengths = padded([torch.randn(length, 160) for length in LENGTHS])
    for layers, expected in {(0,): [0], (1,): [0], (2, 0): [0, 1], (1, -1): [0, 1, 2]}.items():
        runs.clear()
        assert set(FAMILY.hidden_states(backbone, features, lengths, layers)) == set(layers)
        assert runs == expected
    cut = FAMILY.cut(backbone, 2)
    assert (cut.config.num_hidden_layers, backbone.config.num_hidden_layers) == (2, 3)
    for layer in (0, 1, 2):
        states = (FAMILY.hidden_states(view, features, lengths, [layer])[layer] for view in (cut, backbone))
        torch.testing.assert_close(*states, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_a_batch_leaves_nothing_for_the_next_one(positions):
    """Transformers' modules keep the positions of the last batch: in 16 bits, they would stay rounded."""
    plain, clip = plain_backbone(positions), torch.randn(1, 40, 160)
    for layer in plain.encoder.layers:  # whose attention depends little on positions before it is trained
        for weight in layer.self_attn.parameters():
            weight *= 20
    backbone, expected = exact(plain), copy.deepcopy(plain)(clip).last_hidden_state
    for model in (backbone, plain):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(clip)
    torch.testing.assert_close(backbone(clip).last_hidden_state, expected, atol=0, rtol=0)
    assert (plain(clip).last_hidden_state - expected).abs().max() > 1e-4  # why `prepare` changes them
    with torch.enable_grad():  # nor what was computed without gradients
        backbone(clip).last_hidden_state.sum().backward()


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_model_trains_saves_and_loads_with_the_same_shares(positions, tmp_path):
    model = small_model(backbone_config=bert_config(positions), backbone_layer="weighted", freeze_backbone=False)
    features, lengths = padded([torch.randn(length, 160) for length in LENGTHS])
    batch = {"input_features": features, "attention_mask": length_mask(lengths, 80).long()}
    assert model.main_input_name == "input_features"
    model(**batch, labels=torch.rand(4, 9)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.backbone.encoder.parameters())
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = EmoShareModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=0)
    in_bfloat16 = EmoShareModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert in_bfloat16.backbone.dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(in_bfloat16(**batch).logits, expected, atol=2e-2, rtol=0)


def test_what_would_not_be_exact_or_cannot_be_built_is_refused():
    for fields, named in [
        ({"add_adapter": True}, "add_adapter=True is not supported"),
        ({"conv_depthwise_kernel_size": 30}, "conv_depthwise_kernel_size is 30"),
        ({"num_attention_heads": 5}, "hidden_size is 32"),
    ]:
        with pytest.raises(ValueError, match=f"^backbone_config: {named}"):
            EmoShareConfig(backbone_config=bert_config(**fields))
    model = small_model(backbone_config=bert_config())
    with pytest.raises(ValueError, match=r"^input_features: got frames of width 80; expected 160"):
        model(input_features=torch.randn(1, 20, 80))
    with pytest.raises(ValueError, match=r"^input_features: .* 1 input frames, 1 frames; expected at least 2"):
        model(input_features=torch.randn(1, 1, 160))


def test_only_speed_replaces_transformers_modules():
    plain = plain_backbone()
    assert {type(module) for module in exact(plain, fast=False).modules()} == {type(m) for m in plain.modules()}
    assert {type(module) for module in exact(plain).modules()} - {type(m) for m in plain.modules()} == {EncoderLayers}


# Where a model of it goes


def test_the_pipeline_gives_each_clip_its_scores_and_times_at_every_batch_size(model_and_extractor):
    model, extractor = model_and_extractor
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=extractor)
    clips = [speech(seconds, seed) for seed, seconds in enumerate([0.6, 1.0, 0.06, 0.8])]
    one_by_one = [emotion_share(clip, return_attention=True) for clip in clips]
    for result, expected in zip(emotion_share(clips, batch_size=3, return_attention=True), one_by_one, strict=True):
        for share, own in zip(result["shares"], expected["shares"], strict=True):
            assert share == {"label": own["label"], "score": pytest.approx(own["score"], abs=1e-5)}
    # Of two frames each: the first sees samples 0 to 560, the second 320 to 880.
    assert one_by_one[0]["attention"]["time"][0] == pytest.approx(440 / 16000)
    assert len(one_by_one[0]["attention"]["time"]) == extractor.num_frames(9600) // 2
    stock = pipeline("audio-classification", model=model, feature_extractor=extractor)(clips[0], top_k=9)
    for share, own in zip(stock, one_by_one[0]["shares"], strict=True):
        assert share == {"label": own["label"], "score": pytest.approx(own["score"], abs=1e-5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_alone_find_their_backbone_by_its_hash(dtype, model_and_extractor, bert_folder, tmp_path):
    model, _ = model_and_extractor
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    model.save_pretrained(tmp_path / "whole")
    assert all(name.startswith("heads.") for name in load_file(tmp_path / "heads" / "model.safetensors"))
    alone, whole = (EmoShareModel.from_pretrained(tmp_path / name, dtype=dtype) for name in ("heads", "whole"))
    assert alone.backbone.dtype == whole.backbone.dtype == dtype
    assert whole.config.backbone_config.num_hidden_layers == 2  # those above the one that is read are not saved
    for name, weight in whole.state_dict().items():
        assert torch.equal(alone.state_dict()[name], weight)
    changed = AutoModel.from_pretrained(bert_folder)
    changed.encoder.layers[0].conv_module.depthwise_conv.weight.data[0, 0, 0] += 1e-6
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="these heads were trained on weights with the hash"):
        EmoShareModel.from_pretrained(tmp_path / "heads", backbone_name_or_path=str(tmp_path / "changed"))


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["emoshare"] = None
import soundfile
from transformers import AutoModel, AutoModelForAudioClassification, pipeline
folder, wav = sys.argv[1:]
scores = []
for auto in (AutoModel, AutoModelForAudioClassification):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert family_name in str(type(model.family)), model.family
own = pipeline("emotion-share", model=folder, trust_remote_code=True)
stock = pipeline("audio-classification", model=folder, trust_remote_code=True)
print(json.dumps([own(wav), stock(soundfile.read(wav, dtype="float32")[0], top_k=9)]))
""".replace("family_name", '"Wav2Vec2BertFamily"')


@pytest.mark.slow
def test_trained_by_the_command_it_predicts_with_and_without_the_package(bert_folder, wav, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"train": 4, "devel": 4, "test": 2})
    output_dir = tmp_path / "output"
    flags = ["--dataset", "compare2023", "--data_dir", corpus, "--backbone", bert_folder, *SMALL_HEAD_FLAGS]
    flags += ["--backbone_layer", "2", "--num_train_epochs", "1", "--bootstrap", "0", "--feature_dtype", "float32"]
    run_script(ROOT / "train.py", *flags, "--output_dir", output_dir, cwd=tmp_path)
    model, extractor = EmoShareModel.from_pretrained(output_dir), EmoShareFeatureExtractor.from_pretrained(output_dir)
    assert family_of(model.config.backbone_config).model_types == FAMILY.model_types
    expected = EmotionSharePipeline(model=model, feature_extractor=extractor)(str(wav))

    assert main(["predict", "--model", str(output_dir), str(wav), "--output", str(tmp_path / "shares.csv")]) == 0
    header, row = read_csv(tmp_path / "shares.csv")
    predicted = dict(zip(header[1:], map(float, row[1:]), strict=True))
    assert predicted == {share["label"]: pytest.approx(share["score"], abs=1e-5) for share in expected}

    script = tmp_path / "downstream.py"
    script.write_text(WITHOUT_THE_PACKAGE)
    result = run_python(script, output_dir, wav, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    for shares in json.loads(result.stdout):
        assert shares == [{**own, "score": pytest.approx(own["score"], abs=1e-5)} for own in expected]
