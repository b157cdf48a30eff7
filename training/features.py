"""Extracts frame features: the frozen backbone runs once over every clip, and a store keeps the result."""

import copy
import shutil
import sys
from contextlib import ExitStack, closing
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, tqdm
from filelock import FileLock

from ..audio_emoshare import load_audio
from ..backbone_emoshare import family_of
from ..dataset_script.audio import check_audio, length_of
from ..dataset_script.tables import FILENAME
from .batches import batches_by_length
from .model import load_left_out_backbone
from .read_ahead import ReadAhead
from .store import (
    FrameFeatureStore,
    as_stored,
    begin,
    finish,
    is_whole,
    shard_path,
    shard_writer,
    stored_bytes,
    written_clips,
)
from .store_names import StoreNames
from .user_errors import checking, together

# What one process loses at most when it is killed; for n layers, 1/n of it. More in a large split: a store has at most
# `SHARDS` files, and one for each process besides.
CLIPS_PER_SHARD = 128
SHARDS = 1000
# The most audio files that are opened to estimate how long the clips of a split are.
FILES_OPENED = 2000
# Seconds of audio that the backbone runs on at once. On a CPU, window by window: a batch costs more than it gains.
SECONDS_PER_PASS = {"cpu": 0}
SECONDS_PER_PASS_ON_ACCELERATORS = 128
# Seconds of audio that may wait, decoded, for the backbone: less where it takes clip by clip.
SECONDS_AHEAD, SECONDS_AHEAD_OF_CLIPS = 1024, 64
DECODING_THREADS = 4  # where the backbone runs on an accelerator


def extract_frame_features(
    corpus, split, model, feature_extractor, cache_dir, accelerator, dtype="float16", names=None
):
    """
    The frame features of a split, of the model's `backbone_layer`.

    Args:
        corpus: `Corpus`.
        split: name of the split.
        model, feature_extractor, cache_dir, accelerator, dtype, names: as in `extract_layers`, errors too.

    Returns:
        `FrameFeatureStore`.
    """
    layer = model.config.backbone_layer
    clips = corpus.splits[split]
    stores = extract_layers(clips, split, model, feature_extractor, cache_dir, accelerator, dtype, [layer], names)
    with checking(is_of_all=True):
        return FrameFeatureStore(stores[layer], corpus, split)


def check_new_audio(corpus, model, feature_extractor, data, cache_dir, accelerator, layers, names=None):
    """
    Checks, on the main process, the audio of the splits whose features `cache_dir` does not have yet.

    Args:
        corpus: `Corpus`, with the splits by which features are stored.
        data: `DataArguments`.
        model, feature_extractor, cache_dir, accelerator, layers, names: as in `extract_layers`.

    Raises:
        UserError: if clips cannot be read, are not whole or too short; lists all of them, with their rows.
    """

    def check():
        of_stores = names or StoreNames(model, feature_extractor, data.feature_dtype)
        new = [
            split
            for split, clips in corpus.splits.items()
            if not all(is_whole(Path(cache_dir, name)) for name in of_stores.of(clips, layers).values())
        ]
        rate, least = feature_extractor.sampling_rate, feature_extractor.min_samples
        check_audio(corpus, new, data.data_dir or data.dataset, rate, least, data.decode_audio)

    together(check if accelerator.is_main_process else lambda: None)


