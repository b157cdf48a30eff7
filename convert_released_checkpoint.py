"""
Converts the checkpoints that the authors' training scripts write, one network per emotion, to a model repository:

    python convert_released_checkpoint.py --architecture cnn_lstm_attention --backbone facebook/hubert-large-ll60k \
        --output_dir DIR Anger=anger.pth.tar Boredom=boredom.pth.tar ...     (all nine)

The converted model computes the same as the authors' network; docs/fidelity.md says how exactly.
"""

import argparse
import sys
from statistics import mode

import torch

from emoshare.backbone_emoshare import config_of_backbone
from emoshare.configuration_emoshare import ARCHITECTURES, DEFAULT_FEATURE_SIZE, EmoShareConfig
from emoshare.feature_extraction_emoshare import EmoShareFeatureExtractor
from emoshare.fields_emoshare import EMOTIONS
from emoshare.head_emoshare import EmotionHead
from emoshare.modeling_emoshare import EmoShareModel

# Lengths that the authors pad to (paper, section 2.1).
BACKBONE_FRAMES = 398
ACOUSTIC_FRAMES = 797


def convert_state_dicts(state_dicts, architecture, backbone_config=None):
    """
    Args:
        state_dicts (`dict[str, dict[str, torch.Tensor]]`): for each emotion, the released network's weights under the
            names in the authors' code.
        architecture: `"cnn_lstm"` (Architecture 1) or `"cnn_lstm_attention"` (Architecture 2).
        backbone_config: config of the backbone; without one, the model takes frame features as `input_features`.

    Returns:
        `EmoShareModel` with `normalization="sequence"`, in eval mode, whose labels are the given emotions in the
        challenge's order. The backbone, if there is one, has random weights.

    Raises:
        ValueError: on an emotion that is not one of the nine, or a key that is missing, unexpected or of a wrong shape;
            the message names emotion and key.
    """
    config = EmoShareConfig(
        backbone_config=backbone_config, **_config_fields(state_dicts, architecture, backbone_config)
    )
    heads = _head_weights(state_dicts, config)
    model = EmoShareModel(config)
    _load(model, heads)
    return model.eval()


def _config_fields(state_dicts, architecture, backbone_config):
    unknown = sorted(set(state_dicts) - set(EMOTIONS))
    if unknown or not state_dicts:
        raise ValueError(f"state_dicts: got {unknown or 'none'}; expected emotions out of {', '.join(EMOTIONS)}")
    fields = {
        "architecture": architecture,
        "normalization": "sequence",
        "output_activation": "relu",
        "max_frames": BACKBONE_FRAMES,
        "id2label": dict(enumerate(emotion for emotion in EMOTIONS if emotion in state_dicts)),
    }
    if backbone_config is None:
        fields["feature_size"] = _input_width(state_dicts)
        if fields["feature_size"] == DEFAULT_FEATURE_SIZE:
            fields["max_frames"] = ACOUSTIC_FRAMES
    return fields


def _input_width(state_dicts):
    """Width of the frame features, from the weight of the first convolution, (channels, width, kernel)."""
    weights = {emotion: state_dict.get("layer_cnn.0.weight") for emotion, state_dict in state_dicts.items()}
    for emotion, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            raise ValueError(f"{emotion}: layer_cnn.0.weight is missing, or not of the shape (channels, width, kernel)")
    return mode(weight.shape[1] for weight in weights.values())  # an outlier among them is reported later


