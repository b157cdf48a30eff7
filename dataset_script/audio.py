"""Checks all audio of a corpus before anything is computed from it, and fingerprints it by its content."""

import hashlib
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from datasets.utils import tqdm

from ..audio_emoshare import audio_info, load_audio
from .digests import Entry, are_settled, file_digests, keep, kept, state_of
from .streamed import audio_of, is_reference, reference_digests
from .tables import AUDIO, FILENAME, Problems

ROWS_AT_ONCE = 100  # rows of audio in memory
DIGEST_BYTES = hashlib.blake2b().digest_size

# Digests of splits that hold the audio themselves, which cannot change. A run needs each several times.
_of_bytes = WeakKeyDictionary()


class Clip(Mapping):
    """
    The audio of a clip, `{"bytes": ..., "path": ...}` as `load_audio` takes it, which is read on access: all clips of a
    published corpus would not fit into memory.

    Args:
        clips: the split, a `datasets.Dataset`.
        index: index of the clip in the split.
        filename: the clip's name.
    """

    def __init__(self, clips, index, filename):
        self.clips, self.index, self.filename = clips, index, filename

    def __getitem__(self, key):
        if key not in ("bytes", "path"):  # `load_audio` looks for other keys too, which needs no reading
            raise KeyError(key)
        return audio_of(self.clips[self.index][AUDIO])[key]

    def __iter__(self):
        return iter(("bytes", "path"))

    def __len__(self):
        return 2


def message_of(error, audio):
    """Message of an error of `load_audio` without the leading path; `audio`: as in a row of a corpus."""
    return str(error).removeprefix(f"{audio['path'] or 'audio bytes'}: ")


def check_audio(corpus, splits, source, sampling_rate, min_samples, decode=False, part=None):
    """
    Checks that each clip is a complete audio file that is long enough.

    Args:
        corpus: `Corpus`.
        splits: names of the splits to check.
        source: what the error begins with, such as the corpus's folder.
        sampling_rate: rate in Hz to which the clips will be resampled.
        min_samples: the least number of samples that a clip must have at that rate.
        decode: whether to decode each clip to its end, which finds damage in the middle of a file. Otherwise only its
            header is compared with what the file holds, which takes about a millisecond.
        part: `Part` of the clips to check; all if not given.

    Raises:
        ValueError: if anything is wrong; lists every such clip with its row.
    """
    problems = Problems(source, shown=None)
    clips = [(split, index) for split in splits for index in range(len(corpus.splits[split]))]
    if part is not None:
        clips = part.of(clips)
    rows = corpus.splits.select_columns([FILENAME, AUDIO])  # reading rows with all columns takes longer
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
        row: row of a clip with its `filename` and its `audio`, not decoded.
        sampling_rate: rate in Hz.
        decode: whether to decode the clip instead of reading its header.

    Returns:
        The clip's number of samples at that rate.

    Raises:
        ValueError: if the clip is not an audio file or not complete; begins with its `filename`.
        OSError: if the clip cannot be read.
    """
    audio = audio_of(row[AUDIO])
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
    """`clips_fingerprint`, from `clip_digests`."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def clip_digests(clips):
    """
    Returns, for each clip of a split, a `datasets.Dataset`, `bytes` that change with its name and the content of its
    file. A file is read once, and again only if it has changed: see `digests`.
    """
    if clips in _of_bytes:
        return _of_bytes[clips]
    paths = audio_files(clips)
    in_files = [path for path in paths if path is not None]
    of_files = iter(file_digests(in_files))
    if len(clips) and is_reference(clips[0][AUDIO]):
        of_rows = reference_digests(path for audio in _audio(clips) for path in audio.field("path").to_pylist())
    else:
        of_rows = iter(_digests_of_rows(clips) if len(in_files) < len(paths) else [])
    digests = [
        hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest() + next(of_rows if path is None else of_files)
        for name, path in zip(clips[FILENAME][:], paths, strict=True)
    ]
    if not in_files:
        _of_bytes[clips] = digests
    return digests


def audio_files(clips):
    """The path of each clip of a split, a `datasets.Dataset`; `None` if its audio is in the split or streamed."""
    if len(clips) and is_reference(clips[0][AUDIO]):
        return [None] * len(clips)
    paths = []
    for audio in _audio(clips):
        is_file = audio.field("bytes").is_null().to_pylist()
        paths += [path if there else None for path, there in zip(audio.field("path").to_pylist(), is_file, strict=True)]
    return paths


def _digests_of_rows(clips):
    """Digests of the clips whose audio a split holds itself. They are stored if the split is in Arrow files."""
    name = b"rows of " + clips._fingerprint.encode()
    files = [file["filename"] for file in clips.cache_files]
    state = state_of(files)
    joined = kept({name: state}).get(name) if files else None
    if joined is None:
        is_settled = bool(files) and are_settled(files)
        held = (content.as_buffer() for audio in _audio(clips) for content in audio.field("bytes") if content.is_valid)
        joined = b"".join(map(_digest, tqdm(held, desc="Fingerprinting audio", total=len(clips), unit=" clips")))
        keep([Entry(name, state, joined, is_settled)])
    return [joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES)]


def _audio(clips):
    """Yields the audio column of a split in parts: Arrow arrays of structs, without copying the bytes."""
    for rows in clips.select_columns([AUDIO]).with_format("arrow").iter(ROWS_AT_ONCE):
        yield rows[AUDIO].combine_chunks()


def _digest(content):
    return hashlib.blake2b(content).digest()
