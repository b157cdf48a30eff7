"""
How much the shares of exported models differ from the pipeline's, for single clips and in mixed batches.

    python benchmarks/onnx_exactness.py

200 synthetic clips of 1 to 8 s, a third of them at 44.1 kHz. Every architecture on log-mels, MFCCs and a small HuBERT
with random weights, and one architecture on each other kind of backbone. Last layers are scaled so that each emotion's
shares spread widely. The runtime is in a process of its own, in which PyTorch and Transformers cannot be imported.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from corpus import voices
from cuda import spread
from machine import describe
from transformers import AutoConfig

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel, EmotionSharePipeline
from emoshare.architectures_emoshare import ARCHITECTURES

CLIPS, SECONDS = 200, (1.0, 8.0)
BATCH_SIZE = 8
SPREAD_OVER = 40  # clips
HEAD = {"conv_channels": (32, 16), "lstm_hidden_size": 16, "ffn_sizes": (8,), "id2label": {0: "calm", 1: "angry"}}
BACKBONE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
OTHERS = {
    "HuBERT, layer norm": ("hubert", LAYER_NORM),
    "wav2vec 2.0": ("wav2vec2", {}),
    "WavLM": ("wavlm", {}),
    "UniSpeech-SAT": ("unispeech-sat", {}),
    "data2vec-audio": ("data2vec-audio", {"num_conv_pos_embeddings": 5}),
}
WITHOUT_TORCH = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchaudio", "transformers", "emoshare"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing())
from emoshare_runtime import EmotionShareRuntime

runtime = EmotionShareRuntime(".")
alone = [runtime(path) for path in sys.argv[2:]]
print(json.dumps([alone, runtime(sys.argv[2:], batch_size=int(sys.argv[1]))]))
"""


def main():
    print(describe(), "\n")
    print("| features | architecture | alone | in mixed batches | deviation of the shares |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_clips(Path(folder))
        for architecture in ARCHITECTURES:
            for feature_type in ("mel", "mfcc"):
                compare(feature_type, architecture, EmoShareFeatureExtractor(feature_type), {}, paths)
            compare("HuBERT", architecture, EmoShareFeatureExtractor(), backbone("hubert", {}), paths)
        for name, (model_type, fields) in OTHERS.items():
            compare(name, "cnn_lstm_attention", EmoShareFeatureExtractor(), backbone(model_type, fields), paths)


def backbone(model_type, fields):
    return {"backbone_config": AutoConfig.for_model(model_type, **{**BACKBONE, **fields})}


def write_clips(folder):
    paths = []
    for number, clip in enumerate(voices(np.random.default_rng(0).uniform(*SECONDS, size=CLIPS))):
        rate = 44100 if number % 3 == 0 else 16000
        times = np.arange(len(clip) * rate // 16000) / rate
        paths.append(str(folder / f"{number:03d}.wav"))
        soundfile.write(paths[-1], np.interp(times, np.arange(len(clip)) / 16000, clip), rate)
    return paths


def compare(name, architecture, feature_extractor, fields, paths):
    """Prints a row of the table."""
    torch.manual_seed(0)
    model = EmoShareModel(EmoShareConfig(architecture=architecture, **HEAD, **fields)).eval()
    emotion_share = EmotionSharePipeline(model=model, feature_extractor=feature_extractor)
    labels = model.config.labels
    spread(model, as_array(emotion_share(paths[:SPREAD_OVER]), labels))
    expected = as_array(emotion_share(paths), labels)
    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(folder, feature_extractor)
        command = [sys.executable, "-c", WITHOUT_TORCH, str(BATCH_SIZE), *paths]
        found = subprocess.run(command, cwd=f"{folder}/onnx", check=True, capture_output=True, text=True).stdout
    alone, together = (np.abs(as_array(results, labels) - expected).max() for results in json.loads(found))
    print(
        f"| {name} | `{architecture}` | {alone:.1e} | {together:.1e} | {expected.std(axis=0).mean():.2f} |", flush=True
    )


def as_array(results, labels):
    """Returns the scores as (clips, labels)."""
    scores = [{share["label"]: share["score"] for share in shares} for shares in results]
    return np.array([[clip[label] for label in labels] for clip in scores])


if __name__ == "__main__":
    main()
