"""
Multilingual encoders, and checkpoints in old formats on the Hub: each loads with the right weights.

Configs and preprocessor configs have the fields of the published ones, with small sizes.
"""

import json

import pytest
import torch
from conftest import SMALL_HEAD, run_python
from loopback_hub import LoopbackHub, Repository
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    AutoModelForPreTraining,
    HubertForSequenceClassification,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.frames_emoshare import length_mask

OF_ALL = {
    "apply_spec_augment": True,
    "bos_token_id": 1,
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "eos_token_id": 2,
    "feat_extract_activation": "gelu",
    "feat_extract_dropout": 0.0,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-05,
    "layerdrop": 0.1,
    "mask_time_prob": 0.075,
    "num_attention_heads": 2,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 16,
    "num_feat_extract_layers": 7,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "use_weighted_layer_sum": False,
    "vocab_size": 12,
}
LAYER_NORM = {"conv_bias": True, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
GROUP_NORM = {"conv_bias": False, "do_stable_layer_norm": False, "feat_extract_norm": "group"}
QUANTIZER = {
    "codevector_dim": 24,
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 8,
    "proj_codevector_dim": 24,
}
MMS = {"adapter_kernel_size": 3, "adapter_stride": 2, "add_adapter": False, "num_adapter_layers": 3}
ENCODERS = {
    "xls-r": {"model_type": "wav2vec2", "transformers_version": "4.12.0.dev0", **LAYER_NORM, **QUANTIZER},
    "mms": {"model_type": "wav2vec2", **LAYER_NORM, **QUANTIZER, **MMS, "adapter_attn_dim": None},
    "mms-adapters": {"model_type": "wav2vec2", **LAYER_NORM, **QUANTIZER, **MMS, "adapter_attn_dim": 4},
    "mhubert-147": {"model_type": "hubert", **GROUP_NORM, "feat_proj_layer_norm": True, "classifier_proj_size": 8},
    "hubert-large": {"model_type": "hubert", **LAYER_NORM},
    "wavlm-large": {"model_type": "wavlm", **LAYER_NORM, "num_buckets": 20, "max_bucket_distance": 40},
}
PREPROCESSOR = {
    "do_normalize": True,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
CLIP = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))


def config_of(encoder):
    return AutoConfig.for_model(**OF_ALL, **ENCODERS[encoder])


