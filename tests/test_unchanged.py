"""Results equal version 1's: its model repositories, stores and training runs; see fixtures/version_1/README.md."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import run_script
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, pipeline

import emoshare  # noqa: F401  registers the classes and the task

VERSION_1 = Path(__file__).parent / "fixtures" / "version_1"
MODELS = sorted(path.name for path in (VERSION_1 / "models").iterdir())
RUNS = sorted(path.name for path in (VERSION_1 / "runs").iterdir())
CLIPS = ("short", "middle", "long")
HEARD_BY_PIPELINE = (*CLIPS, "several_windows")
TRUE_SHARES = (0.1, math.nan, 0.7)  # of every clip, as far as a model has labels
SPLITS = ("train", "devel", "test")
# What train.py does, with the features of version 1: today's feature extractors have another floor by default. A run
# takes as many threads as there are cores that it may use.
TRAIN = """
import os, sys
from functools import partialmethod
from emoshare import EmoShareFeatureExtractor
from emoshare.training.command import main

cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
EmoShareFeatureExtractor.__init__ = partialmethod(EmoShareFeatureExtractor.__init__, floor="absolute")
main(sys.argv[1:])
"""


def load(name):
    """A model of version 1, in eval mode, and its feature extractor."""
    folder = VERSION_1 / "models" / name
    fields = {}
    if not json.loads((folder / "config.json").read_text())["include_backbone"]:
        fields["backbone_name_or_path"] = str(VERSION_1 / "backbones" / "hubert_layer")
    return AutoModel.from_pretrained(folder, **fields).eval(), AutoFeatureExtractor.from_pretrained(folder)


def waveform(clip):
    return soundfile.read(VERSION_1 / "clips" / f"{clip}.wav", dtype="float32")[0]


def forward(model, feature_extractor, clips, **options):
    inputs = feature_extractor([waveform(clip) for clip in clips], sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs, **options)


def outputs_of_forward(model, feature_extractor):
    """Shares and attention of each clip alone and of all in one padded batch, its loss, hidden states: all tensors."""
    outputs = {clip: forward(model, feature_extractor, [clip], output_attentions=True) for clip in CLIPS}
    labels = torch.tensor([TRUE_SHARES[: model.config.num_labels]] * len(CLIPS))
    outputs["batch"] = forward(model, feature_extractor, CLIPS, labels=labels, output_attentions=True)
    tensors = {f"{name}.shares": output.logits for name, output in outputs.items()}
    for name, output in outputs.items():
        if output.attentions is not None:
            tensors[f"{name}.attentions"] = output.attentions
    tensors["batch.loss"] = outputs["batch"].loss
    if model.config.backbone_config is not None:
        hidden_states = forward(model, feature_extractor, ["short"], output_hidden_states=True).hidden_states
        tensors["short.hidden_states"] = torch.stack(hidden_states)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def outputs_of_pipeline(model, feature_extractor):
    """Scores of every clip; timeline and, where there is one, attention of the clip of several windows."""
    emotion_share = pipeline("emotion-share", model=model, feature_extractor=feature_extractor, device="cpu")
    paths = [str(VERSION_1 / "clips" / f"{clip}.wav") for clip in HEARD_BY_PIPELINE]
    scores = {
        clip: {share["label"]: share["score"] for share in shares}
        for clip, shares in zip(HEARD_BY_PIPELINE, emotion_share(paths), strict=True)
    }
    has_attention = model.config.architecture == "cnn_lstm_attention"
    details = emotion_share(paths[-1], stride_length_s=0.05, return_timeline=True, return_attention=has_attention)
    return {"scores": scores, "details": details}


def assert_same(found, expected, tolerance, where):
    """Compares what JSON can hold, numbers to an absolute tolerance."""
    if isinstance(expected, dict):
        assert set(found) >= set(expected), where
        for name, entry in expected.items():
            assert_same(found[name], entry, tolerance, f"{where}, {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, entry in enumerate(expected):
            assert_same(found[index], entry, tolerance, f"{where}, {index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=0, abs=tolerance, nan_ok=True), where
    else:
        assert found == expected, where


def assert_close(found, expected, scale, where):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * scale, msg=lambda text: f"{where}: {text}")


def scale_of(features):
    """The largest absolute value, at least 1: the rounding of different processors is relative to it."""
    return max(1.0, float(features.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_outputs(name):
    found = outputs_of_forward(*load(name))
    expected = load_file(VERSION_1 / "models" / name / "expected.safetensors")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        # In the hidden states of these small random backbones, processors differ by up to 3e-6 of the scale.
        assert_close(found[key], tensor, 10 * scale_of(tensor) if key.endswith("hidden_states") else 1, key)


@pytest.mark.parametrize("name", MODELS)
def test_the_pipeline_gives_the_same_scores(name):
    expected = json.loads((VERSION_1 / "models" / name / "expected.json").read_text())
    assert_same(outputs_of_pipeline(*load(name)), expected, 1e-6, name)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """The folder of a run of version 1, and what today's code writes with the same flags, on one thread."""
    expected, output_dir = VERSION_1 / "runs" / request.param, tmp_path_factory.mktemp("run") / request.param
    script = output_dir.with_suffix(".py")
    script.write_text(TRAIN)
    # The flags' paths are relative to the folder. A GPU would round in another way.
    flags = (expected / "flags.yaml", "--output_dir", output_dir)
    run_script(script, *flags, cwd=VERSION_1, CUDA_VISIBLE_DEVICES="")
    return expected, output_dir


