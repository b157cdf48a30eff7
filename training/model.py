"""A run's model, its heads untrained, and the feature extractor that fits it."""

from ..configuration_emoshare import EmoShareConfig
from ..feature_extraction_emoshare import MIN_FRAMES, EmoShareFeatureExtractor
from ..modeling_emoshare import EmoShareModel


def build_model(arguments, labels):
    """
    Args:
        arguments: `Arguments`. Without `--head_seeds`, the initial weights follow torch's global seed.
        labels: label names.

    Returns:
        `EmoShareModel` and `EmoShareFeatureExtractor`.

    Raises:
        ValueError: if there is not one seed for each label.
    """
    head_seeds, arguments = arguments.run.head_seeds, arguments.model
    if head_seeds is not None and len(head_seeds) != len(labels):
        raise ValueError(f"--head_seeds: got {len(head_seeds)}; expected one for each of the {len(labels)} labels")
    fields = {**arguments.config_fields, "id2label": dict(enumerate(labels))}
    windows = {"chunk_length_s": arguments.chunk_length_s, "min_frames": max(MIN_FRAMES, arguments.pool_size)}
    if arguments.is_acoustic:
        feature_extractor = EmoShareFeatureExtractor(arguments.acoustic_features, **windows)
        model = EmoShareModel(EmoShareConfig(feature_size=feature_extractor.feature_size, **fields))
    else:
        model = EmoShareModel.from_backbone_pretrained(
            arguments.backbone,
            revision=arguments.backbone_revision,
            backbone_layer=arguments.layer,
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