def old_names(weights):
    """The weight names from before PyTorch's parametrisations."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {
        next((name.replace(*pair) for pair in old.items() if pair[0] in name), name): weight.contiguous()
        for name, weight in weights.items()
    }


def write_pickle(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def write_safetensors(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder, weights, prefix, suffix, write):
    names = sorted(weights)
    parts = [names[::2], names[1::2]]
    files = [f"{prefix}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        write({name: weights[name] for name in part}, folder / file)
    index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / f"{prefix}.{suffix}.index.json").write_text(text)


def write_pickles(folder, weights):
    in_shards(folder, weights, "pytorch_model", "bin", torch.save)


def write_shards(folder, weights):
    in_shards(folder, weights, "model", "safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))


def store(folder, model, encoder, write=write_pickle, names=old_names, preprocessor=PREPROCESSOR):
    """Writes a repository as it was written years ago, without help from Transformers of today."""
    folder.mkdir()
    config = {**OF_ALL, **ENCODERS[encoder], "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, names(model.state_dict()))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def plain_states(model):
    """Hidden states of the encoder in a Transformers model, (layers, frames, width)."""
    encoder = getattr(model, model.base_model_prefix, model).eval()
    with torch.no_grad():
        outputs = encoder(CLIP, output_hidden_states=True)
    return torch.stack([*outputs.hidden_states, outputs.last_hidden_state], dim=1)[0]


def states_of(model):
    """The same of an `EmoShareModel`."""
    layers = [0, 1, 2, -1]
    with torch.no_grad():
        by_layer = model.eval().frame_features(CLIP, layers=layers).by_layer
    return torch.stack([by_layer[layer][0] for layer in layers])


@torch.no_grad()
def assert_exact_in_every_position(model):
    clips = [CLIP[0], CLIP[0, :2600], CLIP[0, 500:1500]]
    alone = [model.frame_features(clip[None]).by_layer[-1][0] for clip in clips]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        lengths = torch.tensor([len(clips[index]) for index in order])
        waveforms = nn.utils.rnn.pad_sequence([clips[index] for index in order], batch_first=True, padding_value=9.0)
        features, num_frames = model.frame_features(waveforms, length_mask(lengths, waveforms.shape[1]))
        for index, own, frames in zip(order, features[-1], num_frames, strict=True):
            torch.testing.assert_close(own[:frames], alone[index], atol=1e-5, rtol=0)


def without_progress(text):
    return [line for line in text.replace("\r", "\n").splitlines() if line and not line.startswith("Loading weights")]


@pytest.fixture
def said(caplog):
    """What Transformers and this package have logged since the last call."""
    with CaptureLogger(logging.get_logger("transformers")) as transformers:

        def messages():
            texts = [*transformers.io.getvalue().splitlines(), *(record.getMessage() for record in caplog.records)]
            transformers.io.truncate(0)
            caplog.clear()
            return texts

        yield messages


def assert_loads(folder, source, said, expected=()):
    """Loads with the source's weights, and logs only these messages."""
    said()
    model = EmoShareModel.from_backbone_pretrained(folder, **SMALL_HEAD)
    extractor = EmoShareFeatureExtractor.for_backbone(folder, model.config.backbone_config)
    for part, message in zip(expected, said(), strict=True):
        assert part in message
    torch.testing.assert_close(states_of(model), plain_states(source), atol=1e-5, rtol=0)
    assert (extractor.do_normalize, extractor.sampling_rate) == (True, 16000)
    return model


HEADS = {"none": AutoModel, "ctc": AutoModelForCTC, "pretraining": AutoModelForPreTraining}
PUBLISHED = [
    ("xls-r", "pretraining", write_pickle),
    ("mms", "pretraining", write_pickle),
    ("mms-adapters", "ctc", write_safetensors),
    ("mhubert-147", "none", write_pickle),
    ("mhubert-147", "none", write_safetensors),
    ("hubert-large", "none", write_pickle),
    ("wavlm-large", "none", write_pickle),
    ("mhubert-147", "ctc", write_shards),
    ("xls-r", "ctc", write_shards),
    ("wavlm-large", "ctc", write_pickles),
    ("mms", "pretraining", write_pickles),
]


@pytest.mark.parametrize(("encoder", "head", "write"), PUBLISHED)
def test_an_encoder_loads_in_the_form_in_which_it_is_published(encoder, head, write, tmp_path, said):
    source = HEADS[head].from_config(config_of(encoder))
    folder = store(tmp_path / "encoder", source, encoder, write)
    model = assert_loads(folder, source, said)
    assert_exact_in_every_position(model)
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        states_of(EmoShareModel.from_pretrained(tmp_path / "model")), states_of(model), atol=0, rtol=0
    )


@pytest.mark.parametrize("names", [old_names, dict], ids=["old_names", "new_names"])
@pytest.mark.parametrize("write", [write_pickle, write_pickles, write_safetensors, write_shards])
def test_a_classifier_around_an_encoder_without_preprocessor_config_in_any_file(write, names, tmp_path, said):
    source = HubertForSequenceClassification(config_of("mhubert-147"))
    folder = store(tmp_path / "encoder", source, "mhubert-147", write, names, preprocessor=None)
    assert_loads(folder, source, said, ["has no preprocessor config"])


