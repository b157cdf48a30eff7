"""Checks the audio of a corpus, all of it, before anything is computed from it; and names it by its content."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

from datasets.utils import tqdm

from ..audio_emoshare import audio_info, load_audio
from .tables import AUDIO, FILENAME, Problems

# The digests of splits that hold the audio themselves, which cannot change: a run asks for each several times.
_of_bytes = WeakKeyDictionary()


class Clip(Mapping):
    """
    The audio of a clip, `{"bytes": ..., "path": ...}` as `load_audio` takes it, which is read when it is asked for: the
    clips of a published corpus would not fit into memory.

    Args:
        clips: the split, a `datasets.Dataset`.
        index: of the clip in it.
        filename: its name.
    """

    def __init__(self, clips, index, filename):
        self.clips, self.index, self.filename = clips, index, filename

    def __getitem__(self, key):
        return self.clips[self.index][AUDIO][key]

    def __iter__(self):
        return iter(("bytes", "path"))

    def __len__(self):
        return 2


def message_of(error, audio):
    """What an error of `load_audio` says, without the path in front of it; `audio` as a row of a corpus holds it."""
    return str(error).removeprefix(f"{audio['path'] or 'audio bytes'}: ")


def check_audio(corpus, splits, source, sampling_rate, min_samples, decode=False):
    """
    Checks that each clip is an audio file that is whole, and long enough.

    Args:
        corpus: `Corpus`.
        splits: names of the splits to check.
        source: what the error names first, such as the corpus's folder.
        sampling_rate: in Hz, that the clips will be resampled to.
        min_samples: the fewest samples that a clip may have then.
        decode: whether to decode each clip to its end, which finds damage in the middle of a file; otherwise its header
            is compared with what the file holds, which takes about a millisecond.

    Raises:
        ValueError: if anything is wrong; lists every such clip with its row.
    """
    problems = Problems(source, shown=None)
    clips = [(split, index) for split in splits for index in range(len(corpus.splits[split]))]
    rows = corpus.splits.select_columns([FILENAME, AUDIO])  # to read a row with all of its columns takes longer
    for split, index in tqdm(clips, desc="Checking audio", unit=" clips"):
        row = rows[split][index]
        try:
            num_samples = length_of(row, sampling_rate, decode)
        except (ValueError, OSError) as error:
            problems.add(*corpus.place(split, index), str(error))
            continue
        if num_samples < min_samples:
            problems.add(
                *corpus.place(split, index),
                f"{row[FILENAME]}: is too short, {num_samples / sampling_rate:.3f} s; expected at least "
                f"{min_samples / sampling_rate:.3f} s",
            )
    problems.raise_if_any()


def length_of(row, sampling_rate, decode=False):
    """
    Args:
        row: of a clip, with its `filename` and its `audio`, not decoded.
        sampling_rate: in Hz.
        decode: whether to decode it, instead of reading its header.

    Returns:
        Its number of samples at that rate.

    Raises:
        ValueError: if it is no audio file, or not whole; begins with its `filename`.
        OSError: if it cannot be read.
    """
    audio = row[AUDIO]
    try:
        if decode:
            return len(load_audio(audio, sampling_rate))
        info = audio_info(audio)
    except ValueError as error:
        raise ValueError(f"{row[FILENAME]}: {message_of(error, audio)}") from error
    return -(-info.num_samples * sampling_rate // info.sampling_rate)  # rounded up, as in resampling


def clips_fingerprint(clips):
    """
    Args:
        clips: a split, a `datasets.Dataset`.

    Returns:
        `str`: hexadecimal; changes with the names of the clips, their order, and the content of their files.
    """
    return fingerprint_of(clip_digests(clips))


def fingerprint_of(digests):
    """`clips_fingerprint` of clips with these `clip_digests`."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def clip_digests(clips):
    """Of each clip of a split, a `datasets.Dataset`, `bytes` that change with its name and the content of its file."""
    if clips in _of_bytes:
        return _of_bytes[clips]
    digests, are_in_files = [], False
    for row in tqdm(clips.select_columns([FILENAME, AUDIO]), desc="Fingerprinting audio", unit=" clips"):
        name = hashlib.blake2b(row[FILENAME].encode("utf-8", "surrogateescape")).digest()
        audio = row[AUDIO]
        if audio["bytes"] is not None:
            content = _digest(audio["bytes"])
        else:
            content = _digest_of_file(Path(audio["path"]))
            are_in_files = True
        digests.append(name + content)
    if not are_in_files:
        _of_bytes[clips] = digests
    return digests


def _digest(content):
    return hashlib.blake2b(content).digest()


def _digest_of_file(path):
    stat = path.stat()
    return _digest_at(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest_at(path, size, time):
    """Of a file with this size and time of its last change: the cells of a grid read each clip once."""
    return _digest(path.read_bytes())
