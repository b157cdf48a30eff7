import json
import re
import shutil

import pytest
import torch
from conftest import SMALL_HEAD, backbone_config
from transformers import AutoConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from emoshare import EMOTIONS, EmoShareConfig, EmoShareModel


def test_defaults_are_the_released_sizes_of_architecture_2():
    config = EmoShareConfig()
    assert config.architecture == "cnn_lstm_attention"
    assert config.conv_channels == (768, 384, 192)
    assert config.lstm_hidden_size == 512
    assert config.ffn_sizes == (256, 128, 64)
    assert config.feature_size == 40
    assert list(config.id2label.values()) == list(EMOTIONS)
    assert config.label2id["Tiredness"] == 8
    assert config.num_labels == 9


def test_ffn_sizes_follow_the_architecture():
    assert EmoShareConfig(architecture="cnn_lstm").ffn_sizes == (256, 64, 8)


def test_feature_size_follows_the_backbone():
    assert EmoShareConfig(backbone_config=backbone_config()).feature_size == 32


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architecture": "rnn"}, "architecture"),
        ({"normalization": "batch"}, "normalization"),
        ({"output_activation": "tanh"}, "output_activation"),
        ({"output_activation": "relu", "loss": "binomial"}, "loss"),
        ({"output_activation": "relu", "loss": "beta_binomial"}, "loss"),
        ({"conv_channels": ()}, "conv_channels"),
        ({"conv_channels": (8, 0)}, "conv_channels"),
        ({"conv_channels": 8}, "conv_channels"),
        ({"id2label": {"a": 0}}, "id2label"),
        ({"backbone_config": EmoShareConfig()}, "backbone_config"),
        ({"conv_kernel_size": 4}, "conv_kernel_size"),
        ({"pool_size": 0}, "pool_size"),
        ({"dropout": 1}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": True}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"lstm_hidden_size": -1}, "lstm_hidden_size"),
        ({"ffn_sizes": (1.5,)}, "ffn_sizes"),
        ({"freeze_backbone": "yes"}, "freeze_backbone"),
        ({"finetuned_layers": 1}, "finetuned_layers"),
        ({"finetuned_layers": -1, "backbone_config": backbone_config()}, "finetuned_layers"),
        ({"finetuned_layers": True, "backbone_config": backbone_config()}, "finetuned_layers"),
        ({"finetuned_layers": 3, "backbone_config": backbone_config()}, "finetuned_layers"),
        ({"finetuned_layers": 2, "backbone_layer": 1, "backbone_config": backbone_config()}, "finetuned_layers"),
        (
            {"finetuned_layers": 1, "backbone_layer": "weighted", "backbone_config": backbone_config()},
            "finetuned_layers",
        ),
        ({"finetuned_layers": 1, "freeze_backbone": False, "backbone_config": backbone_config()}, "finetuned_layers"),
        ({"lora_rank": 4, "backbone_config": backbone_config()}, "lora_rank"),
        ({"finetuned_layers": 1, "lora_rank": 33, "backbone_config": backbone_config()}, "lora_rank"),
        ({"problem_type": "single_label_classification"}, "problem_type"),
        ({"backbone_layer": 1}, "backbone_layer"),
        ({"normalization": "sequence", "max_frames": 1}, "max_frames"),
        ({"architecture": "transformer", "conv_channels": (64, 30)}, "conv_channels"),
        ({"architecture": "transformer", "normalization": "sequence"}, "normalization"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label"),
        ({"id2label": {0: "a", 1: "a"}}, "id2label"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "label2id"),
        ({"backbone_config": {"model_type": "sew"}}, "backbone_config"),
        ({"backbone_config": {"model_type": ["hubert"]}}, "backbone_config"),
        ({"backbone_config": {"model_type": "hubert", "hidden_size": "wide"}}, "backbone_config"),
        ({"backbone_config": {"model_type": "hubert", "conv_dim": [8, 1e300]}}, "backbone_config"),
        ({"backbone_config": {"model_type": "hubert", "num_hidden_layers": 10**9}}, "backbone_config"),
        ({"backbone_config": {"model_type": "hubert", "conv_stride": [10**30] * 7}}, "backbone_config"),
        ({"backbone_config": []}, "backbone_config"),
        ({"id2label": {0: "a", 1: ["b"]}}, "id2label"),
        ({"lstm_num_layers": 10**9}, "lstm_num_layers"),
        ({"pool_size": 10**30}, "pool_size"),
        ({"dtype": "float33"}, "dtype"),
        ({"model_type": ["emoshare"]}, "model_type"),
    ],
)
def test_illegal_fields_are_named(fields, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        EmoShareConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"feature_size": 40}, "feature_size"),
        ({"backbone_layer": 3}, "backbone_layer"),
        ({"backbone_layer": -2}, "backbone_layer"),
        ({"backbone_layer": "last"}, "backbone_layer"),
    ],
)
def test_illegal_fields_beside_a_backbone_are_named(fields, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        EmoShareConfig(backbone_config=backbone_config(), **fields)


def test_an_adapter_is_refused_by_name():
    with pytest.raises(ValueError, match="add_adapter"):
        EmoShareConfig(backbone_config=backbone_config("wav2vec2", add_adapter=True))


def test_saved_config_comes_back_equal(tmp_path):
    config = EmoShareConfig(
        backbone_config=backbone_config(), backbone_layer="weighted", ffn_sizes=(5,), id2label={0: "joy", 1: "awe"}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "joy", 1: "awe"}
    assert loaded.conv_channels == config.conv_channels
    ignored = {"auto_map", "_name_or_path", "transformers_version"}
    before, after = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}


