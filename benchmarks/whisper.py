"""
Speed of Whisper's encoder with clips padded to 30 s, as in its training, and without padding (`backbone_padding`).

    python benchmarks/whisper.py

Published sizes with random weights, 8 synthetic clips of 1 to 8 s, from waveforms to frame features, clip by clip on a
CPU, as training extracts them. The peer is plain Transformers: `WhisperFeatureExtractor` and `WhisperEncoder`, which
only take 30 s. They take turns for several rounds; a ratio is the median over the rounds. The real-time factor (RTF) is
seconds of computing per second of audio.
"""

import numpy as np
import torch
from corpus import voices
from machine import DEVICE, describe, seconds_of
from transformers import AutoConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel

CLIPS, SECONDS, ROUNDS = 8, (1.0, 8.0), 3
SIZES = {"tiny": (384, 4, 6), "small": (768, 12, 12)}
DTYPES = (torch.float32, torch.bfloat16)


def main():
    print(describe())
    clips = voices(np.random.default_rng(0).uniform(*SECONDS, size=CLIPS))
    seconds = sum(len(clip) for clip in clips) / 16000
    print(f"{CLIPS} clips, {seconds:.0f} s in all\n")
    print("| Whisper | plain Transformers, RTF | 30s, RTF | clip, RTF | plain / 30s | 30s / clip |")
    print("|---|---|---|---|---|---|")
    for name, (width, layers, heads) in SIZES.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            sizes = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads}
            config = AutoConfig.for_model("whisper", **sizes, encoder_ffn_dim=4 * width)
            plain = WhisperEncoder(config).eval().to(DEVICE, dtype)
            runs = [plain_run(plain, clips), *(our_run(plain, padding, clips) for padding in ("30s", "clip"))]
            times = np.array([[seconds_of(run) for run in runs] for _ in range(ROUNDS)])
            rtf = np.median(times, axis=0) / seconds
            ratios = np.median(times[:, :2] / times[:, 1:], axis=0)
            cells = [*(f"{value:.3f}" for value in rtf), *(f"{value:.2f}" for value in ratios)]
            print(f"| {name}, {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |", flush=True)


def plain_run(encoder, clips):
    extractor = WhisperFeatureExtractor()

    def run():
        for clip in clips:
            encoder(extractor(clip, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE, encoder.dtype))

    return run


def our_run(plain, padding, clips):
    config = AutoConfig.for_model(**plain.config.to_dict())
    model = EmoShareModel(EmoShareConfig(backbone_config=config, backbone_padding=padding)).eval()
    model.backbone.load_state_dict(plain.state_dict())
    model.backbone.to(DEVICE, plain.dtype)
    extractor = EmoShareFeatureExtractor("whisper_log_mels")

    def run():
        for clip in clips:
            inputs = extractor(clip, sampling_rate=16000, return_tensors="pt").to(DEVICE)
            model.frame_features(inputs["input_features"], inputs["attention_mask"])

    return run


if __name__ == "__main__":
    with torch.inference_mode():
        main()
