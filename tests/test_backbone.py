import pytest
import torch
from conftest import backbone_config
from transformers import AutoModel

from emoshare.backbone_emoshare import frame_features, is_exact_in_batch, num_frames

LENGTHS = [9600, 16000, 720, 12345]

BACKBONES = [
    ("hubert", {}),
    ("hubert", {"do_stable_layer_norm": False}),
    ("hubert", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    ("hubert", {"conv_pos_batch_norm": True}),
    ("wav2vec2", {}),
    ("wav2vec2", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    ("wavlm", {}),
    ("wavlm", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    ("unispeech-sat", {}),
    ("unispeech-sat", {"feat_extract_norm": "group", "do_stable_layer_norm": False}),
    ("data2vec-audio", {}),
]


def padded(waveforms):
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)


@pytest.mark.parametrize(("model_type", "fields"), BACKBONES)
@pytest.mark.parametrize("layer", [-1, 1, "weighted"])
def test_features_are_those_of_the_plain_backbone_on_each_clip_alone(model_type, fields, layer):
    backbone = AutoModel.from_config(backbone_config(model_type, **fields)).eval()
    clips = [torch.randn(length) for length in LENGTHS]
    with torch.no_grad():
        output = frame_features(backbone, padded(clips), torch.tensor(LENGTHS), layer)
        for features, length, clip in zip(output.features, output.lengths, clips, strict=True):
            alone = backbone(clip[None], output_hidden_states=True)
            expected = {-1: alone.last_hidden_state[0], 1: alone.hidden_states[1][0]}.get(layer)
            if layer == "weighted":
                expected = torch.stack(alone.hidden_states, dim=1)[0]
            assert length == expected.shape[-2]
            torch.testing.assert_close(features[..., :length, :], expected, atol=1e-5, rtol=0)


def test_group_norm_leaks_padding_in_plain_transformers():
    """Why those backbones run clip by clip: were this to pass one day, the detour would not be needed."""
    config = backbone_config(feat_extract_norm="group", do_stable_layer_norm=False)
    assert not is_exact_in_batch(config)
    backbone = AutoModel.from_config(config).eval()
    clip = torch.randn(1, 8000)
    with torch.no_grad():
        alone = backbone(clip).last_hidden_state[0]
        in_batch = backbone(torch.nn.functional.pad(clip, (0, 8000))).last_hidden_state[0, : len(alone)]
    assert (alone - in_batch).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False}])
def test_hidden_states_come_padded_to_the_batch(fields):
    backbone = AutoModel.from_config(backbone_config(**fields)).eval()
    clips = [torch.randn(length) for length in LENGTHS]
    with torch.no_grad():
        output = frame_features(backbone, padded(clips), torch.tensor(LENGTHS), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert all(states.shape == output.features.shape for states in output.hidden_states)


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16000, 127759, 127760])
def test_num_frames_is_that_of_transformers(num_samples):
    backbone = AutoModel.from_config(backbone_config())
    expected = int(backbone._get_feat_extract_output_lengths(torch.tensor(num_samples)))
    assert num_frames(backbone.config, num_samples) == expected
