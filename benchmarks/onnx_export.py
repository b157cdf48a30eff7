"""
Exported models: their size, their speed in onnxruntime, and the accuracy lost in 8 bits.

    python benchmarks/onnx_export.py

HuBERT Base in its published size with random weights, and nine heads of the demo's sizes, which are briefly trained on
synthetic clips so that their shares differ from clip to clip. Four runtimes take turns for several rounds:
Transformers' own pipeline and EmoShare's in PyTorch, and the runtime of exported models with the file in float32 and
the one in 8 bits. The time is the best over the rounds, for eight clips of 1 to 8 s, one by one. Rank correlations are
between the shares of the two files, on clips that the heads have not seen.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from corpus import voices
from inference import DEMO_HEAD, interleaved, our_pipeline, stock_pipeline
from machine import describe
from scipy.stats import spearmanr
from transformers import AutoConfig, HubertForSequenceClassification

from emoshare import EMOTIONS, EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script.synthetic import SyntheticCorpus, synthesize
from emoshare.emoshare_runtime import EmotionShareRuntime

TIMED_SECONDS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
TRAINED_ON, TRIED_ON = 48, 48
SHORT = 2.0  # seconds of these clips
STEPS, RATE = 200, 3e-4  # with a higher rate, heads soon give every clip the same share
ROUNDS = 3


def main():
    torch.manual_seed(0)
    print(f"{describe()}, onnxruntime {onnxruntime.__version__}\n")
    config = AutoConfig.for_model("hubert", mask_time_prob=0.0, num_labels=len(EMOTIONS))
    peer = HubertForSequenceClassification(config).eval()
    model = EmoShareModel(EmoShareConfig(backbone_config=config, **DEMO_HEAD))
    model.backbone.load_state_dict(peer.hubert.state_dict())
    extractor = EmoShareFeatureExtractor()
    clips, shares = corpus()
    train(model, extractor, clips[:TRAINED_ON], shares[:TRAINED_ON])
    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = model.export_onnx(folder, extractor, int8=True)
        print(f"float32: {exact.num_bytes / 1e6:.0f} MB; int8: {rounded.num_bytes / 1e6:.0f} MB, ", end="")
        print(f"{rounded.num_bytes / exact.num_bytes:.1%}; shares within {exact.difference:.1e} of the model's\n")
        runtimes = {
            "onnxruntime float32": EmotionShareRuntime(Path(folder) / "onnx"),
            "onnxruntime int8": EmotionShareRuntime(Path(folder) / "onnx", "model_int8.onnx"),
        }
        print_rank_correlation(*runtimes.values(), clips[TRAINED_ON:])
        pipelines = {
            "Transformers float32": stock_pipeline(peer, torch.float32),
            "EmoShare float32": our_pipeline(model, torch.float32),
            **runtimes,
        }
        print_times(pipelines, voices(TIMED_SECONDS))


def corpus():
    """Synthetic clips, and their shares of listeners, (clips, labels)."""
    utterances = SyntheticCorpus(train=TRAINED_ON + TRIED_ON).utterances("train")
    for utterance in utterances:
        utterance.seconds = SHORT
    return [synthesize(utterance) for utterance in utterances], [utterance.shares for utterance in utterances]


def train(model, extractor, clips, shares):
    """Trains the heads with Adam, on all clips at once."""
    features = [features_of(model, extractor, clip) for clip in clips]
    features, shares = torch.cat(features), torch.tensor(np.array(shares), dtype=torch.float32)
    optimizer = torch.optim.Adam(model.heads.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(frame_features=features, labels=shares).loss
        loss.backward()
        optimizer.step()
    print(f"heads trained for {STEPS} steps, to a mean squared error of {loss.item():.4f}", flush=True)
    model.eval()


@torch.no_grad()
def features_of(model, extractor, clip):
    waveform = extractor(clip, sampling_rate=16000, return_tensors="pt")["input_values"]
    return model.frame_features(waveform).by_layer[-1]


def print_rank_correlation(exact, rounded, clips):
    expected, found = (as_array(runtime(clips)) for runtime in (exact, rounded))
    together = as_array(rounded(clips, batch_size=8))
    by_emotion = [spearmanr(a, b)[0] for a, b in zip(expected.T, found.T, strict=True)]
    off, deviation = np.abs(found - expected), expected.std(axis=0).mean()
    print(f"int8 against float32, {len(clips)} clips of {SHORT:.0f} s:")
    print(f"- Spearman's rho: {np.mean(by_emotion):.4f} as the mean over emotions, {min(by_emotion):.4f} at the least")
    print(
        f"- shares differ by {off.mean():.4f} in the mean, {off.max():.4f} at the most; their standard deviation is "
        f"{deviation:.3f}"
    )
    print(f"- and from those in batches of 8 by {np.abs(together - found).max():.4f} at the most\n", flush=True)


def as_array(results):
    """Returns the scores as (clips, labels)."""
    scores = [{share["label"]: share["score"] for share in shares} for shares in results]
    return np.array([[clip[emotion] for emotion in EMOTIONS] for clip in scores])


def print_times(pipelines, clips):
    runs = {name: partial(one_by_one, pipe, clips) for name, pipe in pipelines.items()}
    for pipe in pipelines.values():
        pipe(clips[0])  # warm-up
    least = {name: times.min() for name, times in interleaved(runs, ROUNDS).items()}
    seconds = sum(len(clip) for clip in clips) / 16000
    print("| runtime | s | RTF | against Transformers | against onnxruntime float32 |")
    print("|---|---|---|---|---|")
    for name, own in least.items():
        ratios = [f"{least[peer] / own:.2f}x" for peer in ("Transformers float32", "onnxruntime float32")]
        print(f"| {name} | {own:.2f} | {own / seconds:.4f} | {ratios[0]} | {ratios[1]} |")


def one_by_one(pipe, clips):
    for clip in clips:
        pipe(clip)


if __name__ == "__main__":
    main()
