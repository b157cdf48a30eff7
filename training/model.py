"""The model of a run, its heads fresh, and the feature extractor that fits it."""

from transformers.utils import logging

from ..feature_extraction_emoshare import MIN_FRAMES, EmoShareFeatureExtractor
from ..modeling_emoshare import EmoShareConfig, EmoShareModel
from .arguments import ACOUSTIC

logger = logging.get_logger(__name__)

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


def build_model(arguments, labels):
    """
    Args:
        arguments: `ModelArguments`.
        labels: label names.

    Returns:
        `EmoShareModel` and `EmoShareFeatureExtractor`.
    """
    fields = {name: getattr(arguments, name) for name in HEAD_FIELDS if getattr(arguments, name) is not None}
    fields["id2label"] = dict(enumerate(labels))
    windows = {"chunk_length_s": arguments.chunk_length_s, "min_frames": max(MIN_FRAMES, arguments.pool_size)}
    if arguments.backbone == ACOUSTIC:
        model = EmoShareModel(EmoShareConfig(**fields))
        return model, _fitting(EmoShareFeatureExtractor(arguments.acoustic_features, **windows), model)
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
        revision=arguments.backbone_revision,
        **windows,
    )
    return model, _fitting(feature_extractor, model)


def _fitting(feature_extractor, model):
    """Windows of no more frames than `normalization="sequence"` takes."""
    if model.config.normalization == "sequence":
        longest = feature_extractor.samples_of(model.config.max_frames + 1) - 1
        if feature_extractor.max_window_samples > longest:
            feature_extractor.chunk_length_s = longest // 16 * 16 / feature_extractor.sampling_rate
            logger.warning(
                f"windows are cut to {feature_extractor.chunk_length_s} s, the max_frames={model.config.max_frames} "
                "frames of normalization='sequence'"
            )
    return feature_extractor
