"""Emotion share corpora as Hugging Face datasets: ComParE 2023, any folder of clips and CSVs, a synthetic corpus."""

from .emotion_share import EmotionShare, load_emotion_share

__all__ = ["EmotionShare", "load_emotion_share"]
