"""`emoshare embed`."""

from ..embeddings_emoshare import embedding_widths
from ..evaluation.clips import find_clips, predict_each
from ..evaluation.embeddings import embeddings_parquet
from .loading import load_pipeline
from .output import write_each


def run(arguments):
    """`emoshare embed`: writes a row per clip. Broken files and warnings are listed at the end."""
    clips = find_clips(arguments.inputs)
    emotion_share = load_pipeline(arguments)
    with embeddings_parquet(arguments.output, embedding_widths(emotion_share.model)) as add:
        results = predict_each(emotion_share, clips, return_embedding=True)
        return write_each(arguments, len(clips), results, lambda clip, result: add(clip, result["embedding"]))
