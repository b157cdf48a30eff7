"""
What turns and streams cost: against the same audio as clips, and how late a stream is.

    python benchmarks/conversations.py

HuBERT Base in its published size with random weights and nine small heads. The peer of the turns is the pipeline on the
same turns as clips, each cut out before. Both run in turns with the same batch size; the ratio is the median over the
rounds. Then memory: a recording of an hour with 500 turns, of which the model computes nothing here, against one of ten
minutes with 500 turns. Last, a stream that is given audio in pieces of 0.1 s, as fast as it takes them: what a window
costs, and how much later than its end it comes when audio comes in real time.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from corpus import voices
from machine import DEVICE, PeakMemory, anonymous_memory, describe, seconds_of
from transformers import AutoConfig

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmoShareOutput, EmotionSharePipeline

ROUNDS, BATCH_SIZE, TURNS, MANY_TURNS = 3, 8, 24, 500
HEAD = {"conv_channels": (32, 32, 32), "lstm_hidden_size": 32, "ffn_sizes": (32,)}
HOP_S, PIECE_S, STREAM_S = 1.0, 0.1, 20.0
RATE = 16000


def main():
    torch.manual_seed(0)
    print(describe())
    backbone_config = AutoConfig.for_model("hubert", mask_time_prob=0.0)
    model = EmoShareModel(EmoShareConfig(backbone_config=backbone_config, **HEAD)).eval()
    extractor = EmoShareFeatureExtractor("waveform")
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=extractor, device=DEVICE, batch_size=BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        compare_with_clips(emotion_share, Path(folder))
        stream(emotion_share)
        compare_memory(emotion_share, Path(folder))


def compare_with_clips(emotion_share, folder):
    (meeting,) = voices([120.0])
    soundfile.write(folder / "meeting.wav", meeting, RATE)
    turns = random_turns(120.0, TURNS)
    clips = [meeting[round(turn["start"] * RATE) : round(turn["end"] * RATE)] for turn in turns]
    runs = {
        "turns": lambda: emotion_share(str(folder / "meeting.wav"), segments=turns),
        "clips": lambda: emotion_share(clips),
    }
    emotion_share(clips[:2])
    times = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(ROUNDS)]
    ratio, least = statistics.median(taken["turns"] / taken["clips"] for taken in times), min(t["turns"] for t in times)
    print(f"{TURNS} turns: {least:.2f} s, {ratio:.2f} times as long as they take as clips")


def random_turns(seconds, number):
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, seconds - 9, number)
    return [{"start": start, "end": start + rng.uniform(1, 8), "speaker": "Ada"} for start in starts]


def stream(emotion_share):
    (voice,) = voices([STREAM_S])
    piece = round(PIECE_S * RATE)
    opened = emotion_share.stream(hop_length_s=HOP_S)
    costs, lateness = [], []
    for end in range(piece, len(voice) + 1, piece):
        windows = []
        cost = seconds_of(lambda: windows.extend(opened.push(voice[end - piece : end])))  # noqa: B023
        costs += [cost] * len(windows)
        lateness += [end / RATE - window["end"] + cost for window in windows]
    print(
        f"a stream with a hop of {HOP_S:g} s: a window costs {statistics.median(costs):.3f} s, and comes at most "
        f"{max(lateness):.3f} s after its end"
    )


def compare_memory(emotion_share, folder):
    """Anonymous memory at most, above what it was before, with a model that computes nothing."""
    type(emotion_share.model).forward = lambda self, input_values, **further: EmoShareOutput(
        logits=torch.zeros(len(input_values), self.config.num_labels)
    )
    (minute,) = voices([60.0])
    for minutes in (10, 60):
        path, turns = folder / f"{minutes}.wav", random_turns(60 * minutes, MANY_TURNS)
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        before = anonymous_memory()
        with PeakMemory() as memory:
            emotion_share(str(path), segments=turns)
        print(f"{minutes} minutes with {MANY_TURNS} turns: {(memory.peak - before) / 2**20:.0f} MiB more than before")


if __name__ == "__main__":
    main()
