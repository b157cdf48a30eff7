"""Extracts frame features: the frozen backbone runs once over every clip, and the result is stored."""

import copy
import math
import shutil
import sys
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, tqdm
from filelock import FileLock

from ..audio_emoshare import load_audio
from ..backbone_emoshare import family_of
from ..dataset_script.audio import check_audio, length_of
from ..dataset_script.streamed import audio_of
from ..dataset_script.tables import AUDIO, FILENAME
from ..finetuning_emoshare import stored_layer
from ..threads_emoshare import single_threads
from .batches import batches_by_length
from .model import load_left_out_backbone
from .parts import extraction_lock, parts_at_work
from .read_ahead import ReadAhead
from .store import (
    FrameFeatureStore,
    as_stored,
    begin,
    clips_missing,
    finish,
    is_complete,
    is_whole,
    shard_path,
    shard_writer,
    stored_bytes,
    written_shards,
)
from .store_names import StoreNames
from .user_errors import checking, on_main_process

# The most clips that a process loses when it is killed; for n layers, 1/n of this. Shards of a large split hold more
# clips: a store has at most `SHARDS` files, plus one for each process.
CLIPS_PER_SHARD = 128
SHARDS = 1000
# The most audio files that are opened to estimate the lengths of the clips in a split.
FILES_OPENED = 2000
# Seconds of audio in a batch for the backbone. On a CPU, it runs window by window: the features of a window are then
# the same, bit for bit, in any shard, and need little memory. `passes_emoshare` says what that costs.
SECONDS_PER_PASS = {"cpu": 0}
SECONDS_PER_PASS_ON_ACCELERATORS = 128
# Seconds of decoded audio that are buffered for an accelerator, and the number of threads that decode it.
SECONDS_AHEAD = 1024
DECODING_THREADS = 4
NAMES_SHOWN = 5  # of files in a message


def extract_frame_features(
    corpus, split, model, feature_extractor, cache_dir, accelerator, dtype="float16", names=None
):
    """
    The frame features of a split that the model's `trained_part` takes: those of its `backbone_layer`, or of the layer
    below the tuned ones.

    Args:
        corpus: `Corpus`.
        split: name of the split.
        model, feature_extractor, cache_dir, accelerator, dtype, names: as in `extract_layers`; so are the errors.

    Returns:
        `FrameFeatureStore`.
    """
    layer = stored_layer(model.config)
    clips = corpus.splits[split]
    stores = extract_layers(clips, split, model, feature_extractor, cache_dir, accelerator, dtype, [layer], names)
    with checking(is_of_all=True):
        return FrameFeatureStore(stores[layer], corpus, split)


def check_new_audio(corpus, model, feature_extractor, data, cache_dir, accelerator, layers, names=None):
    """
    Checks, on the main process, the audio of the splits whose features are not in `cache_dir` yet; with `--part`, only
    as many clips as a part has.

    Args:
        corpus: `Corpus`, with the splits by which features are stored.
        data: `DataArguments`.
        model, feature_extractor, cache_dir, accelerator, layers, names: as in `extract_layers`.

    Raises:
        UserError: if clips cannot be read, are cut off or too short; lists all of them, with their rows.
    """

    def check():
        of_stores = names or StoreNames(model, feature_extractor, data.feature_dtype)
        new = [
            split
            for split, clips in corpus.splits.items()
            if not all(is_whole(Path(cache_dir, name)) for name in of_stores.of(clips, layers).values())
        ]
        rate, least = feature_extractor.sampling_rate, feature_extractor.min_samples
        check_audio(corpus, new, data.data_dir or data.dataset, rate, least, data.decode_audio, data.chosen_part)

    if not data.streaming:  # streamed audio would be read twice; extraction names the first unreadable clip
        on_main_process(check, accelerator)


