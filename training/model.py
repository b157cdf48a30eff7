"""The model of a run, its heads fresh, and the feature extractor that fits it."""

from ..feature_extraction_emoshare import MIN_FRAMES, EmoShareFeatureExtractor
from ..modeling_emoshare import EmoShareConfig, EmoShareModel
from .arguments import ACOUSTIC

# Arguments that are fields of the configuration under the same name.
HEAD_FIELDS = (
    "architecture",
    "conv_channels",
    "pool_size",
    "max_frames",
    "lstm_hidden_size",
    "lstm_num_layers",
    "ffn_sizes",
    "normalization",
    "output_activation",
    "separate_heads",
)


def head_fields(arguments):
    """The fields of `EmoShareConfig` that say what a head is, of `ModelArguments`."""
    return {name: getattr(arguments, name) for name in HEAD_FIELDS if getattr(arguments, name) is not None}


def build_model(arguments, labels, head_seeds=None):
    """
    Args:
        arguments: `ModelArguments`.
        labels: label names.
        head_seeds: a seed for the initial weights of each label's network; without, they follow torch's global seed.

    Returns:
        `EmoShareModel` and `EmoShareFeatureExtractor`.

    Raises:
        ValueError: if there is not one seed for each label.
    """
    if head_seeds is not None and len(head_seeds) != len(labels):
        raise ValueError(f"--head_seeds: got {len(head_seeds)}; expected one for each of the {len(labels)} labels")
    fields = {**head_fields(arguments), "id2label": dict(enumerate(labels))}
    windows = {"chunk_length_s": arguments.chunk_length_s, "min_frames": max(MIN_FRAMES, arguments.pool_size)}
    if arguments.backbone == ACOUSTIC:
        model = EmoShareModel(EmoShareConfig(**fields))
        feature_extractor = EmoShareFeatureExtractor(arguments.acoustic_features, **windows)
    else:
        layer = arguments.backbone_layer
        model = EmoShareModel.from_backbone_pretrained(
            arguments.backbone,
            revision=arguments.backbone_revision,
            backbone_layer=layer if layer == "weighted" else int(layer),
            **fields,
        )
        feature_extractor = EmoShareFeatureExtractor.for_backbone(
            arguments.backbone,
            model.config.backbone_config,
            revision=model.config.backbone_revision,
            **windows,
        )
    if model.config.normalization == "sequence":
        feature_extractor.limit_windows(model.config.max_frames)
    if head_seeds is not None:
        for index, seed in enumerate(head_seeds):
            model.initialize_head(index, seed)
    return model, feature_extractor
