import sys

import pytest
import torch
from conftest import SMALL_HEAD

from emoshare import EmoShareConfig, EmotionHead
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.model import build_model

SMALL = {name: list(sizes) if isinstance(sizes, tuple) else sizes for name, sizes in SMALL_HEAD.items()}


def arguments_with(head_seeds=None, **model):
    return Arguments(DataArguments(), ModelArguments(**{**SMALL, **model}), RunArguments(head_seeds=head_seeds))


def test_acoustic():
    model, extractor = build_model(arguments_with(acoustic_features="mfcc", pool_size=3), ["joy", "awe"])
    assert model.backbone is None
    assert model.config.id2label == {0: "joy", 1: "awe"}
    assert (model.config.conv_channels, model.config.pool_size) == ((16, 8), 3)
    assert (extractor.feature_type, extractor.min_frames) == ("mfcc", 3)


@pytest.mark.parametrize(("flag", "layer"), [("-1", -1), ("1", 1), ("weighted", "weighted")])
def test_backbone(flag, layer, backbone_folder):
    arguments = arguments_with(backbone=str(backbone_folder), backbone_layer=flag, separate_heads=False)
    model, extractor = build_model(arguments, ["joy"])
    assert model.config.backbone_layer == layer
    assert model.config.backbone_config.model_type == "hubert"
    assert len(model.heads) == 1
    assert extractor.do_normalize is False


def test_adapters_need_peft(backbone_folder, monkeypatch):
    arguments = arguments_with(backbone=str(backbone_folder), finetune_last_layers=1, lora_rank=2)
    model, _ = build_model(arguments, ["joy"])
    assert (model.config.finetuned_layers, model.config.lora_rank) == (1, 2)
    assert any(".lora_A." in name for name in model.state_dict())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="--lora_rank: needs PEFT, which is not installed: pip install peft"):
        build_model(arguments, ["joy"])


@pytest.mark.parametrize(("max_frames", "seconds"), [(398, 4.004), (797, 7.994), (900, 8.0)])
def test_the_released_network_gets_windows_that_it_can_take(max_frames, seconds):
    arguments = arguments_with(normalization="sequence", max_frames=max_frames)
    model, extractor = build_model(arguments, ["joy"])
    assert extractor.chunk_length_s == pytest.approx(seconds)
    frames = 1 + (extractor.max_window_samples - extractor.frame_length) // extractor.hop_length
    assert frames == min(max_frames, 798)
    assert model.config.max_frames == max_frames


def test_each_head_has_the_initial_weights_of_its_own_seed():
    torch.manual_seed(9)
    state = torch.get_rng_state()
    expected = [head_of_seed(seed) for seed in (999, 66, 999)]
    torch.set_rng_state(state)
    model, _ = build_model(arguments_with(head_seeds=[999, 66, 999]), ["joy", "awe", "fear"])
    after = torch.rand(1)
    for head, fresh in zip(model.heads, expected, strict=True):
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in head.state_dict().items())
    assert not torch.equal(model.heads[0].output.weight, model.heads[1].output.weight)

    torch.set_rng_state(state)
    build_model(arguments_with(), ["joy", "awe", "fear"])
    assert torch.equal(after, torch.rand(1))  # the global seed is left alone


def head_of_seed(seed):
    torch.manual_seed(seed)
    return EmotionHead(EmoShareConfig(**SMALL_HEAD)).state_dict()


def test_there_must_be_a_seed_for_each_label():
    with pytest.raises(ValueError, match=r"--head_seeds: got 3; expected one for each of the 2 labels"):
        build_model(arguments_with(head_seeds=[1, 2, 3]), ["joy", "awe"])
