import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, backbone_config, run_script, small_model, speech
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from released_network import ReleasedNetwork
from transformers import AutoModel, pipeline

from emoshare import EMOTIONS
from emoshare.convert_released_checkpoint import checkpoint_weights, convert_state_dicts, rename_state_dict

ARCHITECTURES = {"cnn_lstm": 1, "cnn_lstm_attention": 2}
SMALL = {"width": 7, "frames": 30, "channels": (6, 5, 4), "hidden": 8, "ffn": (6, 5, 4)}


def networks(architecture, emotions=EMOTIONS, **sizes):
    """
    The oracle, one network per emotion. As PyTorch initialises it, it is so flat that clips differ by little more than
    rounding: weights are scaled up, LayerNorms made to do something, and the last ReLU is open.
    """
    made = {}
    for emotion in emotions:
        network = ReleasedNetwork(ARCHITECTURES[architecture], EMOTIONS.index(emotion), **sizes)
        for name, parameter in network.named_parameters():
            if name.startswith("ln"):
                torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
            elif architecture == "cnn_lstm":
                parameter.data.mul_(2)
        torch.nn.init.constant_(list(network.fully_connected())[-1].bias, 5.0)
        made[emotion] = network
    return made


def state_dicts(networks):
    return {emotion: network.state_dict() for emotion, network in networks.items()}


def clips_of(lengths, width, frames, dtype):
    """Frame features (batch, frames, width), zero past each clip's end."""
    features = torch.randn(len(lengths), frames, width, dtype=dtype)
    for clip, length in zip(features, lengths, strict=True):
        clip[length:] = 0
    return features


def assert_same(model, oracle, lengths, frames, require):
    """
    Shares, and the gradients of inputs and weights, of a batch that is cut to its longest clip. `require` is called
    to see that the oracle's shares differ: a small network may be dead before its last layer.
    """
    longest = max(lengths)
    features = clips_of(lengths, model.config.feature_size, frames, model.dtype)
    theirs, ours = features.clone().requires_grad_(), features[:, :longest].clone().requires_grad_()
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    expected = torch.cat([network(theirs.transpose(1, 2), torch.tensor(lengths)) for network in oracle.values()], dim=1)
    shares = model(input_features=ours, attention_mask=mask.long()).logits
    assert (expected > 0).all()  # a dead network would be equal for nothing
    require(len(lengths) == 1 or expected.std() > 1e-3)
    assert_close(shares, expected, "shares")

    upstream = torch.randn_like(expected) / expected.numel()  # as of a mean, which the loss is
    expected.backward(upstream)
    shares.backward(upstream)
    assert_close(ours.grad[mask], theirs.grad[:, :longest][mask], "gradient of the inputs")  # padding is not an input
    for head, (emotion, network) in zip(model.heads, oracle.items(), strict=True):
        theirs = {name: parameter.grad for name, parameter in network.named_parameters()}
        theirs = rename_state_dict(theirs, emotion, model.config.architecture)
        ours = {name: parameter.grad for name, parameter in head.named_parameters()}
        assert_close(in_one(ours, ours), in_one(theirs, ours), f"gradient of the weights of {emotion}")


def assert_true(condition):
    assert condition


def in_one(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])


