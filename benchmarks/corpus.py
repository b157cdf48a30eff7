"""Clips for benchmarks, where only their lengths matter."""

import numpy as np
import soundfile

from emoshare import EMOTIONS
from emoshare.dataset_script.synthetic import SyntheticCorpus, synthesize
from emoshare.dataset_script.tables import FILENAME


def write_corpus(folder, labels=EMOTIONS, **splits):
    """Writes WAV files of noise in the ComParE 2023 layout; `splits` gives the seconds of each split's clips."""
    rng = np.random.default_rng(0)
    (folder / "wav").mkdir(parents=True)
    (folder / "lab").mkdir()
    for split, lengths in splits.items():
        lines = [",".join([FILENAME, *labels])]
        for number, seconds in enumerate(lengths):
            name = f"{split}_{number:05d}.wav"
            soundfile.write(folder / "wav" / name, 0.1 * rng.standard_normal(round(seconds * 16000)), 16000)
            lines.append(",".join([name, *(f"{share:.3f}" for share in rng.beta(0.6, 2.5, size=len(labels)))]))
        (folder / "lab" / f"{split}.csv").write_text("\n".join(lines) + "\n")


def voices(seconds):
    """A synthetic utterance of each length, (samples,) float32."""
    utterances = SyntheticCorpus(train=len(seconds)).utterances("train")
    for utterance, length in zip(utterances, seconds, strict=True):
        utterance.seconds = length
    return [synthesize(utterance) for utterance in utterances]
