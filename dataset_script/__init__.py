"""Emotion share corpora as Hugging Face datasets: ComParE 2023, any folder of clips and CSVs, a synthetic corpus."""

from .emotion_share import EmotionShare, load_emotion_share
from .published import load_published

__all__ = ["EmotionShare", "load_emotion_share", "load_published"]
