"""
Writes example clips for the demo, from the test split of the synthetic corpus, which is not used in training.

    python -m emoshare.dataset_script.examples FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from ..fields_emoshare import EMOTIONS
from .synthetic import MAX_SECONDS, SAMPLING_RATE, SyntheticCorpus, synthesize

CHOSEN = ("Excitement", "Tiredness", "Anger")


def write_examples(folder):
    """
    Writes, for each chosen emotion, the utterance in which synthetic listeners are most likely to perceive it, and one
    clip of the same three voices in a row, which shows how the shares change over time.
    """
    utterances = SyntheticCorpus().utterances("test")
    probabilities = np.array([utterance.probabilities for utterance in utterances])
    clearest = {emotion: utterances[probabilities[:, EMOTIONS.index(emotion)].argmax()] for emotion in CHOSEN}
    clips = {f"Synthetic voice, {emotion}": synthesize(utterance) for emotion, utterance in clearest.items()}
    clips[f"Synthetic voices, {', then '.join(CHOSEN)}"] = np.concatenate(
        [synthesize(replace(utterance, seconds=MAX_SECONDS)) for utterance in clearest.values()]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, waveform in clips.items():
        soundfile.write(folder / f"{name}.wav", waveform, SAMPLING_RATE, "PCM_16")


if __name__ == "__main__":
    write_examples(sys.argv[1])
