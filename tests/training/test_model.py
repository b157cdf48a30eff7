import pytest
from conftest import SMALL_HEAD

from emoshare.training.arguments import ModelArguments
from emoshare.training.model import build_model

SMALL = {name: list(sizes) if isinstance(sizes, tuple) else sizes for name, sizes in SMALL_HEAD.items()}


def test_acoustic():
    model, extractor = build_model(ModelArguments(acoustic_features="mfcc", pool_size=3, **SMALL), ["joy", "awe"])
    assert model.backbone is None
    assert model.config.id2label == {0: "joy", 1: "awe"}
    assert (model.config.conv_channels, model.config.pool_size) == ((16, 8), 3)
    assert (extractor.feature_type, extractor.min_frames) == ("mfcc", 3)


@pytest.mark.parametrize(("flag", "layer"), [("-1", -1), ("1", 1), ("weighted", "weighted")])
def test_backbone(flag, layer, backbone_folder):
    arguments = ModelArguments(backbone=str(backbone_folder), backbone_layer=flag, separate_heads=False, **SMALL)
    model, extractor = build_model(arguments, ["joy"])
    assert model.config.backbone_layer == layer
    assert model.config.backbone_config.model_type == "hubert"
    assert len(model.heads) == 1
    assert extractor.do_normalize is False


@pytest.mark.parametrize(("max_frames", "seconds"), [(398, 4.004), (797, 7.994), (900, 8.0)])
def test_the_released_network_gets_windows_that_it_can_take(max_frames, seconds):
    arguments = ModelArguments(normalization="sequence", max_frames=max_frames, **SMALL)
    model, extractor = build_model(arguments, ["joy"])
    assert extractor.chunk_length_s == pytest.approx(seconds)
    frames = 1 + (extractor.max_window_samples - extractor.frame_length) // extractor.hop_length
    assert frames == min(max_frames, 798)
    assert model.config.max_frames == max_frames
