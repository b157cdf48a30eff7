"""A run's files are complete, or as they were before."""

import json
import os
import shutil

import pytest
import soundfile
import torch
from conftest import (
    SMALL_HEAD_FLAGS,
    backbone_config,
    full_disk,
    read_csv,
    speech,
    write_corpus,
    write_csv,
)
from transformers import AutoConfig, AutoModel, pipeline

from emoshare import EmoShareModel, modeling_emoshare
from emoshare.audio_emoshare import audio_info
from emoshare.backbone_emoshare import load_backbone as load
from emoshare.dataset_script import audio, digests, load_corpus
from emoshare.evaluation.scores import read_made_from
from emoshare.training import features, model, run
from emoshare.training.command import main


@pytest.fixture
def flags(tmp_path):
    """A run of a second; without `--output_dir`."""
    write_corpus(tmp_path / "corpus", {"train": 6, "devel": 4}, labels=["joy", "awe"])
    flags = ["--dataset", "csv", "--data_dir", tmp_path / "corpus", *SMALL_HEAD_FLAGS, "--num_train_epochs", 1]
    return [str(flag) for flag in [*flags, "--bootstrap", 0, "--feature_cache_dir", tmp_path / "features"]]


def contents(folder):
    """Of the files that a run writes at its end."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_full_disk_leaves_what_an_earlier_run_left(flags, tmp_path, monkeypatch, capsys):
    output_dir, arguments = tmp_path / "output", []
    save = run.save
    monkeypatch.setattr(run, "save", lambda *given: arguments.append(given) or save(*given))
    for seed in ("1", "2"):
        assert main([*flags, "--output_dir", str(tmp_path / f"of seed {seed}"), "--seed", seed]) == 0
    first, second = arguments
    second[0].run.output_dir = first[0].run.output_dir = str(output_dir)
    save(*first)
    before = contents(output_dir)
    (output_dir / "unfinished-model").mkdir()  # of a run that was killed here
    (output_dir / "unfinished-model" / "left.txt").touch()
    for size in (0, 100, 3000, len(before["model.safetensors"]) - 1):
        message = r"cannot be written: .*\. What was there before is left as it was"
        with pytest.raises(OSError, match=message), full_disk(size):
            save(*second)
        assert contents(output_dir) == before
    (output_dir / "model-00001-of-00002.safetensors").touch()  # as if weights had been in several files
    save(*second)
    after = contents(output_dir)
    assert after.keys() == before.keys()
    for name in ("model.safetensors", "predictions_devel.csv", "eval_results.json"):
        assert after[name] != before[name]
    assert not (output_dir / "unfinished-model").exists()
    EmoShareModel.from_pretrained(output_dir)


def test_results_come_last_and_those_of_an_earlier_run_go_first(flags, tmp_path, monkeypatch):
    output_dir = tmp_path / "output"
    assert main([*flags, "--output_dir", str(output_dir)]) == 0
    places, replace = [], os.replace

    def note(source, target):
        if str(target).startswith(str(output_dir)) and "unfinished-model" in str(source):
            places.append((os.path.basename(target), (output_dir / "eval_results.json").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    assert main([*flags, "--output_dir", str(output_dir), "--seed", "1"]) == 0
    in_place = [(name, was_there) for name, was_there in places if not name.startswith("unfinished")]
    moved = in_place[-len(contents(output_dir)) :]
    assert {name for name, _ in moved} == set(contents(output_dir))
    assert moved[-1][0] == "eval_results.json"
    assert not any(was_there for _, was_there in moved)


def test_nothing_of_an_earlier_model_stays_beside_a_new_one(flags, tmp_path):
    output_dir, corpus = tmp_path / "output", tmp_path / "corpus"
    soundfile.write(corpus / "wav" / "test.wav", speech(0.7, seed=99), 16000)
    write_csv(corpus / "lab" / "test.csv", ["filename", "joy", "awe"], [["test.wav", "?", "?"]])
    assert main([*flags, "--output_dir", str(output_dir)]) == 0
    (output_dir / "onnx").mkdir()
    of_model = ["predictions_test.csv", "predictions_train.csv", "eval_results_test.json", "onnx/model_int8.onnx.data"]
    for name in [*of_model, "notes.txt"]:
        (output_dir / name).touch()
    (corpus / "lab" / "test.csv").unlink()
    assert main([*flags, "--output_dir", str(output_dir)]) == 0
    assert [name for name in of_model if (output_dir / name).exists()] == []
    assert (output_dir / "predictions_devel.csv").exists()
    assert (output_dir / "notes.txt").exists()


def test_results_are_of_the_clips_that_the_run_began_with(flags, tmp_path, monkeypatch):
    made_from = load_corpus("csv", data_dir=tmp_path / "corpus", cache_dir=tmp_path / "cache").fingerprints()
    fit = run.HeadTrainer.fit

    def changed_meanwhile(trainer):
        soundfile.write(tmp_path / "corpus" / "wav" / "train_001.wav", speech(0.7, seed=99), 16000)
        (tmp_path / "corpus" / "wav" / "devel_001.wav").unlink()
        return fit(trainer)

    monkeypatch.setattr(run.HeadTrainer, "fit", changed_meanwhile)
    assert main([*flags, "--output_dir", str(tmp_path / "output")]) == 0
    assert read_made_from(tmp_path / "output" / "eval_results.json") == made_from


def test_a_run_takes_the_features_that_were_extracted_in_parts(flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--output_dir", str(tmp_path / "output")]
    checked = []
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    monkeypatch.setattr(audio, "audio_info", lambda clip: checked.append(clip["path"]) or audio_info(clip))
    for part, checks in ("1/2", 5), ("2/2", 5):
        checked.clear()
        assert main([*flags, "--part", part]) == 0
        assert len(checked) == checks
    assert not (tmp_path / "output").exists()
    assert len(list((tmp_path / "features").glob("*/state.json"))) == 2
    capsys.readouterr()
    assert main(flags) == 0
    assert capsys.readouterr().out.count(": using") == 2
    assert (tmp_path / "output" / "eval_results.json").exists()


def test_a_run_with_concentrations_writes_intervals_and_calibration(flags, tmp_path, capsys):
    output_dir, clips = tmp_path / "output", [f"{split}_{n:03d}.wav" for split, n in [("train", 0), ("devel", 1)]]
    flags = [*flags, "--output_dir", str(output_dir), "--loss", "beta_binomial"]
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert "--loss beta_binomial: needs to know how many listeners voted" in errors
    assert "a column 'listeners' in lab/clips.csv" in errors
    assert not output_dir.exists()

    write_csv(tmp_path / "corpus" / "lab" / "clips.csv", ["filename", "listeners"], [[clip, 7] for clip in clips])
    assert main(flags) == 0
    header, *rows = read_csv(output_dir / "intervals_devel.csv")
    assert header == ["filename", "label", "share", "low", "high", "listeners"]
    assert [row[5] for row in rows] == ["20", "20", "7", "7", "20", "20", "20", "20"]
    predictions = [share for row in read_csv(output_dir / "predictions_devel.csv")[1:] for share in row[1:]]
    assert [row[2] for row in rows] == predictions
    assert all(0 <= float(low) <= float(high) <= 1 for *_, low, high, _ in rows)
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert set(results["calibration"]) == {"devel"}
    assert set(results["calibration"]["devel"]["intervals"]["90%"]) == {"stated", "held"}
    assert (output_dir / "calibration_devel.png").stat().st_size > 1000
    card = (output_dir / "README.md").read_text()
    assert "## How sure it is" in card
    assert "(calibration_devel.png)" in card
    assert EmoShareModel.from_pretrained(output_dir).config.has_concentrations

    assert main([*flags[:-1], "mse"]) == 0  # leaves nothing of the run before
    assert not list(output_dir.glob("intervals*")) + list(output_dir.glob("calibration*"))
    assert "calibration" not in json.loads((output_dir / "eval_results.json").read_text())
    assert "How sure" not in (output_dir / "README.md").read_text()


@pytest.mark.parametrize("command", ["train.py"])
def test_broken_clips_end_a_run_before_anything_is_trained(command, flags, tmp_path, capsys):
    for name in ("train_002", "devel_003"):
        soundfile.write(tmp_path / "corpus" / "wav" / f"{name}.wav", speech(0.3)[:300], 16000)
    assert main([*flags, "--output_dir", str(tmp_path / "output")]) == 2
    errors = capsys.readouterr().err
    assert f"{command}: error: {tmp_path / 'corpus'}: 2 problem(s)" in errors
    assert "\n  lab/train.csv, row 4: train_002.wav: is too short, " in errors
    assert "\n  lab/devel.csv, row 5: devel_003.wav: is too short, " in errors
    assert not (tmp_path / "output").exists()
    assert not list((tmp_path).glob("features/*"))


def test_a_value_error_in_training_is_a_bug_and_keeps_its_traceback(flags, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(run.HeadTrainer, "train_epoch", fail)
    with pytest.raises(ValueError, match="broadcast"):
        main([*flags, "--output_dir", str(tmp_path / "output")])


def test_without_listeners_none_can_be_dropped(flags, tmp_path, capsys):
    assert main([*flags, "--output_dir", str(tmp_path / "output"), "--listener_dropout", "0.2"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "train.py: error: --listener_dropout: needs the number of listeners of each clip" in error
    assert not list((tmp_path).glob("features/*"))


def test_a_run_resamples_speakers_and_prints_controls_and_ceiling(flags, tmp_path, capsys):
    write_corpus(tmp_path / "with_test", {"train": 6, "devel": 4, "test": 4}, labels=["joy", "awe"])
    flags[flags.index("--data_dir") + 1] = str(tmp_path / "with_test")
    facts = [[f"devel_00{clip}.wav", f"s{clip % 2}", 8] for clip in range(4)]
    write_csv(tmp_path / "with_test" / "lab" / "clips.csv", ["filename", "speaker", "listeners"], facts)
    flags += ["--output_dir", str(tmp_path / "output"), "--bootstrap", "20", "--controls"]
    assert main([*flags, "--resample", "speaker"]) == 0
    printed = capsys.readouterr().out
    assert "No noise ceiling: the listeners of only 4 clips are known; expected 30 or more." in printed
    *_, header, own, functionals, length, shuffled = printed[: printed.index("Model, predictions")].splitlines()
    assert header.split() == ["devel", "test"]
    for line, name, numbers in [
        (own, "this model", 2),
        (functionals, "ridge", 2),
        (length, "ridge", 2),
        (shuffled, "the", 1),
    ]:
        assert line.startswith(f"  {name} ")
        assert sum("." in word[1:-1] for word in line.split()) == numbers
    assert "bootstrapped over groups of clips (`speaker`)" in (tmp_path / "output" / "README.md").read_text()
    assert main([*flags, "--resample", "person"]) == 2
    assert "train.py: error: --resample: got 'person'; the corpus has speaker, listeners\n" in capsys.readouterr().err


@pytest.mark.slow
def test_features_that_are_there_need_no_backbone(flags, backbone_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    backbone, loaded = shutil.copytree(backbone_folder, tmp_path / "backbone"), []
    for module in (model, modeling_emoshare):
        monkeypatch.setattr(module, "load_backbone", lambda *args, **more: loaded.append(1) or load(*args, **more))
    flags = [*flags, "--backbone", str(backbone), "--push_backbone", "false"]

    def run_to(output_dir, *more):
        loaded.clear()
        assert main([*flags, "--output_dir", str(tmp_path / output_dir), *more]) == 0
        return len(loaded), capsys.readouterr().out.count(": extracting ")

    assert run_to("first") == (1, 2)
    assert run_to("second") == (0, 0)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    card = first.pop("README.md").replace(b"/first", b"/second").replace(b"name: first", b"name: second")
    assert second.pop("README.md") == card
    assert second == first
    assert run_to("another layer", "--backbone_layer", "1") == (1, 2)
    assert run_to("whole", "--push_backbone", "true") == (1, 0)
    for name in ("predictions_devel.csv", "eval_results.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    for folder in ("second", "whole"):
        assert EmoShareModel.from_pretrained(tmp_path / folder).backbone is not None
    AutoModel.from_config(backbone_config()).save_pretrained(backbone)
    assert run_to("another backbone") == (1, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output_dir", "a file"], "a file cannot be written: Not a directory"),
        (["--output_dir", "a file/output"], "a file/output cannot be written: Not a directory"),
        (["--output_dir", "output", "--resume_from_checkpoint"], "there is no checkpoint in output"),
        (["--output_dir", "output", "--resume_from_checkpoint", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_wrong_folder_is_named_before_features_are_extracted(more, message, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    assert main([*flags, *more]) == 2
    assert f"{message}\n" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuned",
    [
        ["--finetune_last_layers", "1"],
        ["--finetune", "all"],
        ["--finetune", "all", "--backbone_layer", "weighted"],
    ],
    ids=["last", "all", "weighted"],
)
def test_a_tuned_model_is_the_one_that_predicted(tuned, flags, backbone_folder, tmp_path, capsys):
    output_dir = tmp_path / "output"
    flags = [*flags, "--backbone", str(backbone_folder), "--feature_dtype", "float32", "--output_dir", str(output_dir)]
    assert main([*flags, *tuned, "--finetune_learning_rate", "0.01", "--controls"]) == 0
    printed = capsys.readouterr().out
    assert "all emotions have one epoch, chosen by their mean" in printed
    assert "the same model, trained on shuffled labels" in printed
    assert ("mean and deviation of the backbone's features" in printed) == ("all" not in tuned)
    predict = pipeline("audio-classification", model=str(output_dir), trust_remote_code=True)
    for filename, *shares in read_csv(output_dir / "predictions_devel.csv")[1:]:
        waveform, _ = soundfile.read(tmp_path / "corpus" / "wav" / filename, dtype="float32")
        found = {entry["label"]: entry["score"] for entry in predict(waveform)}
        assert [found["joy"], found["awe"]] == pytest.approx([float(share) for share in shares], abs=1e-5)
    before = load(backbone_folder, AutoConfig.from_pretrained(backbone_folder)).state_dict()
    after = EmoShareModel.from_pretrained(output_dir).backbone.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    if "all" not in tuned:
        assert changed
        assert all(name.startswith("encoder.layers.1.") for name in changed)
        # Heads on the layer below take the same stored features.
        flags[-1] = str(tmp_path / "heads")
        assert main([*flags, "--backbone_layer", "1"]) == 0
        assert capsys.readouterr().out.count(": using") == 2
    else:
        assert {name.split(".")[0] for name in changed} >= {"feature_extractor", "feature_projection", "encoder"}
        assert not (tmp_path / "features").exists()


def test_more_layers_than_there_are_are_named(flags, backbone_folder, tmp_path, capsys):
    flags = [*flags, "--backbone", str(backbone_folder), "--output_dir", str(tmp_path / "output")]
    assert main([*flags, "--finetune_last_layers", "3"]) == 2
    message = "--finetune_last_layers: got 3; expected at most 2, the layers up to the one that is read"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "features").exists()
