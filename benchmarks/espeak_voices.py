"""
Makes a corpus of synthetic voices with espeak-ng (which must be installed), to try training recipes on.

Each clip is a sentence in a voice (a speaker). Its intended arousal and tension determine its pitch, pitch range, rate
and loudness. Ten simulated listeners choose one of six emotions each; the closer an emotion is to the clip's arousal
and tension, the more likely they choose it. So shares and numbers of listeners are known, and only the sound carries
the emotions. Speakers of train, devel and test are disjoint. Nobody has listened to these clips: figures show what
software can find in them, and say nothing about people.

    python benchmarks/espeak_voices.py --output_dir DIR
    accelerate launch train.py configs/small_corpus.yaml --dataset csv --data_dir DIR
"""

import argparse
import csv
import subprocess
from pathlib import Path

import numpy as np
from tqdm import tqdm

SPEAKERS = {  # variants of espeak-ng's voice
    "train": ["m1", "m3", "m5", "m7", "f1", "f2", "f4", "klatt2"],
    "devel": ["m2", "m6", "f3", "klatt"],
    "test": ["m4", "m8", "f5", "klatt3"],
}
CLIPS_PER_SPEAKER = 75
LISTENERS = 10
EMOTIONS = {  # arousal and tension, each from -1 to 1
    "Anger": (0.8, 0.8),
    "Fear": (0.4, 0.9),
    "Joy": (0.8, -0.5),
    "Boredom": (-0.8, 0.0),
    "Sadness": (-0.6, 0.7),
    "Calmness": (-0.4, -0.7),
}
SENTENCES = (
    "The train will leave from the other platform.",
    "She put the letters on the kitchen table.",
    "We can talk about it on Thursday morning.",
    "There are seven boxes left in the hall.",
    "He said that he would be here by now.",
    "They are going to paint the house again.",
)


def shares_of(state, rng):
    """The share of listeners who chose each emotion: (emotions,)."""
    distances = ((np.array(list(EMOTIONS.values())) - state) ** 2).sum(axis=1)
    likelihoods = np.exp(-2.5 * distances)
    return rng.multinomial(LISTENERS, likelihoods / likelihoods.sum()) / LISTENERS


def speak(path, speaker, state, rng):
    """Writes a WAV file of a random sentence. Each speaker has a pitch and a rate of their own."""
    arousal, tension = state + rng.normal(0, 0.1, size=2)
    own = np.random.default_rng(sum(map(ord, speaker))).uniform(-1, 1, size=2)
    prosody = {
        "pitch": 50 + 18 * arousal + 8 * tension + 12 * own[0] + rng.normal(0, 4),
        "range": 50 + 35 * arousal - 20 * tension + rng.normal(0, 6),
        "rate": 165 * np.exp(0.22 * arousal + 0.12 * tension + 0.1 * own[1] + rng.normal(0, 0.04)),
        "loudness": 100 * np.exp(0.35 * arousal + rng.normal(0, 0.15)),
    }
    pitch, pitch_range, rate, loudness = (round(value) for value in prosody.values())
    text = f'<prosody range="{np.clip(pitch_range, 0, 100)}%">{rng.choice(SENTENCES)}</prosody>'
    options = ["-p", np.clip(pitch, 0, 99), "-s", np.clip(rate, 80, 400), "-a", np.clip(loudness, 20, 200)]
    command = ["espeak-ng", "-v", f"en+{speaker}", *options, "-m", "-w", path, text]
    subprocess.run([str(part) for part in command], check=True)


def write_rows(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    folder, rng, facts = parser.parse_args(argv).output_dir, np.random.default_rng(0), []
    (folder / "wav").mkdir(parents=True)
    (folder / "lab").mkdir()
    for split, speakers in SPEAKERS.items():
        rows = []
        for number in tqdm(range(len(speakers) * CLIPS_PER_SPEAKER), desc=split, unit=" clips"):
            speaker, filename = speakers[number % len(speakers)], f"{split}_{number:03d}.wav"
            state = rng.uniform(-1, 1, size=2)
            speak(folder / "wav" / filename, speaker, state, rng)
            rows.append([filename, *shares_of(state, rng)])
            facts.append([filename, speaker, LISTENERS])
        write_rows(folder / "lab" / f"{split}.csv", ["filename", *EMOTIONS], rows)
    write_rows(folder / "lab" / "clips.csv", ["filename", "speaker", "listeners"], facts)


if __name__ == "__main__":
    main()