def test_an_old_preprocessor_config_may_not_say_of_what_it_is(tmp_path, said):
    typed = {**PREPROCESSOR, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    for name, preprocessor in {"typed": typed, "untyped": PREPROCESSOR}.items():
        source = AutoModel.from_config(config_of("wavlm-large"))
        assert_loads(store(tmp_path / name, source, "wavlm-large", preprocessor=preprocessor), source, said)


def test_heads_alone_find_a_backbone_in_an_old_form(tmp_path):
    source = AutoModelForPreTraining.from_config(config_of("xls-r"))
    folder = store(tmp_path / "encoder", source, "xls-r")
    model = EmoShareModel.from_backbone_pretrained(folder, **SMALL_HEAD)
    model.save_pretrained(tmp_path / "heads", include_backbone=False)
    assert all(name.startswith("heads.") for name in load_file(tmp_path / "heads" / "model.safetensors"))
    alone = EmoShareModel.from_pretrained(tmp_path / "heads")
    torch.testing.assert_close(states_of(alone), plain_states(source), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["none", "ctc"])
def test_a_checkpoint_that_is_not_the_configs_is_named(head, tmp_path, said):
    source = HEADS[head].from_config(config_of("hubert-large"))
    folder = store(tmp_path / "encoder", source, "hubert-large")
    config = json.loads((folder / "config.json").read_text())

    def load(**fields):
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return EmoShareModel.from_backbone_pretrained(folder, **SMALL_HEAD)

    with pytest.raises(ValueError, match=r"encoder: the checkpoint lacks 16 backbone weights: \['encoder.layers.2.att"):
        load(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"encoder: config.json: .*'hidden_size' expected int, got str"):
        load(hidden_size="wide")
    with pytest.raises(ValueError, match=r"have other shapes than its config says: enc.* is \(48,\); expected \(40,"):
        load(intermediate_size=40)
    said()
    load(num_hidden_layers=1)
    (message,) = said()
    assert "holds 16 backbone weights for which its config has no place" in message
    assert "encoder.layers.1." in message


def test_the_encoder_of_another_library_is_named_by_what_it_lacks(tmp_path):
    """As fairseq's checkpoints, whose names are others."""
    source = AutoModel.from_config(config_of("hubert-large"))

    def others(weights):
        return {f"w2v_model.{name}": weight for name, weight in old_names(weights).items()}

    with pytest.raises(ValueError, match=r"encoder: the checkpoint lacks \d+ backbone weights"):
        EmoShareModel.from_backbone_pretrained(store(tmp_path / "encoder", source, "hubert-large", names=others))


BY_ID = """
import sys, torch
from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.frames_emoshare import length_mask
model = EmoShareModel.from_backbone_pretrained(sys.argv[1], conv_channels=[8], lstm_hidden_size=8, ffn_sizes=[4])
EmoShareFeatureExtractor.for_backbone(sys.argv[1], model.config.backbone_config, model.config.backbone_revision)
torch.save(model.backbone.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_by_id_a_pickle_is_fetched_once_and_nobody_is_asked_to_convert_it(tmp_path):
    source = AutoModelForPreTraining.from_config(config_of("xls-r"))
    folder = store(tmp_path / "encoder", source, "xls-r", preprocessor=None)
    with LoopbackHub() as hub:
        repository = hub.repositories["org/xls-r"] = Repository(private=False)
        repository.commit({path.name: (path.read_bytes(), False) for path in folder.iterdir()})
        environment = hub.environment(tmp_path / "home", token=None)
        result = run_python("-c", BY_ID, "org/xls-r", tmp_path / "weights", cwd=tmp_path, **environment)
    assert [line for line in without_progress(result.stderr) if "no preprocessor config" not in line] == []
    weights = torch.load(tmp_path / "weights", weights_only=True)
    for name, weight in source.wav2vec2.state_dict().items():
        assert torch.equal(weights[name], weight)
    fetched = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched == ["config.json", "pytorch_model.bin"]
    assert not any(path.startswith("/api/models/") for _, path in hub.requests)  # where conversions begin
