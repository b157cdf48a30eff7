"""Frame features: computed once through the frozen backbone, kept on disk, read back without copying."""

import hashlib
import json
import shutil
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
import transformers
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from ..dataset_script.labels import FILENAME
from ..pipeline_emoshare import load_audio

# Part of every store's fingerprint: raise it when this code computes other features from the same input.
FEATURES_VERSION = 1
# On a CPU, padding costs more than a batch gains.
WINDOWS_PER_PASS = {"cpu": 1}
WINDOWS_PER_PASS_ON_ACCELERATORS = 16

STORE_SCHEMA = pa.schema(
    [
        ("clip", pa.int64()),  # row of the clip in its split
        ("start", pa.int64()),  # first sample of the window in the clip
        ("num_samples", pa.int64()),
        ("shape", pa.list_(pa.int64())),  # of the features: frames, width; with layers in front for "weighted"
        ("features", pa.list_(pa.float32())),
    ]
)


class FrameFeatureStore(torch.utils.data.Dataset):
    """
    The frame features of a split, one item per window, in the order of the clips.

    Attributes:
        clips: the split, a `datasets.Dataset`.
        labels: label names.
        shares: (clips, labels) float32, NaN where a share is not known.
        fingerprint: changes with the features, the labels and their shares.
    """

    def __init__(self, folder, clips, labels):
        self.clips = clips
        self.labels = labels
        self.shares = np.array([clips[label] for label in labels], dtype=np.float32).T
        self.fingerprint = f"{folder.name}-{Hasher.hash((labels, self.shares))}"
        parts = [Dataset.from_file(str(part)) for part in sorted(folder.glob("*.arrow"))]
        table = concatenate_datasets(parts).data
        self.clip_of_window = table.column("clip").to_numpy()
        if set(self.clip_of_window) != set(range(len(clips))):
            raise ValueError(
                f"{folder}: holds features of other clips than the split's {len(clips)}; delete the folder"
            )
        self.order = np.lexsort([table.column("start").to_numpy(), self.clip_of_window])
        self.num_samples = table.column("num_samples").to_numpy()
        self.shape = table.column("shape")
        self.features = table.column("features")

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        row = self.order[index]
        clip = int(self.clip_of_window[row])
        shape = self.shape[row].as_py()
        return {
            "features": self.features[int(row)].values.to_numpy().reshape(shape),
            "shares": self.shares[clip],
            "clip": clip,
            "num_samples": int(self.num_samples[row]),
        }


def collate(windows):
    """Items of a `FrameFeatureStore` to one batch, features zero-padded to the longest."""
    features = [window["features"] for window in windows]
    frames = [array.shape[-2] for array in features]
    longest = max(frames)
    batch = np.zeros((len(features), *features[0].shape[:-2], longest, features[0].shape[-1]), dtype=np.float32)
    for padded, array in zip(batch, features, strict=True):
        padded[..., : array.shape[-2], :] = array
    return {
        "input_features": torch.from_numpy(batch),
        "attention_mask": (torch.arange(longest) < torch.tensor(frames)[:, None]).long(),
        "shares": torch.from_numpy(np.stack([window["shares"] for window in windows])),
        "clip": torch.tensor([window["clip"] for window in windows]),
        "num_samples": torch.tensor([window["num_samples"] for window in windows]),
    }


def extract_frame_features(clips, split, model, feature_extractor, cache_dir, accelerator):
    """
    The frame features of a split, from `cache_dir` if nothing that decides them has changed.

    Each process extracts its part of the clips. A store is written under another name and renamed when it is whole.

    Args:
        clips: the split, a `datasets.Dataset` with `filename`, `audio` and a column per label of the model.
        split: its name, for messages.
        model: `EmoShareModel`; without a backbone, the acoustic features are the frame features.
        feature_extractor: `EmoShareFeatureExtractor`.
        cache_dir: folder of the stores.
        accelerator: `accelerate.Accelerator`.

    Returns:
        `FrameFeatureStore`.

    Raises:
        ValueError: if a clip cannot be read or is too short; names it.
    """
    store, unfinished = None, None
    if accelerator.is_main_process:
        store = Path(cache_dir) / _fingerprint(clips, model, feature_extractor)
        if not store.is_dir():
            unfinished = store.with_name(f"unfinished-{uuid4().hex}")
            unfinished.mkdir(parents=True)
    store, unfinished = broadcast_object_list([store, unfinished])
    if unfinished is None:
        accelerator.print(f"Frame features of {split}: using {store}")
    else:
        accelerator.print(f"Frame features of {split}: extracting {len(clips)} clips to {store}")
        try:
            _extract_part(clips, split, model.to(accelerator.device), feature_extractor, unfinished, accelerator)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process and not store.is_dir():  # else another run was quicker
                unfinished.rename(store)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    return FrameFeatureStore(store, clips, list(model.config.id2label.values()))


def _extract_part(clips, split, model, feature_extractor, folder, accelerator):
    mine = range(accelerator.process_index, len(clips), accelerator.num_processes)
    per_pass = WINDOWS_PER_PASS.get(accelerator.device.type, WINDOWS_PER_PASS_ON_ACCELERATORS)
    progress = tqdm(total=len(mine), desc=f"Extracting {split}", unit=" clips")
    part = folder / f"part-{accelerator.process_index:05d}.arrow"
    with progress, pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, STORE_SCHEMA) as writer:
        waiting = []
        for clip in mine:
            waiting += _windows(clips[clip], clip, feature_extractor)
            if len(waiting) >= per_pass:
                _write(waiting, model, feature_extractor, writer)
                waiting = []
            progress.update()
        if waiting:
            _write(waiting, model, feature_extractor, writer)


def _windows(row, clip, feature_extractor):
    sampling_rate = feature_extractor.sampling_rate
    try:
        waveform = load_audio(row["audio"], sampling_rate)
        return [
            {
                "clip": clip,
                "start": start,
                "num_samples": end - start,
                "inputs": feature_extractor(waveform[start:end], sampling_rate=sampling_rate),
            }
            for start, end in feature_extractor.windows(len(waveform))
        ]
    except ValueError as error:
        raise ValueError(f"clip {row[FILENAME]}: {error}") from error


def _write(windows, model, feature_extractor, writer):
    arrays = _frame_features([window["inputs"] for window in windows], model, feature_extractor)
    columns = [[window[name] for window in windows] for name in ("clip", "start", "num_samples")]
    columns.append([list(array.shape) for array in arrays])
    values = pa.array(np.concatenate([array.ravel() for array in arrays]))
    offsets = np.cumsum([0] + [array.size for array in arrays], dtype=np.int32)
    columns.append(pa.ListArray.from_arrays(offsets, values))
    writer.write_batch(pa.record_batch(columns, schema=STORE_SCHEMA))


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


def _fingerprint(clips, model, feature_extractor):
    """Everything that decides the features of a split, as one hexadecimal name."""
    digest = hashlib.blake2b(digest_size=16)
    versions = f"{FEATURES_VERSION} {transformers.__version__} {torch.__version__}"
    settings = {name: value for name, value in feature_extractor.to_dict().items() if name != "auto_map"}
    digest.update(json.dumps([versions, settings, model.config.backbone_layer], sort_keys=True).encode())
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
