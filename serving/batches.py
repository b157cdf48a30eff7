"""Decodes the clips of many requests on several threads, and predicts them in batches on one."""

import logging
import threading
import time
import warnings
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from queue import Empty, Queue

import numpy as np
import torch

from ..audio_emoshare import audio_blocks, audio_name
from ..passes_emoshare import passes
from ..pipeline_emoshare import BATCHES_READ_AHEAD, MOST_PADDING
from ..threads_emoshare import single_threads
from ..windows_emoshare import num_heard

logger = logging.getLogger(__name__)

COLLECTING_S = 0.005  # how long an incomplete batch waits for more windows
MOST_DECODERS = 8  # threads
# A clip's overlapping windows may last this many times the longest clip in total: with windows of 8 s and a hop of 1 s,
# each second of audio is in eight windows.
MOST_HEARD = 8


class TooLongError(ValueError):
    """A clip is too long, or its overlapping windows are too long in total."""


class NoRoomError(RuntimeError):
    """The queue is full."""


class ModelError(RuntimeError):
    """The model raised an error on valid windows, for example because it ran out of memory."""


@dataclass(eq=False)
class Clip:
    """
    Args:
        audio: binary file object.
        preprocess, forward, postprocess: arguments of the pipeline's methods of the same names.

    Attributes:
        windows: future with the outputs of all windows of the clip, as the pipeline's `postprocess` takes them. If it
            is cancelled, windows that have not been computed yet are skipped.
        warnings (`list[str]`): the decoder's warnings.
        decoding: future that is done when `audio` is no longer read.
    """

    audio: object
    preprocess: dict
    forward: dict
    postprocess: dict
    windows: Future = field(default_factory=Future)
    warnings: list = field(default_factory=list)
    outputs: dict = field(default_factory=dict)  # by window number
    decoding: Future | None = None

    @property
    def forward_key(self):
        """A key that is equal for clips that can share a batch."""
        return sorted(self.forward.items())

    def add(self, number, output):
        """Adds the output of a window. Windows may come in any order."""
        self.outputs[number] = output
        last = max(self.outputs)
        if self.outputs[last]["is_last"] and len(self.outputs) == last + 1:
            with suppress(InvalidStateError):
                self.windows.set_result([self.outputs[number] for number in range(last + 1)])

    def note_failure(self, decoding):
        if not decoding.cancelled() and decoding.exception() is not None:
            self.fail(decoding.exception())

    def fail(self, error):
        with suppress(InvalidStateError):  # it was cancelled, or another window has failed already
            self.windows.set_exception(error)


@dataclass
class Waiting:
    """A window in the queue: what the pipeline's `preprocess` yielded, and the window's number in its clip."""

    clip: Clip
    number: int
    inputs: dict


