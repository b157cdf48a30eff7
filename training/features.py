"""Extracts frame features: the frozen backbone runs once over every clip, and what it gives is kept in a store."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, tqdm
from filelock import FileLock

from ..audio_emoshare import load_audio
from ..dataset_script.labels import FILENAME
from .batches import batches_by_length
from .store import FrameFeatureStore, as_stored, begin, finish, shard_path, write_shard

# Part of every store's fingerprint: raise it when this code computes other features from the same input.
FEATURES_VERSION = 3
# What one process writes at once, and loses at most when it is killed; a weighted sum keeps every layer.
CLIPS_PER_SHARD = 128
# Audio that the backbone runs on at once. On a CPU, a batch costs more than it gains: window by window.
SECONDS_PER_PASS = {"cpu": 0}
SECONDS_PER_PASS_ON_ACCELERATORS = 128


def extract_frame_features(clips, split, model, feature_extractor, cache_dir, accelerator, dtype="float16"):
    """
    The frame features of a split, from `cache_dir` if nothing that decides them has changed.

    Each process extracts its part of the clips, shard by shard. An extraction that was interrupted goes on after its
    last whole shard. The store gets its name when it is whole.

    Args:
        clips: the split, a `datasets.Dataset` with `filename`, `audio` and a column per label of the model.
        split: its name, for messages.
        model: `EmoShareModel`; without a backbone, the acoustic features are the frame features.
        feature_extractor: `EmoShareFeatureExtractor`.
        cache_dir: folder of the stores.
        accelerator: `accelerate.Accelerator`.
        dtype: how features are kept: `"float16"`, `"bfloat16"` or `"float32"`.

    Returns:
        `FrameFeatureStore`.

    Raises:
        ValueError: if a clip cannot be read, is too short, or has features that `dtype` cannot hold; names it.
        OSError: if the features cannot be written.
    """
    labels = list(model.config.id2label.values())
    store = None
    if accelerator.is_main_process:
        store = Path(cache_dir) / _fingerprint(clips, model, feature_extractor, dtype)
        store.parent.mkdir(parents=True, exist_ok=True)
    (store,) = broadcast_object_list([store])
    # Another run that wants the same features waits here, and then finds them.
    with FileLock(f"{store}.lock") if accelerator.is_main_process else nullcontext():
        (is_there,) = broadcast_object_list([store.is_dir()])
        if is_there:
            accelerator.print(f"Frame features of {split}: using {store}")
        else:
            unfinished = store.with_name(f"{store.name}.unfinished")
            if accelerator.is_main_process:
                begin(unfinished, accelerator.num_processes)
            accelerator.wait_for_everyone()
            _extract(clips, split, model.to(accelerator.device), feature_extractor, unfinished, accelerator, dtype)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                finish(unfinished, store, dtype)
            accelerator.wait_for_everyone()
    return FrameFeatureStore(store, clips, labels)


def _extract(clips, split, model, feature_extractor, folder, accelerator, dtype):
    """This process's shards; those that are there already stay as they are."""
    mine = range(accelerator.process_index, len(clips), accelerator.num_processes)
    layers = model.config.backbone_config.num_hidden_layers + 1 if model.config.backbone_layer == "weighted" else 1
    per_shard = -(-CLIPS_PER_SHARD // layers)
    shards = {
        shard_path(folder, number, accelerator.process_index, accelerator.num_processes): mine[
            first : first + per_shard
        ]
        for number, first in enumerate(range(0, len(mine), per_shard))
    }
    done = sum(len(shard) for path, shard in shards.items() if path.exists())
    accelerator.print(
        f"Frame features of {split}: extracting {len(clips)} clips to {folder}"
        + (f", going on after {done} of {len(mine)}" if done else "")
    )
    samples = 0
    with tqdm(total=len(mine), initial=done, desc=f"Extracting {split}", unit=" clips") as progress:
        for path, shard in shards.items():
            if path.exists():
                continue
            windows = [window for clip in shard for window in _windows(clips[clip], clip, feature_extractor)]
            _add_features(windows, model, feature_extractor, dtype)
            write_shard(path, windows, dtype)
            samples += sum(window["num_samples"] for window in windows)
            progress.update(len(shard))
            progress.set_postfix_str(f"{samples / feature_extractor.sampling_rate / 3600:.2f} h of audio")


def _windows(row, clip, feature_extractor):
    sampling_rate = feature_extractor.sampling_rate
    try:
        waveform = load_audio(row["audio"], sampling_rate)
        return [
            {
                "filename": row[FILENAME],
                "clip": clip,
                "start": start,
                "num_samples": end - start,
                "inputs": feature_extractor(waveform[start:end], sampling_rate=sampling_rate),
            }
            for start, end in feature_extractor.windows(len(waveform))
        ]
    except ValueError as error:
        raise ValueError(f"clip {row[FILENAME]}: {error}") from error


def _add_features(windows, model, feature_extractor, dtype):
    """Replaces each window's `inputs` by its `features`, in batches of windows of like length."""
    seconds = SECONDS_PER_PASS.get(model.device.type, SECONDS_PER_PASS_ON_ACCELERATORS)
    lengths = np.array([window["num_samples"] for window in windows])
    for batch in batches_by_length(lengths, seconds * feature_extractor.sampling_rate):
        inputs = [windows[index].pop("inputs") for index in batch]
        for index, features in zip(batch, _frame_features(inputs, model, feature_extractor), strict=True):
            try:
                windows[index]["features"] = as_stored(features, dtype)
            except ValueError as error:
                raise ValueError(f"clip {windows[index]['filename']}: {error}") from error


def _frame_features(inputs, model, feature_extractor):
    """Per window an array (frames, width), or (layers, frames, width) for `backbone_layer="weighted"`, float32."""
    name = feature_extractor.model_input_names[0]
    windows = {name: [window[name][0] for window in inputs]}
    if model.backbone is None:
        return windows[name]
    batch = feature_extractor.pad(windows, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.frame_features(batch[name], batch["attention_mask"])
    features = output.features.float().cpu().numpy()
    return [array[..., :frames, :] for array, frames in zip(features, output.lengths.tolist(), strict=True)]


def _fingerprint(clips, model, feature_extractor, dtype):
    """Everything that decides the features of a split, as one hexadecimal name."""
    digest = hashlib.blake2b(digest_size=16)
    versions = f"{FEATURES_VERSION} {transformers.__version__} {torch.__version__}"
    settings = {name: value for name, value in feature_extractor.to_dict().items() if name != "auto_map"}
    digest.update(json.dumps([versions, dtype, settings, model.config.backbone_layer], sort_keys=True).encode())
    if model.backbone is not None:
        digest.update(model.config.backbone_config.to_json_string().encode())
        for name, tensor in sorted(model.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for row in tqdm(clips.select_columns([FILENAME, "audio"]), desc="Fingerprinting audio", unit=" clips"):
        audio = row["audio"]
        digest.update(row[FILENAME].encode())
        digest.update(audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes())
    return digest.hexdigest()
