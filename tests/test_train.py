"""Whole training runs, launched as users launch them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import (
    ROOT,
    SMALL_HEAD_FLAGS,
    needs_bfloat16,
    read_csv,
    run_command,
    run_script,
    write_corpus,
    write_csv,
)
from safetensors.torch import load_file
from transformers import pipeline

from emoshare import EMOTIONS

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TRAIN = ROOT / "train.py"
LAUNCH = [BIN / "accelerate", "launch", "--config_file", ROOT / "accelerate_config.yaml", TRAIN]
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", TRAIN]
ACOUSTIC = ["--dataset", "csv", "--feature_dtype", "float32", *SMALL_HEAD_FLAGS]
ACOUSTIC += ["--learning_rate", "1e-3", "--per_device_train_batch_size", "4"]
MODULES = ["configuration", "backbone", "modeling", "feature_extraction", "pipeline"]


@pytest.fixture(scope="module")
def trained(corpus_folder, backbone_folder, tmp_path_factory):
    """A run on real files of mixed format with a backbone from a local folder; its output, and what it printed."""
    output_dir = tmp_path_factory.mktemp("trained") / "output"
    arguments = ["--dataset", "compare2023", "--data_dir", corpus_folder, "--backbone", backbone_folder]
    arguments += [
        "--feature_dtype",
        "float32",
        "--num_train_epochs",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--bootstrap",
        "20",
        "--report_to",
        "tensorboard",
    ]
    result = run_command(*LAUNCH, *arguments, *SMALL_HEAD_FLAGS, "--output_dir", output_dir, cwd=output_dir.parent)
    return output_dir, result


@pytest.fixture(scope="module")
def own_corpus(tmp_path_factory):
    """Own labels, and no test split."""
    folder = tmp_path_factory.mktemp("own") / "corpus"
    return write_corpus(folder, {"train": 10, "devel": 5}, labels=["joy", "awe"], seconds=(0.3, 0.9))


def test_the_output_is_a_complete_model_repository(trained):
    output_dir, _ = trained
    files = {path.name for path in output_dir.iterdir()}
    assert files >= {f"{module}_emoshare.py" for module in MODULES}
    assert files >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((output_dir / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}
    assert config["custom_pipelines"]["emotion-share"]["impl"] == "pipeline_emoshare.EmotionSharePipeline"
    preprocessor = json.loads((output_dir / "preprocessor_config.json").read_text())
    assert preprocessor["do_normalize"] is False  # as the backbone's own says


def test_results_are_the_metrics(trained):
    results = json.loads((trained[0] / "eval_results.json").read_text())
    keys = ["eval_spearman", *(f"eval_spearman_{emotion}" for emotion in EMOTIONS)]
    made_from = results.pop("made_from")
    assert set(results) == {*keys, *(f"{key}_ci95" for key in keys)}
    assert [(split, *parts) for split, parts in made_from.items()] == [
        (split, "clips", "shares") for split in ("train", "devel", "test")
    ]
    assert results["eval_spearman"] == pytest.approx(np.mean([results[key] for key in keys[1:]]))


@pytest.mark.parametrize("split", ["devel", "test"])
def test_predictions_are_in_the_order_of_the_labels_file(trained, corpus_folder, split):
    rows = read_csv(trained[0] / f"predictions_{split}.csv")
    expected = read_csv(corpus_folder / "lab" / f"{split}.csv")
    assert rows[0] == expected[0]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    assert all(0 <= float(share) <= 1 for row in rows[1:] for share in row[1:])


def test_predictions_are_the_pipelines(trained, corpus_folder):
    output_dir, _ = trained
    emotion_share = pipeline("emotion-share", model=str(output_dir))
    header, *rows = read_csv(output_dir / "predictions_devel.csv")
    for row in rows:
        scores = {share["label"]: share["score"] for share in emotion_share(str(corpus_folder / "wav" / row[0]))}
        assert scores == pytest.approx(dict(zip(header[1:], map(float, row[1:]), strict=True)), abs=1e-5)


def test_the_results_score_the_written_predictions(trained, corpus_folder):
    from scipy.stats import spearmanr

    results = json.loads((trained[0] / "eval_results.json").read_text())
    predicted = np.array([row[1:] for row in read_csv(trained[0] / "predictions_devel.csv")[1:]], dtype=float)
    true = np.array([row[1:] for row in read_csv(corpus_folder / "lab" / "devel.csv")[1:]], dtype=float)
    for index, emotion in enumerate(EMOTIONS):
        expected = spearmanr(predicted[:, index], true[:, index]).statistic
        assert results[f"eval_spearman_{emotion}"] == pytest.approx(expected, abs=1e-3)


def test_the_history_has_loss_and_rho_of_each_epoch_and_emotion(trained):
    output_dir, result = trained
    header, *rows = read_csv(output_dir / "training_history.csv")
    assert header == ["epoch", "label", "train_loss", "devel_spearman"]
    assert [row[:2] for row in rows] == [[epoch, emotion] for epoch in "12" for emotion in EMOTIONS]
    last = rows[9:]
    assert f"loss {np.mean([float(row[2]) for row in last]):.5f}" in result.stdout
    assert all(f"{row[1]} {float(row[3]):.2f}" in result.stdout for row in last)


def test_a_run_says_what_it_does(trained):
    _, result = trained
    for epoch in (1, 2):
        assert f"epoch {epoch}: loss " in result.stdout
    assert "devel rho" in result.stdout
    assert "12 train, 8 devel, 4 test" in result.stdout
    assert "31745" in result.stderr  # not the challenge's sizes


def test_the_tracker_gets_every_epoch(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (trained[0] / "emoshare").glob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    assert [scalar.step for scalar in log.Scalars("devel_spearman")] == [1, 2]
    assert {"train_loss", "devel_spearman_Anger"} <= set(log.Tags()["scalars"])


def test_backbone_weights_are_saved_unchanged(trained, backbone_folder):
    saved = load_file(trained[0] / "model.safetensors")
    for name, tensor in load_file(backbone_folder / "model.safetensors").items():
        assert (saved[f"backbone.{name}"] == tensor).all()


def start_and_kill_after(checkpoint, *command, cwd):
    """Starts a run and kills it at once when the checkpoint is there."""
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, start_new_session=True)
    deadline = time.monotonic() + 180
    while not checkpoint.is_dir():
        assert process.poll() is None, "the run ended before it wrote the checkpoint"
        assert time.monotonic() < deadline, f"no {checkpoint}"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_resumes_and_ends_with_the_same_weights(own_corpus, tmp_path):
    flags = [*ACOUSTIC, "--data_dir", own_corpus, "--num_train_epochs", "8"]
    flags += ["--feature_cache_dir", tmp_path / "features", "--checkpoint_minutes", "0"]
    run_script(TRAIN, *flags, "--output_dir", tmp_path / "whole", cwd=tmp_path)
    start_and_kill_after(
        tmp_path / "parts" / "checkpoint-epoch-3", *LAUNCH, *flags, "--output_dir", tmp_path / "parts", cwd=tmp_path
    )
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    result = run_script(TRAIN, *flags, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", cwd=tmp_path)
    assert "Resuming after epoch" in result.stdout
    assert "epoch 1: " not in result.stdout
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert len(list((tmp_path / "parts").glob("checkpoint-epoch-*"))) == 1
    for name in ("predictions_devel.csv", "training_history.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()

    # On other labels the same flags are another run.
    rows = read_csv(own_corpus / "lab" / "train.csv")
    changed = shutil.copytree(own_corpus, tmp_path / "changed")
    write_csv(changed / "lab" / "train.csv", [rows[0][0], rows[0][2], rows[0][1]], rows[1:])
    flags[flags.index(own_corpus)] = changed
    arguments = ["--output_dir", tmp_path / "parts", "--resume_from_checkpoint"]
    result = run_script(TRAIN, *flags, *arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "checkpoint-epoch-8 is from another run: train: " in result.stderr


def test_the_papers_recipe_runs_and_names_a_dead_head(corpus_folder, backbone_folder, tmp_path):
    recipe = [ROOT / "configs" / "paper_recipe.yaml", "--data_dir", corpus_folder, "--backbone", backbone_folder]
    # In a head of this size, the last ReLU is closed from the start with seed 3, and open with 4 and 999.
    seeds = ["--head_seeds", "999", "3", *["999"] * 7]
    arguments = [*SMALL_HEAD_FLAGS, *seeds, "--num_train_epochs", "2", "--output_dir", tmp_path / "output"]
    result = run_script(TRAIN, *recipe, *arguments, cwd=tmp_path)
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert (config["normalization"], config["output_activation"]) == ("sequence", "relu")
    preprocessor = json.loads((tmp_path / "output" / "preprocessor_config.json").read_text())
    assert preprocessor["chunk_length_s"] == 7.984
    assert "Boredom dead" in result.stdout
    assert "Dead: Boredom. " in result.stdout

    arguments += ["--restart_dead_heads", "2"]
    result = run_script(TRAIN, *recipe, *arguments, cwd=tmp_path)
    assert (
        "Boredom is dead: its head gives the same share for every devel clip; re-initialised with seed 4 (1 of 2)"
        in result.stdout
    )
    assert "epoch 2" in result.stdout
    assert "Dead:" not in result.stdout


def test_two_processes_train_together(own_corpus, tmp_path):
    arguments = [*ACOUSTIC, "--data_dir", own_corpus, "--num_train_epochs", "2", "--output_dir", tmp_path / "output"]
    result = run_command(*TORCHRUN, *arguments, "--chunk_length_s", "0.5", cwd=tmp_path)
    assert result.stdout.count("epoch 1: loss") == 1  # one process speaks
    rows = read_csv(tmp_path / "output" / "predictions_devel.csv")
    expected = [row[0] for row in read_csv(own_corpus / "lab" / "devel.csv")]
    assert [row[0] for row in rows] == expected
    assert len(list((tmp_path / "output" / "features").glob("*/shard-*.arrow"))) == 4  # two splits, two processes
    emotion_share = pipeline("emotion-share", model=str(tmp_path / "output"))
    for row in rows[1:]:
        scores = {share["label"]: share["score"] for share in emotion_share(str(own_corpus / "wav" / row[0]))}
        assert scores == pytest.approx({"joy": float(row[1]), "awe": float(row[2])}, abs=1e-5)
    assert not (tmp_path / "output" / "predictions_test.csv").exists()


@needs_bfloat16
def test_mixed_precision_leaves_predictions_and_model_in_agreement(own_corpus, tmp_path):
    launch = [BIN / "accelerate", "launch", "--mixed_precision", "bf16", ROOT / "train.py"]
    arguments = [*ACOUSTIC, "--data_dir", own_corpus, "--num_train_epochs", "1", "--max_train_samples", "6"]
    result = run_command(*launch, *arguments, "--output_dir", tmp_path / "output", cwd=tmp_path)
    assert "6 train, 5 devel" in result.stdout
    emotion_share = pipeline("emotion-share", model=str(tmp_path / "output"))
    for filename, joy, awe in read_csv(tmp_path / "output" / "predictions_devel.csv")[1:]:
        scores = {share["label"]: share["score"] for share in emotion_share(str(own_corpus / "wav" / filename))}
        assert scores == pytest.approx({"joy": float(joy), "awe": float(awe)}, abs=1e-5)


def test_a_bad_corpus_ends_the_run_before_anything_is_written(own_corpus, tmp_path):
    missing = own_corpus / "wav" / "train_004.wav"
    content = missing.read_bytes()
    missing.unlink()
    try:
        arguments = [*ACOUSTIC, "--data_dir", own_corpus, "--output_dir", tmp_path / "output"]
        result = run_command(*LAUNCH, *arguments, cwd=tmp_path, check=False)
    finally:
        missing.write_bytes(content)
    assert result.returncode != 0
    assert "lab/train.csv, row 6: wav/train_004.wav: no such file" in result.stderr
    assert result.stderr.count("train.py: error: ") == 1
    assert "training/run.py" not in result.stderr  # no traceback but the launcher's own
    assert not (tmp_path / "output").exists()


def test_two_processes_say_what_is_wrong_once(own_corpus, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16000)
    corpus = shutil.copytree(own_corpus, tmp_path / "corpus")
    shutil.copy(tmp_path / "short.wav", corpus / "wav" / "train_004.wav")
    arguments = [*ACOUSTIC, "--data_dir", corpus, "--output_dir", tmp_path / "output"]
    result = run_command(*TORCHRUN, *arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: ") == 1
    assert "lab/train.csv, row 6: train_004.wav: is too short" in result.stderr
    assert "training/run.py" not in result.stderr  # no traceback but the launcher's own


def test_resuming_without_a_checkpoint_is_an_error(own_corpus, tmp_path):
    arguments = [*ACOUSTIC, "--data_dir", own_corpus, "--output_dir", tmp_path / "output", "--resume_from_checkpoint"]
    result = run_script(TRAIN, *arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "there is no checkpoint in" in result.stderr
