"""The command `emoshare`: in this process where that is enough, in one of its own for exit codes and signals."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import SMALL_HEAD_FLAGS, read_csv, run_python, speech, write_corpus, write_csv
from scipy.stats import spearmanr
from torch.nn.modules.module import register_module_forward_hook
from transformers import pipeline

from emoshare import EMOTIONS, EmoShareModel, EmotionSharePipeline, cli, other_formats_emoshare
from emoshare.cli import main
from emoshare.commands import evaluate, predict
from emoshare.dataset_script import load_corpus
from emoshare.dataset_script.emotion_share import EmotionShare
from emoshare.dataset_script.publishing import write_dataset
from emoshare.evaluation import groups
from emoshare.evaluation.clips import find_clips, predict_each
from emoshare.evaluation.scores import MEAN, read_scores

COMMAND = [sys.executable, "-m", "emoshare.cli"]


@pytest.fixture(scope="module")
def emotion_share(model_folder):
    return pipeline("emotion-share", model=str(model_folder))


def write_clip(path, seconds, seed=0, sampling_rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech(seconds, seed, sampling_rate), sampling_rate)
    return str(path)


def write_broken(folder):
    """A file of each kind that cannot be predicted; each fails at another point."""
    paths = {kind: folder / f"{kind}.wav" for kind in ("text", "nothing", "short", "not_finite")}
    paths["text"].write_text("not audio")
    paths["nothing"].touch()
    soundfile.write(paths["short"], speech(0.5)[:500], 16000)
    soundfile.write(paths["not_finite"], np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    return {kind: str(path) for kind, path in paths.items()}


def expected_row(emotion_share, path):
    scores = {share["label"]: share["score"] for share in emotion_share(path)}
    return [scores[emotion] for emotion in EMOTIONS]


# predict


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_rows_are_the_pipelines(batch_size, emotion_share, model_folder, tmp_path):
    named = str(shutil.move(write_clip(tmp_path / "named.wav", 0.7), tmp_path / "named.audio"))
    in_folder = [
        write_clip(tmp_path / "clips" / "a" / "second.flac", 9.0, seed=1, sampling_rate=22050),
        write_clip(tmp_path / "clips" / "first.WAV", 0.4, seed=2),
    ]
    output = tmp_path / "shares.csv"
    arguments = ["--model", str(model_folder), "--output", str(output), "--batch_size", batch_size]
    assert main(["predict", named, str(tmp_path / "clips"), *arguments]) == 0
    header, *rows = read_csv(output)
    assert header == ["filename", *EMOTIONS]
    assert [row[0] for row in rows] == [named, *in_folder]
    for path, *shares in rows:
        assert [float(share) for share in shares] == pytest.approx(expected_row(emotion_share, path), abs=1e-6)


def test_windows_go_through_the_model_in_batches(model_folder, tmp_path):
    clips = [write_clip(tmp_path / f"{number}.wav", 0.3) for number in range(5)]
    sizes = []

    def note_size(module, _, output):
        if isinstance(module, EmoShareModel):
            sizes.append(len(output.logits))

    hook = register_module_forward_hook(note_size)
    arguments = ["--model", str(model_folder), "--output", str(tmp_path / "shares.csv")]
    main(["predict", *clips, *arguments, "--batch_size", "3"])
    main(["predict", *clips, *arguments])
    hook.remove()
    assert sizes == [3, 2] + 5 * [1]


def test_float32_is_no_tf32_as_in_training(model_folder, wav, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert main(["predict", str(wav), "--model", str(model_folder)]) == 0
    assert not torch.backends.cudnn.allow_tf32


def test_json_lines(emotion_share, model_folder, tmp_path):
    clip = write_clip(tmp_path / "Müller.wav", 0.5)
    output = tmp_path / "shares.jsonl"
    assert main(["predict", clip, "--model", str(model_folder), "--output", str(output)]) == 0
    (line,) = output.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["filename"] == clip
    assert list(row["shares"]) == list(EMOTIONS)
    assert list(row["shares"].values()) == pytest.approx(expected_row(emotion_share, clip), abs=1e-6)


def test_names_need_not_be_utf_8_nor_fit_on_a_line(emotion_share, model_folder, tmp_path, capfd):
    folder = tmp_path / "clips"
    clips = [
        os.path.join(os.fsencode(folder), name) for name in (b"M\xfcller.wav", b"two\nlines.wav", b"broken\xff\n.wav")
    ]
    source = write_clip(tmp_path / "clip.wav", 0.4)
    folder.mkdir()
    for clip in clips[:2]:
        shutil.copy(source, clip)
    with open(clips[2], "wb") as file:
        file.write(b"no audio")
    expected = expected_row(emotion_share, source)
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"shares.{suffix}"
        assert main(["predict", str(folder), "--model", str(model_folder), "--output", str(output)]) == 1
        if suffix == "csv":  # with the bytes of the name, as the shell has them
            with output.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = {row[0]: [float(share) for share in row[1:]] for row in list(csv.reader(file))[1:]}
        else:  # in UTF-8, which JSON must be
            rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
            rows = {row["filename"]: list(row["shares"].values()) for row in rows}
        assert sorted(map(os.fsencode, rows)) == sorted(clips[:2])
        for shares in rows.values():
            assert shares == pytest.approx(expected, abs=1e-6)
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1].startswith(rf"  {folder}/broken\udcff\n.wav: not an audio file")


def test_a_file_that_cannot_be_decoded_is_listed_whatever_its_format(model_folder, wav, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(other_formats_emoshare, "_decoder_class", lambda: None)
    shutil.copy(wav, tmp_path / "a.wav")
    for name in ("b.m4a", "c.webm"):
        (tmp_path / name).write_bytes(b"something else")
    assert main(["predict", str(tmp_path), "--model", str(model_folder)]) == 1
    output, errors = capfd.readouterr()
    assert [row[0] for row in csv.reader(io.StringIO(output))] == ["filename", str(tmp_path / "a.wav")]
    assert "2 of 3 files could not be predicted:" in errors
    assert f"ffmpeg -i {tmp_path}/b.m4a {tmp_path}/b.wav" in errors
    assert f"ffmpeg -i {tmp_path}/c.webm {tmp_path}/c.wav" in errors


def test_warnings_of_files_are_listed_at_the_end_each_once(model_folder, wav, tmp_path, capfd):
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(8000), 16000)
    (tmp_path / "text.wav").write_text("no audio")  # what was read ahead of it is read again
    inputs = [str(silence), str(tmp_path / "text.wav"), str(wav)]
    assert main(["predict", *inputs, "--model", str(model_folder), "--batch_size", "4"]) == 1
    output, errors = capfd.readouterr()
    assert [row[0] for row in csv.reader(io.StringIO(output))] == ["filename", str(silence), str(wav)]
    lines = errors[errors.index("Warnings:") :].splitlines()
    assert lines[:2] == ["Warnings:", f"  {silence}: is digital silence"]
    assert lines[-2] == "1 of 3 files could not be predicted:"
    assert errors.count("digital silence") == 1


def test_no_code_of_the_models_folder_is_run(model_folder, wav, tmp_path, capfd):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    for module in folder.glob("*.py"):
        module.write_text("raise AssertionError('remote code')")
    assert main(["predict", str(wav), "--model", str(folder)]) == 0
    assert capfd.readouterr().out.startswith(f"filename,{','.join(EMOTIONS)}\n{wav},0.")


@pytest.mark.slow
def test_rows_go_to_standard_output_and_broken_files_to_the_end_of_the_other(emotion_share, model_folder, tmp_path):
    broken = write_broken(tmp_path)
    clips = [write_clip(tmp_path / f"{number}.wav", 0.4, seed=number) for number in range(3)]
    inputs = [broken["text"], clips[0], broken["nothing"], broken["short"], *clips[1:], broken["not_finite"]]
    command = [*COMMAND, "predict", *inputs, "--model", model_folder, "--batch_size", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    rows = list(csv.reader(io.StringIO(result.stdout)))
    assert [row[0] for row in rows] == ["filename", *clips]
    for path, *shares in rows[1:]:
        assert [float(share) for share in shares] == pytest.approx(expected_row(emotion_share, path), abs=1e-5)
    assert "7/7" in result.stderr  # the progress bar
    summary, *lines = result.stderr[result.stderr.index("4 of 7") :].splitlines()
    assert summary == "4 of 7 files could not be predicted:"
    reasons = {
        "text": "not an audio file",
        "nothing": "not an audio file",
        "short": "got 500 samples",
        "not_finite": "16000 of 16000 samples are not finite",
    }
    for line, (kind, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"  {broken[kind]}: ")
        assert line.count(broken[kind]) == 1 or kind in ("text", "nothing")  # libsndfile names it once more
        assert reason in line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("batch_size", [1, 2])
def test_broken_files_anywhere_leave_every_other_clip_as_it_is(batch_size, model_folder, tmp_path):
    """A clip of many windows is begun in one batch and ended in another, with a broken file read ahead behind it."""
    emotion_share = pipeline("emotion-share", model=str(model_folder), batch_size=batch_size)
    long = write_clip(tmp_path / "long.wav", 12.0)
    emotion_share.feature_extractor.chunk_length_s = 0.5
    good = [write_clip(tmp_path / f"{number}.wav", 0.3 + 0.1 * number, seed=number) for number in range(4)]
    broken = list(write_broken(tmp_path).values())
    clips = [broken[0], long, broken[1], broken[2], good[0], good[1], good[2], broken[3], good[3]]
    expected = {clip: emotion_share(clip) for clip in [long, *good]}
    results = list(predict_each(emotion_share, clips))
    assert sorted(clip for clip, _ in results) == sorted(clips)
    predicted = {clip: result for clip, result in results if clip not in broken}
    assert list(predicted) == list(expected)  # in their order
    for clip, shares in expected.items():
        assert [share["label"] for share in predicted[clip]] == [share["label"] for share in shares]
        assert [share["score"] for share in predicted[clip]] == pytest.approx(
            [share["score"] for share in shares], abs=1e-5
        )
    for clip, error in results:
        if clip in broken:
            assert str(error).startswith(clip)


def test_many_broken_files_cost_no_clip_more_than_a_second_reading(model_folder, tmp_path, monkeypatch):
    emotion_share = pipeline("emotion-share", model=str(model_folder), batch_size=4)
    clips = []
    for number in range(10):
        clips.append(write_clip(tmp_path / f"{number}.wav", 0.2, seed=number))
        clips.append(str(shutil.copy(write_broken(tmp_path)["text"], tmp_path / f"broken_{number}.wav")))
    read = []
    preprocess = emotion_share.preprocess
    monkeypatch.setattr(emotion_share, "preprocess", lambda clip, **lengths: read.append(clip) or preprocess(clip))
    assert len(list(predict_each(emotion_share, clips))) == 20
    assert max(read.count(clip) for clip in clips) <= 2


@pytest.mark.slow
def take_interrupts():
    """A process in the background of a script ignores interrupts, and so would the command that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupted_run_keeps_its_rows(model_folder, tmp_path):
    clip = write_clip(tmp_path / "clip.wav", 1.0)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "0.wav").write_text("not audio")
    for number in range(1, 3000):
        os.symlink(clip, tmp_path / "clips" / f"{number}.wav")
    output = tmp_path / "shares.csv"
    command = [*COMMAND, "predict", tmp_path / "clips", "--model", model_folder, "--output", output]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=take_interrupts)
    deadline = time.monotonic() + 120
    while not (output.is_file() and output.read_text().count("\n") > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "0.wav: not an audio file" in errors
    header, *rows = read_csv(output)
    assert 3 <= len(rows) < 2999
    assert {len(row) for row in rows} == {len(header)}


def test_a_killed_run_keeps_its_rows(model_folder, tmp_path, monkeypatch):
    """Rows are in the file before the next clip is read, not when the file is closed."""
    clips = [write_clip(tmp_path / f"{number}.wav", 0.3) for number in range(3)]
    output = tmp_path / "shares.csv"
    lines = []
    preprocess = EmotionSharePipeline.preprocess

    def count_rows(*arguments, **lengths):
        lines.append(len(output.read_text().splitlines()))
        return preprocess(*arguments, **lengths)

    monkeypatch.setattr(EmotionSharePipeline, "preprocess", count_rows)
    main(["predict", *clips, "--model", str(model_folder), "--output", str(output)])
    assert lines == [1, 2, 3]


def test_folders_are_searched_for_audio_files(tmp_path):
    """Files that cannot be decoded are found too: no audio file is skipped silently."""
    names = ["b.wav", "a.FLAC", "deep/er/c.ogg", "deep/d.mp3", "e.opus", "f.m4a", "g.MP4", "raw.raw"]
    names += ["notes.txt", "picture.jpg", ".hidden.wav"]
    for name in [*names, ".cache/f.wav"]:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = str(tmp_path / "folder")
    found = ["a.FLAC", "b.wav", "deep/d.mp3", "deep/er/c.ogg", "e.opus", "f.m4a", "g.MP4", "raw.raw"]
    assert find_clips([folder]) == [os.path.join(folder, name) for name in found]


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "clip.bin").touch()
    assert find_clips([str(tmp_path / "clip.bin")]) == [str(tmp_path / "clip.bin")]


