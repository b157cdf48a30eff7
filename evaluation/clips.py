"""Predicts audio files: finds them in folders, and predicts many of them past those that are broken."""

import os
import warnings

import soundfile

from ..other_formats_emoshare import OTHER_SUFFIXES

# What libsndfile decodes, under its own names and further ones of the same formats.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - OTHER_SUFFIXES
AUDIO_SUFFIXES |= {".aif", ".aifc", ".bwf", ".mp1", ".mp2", ".oga", ".opus", ".sph", ".snd", ".wave"}


def find_clips(inputs):
    """
    Args:
        inputs: paths of audio files, and of folders to search, with all folders in them, for files with a suffix of
            audio or video, whether they can be decoded or not. The search skips hidden files and folders, and links to
            folders.

    Returns:
        `list[str]`: the clips in the order of the inputs, those of a folder sorted; each once, under the first path
        that leads to it, which begins as the input does.

    Raises:
        FileNotFoundError: on an input that does not exist, or a folder without audio files.
        OSError: on a folder that cannot be read.
    """
    clips = {}
    for path in inputs:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{printable(path) or repr(path)}: no such file or folder")
        found = _search(path) if os.path.isdir(path) else [path]
        if not found:
            expected = ", ".join(sorted(AUDIO_SUFFIXES))
            raise FileNotFoundError(f"{printable(path)}: no audio files in this folder; expected one of {expected}")
        for clip in found:
            # A link to a clip is a clip of its own: caches link clips of equal content to one file.
            folder, name = os.path.split(clip)
            clips.setdefault(os.path.join(os.path.realpath(folder), name), clip)
    return list(clips.values())


def _search(folder):
    def fail(error):
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES | OTHER_SUFFIXES
        ]
    return sorted(found)


def printable(text):
    """Text for the terminal: what is no character there, in names of files above all, is escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def predict_each(emotion_share, clips, **options):
    """
    Predicts many files in the pipeline's batches, and continues after those that are broken. An iterator of a pipeline
    ends with the first error: here, a new one then begins after the file that caused it. Files that were read ahead of
    that file are read a second time.

    Args:
        emotion_share: `EmotionSharePipeline`.
        clips: paths of audio files.
        options: as in the pipeline's call.

    Yields:
        Each clip once, with what the pipeline returns for it, or with the `ValueError` or `OSError` that it raised. A
        broken clip comes before those that were read ahead of it.
    """
    runs = [list(clips)]
    while runs:
        run, read, done = runs.pop(), [], 0
        try:
            for result in emotion_share(_note_what_is_read(run, read), **options):
                yield run[done], result
                done += 1
        except (ValueError, OSError) as error:
            # The pipeline reads a clip whole before it asks for the next one: the broken one is the last it asked for.
            yield read[-1], error
            runs += [run[len(read) :], read[done:-1]]


def _note_what_is_read(clips, read):
    for clip in clips:
        read.append(clip)
        yield clip


def predict_conversations(emotion_share, recordings, find_speech):
    """
    Predicts the speech in recordings, one after the other, and continues after those that are broken.

    Args:
        emotion_share: `EmotionSharePipeline`.
        recordings: paths of audio files.
        find_speech: function of a path to its segments.

    Yields:
        Each recording, with what the pipeline returns for it, or with the `ValueError` or `OSError` that it raised. One
        without speech is warned of.
    """
    for recording in recordings:
        try:
            segments = find_speech(recording)
            if not segments:
                warnings.warn(f"{recording}: no speech was found", stacklevel=2)
            yield recording, emotion_share(recording, segments=segments)
        except (ValueError, OSError) as error:
            yield recording, error


def shares_of(result, labels):
    """The shares that the pipeline returned for a clip, in the order of the labels."""
    shares = {share["label"]: share["score"] for share in result}
    return [shares[label] for label in labels]