def assert_close(ours, theirs, name):
    """Within the tolerance, relative to the largest entry if that is more than 1: a float32 has seven digits."""
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9}[theirs.dtype]
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= tolerance * max(1.0, largest), f"{name}: {difference} of {largest}"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [[2, 398, 199, 250], [397], [3]], ids=str)
def test_released_sizes(architecture, lengths):
    oracle = networks(architecture, emotions=["Anger", "Tiredness"])
    model = convert_state_dicts(state_dicts(oracle), architecture)
    assert model.config.max_frames == 398
    assert_same(model, oracle, lengths, frames=398, require=assert_true)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    frames=st.integers(28, 31),
    lengths=st.lists(st.integers(2, 28), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(architecture, frames, lengths, seed):
    """In float64: so small a network is ill-conditioned, and float32's rounding would cover up small deviations."""
    torch.manual_seed(seed)
    sizes = {**SMALL, "frames": frames}
    oracle = networks(architecture, emotions=["Calmness", "Interest"], **sizes)
    model = small_model(
        feature_size=sizes["width"],
        architecture=architecture,
        conv_channels=sizes["channels"],
        lstm_hidden_size=sizes["hidden"],
        ffn_sizes=sizes["ffn"],
        max_frames=frames,
        normalization="sequence",
        output_activation="relu",
        id2label={0: "Calmness", 1: "Interest"},
    )
    for head, (emotion, network) in zip(model.heads, oracle.items(), strict=True):
        head.load_state_dict(rename_state_dict(network.state_dict(), emotion, architecture))
        network.double()
    assert_same(model.double(), oracle, lengths, frames, require=assume)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_labels_come_in_the_challenges_order(architecture):
    oracle = networks(architecture, emotions=["Tiredness", "Anger"], width=40)
    if architecture == "cnn_lstm_attention":
        oracle = networks(architecture, emotions=["Tiredness", "Anger"], width=40, frames=797)
    model = convert_state_dicts(state_dicts(oracle), architecture)
    assert model.config.id2label == {0: "Anger", 1: "Tiredness"}
    assert (model.config.feature_size, model.config.max_frames) == (40, 797)  # acoustic features
    assert not model.training
    torch.testing.assert_close(
        model.heads[1].state_dict()["convolutions.0.bias"], oracle["Tiredness"].layer_cnn[0].bias
    )


def test_inputs_that_are_too_long_are_refused():
    model = convert_state_dicts(state_dicts(networks("cnn_lstm", ["Anger"], width=32)), "cnn_lstm")
    with pytest.raises(ValueError, match=r"got 399 frames.*at most max_frames=398"):
        model(input_features=torch.randn(1, 399, 32))


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("cnn_lstm", lambda weights: weights.pop("lstm.bias_hh_l1"), "Sadness: lstm.bias_hh_l1 is missing"),
        ("cnn_lstm", lambda weights: weights.update(more=torch.zeros(1)), "Sadness: more is unexpected"),
        (
            "cnn_lstm",
            lambda weights: weights.update({"fc_emotion_0.0.weight": weights.pop("fc_emotion_7.0.weight")}),
            "Sadness: fc_emotion_7.0.weight is missing; fc_emotion_0.0.weight is unexpected",
        ),
        (
            "cnn_lstm_attention",
            lambda weights: weights.update({"ln3.weight": torch.ones(1, 198)}),
            r"Sadness: ln3.weight has the shape \(1, 198\), expected \(1, 199\)",
        ),
        (
            "cnn_lstm_attention",
            lambda weights: weights.update({"layer_cnn.0.weight": torch.ones(768, 33, 3)}),
            r"Sadness: layer_cnn.0.weight has the shape \(768, 33, 3\), expected \(768, 32, 3\)",
        ),
        ("cnn_lstm_attention", lambda weights: weights.pop("ln2.weight"), None),
    ],
)
@pytest.mark.parametrize("has_backbone", [False, True])
def test_a_wrong_key_is_named(architecture, change, message, has_backbone):
    weights = state_dicts(networks(architecture, ["Anger", "Sadness"], width=32))
    change(weights["Sadness"])
    backbone = backbone_config() if has_backbone else None
    if message is None:
        convert_state_dicts(weights, architecture, backbone)
    else:
        with pytest.raises(ValueError, match=message):
            convert_state_dicts(weights, architecture, backbone)


