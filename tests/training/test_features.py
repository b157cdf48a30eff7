import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL_HEAD, backbone_config, small_model, speech, write_corpus

from emoshare import EmoShareFeatureExtractor, EmoShareModel, load_audio
from emoshare.dataset_script import load_emotion_share
from emoshare.training import features
from emoshare.training.features import FrameFeatureStore, collate, extract_frame_features

LABELS = ["joy", "awe"]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def clips(tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"train": 5, "devel": 2}, labels=LABELS)
    return load_emotion_share("csv", data_dir=folder, cache_dir=tmp_path / "cache")["train"]


def model_with(**fields):
    return small_model(id2label=dict(enumerate(LABELS)), **fields)


def test_acoustic_features_are_those_of_the_feature_extractor(clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel")
    store = extract_frame_features(clips, "train", model_with(), extractor, tmp_path / "store", accelerator)
    assert len(store) == 5
    for index, row in enumerate(clips):
        expected = extractor(load_audio(row["audio"]), sampling_rate=16000)["input_features"][0]
        np.testing.assert_array_equal(store[index]["features"], expected)
        assert store[index]["clip"] == index
        np.testing.assert_allclose(store[index]["shares"], [row["joy"], row["awe"]])


@pytest.mark.parametrize("fields", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False}])
@pytest.mark.parametrize("layer", [-1, "weighted"])
@pytest.mark.parametrize("per_pass", [1, 3])
def test_stored_features_give_the_shares_of_the_waveforms(
    fields, layer, per_pass, clips, tmp_path, accelerator, monkeypatch
):
    monkeypatch.setattr("emoshare.training.features.WINDOWS_PER_PASS", {"cpu": per_pass})
    model = model_with(backbone_config=backbone_config(**fields), backbone_layer=layer)
    extractor = EmoShareFeatureExtractor()
    store = extract_frame_features(clips, "train", model, extractor, tmp_path / "store", accelerator)
    batch = collate([store[index] for index in range(5)])
    from_store = model(input_features=batch["input_features"], attention_mask=batch["attention_mask"]).logits
    for row, shares in zip(clips, from_store, strict=True):
        inputs = extractor(load_audio(row["audio"]), sampling_rate=16000, return_tensors="pt")
        torch.testing.assert_close(shares, model(**inputs).logits[0], atol=1e-5, rtol=0)


