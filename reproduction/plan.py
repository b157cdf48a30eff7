"""Estimates the time and disk space of a grid, and extracts the features of all layers that its cells share."""

import time
from functools import partial

import torch
from accelerate.utils import tqdm

from ..configuration_emoshare import EmoShareConfig
from ..finetuning_emoshare import stored_layer
from ..modeling_emoshare import EmoShareModel
from ..training.checkpoints import checkpoints
from ..training.features import check_new_audio, expected_bytes, extract_layers
from ..training.model import build_model, load_left_out_backbone
from ..training.precision import training_dtype
from ..training.steps import heads_in_training, threads_for, train_step
from ..training.store_names import StoreNames
from ..training.user_errors import together

PROBED_SECONDS = 4.0  # of audio, as in a clip of the challenge
PROBES = 3
TUNING = ", plus tuning the backbone"  # which is not measured


def prepare_features(grid, corpus, accelerator):
    """
    Checks all audio whose features are missing, before anything is trained. Then extracts the features of all layers
    that a row's unfinished cells need, in one pass of its backbone, after printing how much disk space they take.

    Args:
        grid: `Grid`.
        corpus: the `Corpus` of its first cell.
        accelerator: `accelerate.Accelerator`.

    Raises:
        UserError: if clips are unreadable, truncated or too short; lists all of them, with their rows.
    """
    for row, cells in _by_backbone(grid):
        unfinished = [cell for cell in cells if not cell.is_done and cell.arguments.model.finetune != "all"]
        if not unfinished:
            continue
        arguments = cells[0].arguments
        model, feature_extractor = together(partial(build_model, arguments, corpus.labels))
        layers = _stored_layers(unfinished, model.config.backbone_config)
        cache_dir = arguments.feature_cache_dir
        dtype = arguments.data.feature_dtype
        whole = corpus.as_stored
        names = StoreNames(model, feature_extractor, dtype, model.config.backbone_hash)
        check_new_audio(whole, model, feature_extractor, arguments.data, cache_dir, accelerator, layers, names)
        if len(layers) < 2:
            continue  # training extracts a single one itself
        disk = _expected_disk(whole, model.config, feature_extractor, arguments, layers)
        accelerator.print(f"{row}: features of {len(layers)} layers, {_size(disk)} if none has been extracted yet")
        for split, clips in whole.splits.items():
            extract_layers(clips, split, model, feature_extractor, cache_dir, accelerator, dtype, layers, names)


def describe(grid, corpus, accelerator):
    """
    Args:
        grid, corpus, accelerator: as in `prepare_features`.

    Returns:
        `str`: the cells, with their estimated time and disk space on this machine. Times are extrapolated from a few
        steps on random features, and assume that training does not stop early. The time to tune a backbone is not
        measured, and the text says so.
    """
    lines = [f"{'cell':<64} {'state':<12} {'training':>10}"]
    total, disk = 0.0, 0
    whole = corpus.as_stored
    num_clips = sum(map(len, whole.splits.values()))
    for row, cells in _by_backbone(grid):
        arguments = cells[0].arguments
        model, feature_extractor = together(partial(build_model, arguments, corpus.labels))
        together(partial(load_left_out_backbone, model))
        model.to(accelerator.device)
        layers, size, extraction = _stored_layers(cells, model.config.backbone_config), 0, 0.0
        if layers:
            size = _expected_disk(whole, model.config, feature_extractor, arguments, layers)
            extraction = num_clips * _seconds_of(partial(_extract, model, feature_extractor))
            extraction /= accelerator.num_processes
        lines.append(f"{row}: features of {len(layers)} layers, {_size(size)}, {_duration(extraction)} to extract")
        total, disk = total + extraction, disk + size
        frames = feature_extractor.num_frames(_probed_samples(feature_extractor))
        times = {}  # folds take about the same time
        for cell in tqdm(cells, desc=f"Timing {row}", leave=False):
            state = "done" if cell.is_done else "interrupted" if checkpoints(cell.folder) else "to do"
            seconds = 0.0
            if not cell.is_done:
                key = cell.architecture, cell.layer, cell.seed
                if key not in times:
                    heads = _heads_of(cell, model.config)
                    train = len(corpus.splits["train"])
                    times[key] = _training_seconds(heads, cell.arguments, frames, train, accelerator)
                seconds = times[key]
            more = TUNING if cell.arguments.model.tunes_backbone else ""
            lines.append(f"  {cell.folder.name:<62} {state:<12} {_duration(seconds):>10}{more}")
            total += seconds
    more = TUNING if any(cell.arguments.model.tunes_backbone for cell in grid.cells) else ""
    lines.append(f"In all: {_duration(total)} on this machine, at most{more}; {_size(disk)} of features")
    return "\n".join(lines)