def extract_layers(clips, split, model, feature_extractor, cache_dir, accelerator, dtype, layers, names=None):
    """
    Ensures that `cache_dir` holds the frame features of a split, one store per layer; a store that is there already is
    used as it is. The backbone runs over the clips once, for all layers that are missing.

    Each process extracts its part of the clips, shard by shard. An interrupted extraction continues after its last
    finished shards, even if it is for other layers now. A store gets its name when it is complete.

    Args:
        clips: the split, a `datasets.Dataset`.
        split: its name, for messages.
        model: `EmoShareModel`; without a backbone, the acoustic features are the frame features. A backbone that
            `build_model` has left out is loaded if something is to be extracted.
        feature_extractor: `EmoShareFeatureExtractor`.
        cache_dir: folder of the stores.
        accelerator: `accelerate.Accelerator`.
        dtype: of the stored features: `"float16"`, `"bfloat16"` or `"float32"`.
        layers: each as `EmoShareConfig.backbone_layer`; the one in the model's config does not matter.
        names: `StoreNames` of model, feature extractor and dtype, if there are any already.

    Returns:
        `dict`: by layer, the folder of its store, which `extract_frame_features` uses for a model of that layer.

    Raises:
        ValueError: if the model has no such layer, or a clip cannot be read, is too short, or has features that `dtype`
            cannot hold; names it.
        OSError: if the features cannot be written.
    """
    for layer in layers:
        _check_layer(layer, model.config)
    stores = None
    if accelerator.is_main_process:
        of_stores = names or StoreNames(model, feature_extractor, dtype)
        stores = {layer: Path(cache_dir) / name for layer, name in of_stores.of(clips, layers).items()}
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    (stores,) = broadcast_object_list([stores])
    with ExitStack() as locks:
        missing = None
        if accelerator.is_main_process:
            # Another run that needs one of these stores waits here until it is complete. The locks are taken in the
            # order of their names, so that no two runs wait for each other.
            for store in sorted(store for store in stores.values() if not is_whole(store)):
                locks.enter_context(FileLock(f"{store}.lock"))
            missing = [layer for layer, store in stores.items() if not is_whole(store)]
            for layer in missing:
                _take_back(stores[layer])
        (missing,) = broadcast_object_list([missing])
        for layer, store in stores.items():
            if layer not in missing:
                accelerator.print(f"Frame features of {_title(split, layer)}: using {store}")
        if missing:
            unfinished = {layer: _unfinished(stores[layer]) for layer in missing}
            if accelerator.is_main_process:
                for folder in unfinished.values():
                    begin(folder, accelerator.num_processes)
            accelerator.wait_for_everyone()
            with checking():  # not of all: a process has clips of its own
                load_left_out_backbone(model)
                _extract(clips, split, model.to(accelerator.device), feature_extractor, unfinished, accelerator, dtype)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for layer, folder in unfinished.items():
                    finish(folder, stores[layer], dtype)
            accelerator.wait_for_everyone()
    return stores


def _unfinished(store):
    return store.with_name(f"{store.name}.unfinished")


def _take_back(store):
    """Makes of a store that is damaged an extraction that was interrupted: its whole shards are kept."""
    if store.is_dir():
        print(f"{store} is damaged: what cannot be read of it is extracted again", file=sys.stderr)
        shutil.rmtree(_unfinished(store), ignore_errors=True)
        store.rename(_unfinished(store))


