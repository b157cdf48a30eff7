"""Importing this module registers our classes with the Auto classes and the pipelines of Transformers."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_emoshare import EmoShareConfig
from .feature_extraction_emoshare import EmoShareFeatureExtractor
from .modeling_emoshare import EmoShareModel
from .pipeline_emoshare import EmotionSharePipeline

AutoConfig.register(EmoShareConfig.model_type, EmoShareConfig)
AutoModel.register(EmoShareConfig, EmoShareModel)
AutoModelForAudioClassification.register(EmoShareConfig, EmoShareModel)
AutoFeatureExtractor.register(EmoShareConfig, EmoShareFeatureExtractor)
PIPELINE_REGISTRY.register_pipeline(
    "emotion-share", EmotionSharePipeline, pt_model=AutoModelForAudioClassification, type="audio"
)
