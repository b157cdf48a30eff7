"""Emotion share corpora as Hugging Face datasets: ComParE 2023, any folder of clips and CSVs, a synthetic corpus."""

from .corpora import CORPORA, CorpusInfo
from .corpus import Corpus, load_corpus
from .emotion_share import EmotionShare, load_emotion_share

__all__ = ["CORPORA", "Corpus", "CorpusInfo", "EmotionShare", "load_corpus", "load_emotion_share"]
