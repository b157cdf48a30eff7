"""EmoShare: for a speech clip, the share of listeners who would perceive each emotion."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .audio_emoshare import load_audio
from .configuration_emoshare import EMOTIONS, EmoShareConfig
from .feature_extraction_emoshare import EmoShareFeatureExtractor
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