def extract_layers(
    clips, split, model, feature_extractor, cache_dir, accelerator, dtype, layers, names=None, part=None
):
    """
    Ensures that `cache_dir` holds the frame features of a split, one store per layer. Existing stores are used as they
    are. The backbone runs over the clips once, for all missing layers.

    An interrupted extraction continues after its last finished shards, even with other layers or another number of
    processes or parts. A store gets its name when it is complete.

    Which process extracts what: each process has every n-th clip, and writes, shard by shard, those of its clips that
    were in no shard at the beginning, whoever wrote it. With parts, the clips of a process are divided into shards as
    if none were written, and each part has every n-th of these. So the clips of a process depend only on the number of
    processes and parts and on the size of shards, and never on what others are doing: processes and parts that agree in
    these numbers never extract the same clip. Parts that do not agree wait for each other, and look at what was written
    before they begin.

    Args:
        clips: the split, a `datasets.Dataset`.
        split: its name, for messages.
        model: `EmoShareModel`; without a backbone, the acoustic features are the frame features. A backbone that
            `build_model` has left out is loaded if anything needs to be extracted.
        feature_extractor: `EmoShareFeatureExtractor`.
        cache_dir: folder of the stores.
        accelerator: `accelerate.Accelerator`.
        dtype: of the stored features: `"float16"`, `"bfloat16"` or `"float32"`.
        layers: each as `EmoShareConfig.backbone_layer`; the layer in the model's config does not matter.
        names: `StoreNames` of model, feature extractor and dtype, if they exist already.
        part: `Part` of the shards to extract; by default, all that are missing.

    Returns:
        `dict` from layer to the folder of its store. With a part, the store exists only if all other parts are done.

    Raises:
        ValueError: if the model has no such layer, or a clip cannot be read, is too short, or has features that `dtype`
            cannot hold; names the clip.
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
    per_shard = _clips_per_shard(layers, model.config, len(clips))
    cut = f"{accelerator.num_processes}-{per_shard}"
    with ExitStack() as locks:
        written = None  # the shards of each incomplete store
        if accelerator.is_main_process:
            # Another run that needs one of these stores waits here until it is complete. Locks are acquired in the
            # order of their names, so that two runs never wait for each other.
            for store in sorted(store for store in stores.values() if not is_whole(store)):
                prepare = partial(_prepare, store, is_alone=part is None)
                locks.enter_context(extraction_lock(store, _unfinished(store), part, cut, prepare))
            missing = [layer for layer, store in stores.items() if not is_whole(store)]
            written = {layer: written_shards(_unfinished(stores[layer])) for layer in missing}
        (written,) = broadcast_object_list([written])  # so that all processes decide from the same facts
        for layer, store in stores.items():
            if layer not in written:
                accelerator.print(f"Frame features of {_title(split, layer)}: using {store}")
        if written:
            unfinished = {layer: _unfinished(stores[layer]) for layer in written}
            accelerator.wait_for_everyone()
            with checking():  # processes have different clips, and different errors
                load_left_out_backbone(model)
                model.to(accelerator.device)
                mine = _own_clips(len(clips), accelerator, part, per_shard)
                _extract(clips, split, model, feature_extractor, unfinished, accelerator, dtype, mine, written, part)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process and part is None:
                for layer, folder in unfinished.items():
                    finish(folder, stores[layer], dtype)
            accelerator.wait_for_everyone()
    if part is not None and accelerator.is_main_process:
        for layer in written:
            _finish_if_complete(stores[layer], len(clips), dtype, _title(split, layer), part)
    return stores


def _prepare(store, is_alone):
    """Makes the folder of the shards of an incomplete store, from what an earlier run has left."""
    if is_whole(store):
        return
    if store.is_dir():
        print(f"{store} is damaged: what cannot be read of it is extracted again", file=sys.stderr)
        shutil.rmtree(_unfinished(store), ignore_errors=True)
        store.rename(_unfinished(store))
    gone = begin(_unfinished(store), is_alone)
    if gone:
        print(
            f"{_unfinished(store)}: removed {len(gone)} shard(s) that are damaged or hold clips that others hold, too; "
            f"what is missing without them is extracted again: {', '.join(gone[:NAMES_SHOWN])}"
            + (", ..." if len(gone) > NAMES_SHOWN else ""),
            file=sys.stderr,
        )


def _finish_if_complete(store, num_clips, dtype, title, part):
    """
    The part that finishes last combines all parts into a store. While a part is at work, it may still read the shards
    that it has written; it then gets here later.
    """
    unfinished = _unfinished(store)
    with FileLock(f"{store}.lock"):
        if not is_whole(store):
            at_work = parts_at_work(unfinished)
            if at_work or not is_complete(unfinished, num_clips):
                missing = clips_missing(unfinished, num_clips)
                what = f"clips missing: {missing} of {num_clips}, parts at work: {len(at_work)}"
                print(f"Frame features of {title}: part {part} is there; others are not yet ({what})")
                return
            finish(unfinished, store, dtype)
        print(f"Frame features of {title}: part {part} is there, and so are all others: {store}")


def _unfinished(store):
    return store.with_name(f"{store.name}.unfinished")


def expected_bytes(clips, config, feature_extractor, dtype, layers):
    """
    Estimates, before extraction, the bytes that stores will take on disk. The lengths of clips come from the headers of
    their files; of more than `FILES_OPENED` clips, only every second one is read, or every third, and so on.

    Args:
        clips: the split, a `datasets.Dataset`.
        feature_extractor, dtype, layers: as in `extract_layers`.
        config: `EmoShareConfig` of the model.

    Returns:
        `dict`: the bytes of each layer's store.

    Raises:
        ValueError: if the model has no such layer, or a clip cannot be read; names the clip.
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
    config.backbone_layer, config.finetuned_layers, config.lora_rank = layer, 0, 0
    config.check()