def test_long_clips_are_stored_by_window_each_with_the_clips_labels(clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel", chunk_length_s=0.25)
    store = extract_frame_features(clips, "train", model_with(), extractor, tmp_path / "store", accelerator)
    expected = [extractor.windows(len(load_audio(row["audio"]))) for row in clips]
    assert len(store) == sum(len(windows) for windows in expected) > len(clips)
    windows = [store[index] for index in range(len(store))]
    assert [window["clip"] for window in windows] == [clip for clip, cuts in enumerate(expected) for _ in cuts]
    assert [window["num_samples"] for window in windows] == [end - start for cuts in expected for start, end in cuts]
    first = extractor(load_audio(clips[0]["audio"])[:4000], sampling_rate=16000)["input_features"][0]
    np.testing.assert_array_equal(windows[0]["features"], first)
    np.testing.assert_allclose(windows[1]["shares"], [clips[0]["joy"], clips[0]["awe"]])


def test_a_store_is_reused_until_something_that_decides_it_changes(clips, tmp_path, accelerator, capsys, corpus_folder):
    def stores():
        return {path.name for path in (tmp_path / "store").iterdir()}

    def extract(model, extractor):
        return extract_frame_features(clips, "train", model, extractor, tmp_path / "store", accelerator)

    torch.manual_seed(3)
    model, extractor = model_with(backbone_config=backbone_config()), EmoShareFeatureExtractor()
    extract(model, extractor)
    first = stores()
    assert "extracting 5 clips" in capsys.readouterr().out
    for parameter in model.heads.parameters():
        parameter.data.zero_()
    extract(model, extractor)
    assert stores() == first
    assert "using" in capsys.readouterr().out

    seen = len(first)
    for change in (
        lambda: extract(model, EmoShareFeatureExtractor(do_normalize=False)),
        lambda: (
            model.backbone.encoder.layers[1].feed_forward.output_dense.bias.data.add_(0.1),
            extract(model, extractor),
        ),
        lambda: (setattr(model.config, "backbone_layer", 1), extract(model, extractor)),
        lambda: (
            shutil.copy(corpus_folder / "wav" / "train_000.wav", clips[2]["audio"]["path"]),
            extract(model, extractor),
        ),
    ):
        change()
        seen += 1
        assert len(stores()) == seen


def test_a_run_beside_this_one_may_extract_the_same_features(clips, tmp_path, accelerator, monkeypatch):
    extract_part = features._extract_part
    arguments = (clips, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator)

    def with_another_run_in_between(*part):
        extract_part(*part)
        monkeypatch.setattr(features, "_extract_part", extract_part)
        extract_frame_features(*arguments)

    monkeypatch.setattr(features, "_extract_part", with_another_run_in_between)
    assert len(extract_frame_features(*arguments)) == 5
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_windows_come_in_the_order_of_the_clips_whichever_process_wrote_them(clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel", chunk_length_s=0.25)
    store = extract_frame_features(clips, "train", model_with(), extractor, tmp_path / "store", accelerator)
    (written,) = (tmp_path / "store").glob("*/*.arrow")
    table = pa.ipc.open_stream(written).read_all()
    folder = tmp_path / "by_two"
    folder.mkdir()
    for process in (0, 1):
        rows = [row for row in range(len(table)) if row % 2 != process][::-1]
        with pa.ipc.new_stream(folder / f"part-{process:05d}.arrow", table.schema) as writer:
            writer.write_table(table.take(rows))
    by_two = FrameFeatureStore(folder, clips, LABELS)
    assert len(by_two) == len(store)
    for index in range(len(store)):
        assert by_two[index]["clip"] == store[index]["clip"]
        np.testing.assert_array_equal(by_two[index]["features"], store[index]["features"])


def test_a_store_that_is_not_whole_is_refused(clips, tmp_path, accelerator):
    arguments = ("train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator)
    extract_frame_features(clips, *arguments)
    (whole,) = (tmp_path / "store").glob("*/*.arrow")
    extract_frame_features(clips.select(range(3)), *arguments)
    (part,) = (path for path in (tmp_path / "store").glob("*/*.arrow") if path != whole)
    shutil.copy(part, whole)
    with pytest.raises(ValueError, match="other clips than the split's 5; delete the folder"):
        extract_frame_features(clips, *arguments)


def test_a_backbone_with_counters_among_its_weights(clips, tmp_path, accelerator):
    model = model_with(backbone_config=backbone_config(conv_pos_batch_norm=True))
    extractor = EmoShareFeatureExtractor()
    assert len(extract_frame_features(clips, "train", model, extractor, tmp_path / "store", accelerator)) == 5


def test_an_unreadable_clip_is_named_and_leaves_no_store(clips, tmp_path, accelerator):
    from pathlib import Path

    Path(clips[3]["audio"]["path"]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"clip train_003\.wav: .*not an audio file"):
        extract_frame_features(
            clips, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator
        )
    assert not list((tmp_path / "store").iterdir())


def test_too_short_a_clip_is_named(clips, tmp_path, accelerator):
    import soundfile

    soundfile.write(clips[1]["audio"]["path"], speech(0.3)[:300], 16000)
    with pytest.raises(ValueError, match=r"clip train_001\.wav: .*300 samples"):
        extract_frame_features(
            clips, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator
        )


def test_a_batch_is_padded_to_its_longest():
    windows = [
        {
            "features": np.full((frames, 2), 1.0, np.float32),
            "shares": np.zeros(2, np.float32),
            "clip": 0,
            "num_samples": 1,
        }
        for frames in (3, 5)
    ]
    batch = collate(windows)
    assert batch["input_features"].shape == (2, 5, 2)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_features"][0, 3:].abs().sum() == 0


def test_the_real_backbone_is_loaded_from_its_folder(clips, tmp_path, accelerator, backbone_folder):
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, id2label=dict(enumerate(LABELS)), **SMALL_HEAD)
    extractor = EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config)
    store = extract_frame_features(clips, "train", model, extractor, tmp_path / "store", accelerator)
    waveform = torch.from_numpy(load_audio(clips[0]["audio"]))
    plain = model.backbone(waveform[None]).last_hidden_state[0].detach()
    np.testing.assert_allclose(store[0]["features"], plain.numpy(), atol=1e-5)
