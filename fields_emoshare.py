"""
Choices and defaults of fields of `EmoShareConfig` and `EmoShareFeatureExtractor`, for command lines, which must not
wait seconds for the import of PyTorch and Transformers.
"""

from .architectures_emoshare import ARCHITECTURES
from .losses_emoshare import LOSSES

# The nine emotions of the ComParE 2023 Emotion Share sub-challenge, in the challenge's order.
EMOTIONS = (
    "Anger",
    "Boredom",
    "Calmness",
    "Concentration",
    "Determination",
    "Excitement",
    "Interest",
    "Sadness",
    "Tiredness",
)

# What results hold next to a value for each label: the times of attention weights, and the mean of the backbone's frame
# features. No label of a corpus may have these names.
TIME, BACKBONE = "time", "backbone"

NORMALIZATIONS = ("frame", "none", "sequence")
OUTPUT_ACTIVATIONS = ("sigmoid", "relu")
# Fields whose value is one of several names, and these names.
CHOICES = {
    "architecture": ARCHITECTURES,
    "normalization": NORMALIZATIONS,
    "output_activation": OUTPUT_ACTIVATIONS,
    "loss": LOSSES,
}
# Defaults of the fields that are also flags.
DEFAULTS = {
    "backbone_padding": None,
    "architecture": "cnn_lstm_attention",
    "conv_channels": (768, 384, 192),
    "pool_size": 2,
    "lstm_hidden_size": 512,
    "lstm_num_layers": 2,
    "ffn_sizes": None,
    "normalization": "frame",
    "max_frames": 398,
    "output_activation": "sigmoid",
    "separate_heads": True,
    "loss": "mse",
    "dropout": 0.0,
}

# The paper's acoustic features (section 2.3): 40 mel bands from 0 to 8,000 Hz, 25 ms windows; every 10 ms.
ACOUSTIC_BANDS = 40
# What the extractor makes: its name in model cards, and its width.
FEATURE_TYPES = {
    "waveform": ("waveform", 1),
    "mel": ("log-mel spectrum", ACOUSTIC_BANDS),
    "mfcc": ("MFCC", ACOUSTIC_BANDS),
    "descriptors": ("MFCC and low-level descriptors", 30),
    "filter_banks": ("filter banks", 160),
    "whisper_log_mels": ("log-mels", 80),
}
ACOUSTIC_FEATURES = ("mel", "mfcc", "descriptors")


def label_fields(id2label, fields):
    """`fields` with `id2label` and its inverse, `label2id`; unchanged if only `num_labels` was given."""
    if id2label is None:
        if fields.get("num_labels") not in (None, len(EMOTIONS)):
            return fields
        id2label = dict(enumerate(EMOTIONS))
    id2label = labels_by_index(id2label)
    label2id = {label: index for index, label in id2label.items()}
    if fields.get("label2id") not in (None, label2id):
        raise ValueError(f"label2id: got {fields['label2id']}, which is not the inverse of id2label {id2label}")
    return {**fields, "id2label": id2label, "label2id": label2id}


def labels_by_index(id2label):
    """`id2label`, sorted and with indices as `int`; raises ValueError if it is not a dict of index and label."""
    try:
        id2label = {int(index): label for index, label in id2label.items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"id2label: got {id2label!r}; expected a dict of index and label") from error
    if sorted(id2label) != list(range(len(id2label))) or not id2label:
        raise ValueError(f"id2label: got indices {sorted(id2label)}; expected 0, 1, 2, ... without gaps")
    if not all(isinstance(label, str) for label in id2label.values()):
        raise ValueError(f"id2label: got the labels {list(id2label.values())}; expected text")
    if len(set(id2label.values())) != len(id2label):
        raise ValueError(f"id2label: got a label twice in {list(id2label.values())}")
    return dict(sorted(id2label.items()))
