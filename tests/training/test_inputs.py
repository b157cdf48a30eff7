"""Clips for models whose whole encoder trains: feature extractor outputs, decoded when they are read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import write_corpus

from emoshare import EmoShareFeatureExtractor
from emoshare.audio_emoshare import load_audio
from emoshare.dataset_script import load_corpus
from emoshare.training import inputs
from emoshare.training.inputs import InputStore, check_all_audio
from emoshare.training.user_errors import UserError

ACCELERATOR = Accelerator(cpu=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of 0.3 to 1.2 s, several of them longer than a window."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", {"train": 5, "devel": 2}, mixed_formats=True)


@pytest.fixture(scope="module")
def corpus(folder):
    return load_corpus("csv", data_dir=folder, cache_dir=folder.parent / "cache")


@pytest.fixture(params=["waveform", "mel"])
def extractor(request):
    return EmoShareFeatureExtractor(request.param, chunk_length_s=0.6)


def test_a_batch_is_what_the_feature_extractor_makes_of_the_windows(corpus, extractor):
    store = InputStore(corpus, "train", extractor, ACCELERATOR)
    windows, clips = [], []
    for clip, row in enumerate(corpus.splits["train"]):
        waveform = load_audio(row["audio"], 16000)
        for start, end in extractor.windows(len(waveform)):
            windows.append(waveform[start:end])
            clips.append(clip)
    assert len(store) == len(windows) > len(corpus.splits["train"])
    np.testing.assert_array_equal(store.clip_of_window, clips)
    np.testing.assert_array_equal(store.num_samples, [len(window) for window in windows])
    assert store.num_frames.tolist() == [extractor.num_frames(len(window)) for window in windows]
    for clip in range(len(corpus.splits["train"])):
        assert store.weights[store.clip_of_window == clip].sum() == pytest.approx(1)
    batch = store.collate([store[index] for index in range(len(store))])
    expected = extractor(windows, sampling_rate=16000, padding=True, return_tensors="pt")
    name = extractor.model_input_names[0]
    assert store.input_name == name
    torch.testing.assert_close(batch[name], expected[name], atol=0, rtol=0)
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    np.testing.assert_array_equal(batch["labels"], store.shares[clips])


def test_a_window_is_prepared_without_the_others_of_its_clip(corpus, extractor, monkeypatch):
    store, prepare, prepared = (
        InputStore(corpus, "train", extractor, ACCELERATOR),
        EmoShareFeatureExtractor.__call__,
        [],
    )

    def noted(self, waveform, **options):
        prepared.append(len(waveform))
        return prepare(self, waveform, **options)

    monkeypatch.setattr(EmoShareFeatureExtractor, "__call__", noted)
    for index in range(len(store)):
        store[index]
    assert prepared == store.num_samples.tolist()


def test_processes_read_the_lengths_together(corpus, monkeypatch):
    extractor, found = EmoShareFeatureExtractor("waveform", chunk_length_s=0.6), []
    alone = InputStore(corpus, "train", extractor, ACCELERATOR)
    for process in (0, 1):
        monkeypatch.setattr(inputs, "gather_object", lambda lengths: found.append(lengths) or [[9600]] * 5)
        InputStore(corpus, "train", extractor, SimpleNamespace(process_index=process, num_processes=2))
    assert [len(lengths) for lengths in found] == [3, 2]
    monkeypatch.setattr(inputs, "gather_object", lambda lengths: found[0] + found[1])
    store = InputStore(corpus, "train", extractor, SimpleNamespace(process_index=1, num_processes=2))
    np.testing.assert_array_equal(store.num_samples, alone.num_samples)
    np.testing.assert_array_equal(store.clip_of_window, alone.clip_of_window)
    assert store.fingerprint == alone.fingerprint


def test_broken_clips_are_named_before_anything_is_trained(tmp_path):
    folder = write_corpus(tmp_path / "data", {"train": 3, "devel": 2})
    clip = folder / "wav" / "train_001.wav"
    content, extractor = clip.read_bytes(), EmoShareFeatureExtractor("waveform")
    clip.write_bytes(content[: len(content) // 2])
    corpus = load_corpus("csv", data_dir=folder, cache_dir=tmp_path / "cache")
    data = SimpleNamespace(data_dir=folder, dataset="csv", decode_audio=False, streaming=False)
    with pytest.raises(UserError, match=r"train_001\.wav"):
        check_all_audio(corpus, extractor, data, ACCELERATOR)
    with pytest.raises(UserError, match=r"clip train_001\.wav: "):  # as of audio that is streamed
        InputStore(corpus, "train", extractor, ACCELERATOR)