def test_fields_changed_on_loading_are_checked_and_kept(tmp_path):
    EmoShareConfig(id2label={0: "joy", 1: "awe"}).save_pretrained(tmp_path)
    EmoShareConfig.from_pretrained(tmp_path, id2label={0: "calm", 1: "awe"}).save_pretrained(tmp_path)
    assert EmoShareConfig.from_pretrained(tmp_path).label2id == {"calm": 0, "awe": 1}
    changed = EmoShareConfig.from_pretrained(tmp_path, architecture="rnn")
    with pytest.raises(ValueError, match=r"^architecture: "):
        EmoShareModel(changed)
    with pytest.raises(ValueError, match=r"^architecture: "):
        changed.save_pretrained(tmp_path)


def test_saving_writes_every_module_that_the_config_names(tmp_path):
    EmoShareConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    named = [*saved["auto_map"].values(), saved["custom_pipelines"]["emotion-share"]["impl"]]
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}
    for reference in named:
        module, name = reference.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()


def test_saving_into_the_folder_of_the_modules_is_possible(tmp_path):
    EmoShareConfig().save_pretrained(tmp_path)
    before = (tmp_path / "modeling_emoshare.py").read_bytes()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_emoshare.py").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "hint"),
    [("architecure", "; did you mean 'architecture'"), ("token", ""), ("dtpe", ""), ("max_length", ""), ("conv", "")],
)
def test_unknown_fields_are_refused_by_name(name, hint, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: EmoShareConfig has no such field{re.escape(hint)}"):
        EmoShareConfig(**{name: 1})
    if name == "token":
        return  # which from_backbone_pretrained takes for itself
    with pytest.raises(ValueError, match=f"^{name}: "):
        EmoShareModel.from_backbone_pretrained(saved_backbone(tmp_path), **{name: 1})


def saved_backbone(folder):
    backbone_config().save_pretrained(folder)  # without weights: the field must be checked before they are read
    return folder


def test_common_fields_of_transformers_are_known(tmp_path):
    fields = {"dtype": "bfloat16", "output_attentions": False, "attn_implementation": "eager", "num_labels": 9}
    config = EmoShareConfig(**fields)
    config.use_cache = False  # as Transformers' Trainer does
    config.save_pretrained(tmp_path)
    assert EmoShareConfig.from_pretrained(tmp_path).num_labels == 9


def test_an_attribute_that_is_no_field_is_not_saved_and_that_is_said(tmp_path):
    config = EmoShareConfig()
    config.hf_token = "hf_secret"
    with CaptureLogger(logging.get_logger("emoshare.configuration_emoshare")) as captured:
        config.save_pretrained(tmp_path)
    assert "config.hf_token is not saved: EmoShareConfig has no such field" in captured.out
    assert "hf_secret" not in (tmp_path / "config.json").read_text()
    assert config.hf_token == "hf_secret"
    EmoShareConfig.from_pretrained(tmp_path)


def test_labels_are_in_the_order_of_their_indices(tmp_path):
    config = EmoShareConfig(id2label={"1": "b", "0": "a", 2: "c"})
    assert config.labels == ["a", "b", "c"]
    assert list(config.id2label.values()) == ["a", "b", "c"]
    config.save_pretrained(tmp_path)
    assert EmoShareConfig.from_pretrained(tmp_path).labels == ["a", "b", "c"]


@pytest.mark.parametrize("include_backbone", [True, False])
def test_a_saved_config_names_no_folder_of_this_machine(include_backbone, tmp_path, backbone_folder):
    backbone = shutil.copytree(backbone_folder, tmp_path / "here" / "backbone")
    model = EmoShareModel.from_backbone_pretrained(backbone, **SMALL_HEAD)
    model.save_pretrained(tmp_path / "here" / "model", include_backbone=include_backbone)
    for path in (tmp_path / "here" / "model").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    named = json.loads((tmp_path / "here" / "model" / "config.json").read_text())["backbone_name_or_path"]
    assert named == ("backbone" if include_backbone else "../backbone")
    assert model.config.backbone_name_or_path == str(backbone)

    moved = (tmp_path / "here").rename(tmp_path / "there")
    loaded = EmoShareModel.from_pretrained(moved / "model")
    assert torch.equal(loaded.heads[0].output.weight, model.heads[0].output.weight)
    if include_backbone:
        with pytest.raises(ValueError, match="came from a folder 'backbone', which is not known any more"):
            loaded.save_pretrained(tmp_path / "heads", include_backbone=False)
        loaded.config.backbone_name_or_path = str(moved / "backbone")
    loaded.save_pretrained(tmp_path / "heads", include_backbone=False)
    assert EmoShareModel.from_pretrained(tmp_path / "heads").config.backbone_name_or_path == str(moved / "backbone")


@pytest.mark.parametrize("name", ["/no/such/folder", "./hubret", "~/models/hubert/base", "models"])
def test_a_mistyped_folder_of_a_backbone_is_said(name):
    with pytest.raises(FileNotFoundError, match=f"backbone: {name} is neither a folder nor a Hub id"):
        EmoShareModel.from_backbone_pretrained(name)
