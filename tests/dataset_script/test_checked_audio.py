"""All audio of a corpus is checked before anything is computed from it."""

import numpy as np
import pytest
import soundfile
from conftest import read_csv, speech, write_corpus, write_csv

from emoshare.audio_emoshare import load_audio
from emoshare.dataset_script import audio, digests, load_corpus
from emoshare.dataset_script.audio import check_audio, clips_fingerprint, length_of
from emoshare.dataset_script.emotion_share import EmotionShare
from emoshare.dataset_script.publishing import write_dataset

LABELS = ["joy", "awe"]


@pytest.fixture
def folder(tmp_path):
    return write_corpus(tmp_path / "corpus", {"train": 8, "devel": 3}, labels=LABELS, mixed_formats=True)


def load(folder):
    return load_corpus("csv", data_dir=folder, cache_dir=folder.parent / "cache")


def damage(folder):
    """Breaks a clip in each way; returns the expected message by clip name."""
    wav = folder / "wav"
    (wav / "train_001.wav").write_text("not audio")
    (wav / "train_003.wav").write_bytes(b"")
    content = (wav / "train_004.wav").read_bytes()
    (wav / "train_004.wav").write_bytes(content[: len(content) // 2])
    soundfile.write(wav / "devel_001.wav", speech(0.3)[:300], 16000)
    return {
        "train_001.wav": "not an audio file",
        "train_003.wav": "",
        "train_004.wav": "promises",
        "devel_001.wav": "is too short, 0.019 s; expected at least 0.040 s",
    }


def test_what_is_whole_passes(folder):
    corpus = load(folder)
    for decode in (False, True):
        check_audio(corpus, corpus.splits, folder, 16000, 640, decode)


def test_every_broken_clip_is_listed_with_its_row(folder):
    rows = read_csv(folder / "lab" / "train.csv")
    write_csv(folder / "lab" / "train.csv", rows[0], [rows[1], [], *rows[2:]])  # a blank line: rows move by one
    reasons = damage(folder)
    with pytest.raises(ValueError, match=r"corpus: 4 problem\(s\)") as error:
        check_audio(load(folder), ["train", "devel"], folder, 16000, 640)
    lines = str(error.value).splitlines()[1:]
    places = ["lab/train.csv, row 4", "lab/train.csv, row 6", "lab/train.csv, row 7", "lab/devel.csv, row 3"]
    for line, place, (filename, reason) in zip(lines, places, reasons.items(), strict=True):
        assert line.startswith(f"  {place}: {filename}: ")
        assert reason in line
    check_audio(load(folder), [], folder, 16000, 640)


def test_all_of_many_are_listed(folder):
    for path in (folder / "wav").glob("train_*.wav"):
        path.write_text("not audio")
    with pytest.raises(ValueError, match=r"8 problem\(s\)") as error:
        check_audio(load(folder), ["train", "devel"], folder, 16000, 640)
    assert len(str(error.value).splitlines()) == 9


def test_decoding_finds_what_headers_do_not_show(folder):
    path = folder / "wav" / "devel_002.wav"
    soundfile.write(path, np.where(np.arange(16000) == 9000, np.nan, 0.1).astype(np.float32), 16000, subtype="FLOAT")
    check_audio(load(folder), ["devel"], folder, 16000, 640)
    with pytest.raises(ValueError, match=r"row 4: devel_002\.wav: 1 of 16000 samples are not finite"):
        check_audio(load(folder), ["devel"], folder, 16000, 640, decode=True)


def test_clips_of_a_published_corpus_are_checked_too(folder, tmp_path):
    damage(folder)
    write_dataset(EmotionShare("csv", data_dir=folder, cache_dir=tmp_path / "cache"), tmp_path / "published", "name")
    corpus = load_corpus(str(tmp_path / "published"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"name: 4 problem\(s\)\n  train, row 1: train_001\.wav: not an audio file"):
        check_audio(corpus, corpus.splits, "name", 16000, 640)


def test_a_length_from_the_header_is_that_of_the_audio(folder):
    for row in load(folder).splits["train"]:
        expected = len(load_audio(row["audio"]))
        assert length_of(row, 16000) == length_of(row, 16000, decode=True) == expected


def test_the_fingerprint_of_clips_is_of_names_and_content(folder, tmp_path):
    before = clips_fingerprint(load(folder).splits["train"])
    write_dataset(EmotionShare("csv", data_dir=folder, cache_dir=tmp_path / "cache"), tmp_path / "published", "name")
    published = load_corpus(str(tmp_path / "published"), cache_dir=tmp_path / "cache")
    assert clips_fingerprint(published.splits["train"]) == before
    assert clips_fingerprint(load(folder).splits["train"].select([1, 0, *range(2, 8)])) != before
    path = folder / "wav" / "train_002.wav"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert clips_fingerprint(load(folder).splits["train"]) != before


def test_audio_in_a_published_corpus_is_read_once_and_files_are_asked_each_time(folder, tmp_path, monkeypatch):
    write_dataset(EmotionShare("csv", data_dir=folder, cache_dir=tmp_path / "cache"), tmp_path / "published", "name")
    published, in_files = load_corpus(str(tmp_path / "published"), cache_dir=tmp_path / "cache"), load(folder)
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    read, digest, read_file = [], audio._digest, digests._read
    monkeypatch.setattr(audio, "_digest", lambda content: read.append(len(content)) or digest(content))
    monkeypatch.setattr(digests, "_read", lambda path: read.append(path) or read_file(path))
    before = published.fingerprints()
    assert len(read) == 11
    assert published.fingerprints() == before == in_files.fingerprints()
    assert len(read) == 22
    assert load_corpus(str(tmp_path / "published"), cache_dir=tmp_path / "cache").fingerprints() == before
    assert load(folder).fingerprints() == before
    assert len(read) == 22
    read.clear()
    soundfile.write(folder / "wav" / "train_002.wav", speech(0.7, seed=99), 16000)
    assert published.fingerprints() == before
    assert in_files.fingerprints()["train"] != before["train"]
    assert len(read) == 1


def test_the_fingerprints_of_a_corpus_say_which_part_changed(folder):
    before = load(folder).fingerprints()
    rows = read_csv(folder / "lab" / "devel.csv")
    rows[2][1] = "0.123"
    write_csv(folder / "lab" / "devel.csv", rows[0], rows[1:])
    after = load(folder).fingerprints()
    assert after["train"] == before["train"]
    assert after["devel"]["clips"] == before["devel"]["clips"]
    assert after["devel"]["shares"] != before["devel"]["shares"]