def test_only_the_nine_emotions_are_known():
    with pytest.raises(ValueError, match=r"got \['Joy'\]; expected emotions out of Anger, "):
        convert_state_dicts({"Joy": {}}, "cnn_lstm")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Nine files as the authors' scripts write them, and the networks in them."""
    folder = tmp_path_factory.mktemp("released")
    oracle = networks("cnn_lstm_attention", width=32)
    for emotion, network in oracle.items():
        optimizer = torch.optim.Adam(network.ln4.parameters(), lr=1e-4)
        torch.save(
            {"epoch": 7, "state_dict": network.state_dict(), "optimizer": optimizer.state_dict()},
            folder / f"{emotion}.pth.tar",
        )
    return oracle, {emotion: folder / f"{emotion}.pth.tar" for emotion in oracle}


def convert(files, backbone, output_dir, check=True):
    arguments = [f"{emotion}={file}" for emotion, file in files.items()]
    options = ["--architecture", "cnn_lstm_attention", "--backbone", backbone, "--output_dir", output_dir]
    return run_script(ROOT / "convert_released_checkpoint.py", *options, *arguments, cwd=ROOT, check=check)


@pytest.mark.slow
def test_nine_checkpoints_become_a_repository_with_the_authors_numbers(checkpoints, backbone_folder, tmp_path):
    oracle, files = checkpoints
    convert(files, backbone_folder, tmp_path / "model")

    clips = [
        (speech(8.0), [127280]),  # in two windows, the second the shortest that there is
        (speech(7.3), []),
        (speech(1.0)[:800], []),
    ]
    emotion_share = pipeline("emotion-share", model=str(tmp_path / "model"), trust_remote_code=True)
    assert emotion_share.feature_extractor.chunk_length_s == pytest.approx(7.984)  # 8.000 s are 399 frames
    backbone = AutoModel.from_pretrained(backbone_folder)
    for waveform, cuts in clips:
        soundfile.write(tmp_path / "clip.wav", waveform, 16000, subtype="FLOAT")
        scores = {entry["label"]: entry["score"] for entry in emotion_share(str(tmp_path / "clip.wav"))}
        expected = 0
        for window in np.split(waveform, cuts):
            frames = backbone(torch.from_numpy(window)[None]).last_hidden_state.transpose(1, 2)
            padded = torch.nn.functional.pad(frames, (0, 398 - frames.shape[2]))
            shares = [network(padded, [frames.shape[2]]).item() for network in oracle.values()]
            expected = expected + np.array(shares) * len(window) / len(waveform)
        assert [scores[emotion] for emotion in oracle] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_what_cannot_be_converted_ends_with_a_message_that_names_it(checkpoints, backbone_folder, tmp_path):
    _, files = checkpoints
    for name, text in {"text": "no checkpoint", "longer": "hello, this is no checkpoint\n"}.items():
        (tmp_path / f"{name}.pth.tar").write_text(text)
    torch.save({"epoch": 1}, tmp_path / "empty.pth.tar")
    missing = {emotion: file for emotion, file in files.items() if emotion != "Calmness"}
    for wrong, message in [
        ({**files, "Boredom": tmp_path / "text.pth.tar"}, "Boredom: .*text.pth.tar is not a checkpoint that torch"),
        ({**files, "Boredom": tmp_path / "longer.pth.tar"}, r"longer.pth.tar is not a checkpoint .* \(KeyError\)$"),
        ({**files, "Boredom": tmp_path / "none.pth.tar"}, "Boredom: .*none.pth.tar cannot be read"),
        ({**files, "Boredom": tmp_path / "empty.pth.tar"}, "Boredom: .*empty.pth.tar .* has no 'state_dict'"),
        ({**files, "Joy": files["Anger"]}, "got 'Joy=.*'; expected EMOTION=FILE"),
        (missing, "no file for Calmness"),
    ]:
        with pytest.raises(ValueError, match=message):
            checkpoint_weights([f"{emotion}={file}" for emotion, file in wrong.items()])
    result = convert(missing, backbone_folder, tmp_path / "model", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("error: no file for Calmness")
    assert not (tmp_path / "model").exists()