def read_rows(path):
    with path.open(newline="") as file:
        return [{name: number_or_text(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def number_or_text(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.slow
@pytest.mark.parametrize("file", ["training_history.csv", "predictions_devel.csv", "predictions_test.csv"])
def test_training_gives_the_same_history_and_predictions(run, file):
    expected, output_dir = run
    assert_same(read_rows(output_dir / file), read_rows(expected / file), 1e-5, file)


@pytest.mark.slow
def test_training_gives_the_same_results(run):
    expected, output_dir = run
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert_same(results, json.loads((expected / "eval_results.json").read_text()), 1e-5, "eval_results.json")


def read_stores(output_dir):
    """
    The feature stores that a run left, by split: dicts of `clip`, `start`, `num_samples` and `frames`, all (windows,)
    int64, and `features`, those of all windows end to end, (..., frames of all windows, width) float32.
    """
    sizes = {split: len(read_rows(VERSION_1 / "corpus" / "lab" / f"{split}.csv")) for split in SPLITS}
    stores = {}
    for state in (output_dir / "features").glob("*/state.json"):
        rows = load_from_disk(str(state.parent)).sort(["clip", "start"]).with_format("numpy")[:]
        arrays = [
            np.asarray(values, dtype=np.float32).reshape([int(size) for size in shape])
            for values, shape in zip(rows["features"], rows["shape"], strict=True)
        ]
        (split,) = (split for split, size in sizes.items() if size == len(set(rows["clip"].tolist())))
        windows = {name: np.asarray(rows[name], dtype=np.int64) for name in ("clip", "start", "num_samples")}
        windows["frames"] = np.array([array.shape[-2] for array in arrays])
        windows["features"] = np.concatenate(arrays, axis=-2)
        stores[split] = {name: torch.from_numpy(array) for name, array in windows.items()}
    return stores


@pytest.mark.slow
def test_training_stores_the_same_features(run):
    expected, output_dir = run
    stores = read_stores(output_dir)
    assert set(stores) == set(SPLITS)
    frozen = load_file(expected / "features.safetensors")
    for key, tensor in frozen.items():  # to save room, there are no features of train
        split, name = key.split(".")
        assert_close(stores[split][name], tensor, scale_of(tensor) if name == "features" else 0, key)
