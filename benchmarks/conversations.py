"""
The cost of turns and streams: memory for a long recording, time compared with separate clips, and latency of a stream.

    python benchmarks/conversations.py

First, memory: a recording of an hour with 500 turns against one of ten minutes, with a model that computes nothing.
Then HuBERT Base in its published size, with random weights and nine small heads. The peer is the pipeline on the same
turns as separate clips; the ratio is that of the shortest CPU times of several rounds. Last, a stream that receives
audio in pieces of 0.1 s: the time to compute a window, and the delay from the window's end to its shares, if audio
arrives in real time and the machine is free.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from corpus import voices
from machine import DEVICE, PeakMemory, anonymous_memory, describe, least_cpu_seconds, seconds_of
from transformers import AutoConfig

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmoShareOutput, EmotionSharePipeline

ROUNDS, BATCH_SIZE, TURNS, MANY_TURNS = 2, 8, 12, 500
HEAD = {"conv_channels": (32, 32, 32), "lstm_hidden_size": 32, "ffn_sizes": (32,)}
HOP_S, PIECE_S, STREAM_S = 1.0, 0.1, 15.0
RATE = 16000


def main():
    torch.manual_seed(0)
    print(describe())
    backbone_config = AutoConfig.for_model("hubert", mask_time_prob=0.0)
    model = EmoShareModel(EmoShareConfig(backbone_config=backbone_config, **HEAD)).eval()
    extractor = EmoShareFeatureExtractor("waveform")
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=extractor, device=DEVICE, batch_size=BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        compare_memory(emotion_share, Path(folder))
        compare_with_clips(emotion_share, Path(folder))
    stream(emotion_share)


def compare_with_clips(emotion_share, folder):
    (meeting,) = voices([60.0])
    soundfile.write(folder / "meeting.wav", meeting, RATE)
    turns = random_turns(60.0, TURNS)
    clips = [meeting[round(turn["start"] * RATE) : round(turn["end"] * RATE)] for turn in turns]
    runs = {
        "turns": lambda: emotion_share(str(folder / "meeting.wav"), segments=turns),
        "clips": lambda: emotion_share(clips),
    }
    times = {name: least_cpu_seconds(run, ROUNDS)[0] for name, run in runs.items()}
    ratio = times["turns"] / times["clips"]
    print(f"{TURNS} turns: {times['turns']:.2f} s of CPU time, {ratio:.2f} times as much as they take as clips")


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
    """Prints the peak increase of anonymous memory, with a model that computes nothing."""
    emotion_share.model.forward = lambda input_values, **further: EmoShareOutput(
        logits=torch.zeros(len(input_values), emotion_share.model.config.num_labels)
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
    del emotion_share.model.forward  # restores the class's method


if __name__ == "__main__":
    main()
