"""Finds audio files in folders, and predicts many files, continuing past broken ones."""

import os
import warnings

import soundfile

from ..other_formats_emoshare import OTHER_SUFFIXES

# What libsndfile decodes, by its own names for the formats and further common suffixes.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - OTHER_SUFFIXES
AUDIO_SUFFIXES |= {".aif", ".aifc", ".bwf", ".mp1", ".mp2", ".oga", ".opus", ".sph", ".snd", ".wave"}


def find_clips(inputs):
    """
    Args:
        inputs: paths of audio files, and of folders, which are searched recursively for files with a suffix of audio
            or video, whether these can be decoded or not. The search skips hidden files and folders, and does not
            follow links to folders.

    Returns:
        `list[str]`: paths of clips in the order of the inputs, sorted within a folder. A clip that is found twice is
        listed once, under the first path. Each path begins with the input that it was found under.

    Raises:
        FileNotFoundError: if an input does not exist, or a folder has no audio files.
        OSError: if a folder cannot be read.
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
            # A link to a clip counts as a separate clip: caches link clips of equal content to one file.
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
    """Text for the terminal, with unprintable characters escaped, as file names may contain them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def predict_each(emotion_share, clips, **options):
    """
    Predicts many files in the pipeline's batches, and continues past broken ones. A pipeline's iterator ends at the
    first error; a new one is then started after the file that caused it. Files that had been read before it, but not
    predicted yet, are read a second time.

    Args:
        emotion_share: `EmotionSharePipeline`.
        clips: paths of audio files.
        options: keyword arguments of the pipeline's call.

    Yields:
        Each clip once, with what the pipeline returns for it, or with the `ValueError` or `OSError` that it raised. A
        broken clip comes before the clips that have to be read a second time because of it.
    """
    runs = [list(clips)]
    while runs:
        run, read, done = runs.pop(), [], 0
        try:
            for result in emotion_share(_note_what_is_read(run, read), **options):
                yield run[done], result
                done += 1
        except (ValueError, OSError) as error:
            # The pipeline reads a whole clip before it asks for the next one, so the broken clip is the last in `read`.
            yield read[-1], error
            runs += [run[len(read) :], read[done:-1]]


def _note_what_is_read(clips, read):
    for clip in clips:
        read.append(clip)
        yield clip


def predict_conversations(emotion_share, recordings, find_speech):
    """
    Predicts the speech in recordings, one after the other, and continues past broken ones.

    Args:
        emotion_share: `EmotionSharePipeline`.
        recordings: paths of audio files.
        find_speech: function that takes a path and returns the segments of speech in that recording.

    Yields:
        Each recording, with what the pipeline returns for it, or with the `ValueError` or `OSError` that it raised.
        A recording without speech gives a warning.
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
