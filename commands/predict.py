"""`emoshare predict`."""

from pathlib import Path

from ..conversations.segment_files import read_segments
from ..conversations.turn_files import OF_ONE_RECORDING, TURN_WRITERS
from ..conversations.voice_activity import SpeechDetector
from ..evaluation.clips import find_clips, predict_conversations, predict_each, shares_of
from ..evaluation.predictions import PredictionsCsv, PredictionsJsonLines
from .arguments import OUTPUT_SUFFIXES
from .loading import load_pipeline
from .output import open_output, write_each


def run(arguments):
    """
    `emoshare predict`: a row per clip, written as soon as it is predicted; with `--segments` or `--vad`, a row per
    turn, speaker and recording. Broken files and warnings are listed at the end.
    """
    suffix = f".{(arguments.output or '.csv').rpartition('.')[2].lower()}"
    if arguments.tier and not arguments.segments:
        arguments.fail("--tier: is for --segments FILE.TextGrid")
    is_output = arguments.output and Path(arguments.output).resolve() == Path(arguments.segments or "").resolve()
    if arguments.segments and is_output:
        arguments.fail(f"--output: {arguments.output} is the file of --segments; expected another one")
    if arguments.segments or arguments.vad:
        return _predict_conversations(arguments, suffix)
    if suffix not in OUTPUT_SUFFIXES:
        arguments.fail(
            f"--output: got {arguments.output!r}; expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}, or "
            "--segments or --vad, whose turns can be written there"
        )
    clips = find_clips(arguments.inputs)
    emotion_share = load_pipeline(arguments)
    labels = emotion_share.model.config.labels
    with open_output(arguments.output) as file:
        predictions = (PredictionsJsonLines if suffix == ".jsonl" else PredictionsCsv)(file, labels)
        results = predict_each(emotion_share, clips)
        return write_each(
            arguments, len(clips), results, lambda clip, result: predictions.write(clip, shares_of(result, labels))
        )


def _predict_conversations(arguments, suffix):
    clips = find_clips(arguments.inputs)
    if len(clips) > 1 and (arguments.segments or suffix in OF_ONE_RECORDING):
        flag = "--segments" if arguments.segments else f"--output: {arguments.output}"
        raise ValueError(f"{flag}: is for one recording; got {len(clips)} files")
    if arguments.segments:
        segments = read_segments(arguments.segments, clips[0], arguments.tier)
    else:
        find_speech = SpeechDetector()
    emotion_share = load_pipeline(arguments)
    if arguments.segments:  # an error in the one file of segments ends the command
        results = ((clip, emotion_share(clip, segments=segments)) for clip in clips)
    else:
        results = predict_conversations(emotion_share, clips, find_speech)
    with open_output(arguments.output) as file:
        turns = TURN_WRITERS[suffix](file, emotion_share.model.config.labels)
        return write_each(arguments, len(clips), results, turns.write)
