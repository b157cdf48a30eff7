"""
How long a run takes to fingerprint its clips and its backbone, to find features that exist already.

    python benchmarks/waiting/fingerprints.py

10,000 clips of 64 kB (2 s) in 16 bits, and a backbone of HuBERT Base's size with random weights. A run needs the
fingerprint of its clips three times: to find missing features, to open or extract them, and to record the inputs of its
results; and that of the backbone twice. The peer reads everything each time. "First" is the first run on these files,
"again" any later one. All files are in the page cache: from a disk or a network, the peer and the first run take as
long as reading takes.
"""

import hashlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets.utils.logging import disable_progress_bar
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks
from machine import describe

from emoshare import EMOTIONS, EmoShareModel
from emoshare.backbone_emoshare import weights_hash
from emoshare.dataset_script import digests
from emoshare.dataset_script.audio import clips_fingerprint
from emoshare.training.arguments import arguments_of
from emoshare.training.model import build_model
from emoshare.training.store_names import StoreNames

CLIPS, BYTES = 10_000, 64_000
SMALL_HEAD = {"conv_channels": [8], "lstm_hidden_size": 8, "ffn_sizes": [8]}


def main():
    print(describe())
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        digests.cached_assets_path = lambda *_: Path(folder)  # instead of the user's folder
        clips = write_clips(Path(folder))
        HubertModel(HubertConfig(mask_time_prob=0.0)).save_pretrained(f"{folder}/backbone")
        Wav2Vec2FeatureExtractor().save_pretrained(f"{folder}/backbone")
        flags = {"backbone": f"{folder}/backbone", "push_backbone": False, **SMALL_HEAD}
        arguments = arguments_of(flags, "benchmark")
        time.sleep(digests.SETTLED_NS / 1e9)
        print("\n| | peer, CPU s | first | again |\n|---|---|---|---|")
        of_clips = lambda: [clips_fingerprint(clips) for _ in range(3)]  # noqa: E731
        row(f"{CLIPS:,} clips", lambda: fingerprints_of_peer(clips), of_clips)
        row("backbone, and heads", lambda: peers_model(arguments), lambda: names(arguments, clips))


def write_clips(folder):
    rng, paths = np.random.default_rng(0), [folder / f"{index:05d}.wav" for index in range(CLIPS)]
    for path in paths:
        path.write_bytes(rng.bytes(BYTES))  # they are not decoded
    audio = [{"bytes": None, "path": str(path)} for path in paths]
    types = {"filename": Value("string"), "audio": {"bytes": Value("binary"), "path": Value("string")}}
    return Dataset.from_dict({"filename": [path.name for path in paths], "audio": audio}, Features(types))


def row(title, peer, ours):
    """Prints a row; both calls of `ours` must return the same."""
    times, results = zip(*(timed(function) for function in (peer, ours, ours)), strict=True)
    assert results[1] == results[2]
    print(f"| {title} | " + " | ".join(f"{seconds:.2f}" for seconds in times) + " |", flush=True)


def timed(function):
    torch.manual_seed(0)
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def fingerprints_of_peer(clips):
    for _ in range(3):
        digest = hashlib.blake2b()
        for clip in clips:
            digest.update(hashlib.blake2b(Path(clip["audio"]["path"]).read_bytes()).digest())


def peers_model(arguments):
    model = EmoShareModel.from_backbone_pretrained(arguments.model.backbone, **arguments.model.config_fields)
    for _ in range(2):
        weights_hash(model.backbone)


def names(arguments, clips):
    model, feature_extractor = build_model(arguments, EMOTIONS)
    of_stores = StoreNames(model, feature_extractor, "float16", model.config.backbone_hash)
    return [of_stores.of(clips, [-1]) for _ in range(2)]


if __name__ == "__main__":
    main()