def _num_hidden_states(layer, config):
    """Number of hidden states of the backbone that the features of a layer hold."""
    if layer != "weighted":
        return 1
    return family_of(config.backbone_config).num_layers(config.backbone_config) + 1


def _title(split, layer):
    return split if layer == -1 else f"{split} (layer {layer})"


def _own_clips(num_clips, accelerator, part, per_shard):
    """Ranges of the clips of this process; for a part, every n-th shard of a run without parts."""
    mine = range(accelerator.process_index, num_clips, accelerator.num_processes)
    if part is None:
        return [mine]
    return part.of([mine[first : first + per_shard] for first in range(0, len(mine), per_shard)])


def _extract(clips, split, model, feature_extractor, folders, accelerator, dtype, mine, written, part):
    """Writes the shards of the clips `mine` that are not `written` yet, in a folder for each layer."""
    shards = list(_missing_shards(mine, written, model.config, len(clips)))
    num_mine = sum(map(len, mine))
    done = num_mine - sum(len(shard) for shard, _ in shards)
    for layer, folder in folders.items():
        there = num_mine - sum(len(shard) for shard, missing in shards if layer in missing)
        accelerator.print(
            f"Frame features of {_title(split, layer)}: extracting {'part ' + str(part) + ' of ' if part else ''}"
            f"{len(clips)} clips to {folder}" + (f", continuing after {there} of {num_mine}" if there else "")
        )
    samples = 0
    decoded = _decoded(clips, [clip for shard, _ in shards for clip in shard], model, feature_extractor)
    with closing(decoded), tqdm(total=num_mine, initial=done, desc=f"Extracting {split}", unit=" clips") as progress:
        for shard, missing in shards:
            paths = {layer: shard_path(folders[layer], shard, shard[0] % shard.step, shard.step) for layer in missing}
            for num_samples in _write_shard(paths, shard, decoded, model, feature_extractor, dtype):
                samples += num_samples
                hours = samples / feature_extractor.sampling_rate / 3600
                progress.set_postfix_str(f"{hours:.2f} h of audio", refresh=False)
                progress.update()


def _write_shard(paths, shard, decoded, model, feature_extractor, dtype):
    """
    Writes the shard of each layer to its path; yields each clip's number of samples when it is computed. A thread
    writes the latest results while the backbone runs on the next clips.
    """
    layers = list(paths)
    # Without batches, only one clip is in memory, and one that is being written.
    size = _clips_for(layers, model.config) if _seconds_per_pass(model) else 1
    with ExitStack() as files, single_threads(1) as writer:
        # Closed in the order of the layers.
        writers = {layer: files.enter_context(shard_writer(paths[layer], dtype)) for layer in reversed(layers)}
        written = None
        for first in range(0, len(shard), size):
            of_clips = list(islice(decoded, min(size, len(shard) - first)))
            windows = [window for of_clip in of_clips for window in of_clip]
            _add_features(windows, model, feature_extractor, layers)
            if written is not None:
                written.result()
            written = writer.submit(_write, windows, writers, dtype)
            yield from (sum(window["num_samples"] for window in of_clip) for of_clip in of_clips)
        written.result()


def _write(windows, writers, dtype):
    for window in windows:
        for layer, features in window["features"].items():
            try:
                stored = as_stored(features.cpu(), dtype)
            except ValueError as error:
                raise ValueError(f"clip {window['filename']}: {error}") from error
            writers[layer]({**window, "features": stored})


