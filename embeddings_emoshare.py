"""Embeddings: the input of each emotion's regressor, and the mean of the frame features."""

from contextlib import contextmanager
from functools import partial

from .checks_emoshare import check_no_label_is
from .fields_emoshare import BACKBONE
from .frames_emoshare import length_mask, masked_mean


def embedding_widths(model):
    """
    The widths of a model's embeddings, `{name: int}`, in the order in which they are returned.

    Raises:
        ValueError: if a label is called `"backbone"`.
    """
    check_no_label_is(BACKBONE, model.config.labels, "embeddings")
    return {**dict.fromkeys(model.config.labels, model.heads[0].pooling.width), BACKBONE: model.config.feature_size}


@contextmanager
def embeddings_noted(model):
    """
    Records the embeddings of each forward pass of a model while the context is open.

    Args:
        model: `EmoShareModel`.

    Yields:
        `dict`, which each `forward` fills: for each label, (batch, width) float32, the input of its head's regressor;
        under `BACKBONE`, (batch, width) float32, the mean of the frame features over each clip's own frames, and over
        layers if there are several. With `separate_heads=False`, all labels have the same vector.
    """
    noted, labels = {}, model.config.labels

    def note_pooled(own_labels, pooling, arguments, outputs):
        noted.update(dict.fromkeys(own_labels, outputs[0].float()))

    def note_frames(head, arguments):
        features, lengths = arguments
        features = features.float().mean(dim=1) if features.dim() == 4 else features.float()
        mask = length_mask(lengths, features.shape[1])
        noted[BACKBONE] = masked_mean(features.masked_fill(~mask[..., None], 0), mask)  # NaN in padding is ignored

    labels_of_heads = [[label] for label in labels] if model.config.separate_heads else [labels]
    handles = [model.heads[0].register_forward_pre_hook(note_frames)]
    for head, own_labels in zip(model.heads, labels_of_heads, strict=True):
        handles.append(head.pooling.register_forward_hook(partial(note_pooled, own_labels)))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
