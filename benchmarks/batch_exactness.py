"""
How much a clip's frame features in a padded batch differ from those of the clip alone, in Transformers and EmoShare.

    python benchmarks/batch_exactness.py

Prints the table of docs/fidelity.md. Every supported kind of backbone has its published sizes and random weights: the
differences come from the design, and have the size that they have in an untrained network.
"""

import copy
import platform

import torch
from corpus import voices
from transformers import AutoConfig

from emoshare import EmoShareFeatureExtractor
from emoshare.backbone_emoshare import family_of
from emoshare.frames_emoshare import length_mask

SECONDS = (1.1, 8.0, 2.7, 5.3)
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER_SMALL = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
BACKBONES = {
    "HuBERT Base": ("hubert", {}),
    "HuBERT Large": ("hubert", LARGE | LAYER_NORM),
    "HuBERT Base, `conv_pos_batch_norm`": ("hubert", {"conv_pos_batch_norm": True}),
    "wav2vec 2.0 Base": ("wav2vec2", {}),
    "wav2vec 2.0 Large": ("wav2vec2", LARGE),
    "XLS-R 300M (wav2vec 2.0, layer norm)": ("wav2vec2", LARGE | LAYER_NORM),
    "WavLM Base": ("wavlm", {}),
    "WavLM Large": ("wavlm", LARGE | LAYER_NORM),
    "UniSpeech-SAT Base": ("unispeech-sat", {}),
    "UniSpeech-SAT Large": ("unispeech-sat", LARGE | LAYER_NORM),
    "data2vec-audio Base": ("data2vec-audio", {}),
    "w2v-BERT 2.0": ("wav2vec2-bert", {}),
    "Whisper small, `30s`": ("whisper", WHISPER_SMALL | {"backbone_padding": "30s"}),
    "Whisper small, `clip`": ("whisper", WHISPER_SMALL | {"backbone_padding": "clip"}),
}


def main():
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, clips of {SECONDS} s in one batch\n"
    )
    print("| backbone | plain, float32 | EmoShare, float32 | EmoShare, bfloat16 (RMS) | bfloat16 itself (RMS) |")
    print("|---|---|---|---|---|")
    for name, (model_type, fields) in BACKBONES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, mask_time_prob=0.0, **fields)
        family = family_of(config)
        clips, plain = inputs(family), family.build(config).eval()
        if model_type == "whisper":  # plain Transformers pads each clip to 30 s
            alone, leak = [in_batch(plain, [clip])[0] for clip in clips], "none"
        else:
            alone = [plain(clip[None]).last_hidden_state[0] for clip in clips]
            leak = f"{largest(in_plain_batch(plain, clips), alone):.1e}"
        exact = largest(in_batch(plain, clips), alone)
        halved, half_clips = copy.deepcopy(plain).bfloat16(), [clip.bfloat16() for clip in clips]
        half_alone = [in_batch(halved, [clip])[0] for clip in half_clips]
        rounding, half_exact = relative(half_alone, alone), relative(in_batch(halved, half_clips), half_alone)
        print(f"| {name} | {leak} | {exact:.1e} | {half_exact:.1e} | {rounding:.1e} |", flush=True)


def inputs(family):
    """Model inputs of synthetic utterances, each (samples,) or (frames, width)."""
    extractor = EmoShareFeatureExtractor(family.feature_type)
    return [torch.from_numpy(extractor(w, sampling_rate=16000)[family.input_name][0]) for w in voices(SECONDS)]


def in_plain_batch(backbone, clips):
    batch, lengths = padded(clips)
    mask = length_mask(lengths, batch.shape[1]).long()
    return backbone(batch, attention_mask=mask).last_hidden_state


def in_batch(backbone, clips):
    backbone, family = copy.deepcopy(backbone), family_of(backbone.config)
    family.prepare(backbone)
    return family.hidden_states(backbone, *padded(clips), [-1])[-1]


def padded(clips):
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


def largest(batch, alone):
    """The largest difference between features."""
    return max((clip[: len(own)] - own).abs().max().item() for clip, own in zip(batch, alone, strict=True))


def relative(batch, alone):
    """The relative RMS difference between features."""
    own = torch.cat(list(alone)).float()
    own_in_batch = torch.cat([clip[: len(own)] for clip, own in zip(batch, alone, strict=True)]).float()
    return ((own_in_batch - own).norm() / own.norm()).item()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