def _head_weights(state_dicts, config):
    """The weights of each head under our names, in the order of the labels, checked to have the shapes of `config`."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in EmotionHead(config).state_dict().items()}
    heads = []
    for emotion in config.id2label.values():
        weights = rename_state_dict(state_dicts[emotion], emotion, config.architecture)
        misshapen = [
            f"{released} has the shape {tuple(weights[ours].shape)}, expected {expected[ours]}"
            for released, ours in _names(emotion, config.architecture).items()
            if weights[ours].shape != expected[ours]
        ]
        if misshapen:
            raise ValueError(f"{emotion}: " + "; ".join(misshapen))
        heads.append(weights)
    return heads


def rename_state_dict(state_dict, emotion, architecture):
    """
    One released network's weights, or gradients, under the names in `EmotionHead`. The released network's unused `ln2`
    is dropped.

    Raises:
        ValueError: on a key that is missing, unexpected or not a tensor of finite numbers.
    """
    names = _names(emotion, architecture)
    unused = {"ln2.weight", "ln2.bias"} if architecture == "cnn_lstm_attention" else set()
    problems = [f"{key} is missing" for key in names if key not in state_dict]
    problems += [f"{key} is unexpected" for key in state_dict if key not in names and key not in unused]
    problems += [
        f"{key} is not a tensor of finite numbers"
        for key in names
        if key in state_dict and not (isinstance(state_dict[key], torch.Tensor) and state_dict[key].isfinite().all())
    ]
    if problems:
        raise ValueError(f"{emotion}: " + "; ".join(problems))
    return {ours: state_dict[released] for released, ours in names.items()}


def _names(emotion, architecture):
    """The released network's keys, and the names of the same weights in `EmotionHead`."""
    modules = {f"layer_cnn.{2 * index}": f"convolutions.{index}" for index in range(3)}
    if architecture == "cnn_lstm":
        layers = f"fc_emotion_{EMOTIONS.index(emotion)}"
        modules |= {f"{layers}.{index}": f"ffn.{index}" for index in (0, 2, 4)}  # Linear, ReLU
        modules[f"{layers}.6"] = "output"
    else:
        modules |= {"ln1": "lstm_norm", "Q_scale.0": "attention.query", "ln3": "attention.weight_norm"}
        for index in range(3):  # Linear, ReLU, LayerNorm
            modules[f"fc_emotion_0{index + 1}.0"] = f"ffn.{3 * index}"
            modules[f"ln{index + 4}"] = f"ffn.{3 * index + 2}"
        modules["fc_emotion_04.0"] = "output"
    names = {
        f"{released}.{kind}": f"{ours}.{kind}" for released, ours in modules.items() for kind in ("weight", "bias")
    }
    for layer in range(2):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            names[f"lstm.{kind}_l{layer}"] = f"lstm.{layer}.{kind}_l0"
    return names


def _load(model, heads):
    for head, weights in zip(model.heads, heads, strict=True):
        head.load_state_dict(weights)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), allow_abbrev=False)
    parser.add_argument(
        "--architecture",
        required=True,
        choices=[name for name, architecture in ARCHITECTURES.items() if architecture.is_released],
    )
    parser.add_argument(
        "--backbone", required=True, help="Hub id or folder of the backbone that the heads were trained on"
    )
    parser.add_argument("--backbone_revision", help="branch, tag or commit of the backbone")
    parser.add_argument("--output_dir", required=True, help="folder for the model repository")
    parser.add_argument("checkpoints", nargs="+", metavar="EMOTION=FILE", help="a .pth.tar file for each of the nine")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def convert(arguments):
    state_dicts = checkpoint_weights(arguments.checkpoints)
    backbone, revision = arguments.backbone, arguments.backbone_revision
    backbone_config = config_of_backbone(backbone, revision)
    fields = _config_fields(state_dicts, arguments.architecture, backbone_config)
    # Before the backbone's weights are downloaded, so that errors in a checkpoint are reported early.
    heads = _head_weights(state_dicts, EmoShareConfig(backbone_config=backbone_config, **fields))

    model = EmoShareModel.from_backbone_pretrained(backbone, revision=revision, **fields)
    _load(model, heads)
    feature_extractor = EmoShareFeatureExtractor.for_backbone(backbone, backbone_config, revision=revision)
    feature_extractor.limit_windows(model.config.max_frames)
    model.save_pretrained(arguments.output_dir)
    feature_extractor.save_pretrained(arguments.output_dir)
    print(f"Model repository: {arguments.output_dir}")


def checkpoint_weights(checkpoints):
    """
    Args:
        checkpoints (`list[str]`): EMOTION=FILE for each of the nine.

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: the weights of each emotion's network, under the names in the files.

    Raises:
        ValueError: if an emotion is unknown, given twice or missing, or a file is not a checkpoint of the authors'
            scripts.
    """
    files = {}
    for checkpoint in checkpoints:
        emotion, equals, file = checkpoint.partition("=")
        if not equals or emotion not in EMOTIONS or emotion in files:
            raise ValueError(f"got {checkpoint!r}; expected EMOTION=FILE, once for each of {', '.join(EMOTIONS)}")
        files[emotion] = file
    missing = [emotion for emotion in EMOTIONS if emotion not in files]
    if missing:
        raise ValueError(f"no file for {', '.join(missing)}")
    return {emotion: _load_checkpoint(file, emotion) for emotion, file in files.items()}


def _load_checkpoint(file, emotion):
    """The weights in a checkpoint, which also holds an epoch and an optimizer state."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{emotion}: {file} cannot be read: {error}") from error
    except Exception as error:  # of any kind, where the file is not a checkpoint
        raise ValueError(
            f"{emotion}: {file} is not a checkpoint that torch can read with weights_only=True ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{emotion}: {file} is not a checkpoint of the authors' scripts: it has no 'state_dict'")
    return checkpoint["state_dict"]


if __name__ == "__main__":
    main(sys.argv[1:])