class Batches:
    """
    Predicts clips that are submitted one by one, from any thread, in batches. The results are those of
    `EmotionSharePipeline`.

    Several threads decode clips and cut them into windows, up to eight batches ahead of the model; clips further back
    in the queue stay encoded. One thread runs the model. It takes all windows in the queue, up to eight batches, and
    batches windows of similar length. A clip is answered as soon as its last window has been computed.

    Args:
        emotion_share: `EmotionSharePipeline`.
        batch_size (`int`): windows per pass through the model, at most.
        max_seconds (`float`): longest duration of a clip.
        max_waiting (`int`): most clips that may wait for their answer.
        observe_batch: called with the number of windows of each batch.
    """

    def __init__(self, emotion_share, batch_size, max_seconds, max_waiting, observe_batch=lambda size: None):
        self.emotion_share = emotion_share
        self.batch_size = batch_size
        self.max_seconds = max_seconds
        self.max_waiting = max_waiting
        self.observe_batch = observe_batch
        self.unanswered = set()
        self.queue = Queue(BATCHES_READ_AHEAD * batch_size)
        self.decoders = single_threads(min(torch.get_num_threads(), MOST_DECODERS))
        self.model = threading.Thread(target=self._run_model, name="emoshare-model", daemon=True)
        self.model.start()

    def submit(self, audio, **options):
        """
        Args:
            audio: binary file object, which stays open until the clip's `decoding` is done.
            options: as in the pipeline's call, except that `strict` defaults to `True`.

        Returns:
            `Clip`. Its `windows` may raise `TooLongError`, `ModelError`, and what the pipeline raises on audio.

        Raises:
            NoRoomError: if the queue is full.
            ValueError: if an option does not fit the model.
        """
        clip = Clip(audio, *self.parameters(**options))
        self.check_room()
        self.unanswered.add(clip)
        clip.windows.add_done_callback(lambda _: self.unanswered.discard(clip))
        clip.decoding = self.decoders.submit(self._decode, clip)
        clip.decoding.add_done_callback(clip.note_failure)
        return clip

    def check_room(self):
        """Raises `NoRoomError` if the queue is full."""
        if len(self.unanswered) >= self.max_waiting:
            raise NoRoomError(f"the queue is full ({self.max_waiting} clips); try again later")

    def parameters(self, strict=True, **options):
        """Turns options into the arguments of the pipeline's three methods; raises what the pipeline raises."""
        given = self.emotion_share._sanitize_parameters(strict=strict, **options)
        steps = ("preprocess", "forward", "postprocess")
        return [
            {**getattr(self.emotion_share, f"_{step}_params"), **own} for step, own in zip(steps, given, strict=True)
        ]

    def close(self):
        """Waits until every clip has been answered, and ends the threads."""
        self.decoders.shutdown()
        self.queue.put(None)
        self.model.join()

    def _decode(self, clip):
        sampling_rate = self.emotion_share.feature_extractor.sampling_rate
        with _warnings_in(clip.warnings):
            waveform = self._hear(clip, sampling_rate)
        self._check_windows(clip, len(waveform), sampling_rate)
        audio = {"array": waveform, "sampling_rate": sampling_rate, "path": audio_name(clip.audio)}
        with _warnings_in([]):  # the same warnings again
            for number, window in enumerate(self.emotion_share.preprocess(audio, **clip.preprocess)):
                if clip.windows.done():
                    return
                self.queue.put(Waiting(clip, number, window))

    def _hear(self, clip, sampling_rate):
        """Decodes a clip, at most a minute past the longest duration allowed. Returns (samples,) float32."""
        blocks, num_samples = [], 0
        for block in audio_blocks(clip.audio, sampling_rate, clip.preprocess["strict"]):
            blocks.append(block)
            num_samples += len(block)
            if num_samples > self.max_seconds * sampling_rate:
                raise TooLongError(f"{audio_name(clip.audio)}: lasts more than {self.max_seconds:g} s")
        return np.concatenate(blocks)

    def _check_windows(self, clip, num_samples, sampling_rate):
        """Raises `TooLongError` if overlapping windows make the clip as costly as a far longer one."""
        names = ("chunk_length_s", "stride_length_s", "hop_length_s")
        lengths = {name: clip.preprocess[name] for name in names if name in clip.preprocess}
        seconds = num_heard(num_samples, *self.emotion_share.cutting(**lengths)) / sampling_rate
        if seconds > MOST_HEARD * self.max_seconds:
            name = next(name for name in reversed(names) if name in lengths)
            raise TooLongError(
                f"{audio_name(clip.audio)}: with {name}={lengths[name]:g}, its overlapping windows last "
                f"{seconds:,.0f} s in total; expected at most {MOST_HEARD * self.max_seconds:,g} s: use a longer "
                "hop_length_s or a shorter stride_length_s"
            )

    def _run_model(self):
        is_open = True
        while is_open:
            pool = self._collect()
            is_open = pool[-1] is not None
            wanted = [waiting for waiting in pool if waiting is not None and not waiting.clip.windows.done()]
            for _, alike in groupby(sorted(wanted, key=_forward_key), key=_forward_key):
                alike = list(alike)
                lengths = [waiting.inputs["num_samples"] for waiting in alike]
                for indices in passes(lengths, self.batch_size, MOST_PADDING):
                    self._run_batch([alike[index] for index in indices])

    def _collect(self):
        """Takes the windows in the queue, at least one. `None` follows the last window of all."""
        pool, deadline = [self.queue.get()], time.monotonic() + COLLECTING_S
        with suppress(Empty):
            while len(pool) < self.queue.maxsize and pool[-1] is not None:
                patience = deadline - time.monotonic() if len(pool) < self.batch_size else 0
                pool.append(self.queue.get(timeout=max(patience, 0)))
        return pool

    def _run_batch(self, batch):
        """If a batch fails, its windows run one by one, so that no clip fails because of another."""
        try:
            outputs = self.emotion_share.run_batch([waiting.inputs for waiting in batch], **batch[0].clip.forward)
        except Exception as error:  # on any error, the clips are answered and the thread goes on
            logger.exception("the model failed on %d windows", len(batch))
            if len(batch) > 1:
                for waiting in batch:
                    self._run_batch([waiting])
            else:
                failure = ModelError(f"the model failed on this clip ({type(error).__name__})")
                batch[0].clip.fail(failure)
            return
        self.observe_batch(len(batch))
        for waiting, output in zip(batch, outputs, strict=True):
            waiting.clip.add(waiting.number, output)


def _forward_key(waiting):
    return waiting.clip.forward_key


# A warning belongs to the clip that its thread is decoding.

_of_thread = threading.local()


@contextmanager
def _warnings_in(noted):
    _of_thread.noted = noted
    try:
        yield
    finally:
        _of_thread.noted = None


def note_warnings():
    """Keeps warnings that are given while a clip is decoded with that clip, instead of printing them, from now on."""
    show = warnings.showwarning

    def note(message, *details, **more):
        noted = getattr(_of_thread, "noted", None)
        if noted is None:
            show(message, *details, **more)
        else:
            noted.append(str(message))

    warnings.simplefilter("always", UserWarning)  # also when they are repeated
    warnings.showwarning = note