def test_a_file_is_found_once_under_the_name_that_was_given_first(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.wav").touch()
    os.symlink("a.wav", tmp_path / "folder" / "b.wav")  # another clip of the same content, as in the Hub's cache
    os.symlink("folder", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert find_clips(["./folder/a.wav", "folder", "link", "folder/../folder/a.wav"]) == [
        "./folder/a.wav",
        "folder/b.wav",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.wav"], "missing.wav: no such file or folder"),
        (["empty"], "empty: no audio files in this folder"),
        ([""], "'': no such file or folder"),
        (["no\nclip.wav"], r"no\nclip.wav: no such file or folder"),
        (["clip.wav", "--model", "missing"], "cannot load missing: there is no such folder here, and from the Hub: "),
        (["clip.wav", "--model", "outputs/mising"], "cannot load outputs/mising: there is no such folder here, and fr"),
        (["clip.wav", "--model", "./missing"], "--model: got './missing'; expected a folder, or a Hub id ORG/NAME"),
        (["clip.wav", "--model", "clip.wav"], "--model: got 'clip.wav'; expected a folder"),
        (["clip.wav", "--model", ""], "--model: got ''; expected a folder"),
        (["clip.wav", "--model", "empty"], "cannot load empty: it has no config.json"),
        (["clip.wav", "--model", "null"], "cannot load null: config.json is not a JSON object"),
        (["clip.wav", "--model", "broken"], "cannot load broken: config.json is not valid JSON ("),
        (["clip.wav", "--model", "encoder"], "cannot load encoder: its model_type is 'hubert'; expected 'emoshare'"),
        (
            ["clip.wav", "--model", "its_extractor"],
            "its feature extractor is Wav2Vec2FeatureExtractor, and not EmoShare",
        ),
        (["clip.wav", "--model", "rate"], "cannot load rate: sampling_rate: got '16000'; expected a whole number"),
        (["clip.wav", "--revision", "main"], "--revision: is for repositories on the Hub; "),
        (["clip.wav", "--device", "abacus"], "device string: abacus"),
        (["clip.wav", "--device", "63"], "cannot load "),
        (["clip.wav", "--output", "missing/shares.csv"], "error: missing/shares.csv: No such file or directory"),
        (["clip.wav", "--output", "full.csv"], "error: full.csv: No space left on device"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message, model_folder, wav, tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    shutil.copy(wav, tmp_path / "clip.wav")
    os.symlink("/dev/full", tmp_path / "full.csv")
    write_faulty_models(tmp_path, model_folder)
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "--model", str(model_folder), *arguments]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    (error,) = (line for line in errors.splitlines() if "error" in line)
    assert error.startswith("emoshare predict: error: ")
    assert message in error
    assert errors.endswith(f"{error}\n")  # with no line after it


def write_faulty_models(folder, model_folder):
    """Model folders without weights, each with another fault in the files that are read before those."""

    def write(name, config, preprocessor):
        (folder / name).mkdir()
        for path, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            (folder / name / path).write_text(content if isinstance(content, str) else json.dumps(content))

    names = ("config.json", "preprocessor_config.json")
    config, preprocessor = (json.loads((model_folder / name).read_text()) for name in names)
    write("null", "null", preprocessor)
    write("broken", '{"model_type": "emoshare",', preprocessor)
    write("encoder", {"model_type": "hubert"}, preprocessor)
    write("its_extractor", config, {**preprocessor, "feature_extractor_type": "Wav2Vec2FeatureExtractor"})
    write("rate", config, {**preprocessor, "sampling_rate": "16000"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "shares.txt"], "--output: got 'shares.txt'; expected a name that ends in .csv or .jsonl"),
        (["--batch_size", "0"], "--batch_size: got '0'; expected a number, 1 or more"),
        (["--device", "-2"], "--device: got '-2'; expected a name, the number of an accelerator, or -1 (CPU)"),
        (["--out", "shares.csv"], "unrecognized arguments: --out"),
    ],
)
def test_wrong_arguments_end_the_command_before_anything_is_read(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["predict", "missing.wav", "--model", "missing", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def closed_pipe():
    """Standard output as `| head -n 1` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def test_minus_one_is_the_cpu(model_folder, wav, capfd):
    shares = []
    for device in ("cpu", "-1"):
        assert main(["predict", str(wav), "--model", str(model_folder), "--device", device]) == 0
        shares.append(capfd.readouterr().out)
    assert shares[0] == shares[1] != ""


def test_a_build_of_torch_without_accelerators_says_so(model_folder, wav, monkeypatch, capfd):
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount")
    assert main(["predict", str(wav), "--model", str(model_folder), "--device", "cuda"]) == 2
    assert f"error: cannot load {model_folder}: Torch not compiled with CUDA enabled" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("open_stdout", "message"),
    [(closed_pipe, None), (full_disk, "No space left on device")],
)
def test_output_that_nobody_takes_is_one_line_at_most(open_stdout, message, model_folder, wav, monkeypatch, capfd):
    """Rows are written as they come, and what `evaluate` prints is in Python's buffer until the end."""
    monkeypatch.setattr(evaluate, "run", lambda arguments: print("a table"))
    for run in (
        lambda: main(["predict", str(wav), "--model", str(model_folder)]),
        lambda: cli._run(Namespace(command="evaluate")),
    ):
        with os.fdopen(open_stdout(), "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert run() == 2
            # Closing it, as Python does when it ends, must not complain once more.
        errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == (message is not None)
        assert all(message in error for error in errors)


def test_closed_standard_output_is_said(model_folder, wav, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it
    assert main(["predict", str(wav), "--model", str(model_folder)]) == 2
    assert "error: standard output is closed; expected --output FILE" in capfd.readouterr().err


# predict: conversations


@pytest.fixture(scope="module")
def meeting(tmp_path_factory):
    """A recording of 5 s, and the file of its turns."""
    folder = tmp_path_factory.mktemp("meeting")
    (folder / "turns.csv").write_text("start,end,speaker\n3.0,4.5,Ada\n0.5,2.0,Bo\n1.5,3.0,Ada\n")
    return Path(write_clip(folder / "meeting.wav", 5.0, sampling_rate=22050)), folder / "turns.csv"


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_turns_speakers_and_the_whole_are_the_pipelines(batch_size, emotion_share, model_folder, meeting, tmp_path):
    recording, turns = meeting
    arguments = [str(recording), "--model", str(model_folder), "--segments", str(turns), "--batch_size", batch_size]
    assert main(["predict", *arguments, "--output", str(tmp_path / "shares.csv")]) == 0
    segments = [
        {"start": float(start), "end": float(end), "speaker": speaker} for start, end, speaker in read_csv(turns)[1:]
    ]
    expected = emotion_share(str(recording), segments=segments)
    header, *rows = read_csv(tmp_path / "shares.csv")
    assert header == ["filename", "unit", "start", "end", "speaker", *EMOTIONS]
    assert [row[:5] for row in rows] == [
        [str(recording), "turn", "3.000000", "4.500000", "Ada"],
        [str(recording), "turn", "0.500000", "2.000000", "Bo"],
        [str(recording), "turn", "1.500000", "3.000000", "Ada"],
        [str(recording), "speaker", "", "", "Ada"],
        [str(recording), "speaker", "", "", "Bo"],
        [str(recording), "recording", "", "", ""],
    ]
    units = [*(turn["shares"] for turn in expected["turns"]), *expected["speakers"].values(), expected["shares"]]
    for row, shares in zip(rows, units, strict=True):
        scores = {share["label"]: share["score"] for share in shares}
        assert [float(share) for share in row[5:]] == pytest.approx([scores[label] for label in EMOTIONS], abs=1e-5)
    for suffix in ("jsonl", "TextGrid", "txt"):
        assert main(["predict", *arguments, "--output", str(tmp_path / f"shares.{suffix}")]) == 0
    for suffix in ("csv", "TextGrid", "txt"):  # which are files of segments again
        arguments[4] = str(tmp_path / f"shares.{suffix}")
        assert main(["predict", *arguments, "--output", str(tmp_path / "again.csv")]) == 0
        assert sorted(read_csv(tmp_path / "again.csv")) == sorted([header, *rows])


def test_speech_that_is_found_is_predicted_in_each_recording(emotion_share, model_folder, tmp_path, capfd):
    clips = [str(tmp_path / f"{number}.wav") for number in range(2)]
    silence, broken = tmp_path / "2.wav", tmp_path / "3.wav"
    pause = np.full(24000, 0.0001)
    for clip in clips:
        soundfile.write(clip, np.concatenate([pause, speech(2.0), pause]), 16000)
    soundfile.write(silence, pause, 16000)
    broken.write_text("no audio")
    output = tmp_path / "shares.jsonl"
    assert main(["predict", str(tmp_path), "--model", str(model_folder), "--vad", "--output", str(output)]) == 1
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["filename"], row["unit"]) for row in rows] == [
        *((clip, unit) for clip in clips for unit in ("turn", "recording")),
        (str(silence), "recording"),
    ]
    found = {"start": rows[0]["start"], "end": rows[0]["end"]}
    expected = {share["label"]: share["score"] for share in emotion_share(clips[0], segments=[found])["shares"]}
    assert rows[0]["shares"] == pytest.approx(expected, abs=1e-5)
    assert rows[-1]["shares"] is None
    errors = capfd.readouterr().err
    assert f"Warnings:\n  {silence}: no speech was found\n" in errors
    assert f"1 of 4 files could not be predicted:\n  {broken}: not an audio file" in errors


@pytest.mark.parametrize(
    ("arguments", "turns", "code", "message"),
    [
        (["--segments", "t.csv"], "start,end\n1,2\n3,2.5\n", 2, "t.csv, row 3: starts at 3.000 s and ends at 2.500 s"),
        (["--segments", "t.csv"], "start,end\n1,2\n4,6\n", 2, "t.csv, row 3: 4.000 to 6.000 s is past the end of the"),
        (["--segments", "t.csv", "--tier", "a"], "start,end\n1,2\n", 2, "--tier: is for a TextGrid; got t.csv"),
        (["--segments", "none.csv"], "", 2, "none.csv: No such file or directory"),
        (
            ["--segments", "t.csv", "meeting.wav", "."],
            "start,end\n1,2\n",
            2,
            "--segments: is for one recording; got 2 files",
        ),
        (["--vad", ".", "--output", "a.TextGrid"], "", 2, "--output: a.TextGrid: is for one recording; got 2 files"),
        (["--segments", "t.csv"], "start,end\n1,2\n3,3.01\n", 0, "t.csv, row 3: 3.000 to 3.010 s is too short"),
    ],
)
def test_what_is_wrong_with_turns_is_one_line_with_its_row(
    arguments, turns, code, message, model_folder, meeting, tmp_path, monkeypatch, capfd
):
    shutil.copy(meeting[0], tmp_path / "meeting.wav")
    shutil.copy(meeting[0], tmp_path / "other.wav")
    (tmp_path / "t.csv").write_text(turns)
    monkeypatch.chdir(tmp_path)
    inputs = [] if "." in arguments else ["meeting.wav"]
    assert main(["predict", *inputs, "--model", str(model_folder), *arguments]) == code
    errors = capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    if code == 2:
        assert errors.splitlines()[-1].startswith(f"emoshare predict: error: {message[:20]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vad", "--segments", "t.csv"], "not allowed with argument"),
        (["--tier", "a"], "--tier: is for --segments FILE.TextGrid"),
        (["--output", "a.TextGrid"], "--output: got 'a.TextGrid'; expected a name that ends in .csv or .jsonl"),
        (["--vad", "--output", "a.rttm"], "expected a name that ends in .csv or .jsonl or .TextGrid or .txt"),
    ],
)
def test_flags_of_turns_that_do_not_fit_end_the_command(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "missing.wav", "--model", "missing", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("output", ["turns.csv", "sub/../turns.csv", "link.csv"])
def test_the_file_of_segments_is_not_overwritten(output, tmp_path, monkeypatch, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "turns.csv").write_text("start,end\n1,2\n")
    os.symlink("turns.csv", tmp_path / "link.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "missing.wav", "--model", "missing", "--segments", "turns.csv", "--output", output])
    assert f"--output: {output} is the file of --segments; expected another one" in capsys.readouterr().err


def test_an_error_of_the_recording_is_not_said_of_the_output(model_folder, meeting, tmp_path, monkeypatch, capfd):
    """It is deleted while the model is loaded."""
    recording, load = tmp_path / "meeting.wav", predict.load_pipeline
    shutil.copy(meeting[0], recording)
    monkeypatch.setattr(predict, "load_pipeline", lambda arguments: recording.unlink() or load(arguments))
    arguments = [str(recording), "--model", str(model_folder), "--segments", str(meeting[1])]
    assert main(["predict", *arguments, "--output", str(tmp_path / "shares.csv")]) == 2
    assert f"emoshare predict: error: {recording}: no such audio file\n" in capfd.readouterr().err


# train and evaluate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A user's own labels; the shares of test are unknown."""
    folder = write_corpus(
        tmp_path_factory.mktemp("corpus") / "own", {"train": 8, "devel": 12, "test": 2}, labels=["joy", "awe"]
    )
    rows = read_csv(folder / "lab" / "test.csv")
    write_csv(folder / "lab" / "test.csv", rows[0], [[row[0], "?", "?"] for row in rows[1:]])
    return folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The output of `emoshare train` on it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--dataset", "csv", "--data_dir", corpus, *SMALL_HEAD_FLAGS, "--num_train_epochs", "2"]
    flags += ["--feature_dtype", "float32", "--bootstrap", "50", "--seed", "3", "--output_dir", folder / "output"]
    run_python("-m", "emoshare.cli", "train", *flags, cwd=folder)
    return folder / "output"


def test_train_takes_what_train_py_takes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    help = capsys.readouterr().out
    assert "usage: emoshare train [CONFIG.yaml]" in help
    assert "--early_stopping_patience" in help


def test_reproduce_takes_what_reproduce_py_takes(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["reproduce", "--help"])
    assert exit.value.code == 0
    help = capsys.readouterr().out
    assert "usage: emoshare reproduce " in help
    assert "--sweep_layers" in help


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_errors_name_the_command_that_was_given(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--no_such_flag"])
    assert exit.value.code == 2
    assert f"\nemoshare {command}: error: " in capsys.readouterr().err
    (tmp_path / "grid.yaml").write_text(
        "title: A grid\nfeatures: {Mel: }\narchitectures: {cnn_lstm: }\nseeds: [0]\n"
        f"output_dir: {tmp_path / 'grid'}\ntrain: {{dataset: csv, data_dir: {tmp_path / 'nowhere'}}}\n"
    )
    flags = {
        "train": ["--dataset", "csv", "--data_dir", str(tmp_path / "nowhere")],
        "reproduce": ["--config", str(tmp_path / "grid.yaml")],
    }
    assert main([command, *flags[command]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"emoshare {command}: error: ")
    assert "nowhere" in error


@pytest.mark.slow
def test_evaluate_gives_the_scores_of_the_training_run(trained, corpus, tmp_path, capsys):
    arguments = ["--model", str(trained), "--dataset", "csv", "--data_dir", str(corpus), "--bootstrap", "50"]
    assert main(["evaluate", *arguments, "--seed", "3", "--output_dir", str(tmp_path / "scores")]) == 0
    results = json.loads((tmp_path / "scores" / "eval_results_devel.json").read_text())
    of_training = json.loads((trained / "eval_results.json").read_text())
    assert results.pop("made_from") == {"devel": of_training.pop("made_from")["devel"]}
    assert results.keys() == of_training.keys()
    for name, value in of_training.items():
        assert results[name] == pytest.approx(value, abs=1e-6)
    predicted = read_csv(tmp_path / "scores" / "predictions_devel.csv")
    for row, expected in zip(predicted, read_csv(trained / "predictions_devel.csv"), strict=True):
        assert row[0] == expected[0]
        if row[0] == "filename":
            assert row == expected
        else:
            assert [float(share) for share in row[1:]] == pytest.approx([float(share) for share in expected[1:]])
    low, high = results["eval_spearman_awe_ci95"]
    printed = capsys.readouterr().out
    assert f"awe             {results['eval_spearman_awe']:.3f}   95 % CI {low:.3f} to {high:.3f}" in printed
    assert "on devel, 12 clips" in printed


@pytest.fixture(scope="module")
def with_facts(tmp_path_factory):
    """A corpus of 48 devel clips by four speakers, whose shares are votes of eight listeners."""
    folder = write_corpus(tmp_path_factory.mktemp("facts") / "data", {"train": 1, "devel": 48}, seconds=(0.1, 0.2))
    header, *rows = read_csv(folder / "lab" / "devel.csv")
    votes = np.random.default_rng(0).binomial(8, 0.4, size=(48, 9)) / 8
    write_csv(
        folder / "lab" / "devel.csv", header, [[row[0], *of_clip] for row, of_clip in zip(rows, votes, strict=True)]
    )
    facts = [[row[0], ("f", "m")[clip % 2], f"s{clip % 4}", 8] for clip, row in enumerate(rows)]
    write_csv(folder / "lab" / "clips.csv", ["filename", "sex", "speaker", "listeners"], facts)
    return folder


def test_evaluate_by_facts(with_facts, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(groups, "PERMUTATIONS", 20)
    command = ["evaluate", "--model", str(model_folder), "--dataset", "csv", "--data_dir", str(with_facts)]
    command += ["--bootstrap", "30", "--output_dir"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    by = ["--by", "sex", "--by", "speaker", "listeners", "--resample", "speaker"]
    assert main([*command, str(tmp_path / "by"), *by]) == 0
    printed = capsys.readouterr().out
    plain, results = (
        json.loads((tmp_path / folder / "eval_results_devel.json").read_text()) for folder in ("plain", "by")
    )
    assert list(results["groups"]) == ["sex", "speaker", "listeners"]
    sex = results["groups"]["sex"]
    shares = {row[0]: float(row[1]) for row in read_csv(tmp_path / "by" / "predictions_devel.csv")[1:]}
    women = read_csv(with_facts / "lab" / "devel.csv")[1::2]
    rho = spearmanr([shares[row[0]] for row in women], [float(row[1]) for row in women]).statistic
    assert sex["groups"]["f"][f"spearman_{EMOTIONS[0]}"] == pytest.approx(rho)
    assert (sex["groups"]["f"]["clips"], sex["left_out_as_too_small"]) == (24, {})
    assert sex["largest_gaps"].keys() == {"spearman", *(f"spearman_{emotion}" for emotion in EMOTIONS)}
    assert "sex f: 24 clips" in printed
    assert "Largest gaps by speaker" in printed
    assert "listeners: nothing to compare" in printed
    assert "groups" not in plain
    assert plain["eval_spearman"] == results["eval_spearman"]
    assert plain["eval_spearman_ci95"] != results["eval_spearman_ci95"]  # of clips, and of speakers
    assert plain["noise_ceiling"]["spearman"] == results["noise_ceiling"]["spearman"]
    assert f"   ceiling {plain['noise_ceiling']['spearman']:.3f}" in printed
    assert "Noise ceiling: because panels are small, " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "sex", "age"], "--by: got 'age'; the corpus has sex, speaker, listeners"),
        (["--resample", "age"], "--resample: got 'age'; the corpus has sex, speaker, listeners"),
        (["--resample", "sex", "--split", "train"], "--resample: sex is not known for 1 of the 1 clips of train"),
    ],
)
def test_unknown_facts_are_named_with_those_there_are(arguments, message, with_facts, capsys):
    command = ["evaluate", "--model", "not/loaded", "--dataset", "csv", "--data_dir", str(with_facts)]
    assert main([*command, *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"emoshare evaluate: error: {message}"


@pytest.mark.slow
def test_evaluate_in_batches_of_labels_in_another_order(trained, corpus, tmp_path, capsys):
    turned = shutil.copytree(corpus, tmp_path / "turned")
    for split in ("train", "devel", "test"):
        rows = read_csv(corpus / "lab" / f"{split}.csv")
        write_csv(turned / "lab" / f"{split}.csv", ["filename", "awe", "joy"], [[f, a, j] for f, j, a in rows[1:]])
    arguments = ["--model", str(trained), "--dataset", "csv", "--data_dir", str(turned), "--bootstrap", "0"]
    assert main(["evaluate", *arguments, "--split", "train", "--batch_size", "3"]) == 0
    emotion_share = pipeline("emotion-share", model=str(trained))
    rows = read_csv(turned / "lab" / "train.csv")[1:]
    outputs = [emotion_share(str(turned / "wav" / row[0])) for row in rows]
    joy = [next(share["score"] for share in output if share["label"] == "joy") for output in outputs]
    rho = spearmanr(joy, [float(row[2]) for row in rows]).statistic
    printed = capsys.readouterr().out
    assert f"  joy             {rho:.3f}\n" in printed
    assert "CI" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "--split: 'test' has no known shares"),
        (["--split", "dev"], "--split: got 'dev'; the corpus has train, devel, test"),
        (["--dataset", "unknown"], "'unknown'"),
    ],
)
@pytest.mark.slow
def test_evaluate_says_what_is_wrong(arguments, message, trained, corpus, capsys):
    known = ["--model", str(trained), "--dataset", "csv", "--data_dir", str(corpus)]
    assert main(["evaluate", *known, *arguments]) == 2
    errors = capsys.readouterr().err
    assert "emoshare evaluate: error: " in errors
    assert message in errors


def test_labels_of_another_corpus_are_named(model_folder, corpus, capsys):
    assert main(["evaluate", "--model", str(model_folder), "--dataset", "csv", "--data_dir", str(corpus)]) == 2
    assert f"has the labels {list(EMOTIONS)}; the corpus has ['joy', 'awe']" in capsys.readouterr().err


@pytest.mark.parametrize("is_published", [False, True])
def test_evaluate_goes_on_past_broken_clips(is_published, model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", {"train": 1, "devel": 7})
    command = ["evaluate", "--model", str(model_folder), "--bootstrap", "0", "--output_dir", str(tmp_path / "scores")]
    from_folder = ["--dataset", "csv", "--data_dir", str(corpus)]
    assert main([*command, *from_folder]) == 0
    expected = read_csv(tmp_path / "scores" / "predictions_devel.csv")
    whole_results = json.loads((tmp_path / "scores" / "eval_results_devel.json").read_text())
    (corpus / "wav" / "devel_001.wav").write_text("not audio")
    soundfile.write(corpus / "wav" / "devel_004.wav", speech(0.5)[:500], 16000)
    os.truncate(corpus / "wav" / "devel_005.wav", 8000)
    if is_published:
        builder = EmotionShare("csv", data_dir=corpus, cache_dir=tmp_path / "cache")
        write_dataset(builder, tmp_path / "published", "name")
    capsys.readouterr()
    dataset = ["--dataset", str(tmp_path / "published")] if is_published else from_folder
    assert main([*command, *dataset, "--batch_size", "2"]) == 1
    output, errors = capsys.readouterr()
    summary, *lines = errors[errors.index("3 of 7") :].splitlines()
    assert summary == "3 of 7 clips could not be predicted, and are not in the scores:"
    places = [f"devel, row {row}" if is_published else f"lab/devel.csv, row {row + 2}" for row in (1, 4, 5)]
    assert lines[0].startswith(f"  {places[0]}: devel_001.wav: not an audio file")
    assert lines[1].startswith(f"  {places[1]}: devel_004.wav: ")
    assert "500 samples" in lines[1]
    assert lines[2].startswith(f"  {places[2]}: devel_005.wav: its header promises")
    assert "on devel, 4 clips" in output
    rows = read_csv(tmp_path / "scores" / "predictions_devel.csv")[1:]
    assert [row[0] for row in rows] == [f"devel_00{number}.wav" for number in (0, 2, 3, 6)]
    whole = {row[0]: row[1:] for row in expected[1:]}
    for name, *shares in rows:
        assert [float(share) for share in shares] == pytest.approx([float(share) for share in whole[name]], abs=1e-5)
    true = {row[0]: float(row[1]) for row in read_csv(corpus / "lab" / "devel.csv")[1:]}
    rho = spearmanr([float(row[1]) for row in rows], [true[row[0]] for row in rows]).statistic
    results = json.loads((tmp_path / "scores" / "eval_results_devel.json").read_text())
    assert results[f"eval_spearman_{EMOTIONS[0]}"] == pytest.approx(rho)
    assert "clips_left_out" not in whole_results
    assert results["clips_left_out"] == 3
    header, *labelled = read_csv(corpus / "lab" / "devel.csv")
    write_csv(corpus / "lab" / "devel.csv", header, [labelled[index] for index in (0, 2, 3, 6)])
    of_part = load_corpus("csv", data_dir=corpus, cache_dir=tmp_path / "cache").fingerprints()
    assert results["made_from"] == {"devel": of_part["devel"]}
    assert whole_results["made_from"].keys() == {"devel"}
    assert whole_results["made_from"] != results["made_from"]
    assert read_scores(tmp_path / "scores" / "eval_results_devel.json", EMOTIONS)[MEAN].rho == results["eval_spearman"]


def test_evaluate_of_broken_clips_alone_is_an_error(model_folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", {"train": 1, "devel": 2})
    for path in (corpus / "wav").glob("devel*"):
        path.write_text("not audio")
    command = ["evaluate", "--model", str(model_folder), "--dataset", "csv", "--data_dir", str(corpus)]
    assert main([*command, "--output_dir", str(tmp_path / "scores")]) == 2
    errors = capsys.readouterr().err
    assert "none of the 2 clips of devel could be predicted" in errors
    assert "2 of 2 clips could not be predicted" in errors
    assert not list((tmp_path / "scores").iterdir())


# ensemble


@pytest.fixture
def members(corpus, tmp_path):
    """Three runs whose errors on devel cancel in part."""
    rng = np.random.default_rng(0)
    folders = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for split in ("devel", "test"):
            header, *rows = read_csv(corpus / "lab" / f"{split}.csv")
            known = np.array([[0.5 if share == "?" else float(share) for share in row[1:]] for row in rows])
            shares = np.clip(known + rng.normal(0, 0.15, known.shape), 0, 1)
            predicted = [[row[0], *(f"{share:.6f}" for share in clip)] for row, clip in zip(rows, shares, strict=True)]
            write_csv(tmp_path / name / f"predictions_{split}.csv", header, predicted)
        folders.append(tmp_path / name)
    return folders


def shares_in(path):
    return np.array([[float(share) for share in row[1:]] for row in read_csv(path)[1:]])


def test_an_ensemble_is_the_mean_of_its_members(members, corpus, tmp_path, capsys):
    output = tmp_path / "ensemble"
    arguments = ["--dataset", "csv", "--data_dir", str(corpus), "--bootstrap", "20", "--output_dir", str(output)]
    assert main(["ensemble", *map(str, members), *arguments]) == 0
    for split in ("devel", "test"):
        name = f"predictions_{split}.csv"
        mean = np.mean([shares_in(folder / name) for folder in members], axis=0)
        assert shares_in(output / name) == pytest.approx(mean, abs=1e-8)
        assert [row[0] for row in read_csv(output / name)] == [row[0] for row in read_csv(members[0] / name)]
    true = shares_in(corpus / "lab" / "devel.csv")

    def rho(shares):
        return np.mean([spearmanr(shares[:, index], true[:, index]).statistic for index in range(2)])

    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_spearman"] == pytest.approx(rho(shares_in(output / "predictions_devel.csv")))
    assert len(results["eval_spearman_ci95"]) == 2
    assert results["made_from"] == {
        "devel": load_corpus("csv", data_dir=corpus, cache_dir=tmp_path / "cache").fingerprints()["devel"]
    }
    printed = capsys.readouterr().out
    for folder in members:
        assert f"  {rho(shares_in(folder / 'predictions_devel.csv')):.3f}   {folder}\n" in printed
    assert f"  {results['eval_spearman']:.3f}   their mean\n" in printed


def test_an_ensemble_of_what_is_wrong_is_not_written(members, corpus, tmp_path, capsys):
    arguments = ["--dataset", "csv", "--data_dir", str(corpus), "--output_dir", str(tmp_path / "ensemble")]

    def error_of(*argv):
        assert main(["ensemble", *map(str, argv)]) == 2
        return capsys.readouterr().err

    header, *rows = read_csv(members[1] / "predictions_test.csv")
    write_csv(members[1] / "predictions_test.csv", header, rows[::-1])
    errors = error_of(*members, *arguments)
    assert f"emoshare ensemble: error: {members[1]}/predictions_test.csv: 1 problem(s)" in errors
    assert f"row 2: got {rows[1][0]}; expected {rows[0][0]}" in errors
    (members[1] / "predictions_test.csv").unlink()
    assert f"{members[1]}/predictions_test.csv" in error_of(*members, *arguments)
    assert "got a run more than once" in error_of(members[0], f"{tmp_path}/c/../a", *arguments)
    assert "is one of the runs" in error_of(*members, *arguments[:-1], members[2])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert f"--output_dir: {tmp_path}/run holds a model" in error_of(*members, *arguments[:-1], tmp_path / "run")
    assert not (tmp_path / "ensemble").exists()