def _by_backbone(grid):
    """`list` of (row, cells): the cells of a row that tune the same part of its backbone, and share the frozen rest."""
    groups = {}
    for cell in grid.cells:
        model = cell.arguments.model
        groups.setdefault((cell.feature_set, model.finetune, model.finetune_last_layers, model.lora_rank), []).append(
            cell
        )
    return [(row, cells) for (row, *_), cells in groups.items()]


def _stored_layers(cells, backbone_config):
    """The layers that cells read from the feature store, sorted; none if the whole backbone is trained."""
    fields = [cell.arguments.model.backbone_fields for cell in cells]
    configs = [EmoShareConfig(backbone_config=backbone_config, **own) for own in fields if own["freeze_backbone"]]
    return sorted(set(map(stored_layer, configs)), key=str)


def _expected_disk(corpus, config, feature_extractor, arguments, layers):
    """Size of the stores of all splits and layers, in bytes."""
    dtype = arguments.data.feature_dtype
    splits = corpus.splits.values()
    of_splits = together(lambda: [expected_bytes(clips, config, feature_extractor, dtype, layers) for clips in splits])
    return sum(sum(of_layers.values()) for of_layers in of_splits)


def _probed_samples(feature_extractor):
    return int(min(PROBED_SECONDS, feature_extractor.chunk_length_s) * feature_extractor.sampling_rate)


def _extract(model, feature_extractor):
    waveform = torch.randn(_probed_samples(feature_extractor)).numpy()
    rate = feature_extractor.sampling_rate
    batch = feature_extractor([waveform], sampling_rate=rate, return_tensors="pt").to(model.device)
    if model.backbone is not None:
        with torch.inference_mode():
            model.frame_features(batch[feature_extractor.model_input_names[0]], batch["attention_mask"])


def _heads_of(cell, row_config):
    """A model with the heads of a cell and no backbone, with the labels and backbone config of `row_config`."""
    config = EmoShareConfig(
        backbone_config=row_config.backbone_config,
        backbone_layer=cell.layer,
        id2label=row_config.id2label,
        **cell.arguments.model.config_fields,
    )
    with torch.device("meta"):  # so that the backbone takes neither time nor memory
        model = EmoShareModel(config).select(range(config.num_labels))
    model.to_empty(device="cpu")
    for index in range(len(model.heads)):
        model.initialize_head(index, cell.seed)
    return model


def _training_seconds(model, arguments, frames, num_clips, accelerator):
    """
    Estimated seconds of all epochs of a run.

    Args:
        model: `EmoShareModel` with its heads, without its backbone.
        arguments: `Arguments` of the run.
        frames: length of a clip, in frames.
        num_clips: number of clips in the train split.
        accelerator: `accelerate.Accelerator`.
    """
    device, run, config = accelerator.device, arguments.run, model.config
    clips = min(run.per_device_train_batch_size, num_clips)
    dtype = training_dtype(run.mixed_precision, device)
    shape = [clips, frames, config.feature_size]
    if config.backbone_layer == "weighted":
        shape.insert(1, len(model.heads[0].layer_weights))
    batch = {
        "frame_features": torch.randn(shape, device=device, dtype=dtype),
        "attention_mask": torch.ones(clips, frames, device=device, dtype=torch.bool),
        "labels": torch.rand(clips, config.num_labels, device=device),
        "listeners": torch.full((clips,), float("nan"), device=device),
        "weights": torch.ones(clips, device=device),
        "weight_per_step": torch.full((config.num_labels,), float(clips), device=device),
    }
    heads = heads_in_training(model.to(device), run.learning_rate)
    with threads_for(model) as num_threads:
        seconds = _seconds_of(lambda: train_step(heads, batch, accelerator, num_threads).tolist())
    batches = -(-num_clips // (clips * accelerator.num_processes))
    return run.num_train_epochs * batches * seconds


def _seconds_of(step):
    """The shortest duration of a few steps, after one to warm up."""
    step()
    times = []
    for _ in range(PROBES):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


def _size(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
