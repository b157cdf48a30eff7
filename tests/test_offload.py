"""Models whose weights `device_map` has offloaded."""

import pytest
import torch
from accelerate import disk_offload
from conftest import backbone_config, needs_bfloat16, small_model, speech
from test_wav2vec2 import BACKBONES
from torch import nn

from emoshare import EmoShareModel
from emoshare.configuration_emoshare import ARCHITECTURES
from emoshare.offload_emoshare import weights_in_place


def batch():
    waveforms = torch.from_numpy(speech(1.0)).repeat(2, 1)
    mask = torch.ones_like(waveforms)
    mask[1, 9000:] = 0
    return {"input_values": waveforms, "attention_mask": mask}


def assert_same_shares_offloaded(model, folder, device_map, dtype=torch.float32):
    model.save_pretrained(folder)
    whole = EmoShareModel.from_pretrained(folder, dtype=dtype)
    offloaded = EmoShareModel.from_pretrained(
        folder, dtype=dtype, device_map=device_map, offload_folder=folder / "offloaded"
    )
    assert any(weight.is_meta for weight in offloaded.parameters())
    with torch.no_grad():
        expected = whole(**batch()).logits
        for _ in range(2):
            # Transformers keeps float32 for the heads of a model in bfloat16, but not for offloaded ones.
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(offloaded(**batch()).logits.float(), expected, atol=tolerance, rtol=0)


# Transformers' own WavLM reads weights of linear layers without calling them, and raises if they are offloaded.
OFFLOADABLE = [backbone for backbone in BACKBONES if backbone[0] != "wavlm"]


@pytest.mark.parametrize(("model_type", "fields"), OFFLOADABLE)
def test_a_backbone_on_disk_gives_the_same_shares(model_type, fields, tmp_path):
    model = small_model(backbone_config=backbone_config(model_type, **fields))
    assert_same_shares_offloaded(model, tmp_path, {"backbone": "disk", "heads": "cpu"})


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_on_disk_give_the_same_shares(architecture, dtype, tmp_path):
    model = small_model(backbone_config=backbone_config(), architecture=architecture, conv_channels=(8, 8))
    assert_same_shares_offloaded(model, tmp_path, {"backbone": "cpu", "heads": "disk"}, dtype)


def test_buffers_on_disk_give_the_same_statistics(tmp_path):
    model = small_model(architecture="statistics")
    scale = model.heads[0].pooling.standardization
    scale.mean.normal_()
    features = torch.randn(2, 20, 40)
    with torch.no_grad():
        expected = model(input_features=features).logits
        disk_offload(model.heads[0], tmp_path, execution_device="cpu", offload_buffers=True)
        assert scale.mean.is_meta
        torch.testing.assert_close(model(input_features=features).logits, expected)


def test_weights_that_are_not_offloaded_are_left_alone():
    linear = nn.Linear(2, 2, device="meta")
    with weights_in_place(linear):
        assert linear.weight.is_meta
