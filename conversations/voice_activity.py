"""Voice activity detection with Silero's detector."""

import numpy as np
import torch

from ..audio_emoshare import audio_blocks, audio_name

SAMPLING_RATE = 16000  # of the detector's input, in Hz
FRAME = 512  # samples that the detector takes at a time


class SpeechDetector:
    """
    Finds speech with the package silero-vad, which includes its weights.

    Raises:
        ValueError: if the package is not installed.
    """

    def __init__(self):
        threads = torch.get_num_threads()
        try:
            import silero_vad
        except ImportError as error:
            raise ValueError(
                "--vad: needs the package silero-vad; `pip install silero-vad`, or the extra `vad` of EmoShare"
            ) from error
        finally:
            torch.set_num_threads(threads)  # importing silero-vad sets it to 1
        self.model = silero_vad.load_silero_vad()
        self.find = silero_vad.get_speech_timestamps_from_probs

    def __call__(self, audio):
        """
        Args:
            audio: as `load_audio` takes it; read in blocks.

        Returns:
            `list[dict]`: segments as `EmotionSharePipeline` takes them, without speakers, ordered, not overlapping.

        Raises:
            As `audio_blocks`, which only warns about truncated files here.
        """
        self.model.reset_states()
        probabilities, rest, num_samples = [], np.zeros(0, np.float32), 0
        for block in audio_blocks(audio, SAMPLING_RATE, strict=False):
            num_samples += len(block)
            samples = np.concatenate([rest, block])
            whole = len(samples) - len(samples) % FRAME
            probabilities += self._probabilities(samples[:whole])
            rest = samples[whole:]
        if len(rest) > 0:
            probabilities += self._probabilities(np.pad(rest, (0, FRAME - len(rest))))
        found = self.find(probabilities, sampling_rate=SAMPLING_RATE, audio_length_samples=num_samples)
        name = audio_name(audio)
        return [
            {
                "start": speech["start"] / SAMPLING_RATE,
                "end": speech["end"] / SAMPLING_RATE,
                "place": f"{name}, speech {number}",
            }
            for number, speech in enumerate(found, start=1)
        ]

    @torch.inference_mode()
    def _probabilities(self, samples):
        """The probability of speech in each frame; `samples` holds whole frames."""
        return [self.model(frame, SAMPLING_RATE).item() for frame in torch.from_numpy(samples).reshape(-1, FRAME)]
