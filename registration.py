"""The public names, and their registration with the Auto classes and the pipelines of Transformers."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .audio_emoshare import load_audio
from .configuration_emoshare import EmoShareConfig
from .feature_extraction_emoshare import EmoShareFeatureExtractor
from .fields_emoshare import EMOTIONS
from .head_emoshare import EmotionHead
from .modeling_emoshare import EmoShareModel, EmoShareOutput
from .pipeline_emoshare import EmotionSharePipeline

__all__ = [
    "EMOTIONS",
    "EmoShareConfig",
    "EmoShareFeatureExtractor",
    "EmoShareModel",
    "EmoShareOutput",
    "EmotionHead",
    "EmotionSharePipeline",
    "load_audio",
]

AutoConfig.register(EmoShareConfig.model_type, EmoShareConfig)
AutoModel.register(EmoShareConfig, EmoShareModel)
AutoModelForAudioClassification.register(EmoShareConfig, EmoShareModel)
AutoFeatureExtractor.register(EmoShareConfig, EmoShareFeatureExtractor)
PIPELINE_REGISTRY.register_pipeline(
    "emotion-share", EmotionSharePipeline, pt_model=AutoModelForAudioClassification, type="audio"
)
