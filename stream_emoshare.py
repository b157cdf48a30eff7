"""Audio that is still being spoken: the shares of its windows as soon as they are complete."""

import numpy as np

from .audio_emoshare import Level, mono_block, samples_with_channels
from .resampling_emoshare import checked_rate, resampler_between
from .windows_emoshare import WindowCutter

NAME = "stream"  # in messages
# How many channels a first piece may have if it has fewer samples than channels: 7.1 has eight; with more, the array is
# probably (channels, samples).
MOST_CHANNELS = 8


class EmotionShareStream:
    """
    Predicts the shares in audio that arrives piece by piece, from a microphone or over a network.

    ```python
    >>> stream = EmotionShareStream(emotion_share, hop_length_s=1.0, sampling_rate=48000)
    >>> for samples in microphone:
    ...     for window in stream.push(samples):
    ...         print(window)  # {'start': 3.0, 'end': 4.0, 'shares': {'Anger': 0.02, 'Boredom': 0.31, ...}}
    >>> stream.finish()  # the rest
    ```

    The windows, and their shares, are those of `emotion_share(audio, hop_length_s=..., return_timeline=True)` for all
    of the audio at once. A window is complete when its `end` has arrived, and after it as much audio as the shortest
    clip has (a few hundredths of a second): less could still become a part of the window. The stream keeps only the
    last `chunk_length_s` of audio, however long it lasts.

    Args:
        emotion_share: `EmotionSharePipeline`.
        hop_length_s (`float`, *optional*, defaults to 1): seconds that each window counts for.
        chunk_length_s (`float`, *optional*): seconds that a window hears, including those that it counts for; the
            feature extractor's if not given, and no more than that. The model processes this much audio every hop.
        sampling_rate (`int`, *optional*): rate of the samples in Hz, 1,000 to 768,000; the feature extractor's if not
            given.

    Raises:
        ValueError: on a length or sampling rate that does not fit.
    """

    def __init__(self, emotion_share, hop_length_s=1.0, chunk_length_s=None, sampling_rate=None):
        wanted = emotion_share.feature_extractor.sampling_rate
        self.sampling_rate = checked_rate(wanted if sampling_rate is None else sampling_rate, "sampling_rate")
        self.emotion_share = emotion_share
        self.cutter = WindowCutter(*emotion_share.cutting(chunk_length_s, hop_length_s=hop_length_s))
        self.resampler = resampler_between(self.sampling_rate, wanted)
        self.level = Level()
        self.num_channels = None  # of the first piece
        self.is_finished = False

    def push(self, samples):
        """
        Args:
            samples: the next samples, any number of them: (samples,) or (samples, channels), floating point in [-1, 1],
                or int8, int16 or int32; array, tensor or list. All pieces must have the same number of channels. A
                first piece with more than 8 channels and even fewer samples is refused, because it is probably
                (channels, samples).

        Returns:
            `list[dict]`: the windows that are now complete, `{"start": float, "end": float, "shares": {label: float}}`,
            with times in seconds from the beginning.

        Raises:
            ValueError: if samples have another shape or type or another number of channels than those before, or are
                not finite, or the stream is finished.
        """
        if self.is_finished:
            raise ValueError(f"{NAME}: is finished, and takes no more samples")
        if len(samples) == 0:
            return []
        mono = mono_block(self._with_channels(samples), NAME, self.level)
        return self._predicted(self.cutter.push(self.resampler.push(mono)))

    def _with_channels(self, samples):
        samples = samples_with_channels(samples, NAME, self.num_channels or MOST_CHANNELS)
        self.num_channels = self.num_channels or samples.shape[1]
        if samples.shape[1] != self.num_channels:
            raise ValueError(
                f"{NAME}: got samples of shape {samples.shape}; expected (samples, {self.num_channels}), as before"
            )
        return samples

    def finish(self):
        """
        Ends the stream, and warns if its level is suspicious, as `load_audio` does.

        Returns:
            `list[dict]`: the remaining windows, as from `push`; empty if no samples arrived.

        Raises:
            ValueError: if all audio together is too short for the model.
        """
        if self.is_finished or self.level.num_values == 0:
            return []
        self.is_finished = True
        windows = self.cutter.push(self.resampler.push(np.zeros(0, np.float32), is_last=True))
        self.level.warn(NAME)
        return self._predicted(windows + self.cutter.finish())

    def _predicted(self, windows):
        timeline = []
        for window in windows:
            output = self.emotion_share.forward(self.emotion_share.window_inputs(window, NAME))
            timeline += self.emotion_share.postprocess([output], return_timeline=True)["timeline"]
        return timeline