def expected_bytes(clips, config, feature_extractor, dtype, layers):
    """
    Bytes on disk that stores will take, before anything is extracted. The lengths of clips come from the headers of
    their files; in a split of more than `FILES_OPENED` clips, of every second file, or every third, and so on.

    Args:
        clips: the split, a `datasets.Dataset`.
        feature_extractor, dtype, layers: as in `extract_layers`.
        config: `EmoShareConfig` of the model.

    Returns:
        `dict`: the bytes of each layer's store.

    Raises:
        ValueError: if the model has no such layer, or a clip cannot be read; names it.
    """
    opened = range(0, len(clips), -(-len(clips) // FILES_OPENED))
    frames = []  # of each window
    for clip in opened:
        for start, end in feature_extractor.windows(_num_samples(clips[clip], feature_extractor)):
            frames.append(feature_extractor.num_frames(end - start))
    clips_per_opened = len(clips) / len(opened)
    expected = {}
    for layer in layers:
        _check_layer(layer, config)
        values = sum(frames) * config.feature_size * _num_hidden_states(layer, config)
        expected[layer] = round(clips_per_opened * stored_bytes(len(frames), values, dtype))
    return expected


def _num_samples(row, feature_extractor):
    try:
        return length_of(row, feature_extractor.sampling_rate)
    except ValueError as error:
        raise ValueError(f"clip {error}") from error


def _check_layer(layer, config):
    config = copy.copy(config)
    config.backbone_layer = layer
    config.check()


def _num_hidden_states(layer, config):
    """Number of hidden states of the backbone in the features of a layer."""
    if layer != "weighted":
        return 1
    return family_of(config.backbone_config).num_layers(config.backbone_config) + 1


def _title(split, layer):
    return split if layer == -1 else f"{split} (layer {layer})"


def _extract(clips, split, model, feature_extractor, folders, accelerator, dtype):
    """Writes this process's shards, in a folder for each layer; existing ones stay as they are."""
    process, processes = accelerator.process_index, accelerator.num_processes
    mine = range(process, len(clips), processes)
    written = {layer: written_clips(folder, process, processes) for layer, folder in folders.items()}
    for layer, folder in folders.items():
        done = len(written[layer])
        accelerator.print(
            f"Frame features of {_title(split, layer)}: extracting {len(clips)} clips to {folder}"
            + (f", continuing after {done} of {len(mine)}" if done else "")
        )
    shards = list(_missing_shards(mine, written, model.config, len(clips)))
    done = len(mine) - sum(len(shard) for shard, _ in shards)
    samples = 0
    decoded = iter(_decoded(clips, [clip for shard, _ in shards for clip in shard], model, feature_extractor))
    with (
        closing(decoded),
        tqdm(total=len(mine), initial=done, desc=f"Extracting {split}", unit=" clips") as progress,
    ):
        for shard, layers in shards:
            paths = {layer: shard_path(folders[layer], shard, process, processes) for layer in layers}
            with ExitStack() as files:
                # Closed in the order of the layers.
                write = {layer: files.enter_context(shard_writer(paths[layer], dtype)) for layer in reversed(layers)}
                for part in _in_memory_at_once(shard, layers, model):
                    windows = [window for of_clip in islice(decoded, len(part)) for window in of_clip]
                    _add_features(windows, model, feature_extractor, dtype, layers)
                    for window in windows:
                        for layer, features in window["features"].items():
                            write[layer]({**window, "features": features})
                    samples += sum(window["num_samples"] for window in windows)
                    progress.update(len(part))
                    progress.set_postfix_str(f"{samples / feature_extractor.sampling_rate / 3600:.2f} h of audio")


def _missing_shards(mine, written, config, num_clips):
    """
    Args:
        mine: the clips of this process, in order.
        written: the clips that are already written, a set for each layer. They differ between layers if an extraction
            was interrupted between the shards of two layers, or was for other layers.
        config: `EmoShareConfig` of the model.
        num_clips: of the whole split.

    Yields:
        The clips of a shard, neighbours in `mine`, and the layers that lack all of them.
    """
    for layers, clips in groupby(mine, lambda clip: [layer for layer in written if clip not in written[layer]]):
        if layers:
            clips = list(clips)
            per_shard = max(_clips_for(layers, config), -(-num_clips // SHARDS))
            for first in range(0, len(clips), per_shard):
                yield clips[first : first + per_shard], layers


def _in_memory_at_once(shard, layers, model):
    """The clips of a shard in parts, of which one is in memory: a single clip, where the backbone takes no batches."""
    size = _clips_for(layers, model.config) if _seconds_per_pass(model) else 1
    return [shard[first : first + size] for first in range(0, len(shard), size)]


def _clips_for(layers, config):
    return -(-CLIPS_PER_SHARD // sum(_num_hidden_states(layer, config) for layer in layers))


def _seconds_per_pass(model):
    return SECONDS_PER_PASS.get(model.device.type, SECONDS_PER_PASS_ON_ACCELERATORS)


def _decoded(clips, indices, model, feature_extractor):
    """The windows of each of the clips with these indices, read ahead of the backbone."""
    if model.device.type != "cpu":
        num_threads = DECODING_THREADS
    else:  # without a backbone, nothing else is computed
        num_threads = torch.get_num_threads() if model.backbone is None else 1
    seconds = SECONDS_AHEAD if _seconds_per_pass(model) else SECONDS_AHEAD_OF_CLIPS
    return ReadAhead(
        lambda clip: _windows(clips[clip], clip, feature_extractor),
        indices,
        cost=lambda windows: sum(window["num_samples"] for window in windows),
        limit=seconds * feature_extractor.sampling_rate,
        num_threads=num_threads,
    )


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
    except (ValueError, OSError) as error:
        raise ValueError(f"clip {row[FILENAME]}: {error}") from error


def _add_features(windows, model, feature_extractor, dtype, layers):
    """Replaces each window's `inputs` by its `features`, a dict by layer, in batches of windows of similar length."""
    seconds = _seconds_per_pass(model)
    lengths = np.array([window["num_samples"] for window in windows])
    for batch in batches_by_length(lengths, seconds * feature_extractor.sampling_rate):
        inputs = [windows[index].pop("inputs") for index in batch]
        for index, features in zip(batch, _frame_features(inputs, model, feature_extractor, layers), strict=True):
            try:
                windows[index]["features"] = {layer: as_stored(features[layer], dtype) for layer in layers}
            except ValueError as error:
                raise ValueError(f"clip {windows[index]['filename']}: {error}") from error


def _frame_features(inputs, model, feature_extractor, layers):
    """Per window and layer an array (frames, width), or (layers, frames, width) for `"weighted"`, float32."""
    name = feature_extractor.model_input_names[0]
    windows = {name: [window[name][0] for window in inputs]}
    if model.backbone is None:
        return [dict.fromkeys(layers, window) for window in windows[name]]
    batch = feature_extractor.pad(windows, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        features = model.frame_features(batch[name], batch["attention_mask"], layers)
    arrays = {layer: features.by_layer[layer].float().cpu().numpy() for layer in layers}
    return [
        {layer: array[index][..., :own, :] for layer, array in arrays.items()}
        for index, own in enumerate(features.lengths.tolist())
    ]
