"""Clips of many requests at once: decoded side by side on threads, predicted in batches on one."""

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

COLLECTING_S = 0.005  # how long windows wait for others, while there are fewer of them than a batch has
MOST_DECODERS = 8  # threads that decode
# How often a second of the longest clip may be heard, where windows overlap: with a hop of 1 s and windows of 8 s, each
# is heard eight times.
MOST_HEARD = 8


class TooLongError(ValueError):
    """A clip lasts longer than it may, or its windows do all in all."""


class NoRoomError(RuntimeError):
    """As many clips wait as may."""


class ModelError(RuntimeError):
    """The model raised an error on windows that are as they should be: there is no memory left, for example."""


@dataclass(eq=False)
class Clip:
    """
    Args:
        audio: binary file object.
        preprocess, forward, postprocess: arguments of the pipeline's methods of these names.

    Attributes:
        windows: future of the outputs of all its windows, which are what the pipeline's `postprocess` takes. Cancelling
            it leaves out what has not been computed yet.
        warnings (`list[str]`): what its decoder warned of.
        decoding: future that is done when `audio` is not read any more.
    """

    audio: object
    preprocess: dict
    forward: dict
    postprocess: dict
    windows: Future = field(default_factory=Future)
    warnings: list = field(default_factory=list)
    outputs: dict = field(default_factory=dict)  # by the number of the window
    decoding: Future | None = None

    @property
    def forward_key(self):
        """The same for clips that can go through the model together."""
        return sorted(self.forward.items())

    def add(self, number, output):
        """Takes the output of a window, which come in any order."""
        self.outputs[number] = output
        last = max(self.outputs)
        if self.outputs[last]["is_last"] and len(self.outputs) == last + 1:
            with suppress(InvalidStateError):
                self.windows.set_result([self.outputs[number] for number in range(last + 1)])

    def note_failure(self, decoding):
        if not decoding.cancelled() and decoding.exception() is not None:
            self.fail(decoding.exception())

    def fail(self, error):
        with suppress(InvalidStateError):  # nobody waits for it any more, or another window has failed
            self.windows.set_exception(error)


@dataclass
class Waiting:
    """A window that waits for the model: what the pipeline's `preprocess` yielded, and its number in its clip."""

    clip: Clip
    number: int
    inputs: dict


class Batches:
    """
    Predicts clips that come one by one, from any thread, in the batches of `EmotionSharePipeline`, with its results.

    Threads decode clips and cut them into windows, up to eight batches ahead of the model: whatever waits longer than
    that waits as the file that it is. One thread runs the model. It takes all windows that are there, up to eight
    batches, and runs those of like length together; a clip is answered as soon as its last window is through.

    Args:
        emotion_share: `EmotionSharePipeline`.
        batch_size (`int`): windows per pass through the model, at most.
        max_seconds (`float`): of the longest clip.
        max_waiting (`int`): clips that have no answer yet, at most.
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
            options: as in the pipeline's call, but `strict` is `True` if not given.

        Returns:
            `Clip`. The exceptions of its `windows` are those of the pipeline on audio, `TooLongError` and `ModelError`.

        Raises:
            NoRoomError: if as many clips wait as may.
            ValueError: on an option that does not fit the model.
        """
        clip = Clip(audio, *self.parameters(**options))
        self.check_room()
        self.unanswered.add(clip)
        clip.windows.add_done_callback(lambda _: self.unanswered.discard(clip))
        clip.decoding = self.decoders.submit(self._decode, clip)
        clip.decoding.add_done_callback(clip.note_failure)
        return clip

    def check_room(self):
        """Raises `NoRoomError` if as many clips wait as may."""
        if len(self.unanswered) >= self.max_waiting:
            raise NoRoomError(f"as many clips are waiting as may ({self.max_waiting}); try again later")

    def parameters(self, strict=True, **options):
        """The arguments of the pipeline's three methods that its options stand for; raises as the pipeline does."""
        given = self.emotion_share._sanitize_parameters(strict=strict, **options)
        steps = ("preprocess", "forward", "postprocess")
        return [
            {**getattr(self.emotion_share, f"_{step}_params"), **own} for step, own in zip(steps, given, strict=True)
        ]

    def close(self):
        """Waits until every clip has its answer, and ends the threads."""
        self.decoders.shutdown()
        self.queue.put(None)
        self.model.join()

    def _decode(self, clip):
        sampling_rate = self.emotion_share.feature_extractor.sampling_rate
        with _warnings_in(clip.warnings):
            waveform = self._hear(clip, sampling_rate)
        self._check_windows(clip, len(waveform), sampling_rate)
        audio = {"array": waveform, "sampling_rate": sampling_rate, "path": audio_name(clip.audio)}
        with _warnings_in([]):  # the same ones
            for number, window in enumerate(self.emotion_share.preprocess(audio, **clip.preprocess)):
                if clip.windows.done():
                    return
                self.queue.put(Waiting(clip, number, window))

    def _hear(self, clip, sampling_rate):
        """Decodes a clip, by a minute at most further than it may last: (samples,) float32."""
        blocks, num_samples = [], 0
        for block in audio_blocks(clip.audio, sampling_rate, clip.preprocess["strict"]):
            blocks.append(block)
            num_samples += len(block)
            if num_samples > self.max_seconds * sampling_rate:
                raise TooLongError(f"{audio_name(clip.audio)}: lasts more than {self.max_seconds:g} s")
        return np.concatenate(blocks)

    def _check_windows(self, clip, num_samples, sampling_rate):
        """Raises `TooLongError` if windows overlap so much that the clip would be as much work as a far longer one."""
        names = ("chunk_length_s", "stride_length_s", "hop_length_s")
        lengths = {name: clip.preprocess[name] for name in names if name in clip.preprocess}
        seconds = num_heard(num_samples, *self.emotion_share.cutting(**lengths)) / sampling_rate
        if seconds > MOST_HEARD * self.max_seconds:
            name = next(name for name in reversed(names) if name in lengths)
            raise TooLongError(
                f"{audio_name(clip.audio)}: with {name}={lengths[name]:g}, its windows last {seconds:,.0f} s all in "
                f"all; expected {MOST_HEARD * self.max_seconds:,g} s at most: a longer hop_length_s, or a shorter "
                "stride_length_s"
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
        """The windows that wait, at least one. After the last ones comes `None`."""
        pool, deadline = [self.queue.get()], time.monotonic() + COLLECTING_S
        with suppress(Empty):
            while len(pool) < self.queue.maxsize and pool[-1] is not None:
                patience = deadline - time.monotonic() if len(pool) < self.batch_size else 0
                pool.append(self.queue.get(timeout=max(patience, 0)))
        return pool

    def _run_batch(self, batch):
        """Windows that fail together run one by one, so that no clip fails because of its neighbours."""
        try:
            outputs = self.emotion_share.run_batch([waiting.inputs for waiting in batch], **batch[0].clip.forward)
        except Exception as error:  # whatever it is, the clips get an answer, and the model runs on
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


# Warnings belong to the clip whose thread gives them.

_of_thread = threading.local()


@contextmanager
def _warnings_in(noted):
    _of_thread.noted = noted
    try:
        yield
    finally:
        _of_thread.noted = None


def note_warnings():
    """For the rest of the process: what is warned of while a clip is decoded is kept with it, and not shown."""
    show = warnings.showwarning

    def note(message, *details, **more):
        noted = getattr(_of_thread, "noted", None)
        if noted is None:
            show(message, *details, **more)
        else:
            noted.append(str(message))

    warnings.simplefilter("always", UserWarning)  # also the second time
    warnings.showwarning = note
