"""What a grid will take, before it is begun; and the features that cells share, all layers of a backbone at once."""

import time
from functools import partial

import torch
from accelerate.utils import tqdm

from ..configuration_emoshare import EmoShareConfig
from ..head_emoshare import EmotionHead
from ..losses_emoshare import mse as known_mse
from ..training.arguments import arguments_of
from ..training.features import expected_bytes, extract_layers
from ..training.launch import training_dtype
from ..training.model import build_model, head_fields

PROBED_SECONDS = 4.0  # of audio, the length of a clip of the challenge
PROBES = 3


def extract_swept_layers(grid, splits, labels, accelerator):
    """
    Extracts the features of all layers that a row's unfinished cells want, in one pass of its backbone. Says first how
    much disk they take.

    Args:
        grid: `Grid`.
        splits: `datasets.DatasetDict`.
        labels: label names.
        accelerator: `accelerate.Accelerator`.
    """
    for row, cells in _by_row(grid).items():
        layers = sorted({_layer(cell) for cell in cells if not cell.is_done}, key=str)
        if len(layers) < 2:
            continue  # train.py extracts a single one by itself
        data, arguments, _ = arguments_of(cells[0].flags, row)
        model, feature_extractor = build_model(arguments, labels)
        disk = _expected_disk(splits, model, feature_extractor, data, layers)
        accelerator.print(f"{row}: features of {len(layers)} layers, {_size(disk)} where none of them is there yet")
        for split, clips in splits.items():
            extract_layers(
                clips,
                split,
                model,
                feature_extractor,
                data.feature_cache_dir,
                accelerator,
                data.feature_dtype,
                layers,
            )


def describe(grid, splits, labels, accelerator):
    """
    Args:
        grid, splits, labels, accelerator: as in `extract_swept_layers`.

    Returns:
        `str`: the cells, with the time and the disk that they take on this machine. Times are those of a few steps on
        random features; training is told for all of its epochs, though it may stop early.
    """
    lines = [f"{'cell':<64} {'state':<12} {'training':>10}"]
    total, disk = 0.0, 0
    for row, cells in _by_row(grid).items():
        data, arguments, _ = arguments_of(cells[0].flags, row)
        model, feature_extractor = build_model(arguments, labels)
        model.to(accelerator.device)
        layers = {_layer(cell) for cell in cells}
        size = _expected_disk(splits, model, feature_extractor, data, layers)
        clips = sum(map(len, splits.values()))
        extraction = clips * _seconds_of(partial(_extract, model, feature_extractor)) / accelerator.num_processes
        lines.append(f"{row}: features of {len(layers)} layers, {_size(size)}, {_duration(extraction)} to extract")
        total, disk = total + extraction, disk + size
        for cell in tqdm(cells, desc=f"Timing {row}", leave=False):
            state = "done" if cell.is_done else "interrupted" if cell.folder.is_dir() else "to do"
            training = (
                0.0
                if cell.is_done
                else _training_seconds(cell, model.config, feature_extractor, len(splits["train"]), accelerator)
            )
            lines.append(f"  {cell.folder.name:<62} {state:<12} {_duration(training):>10}")
            total += training
    lines.append(f"In all: {_duration(total)} on this machine, at most; {_size(disk)} of features")
    return "\n".join(lines)


def _by_row(grid):
    rows = {}
    for cell in grid.cells:
        rows.setdefault(cell.features, []).append(cell)
    return rows


def _expected_disk(splits, model, feature_extractor, data, layers):
    """Bytes of the stores of all splits and layers."""
    of_splits = (
        expected_bytes(clips, model.config, feature_extractor, data.feature_dtype, layers) for clips in splits.values()
    )
    return sum(sum(of_layers.values()) for of_layers in of_splits)


def _layer(cell):
    return cell.layer if cell.layer == "weighted" else int(cell.layer)


def _extract(model, feature_extractor):
    rate = feature_extractor.sampling_rate
    inputs = feature_extractor(
        [torch.randn(int(PROBED_SECONDS * rate)).numpy()], sampling_rate=rate, return_tensors="pt"
    )
    if model.backbone is not None:
        with torch.inference_mode():
            model.frame_features(**inputs.to(model.device))


def _training_seconds(cell, row_config, feature_extractor, num_clips, accelerator):
    """Of all epochs of a cell, on clips of `PROBED_SECONDS`; its backbone and labels are those of `row_config`."""
    _, arguments, run = arguments_of(cell.flags, cell.folder)
    config = EmoShareConfig(
        backbone_config=row_config.backbone_config,
        backbone_layer=_layer(cell),
        id2label=row_config.id2label,
        **head_fields(arguments),
    )
    outputs = [1] * config.num_labels if config.separate_heads else [config.num_labels]
    heads = [EmotionHead(config, num_outputs).to(accelerator.device) for num_outputs in outputs]
    frames = feature_extractor.num_frames(int(PROBED_SECONDS * feature_extractor.sampling_rate))
    shape = [run.per_device_train_batch_size, frames, config.feature_size]
    if config.backbone_layer == "weighted":
        shape.insert(1, config.backbone_config.num_hidden_layers + 1)
    dtype = training_dtype(run, accelerator.device)
    features = torch.randn(shape, device=accelerator.device, dtype=dtype)
    lengths = torch.full((shape[0],), frames, device=accelerator.device)

    def step():
        for head in heads:
            with torch.autocast(features.device.type, dtype, enabled=dtype != torch.float32):
                shares, _ = head(features, lengths)
            known_mse(shares, torch.zeros_like(shares)).backward()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    batches = -(-num_clips // (shape[0] * accelerator.num_processes))
    return run.num_train_epochs * batches * _seconds_of(step)


def _seconds_of(step):
    """The shortest of a few times; the first, in which much is made ready, does not count."""
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
