"""Emotion share corpora as Hugging Face datasets: ComParE 2023, any folder of clips and CSVs, a synthetic corpus."""

from importlib import import_module

from .corpora import CORPORA, CorpusInfo

# Imported on first use: the command line only needs the names of the corpora, and importing `datasets` takes seconds.
_MODULES = {
    "Corpus": "corpus",
    "EmotionShare": "emotion_share",
    "load_corpus": "corpus",
    "load_emotion_share": "emotion_share",
}

__all__ = ["CORPORA", "CorpusInfo", *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