def _missing_shards(mine, written, config, num_clips):
    """
    Divides the clips that must be extracted into shards. Where runs with another number of processes have left gaps, a
    shard may hold every second clip of this process, or every third, and so on, so that not each gap becomes a file.

    Args:
        mine: ranges of the clips of this process; a shard holds clips of only one of them.
        written: the clips of existing shards, a list of ranges for each layer. Layers differ if an extraction was
            interrupted between the shards of two layers, or was for other layers.
        config: `EmoShareConfig` of the model.
        num_clips: number of clips in the whole split.

    Yields:
        The clips of a shard, a range, and the layers that lack all of them.
    """
    lacks = np.ones((len(written), num_clips), dtype=bool)
    for of_layer, shards in zip(lacks, written.values(), strict=True):
        for clips in shards:
            of_layer[clips.start : clips.stop : clips.step] = False
    theirs = {clips.step for shards in written.values() for clips in shards}
    for clips in mine:
        steps = sorted({math.lcm(clips.step, step) // clips.step for step in {clips.step, *theirs}})
        own = lacks[:, clips.start : clips.stop : clips.step]
        is_left = own.any(axis=0)
        for first in np.flatnonzero(is_left):
            if is_left[first]:  # otherwise it is in an earlier shard
                layers = [layer for layer, is_lacking in zip(written, own[:, first], strict=True) if is_lacking]
                most = _clips_per_shard(layers, config, num_clips)
                # The first of the longest: consecutive clips, if larger steps gain nothing.
                shard = max((_alike(own, first, step, most) for step in steps), key=len)
                places = slice(shard.start, shard.stop, shard.step)
                own[:, places] = is_left[places] = False
                yield clips[places], layers


def _alike(lacks, first, step, most):
    """At most `most` places from `first` on, in steps of `step`, where each row of `lacks` has the same value."""
    columns = lacks[:, first : first + step * most : step]
    differ = (columns != columns[:, :1]).any(axis=0)
    return range(first, lacks.shape[1], step)[: int(differ.argmax()) if differ.any() else columns.shape[1]]


def _clips_per_shard(layers, config, num_clips):
    return max(_clips_for(layers, config), -(-num_clips // SHARDS))


def _clips_for(layers, config):
    return -(-CLIPS_PER_SHARD // sum(_num_hidden_states(layer, config) for layer in layers))


def _seconds_per_pass(model):
    return SECONDS_PER_PASS.get(model.device.type, SECONDS_PER_PASS_ON_ACCELERATORS)


def _decoded(clips, indices, model, feature_extractor):
    """Yields the windows of each clip with these indices; for an accelerator, clips are decoded ahead on threads."""

    def decode(clip):
        return windows_of(clips[clip], clip, feature_extractor)

    def num_samples(windows):
        return sum(window["num_samples"] for window in windows)

    if model.device.type == "cpu":  # no core is idle
        return (decode(clip) for clip in indices)
    limit = SECONDS_AHEAD * feature_extractor.sampling_rate
    return iter(ReadAhead(decode, indices, num_samples, limit, DECODING_THREADS))


def windows_of(row, clip, feature_extractor, chosen=slice(None)):
    """
    The windows of a clip, each a dict, with the output of the feature extractor under `inputs`.

    Args:
        row: the clip's row in its split.
        clip: its index there.
        feature_extractor: `EmoShareFeatureExtractor`.
        chosen: slice of the windows to return; all by default.

    Raises:
        ValueError: if the clip cannot be read or is too short; names the clip.
    """
    sampling_rate = feature_extractor.sampling_rate
    try:
        waveform = load_audio(audio_of(row[AUDIO]), sampling_rate)
        return [
            {
                "filename": row[FILENAME],
                "clip": clip,
                "start": start,
                "num_samples": end - start,
                "inputs": feature_extractor(waveform[start:end], sampling_rate=sampling_rate),
            }
            for start, end in feature_extractor.windows(len(waveform))[chosen]
        ]
    except (ValueError, OSError) as error:
        raise ValueError(f"clip {row[FILENAME]}: {error}") from error


def _add_features(windows, model, feature_extractor, layers):
    """Replaces each window's `inputs` by its `features`, a dict by layer; runs in batches of similar length."""
    seconds = _seconds_per_pass(model)
    lengths = np.array([window["num_samples"] for window in windows])
    for batch in batches_by_length(lengths, seconds * feature_extractor.sampling_rate):
        inputs = [windows[index].pop("inputs") for index in batch]
        for index, features in zip(batch, _frame_features(inputs, model, feature_extractor, layers), strict=True):
            own = feature_extractor.num_frames(windows[index]["num_samples"])
            windows[index]["features"] = {layer: features[layer][..., :own, :] for layer in layers}


def _frame_features(inputs, model, feature_extractor, layers):
    """
    For each window a dict from layer to a tensor on the model's device, (frames, width), or (layers, frames, width) for
    `"weighted"`, which includes frames of padding. The device may still be computing it.
    """
    name = feature_extractor.model_input_names[0]
    windows = {name: [window[name][0] for window in inputs]}
    if model.backbone is None:
        return [dict.fromkeys(layers, torch.from_numpy(window)) for window in windows[name]]
    batch = feature_extractor.pad(windows, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        by_layer = model.frame_features(batch[name], batch["attention_mask"], layers).by_layer
    return [{layer: by_layer[layer][index] for layer in layers} for index in range(len(inputs))]
