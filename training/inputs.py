"""Clips as the feature extractor prepares them, decoded on reading, for models whose whole encoder trains."""

from functools import partial

import numpy as np
from accelerate.utils import gather_object, tqdm
from datasets.fingerprint import Hasher

from ..dataset_script.audio import check_audio, clips_fingerprint
from .features import DECODING_THREADS, windows_of
from .read_ahead import ReadAhead
from .store import FrameFeatureStore, weights_of_windows
from .user_errors import on_main_process, together


def check_all_audio(corpus, feature_extractor, data, accelerator):
    """
    Checks, on the main process, the audio of all splits.

    Args:
        corpus: `Corpus`.
        feature_extractor: `EmoShareFeatureExtractor`.
        data: `DataArguments`.
        accelerator: `accelerate.Accelerator`.

    Raises:
        UserError: if clips cannot be read, are cut off or too short; lists all of them, with their rows.
    """
    rate, least = feature_extractor.sampling_rate, feature_extractor.min_samples
    check = partial(check_audio, corpus, list(corpus.splits), data.data_dir or data.dataset, rate, least)
    if not data.streaming:  # streamed audio would be read twice
        on_main_process(partial(check, data.decode_audio), accelerator)


class InputStore(FrameFeatureStore):
    """
    The output of a feature extractor for the clips of a split, one item per window, in the order of the clips. It has
    the interface of a `FrameFeatureStore`, but stores nothing: each clip is decoded once to find the lengths of its
    windows, and again whenever a window is read.

    Args:
        corpus: `Corpus`.
        split: name of the split.
        feature_extractor: `EmoShareFeatureExtractor`.
        accelerator: `accelerate.Accelerator`; each process finds the lengths for a part of the clips.

    Raises:
        UserError: if a clip cannot be read or is too short; names the clip.
    """

    reading_threads = DECODING_THREADS

    def __init__(self, corpus, split, feature_extractor, accelerator):
        self._take_clips(corpus, split)
        self.fingerprint = f"{clips_fingerprint(self.clips)}-{Hasher.hash((self.labels, self.shares, self.listeners))}"
        self.feature_extractor = feature_extractor
        self.input_name = feature_extractor.model_input_names[0]
        lengths = self._lengths_of_windows(split, accelerator)  # a list for each clip
        windows = [(clip, number) for clip, of_clip in enumerate(lengths) for number in range(len(of_clip))]
        self.clip_of_window, self.number_in_clip = np.array(windows, dtype=np.int64).T
        self.num_samples = np.array([length for of_clip in lengths for length in of_clip], dtype=np.int64)
        self.num_frames = np.array([feature_extractor.num_frames(length) for length in self.num_samples.tolist()])
        self.weights = weights_of_windows(self.clip_of_window, self.num_samples)

    def _lengths_of_windows(self, split, accelerator):
        process, processes = accelerator.process_index, accelerator.num_processes

        def read():
            read_ahead = ReadAhead(
                lambda clip: [window["num_samples"] for window in self._windows(clip)],
                list(range(process, len(self.clips), processes)),
                cost=lambda lengths: 0,
                limit=1,
                num_threads=self.reading_threads,
            )
            return list(tqdm(read_ahead, desc=f"Reading {split}", unit=" clips", leave=False))

        found = gather_object(together(read))  # process by process
        lengths = [None] * len(self.clips)
        for first in range(processes):
            count = len(range(first, len(self.clips), processes))
            lengths[first::processes], found = found[:count], found[count:]
        return lengths

    def _windows(self, clip, chosen=slice(None)):
        return windows_of(self.clips[clip], clip, self.feature_extractor, chosen)

    def _features(self, index):
        number = int(self.number_in_clip[index])
        (window,) = self._windows(int(self.clip_of_window[index]), slice(number, number + 1))
        return window["inputs"][self.input_name][0]

    def _padded(self, inputs):
        return dict(self.feature_extractor.pad({self.input_name: inputs}, return_tensors="pt"))
