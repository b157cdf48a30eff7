import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from conftest import SMALL_HEAD, backbone_config, run_command, run_script, small_model, speech, write_corpus
from filelock import FileLock

from emoshare import EmoShareFeatureExtractor, EmoShareModel, load_audio
from emoshare.audio_emoshare import audio_info
from emoshare.dataset_script import audio, digests, load_corpus
from emoshare.training import features, parts, store
from emoshare.training.arguments import DataArguments
from emoshare.training.features import expected_bytes, extract_frame_features, extract_layers
from emoshare.training.parts import Part
from emoshare.training.store import FrameFeatureStore
from emoshare.training.user_errors import UserError

LABELS = ["joy", "awe"]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def corpus(tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"train": 5, "devel": 2}, labels=LABELS)
    return load_corpus("csv", data_dir=folder, cache_dir=tmp_path / "cache")


@pytest.fixture
def clips(corpus):
    return corpus.splits["train"]


def model_with(**fields):
    return small_model(id2label=dict(enumerate(LABELS)), **fields)


def test_acoustic_features_are_those_of_the_feature_extractor(corpus, clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel")
    store = extract_frame_features(corpus, "train", model_with(), extractor, tmp_path / "store", accelerator, "float32")
    assert len(store) == 5
    for index, row in enumerate(clips):
        expected = extractor(load_audio(row["audio"]), sampling_rate=16000)["input_features"][0]
        np.testing.assert_array_equal(store[index]["frame_features"], expected)
        assert store.clip_of_window[index] == index
        np.testing.assert_allclose(store[index]["labels"], [row["joy"], row["awe"]])


@pytest.mark.parametrize("fields", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False}])
@pytest.mark.parametrize("layer", [-1, "weighted"])
@pytest.mark.parametrize("seconds", [0, 3])
def test_stored_features_give_the_shares_of_the_waveforms(
    fields, layer, seconds, corpus, clips, tmp_path, accelerator, monkeypatch
):
    monkeypatch.setattr(features, "SECONDS_PER_PASS", {"cpu": seconds})
    model = model_with(backbone_config=backbone_config(**fields), backbone_layer=layer)
    extractor = EmoShareFeatureExtractor()
    store = extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator, "float32")
    batch = store.collate([store[index] for index in range(5)])
    from_store = model(frame_features=batch["frame_features"], attention_mask=batch["attention_mask"]).logits
    for row, shares in zip(clips, from_store, strict=True):
        inputs = extractor(load_audio(row["audio"]), sampling_rate=16000, return_tensors="pt")
        torch.testing.assert_close(shares, model(**inputs).logits[0], atol=1e-5, rtol=0)


def test_long_clips_are_stored_by_window_each_with_the_clips_labels(corpus, clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel", chunk_length_s=0.25)
    store = extract_frame_features(corpus, "train", model_with(), extractor, tmp_path / "store", accelerator, "float32")
    expected = [extractor.windows(len(load_audio(row["audio"]))) for row in clips]
    assert len(store) == sum(len(windows) for windows in expected) > len(clips)
    windows = [store[index] for index in range(len(store))]
    assert store.clip_of_window.tolist() == [clip for clip, cuts in enumerate(expected) for _ in cuts]
    assert store.num_samples.tolist() == [end - start for cuts in expected for start, end in cuts]
    first = extractor(load_audio(clips[0]["audio"])[:4000], sampling_rate=16000)["input_features"][0]
    np.testing.assert_array_equal(windows[0]["frame_features"], first)
    np.testing.assert_allclose(windows[1]["labels"], [clips[0]["joy"], clips[0]["awe"]])


def test_a_store_is_reused_until_its_inputs_change(corpus, clips, tmp_path, accelerator, capsys, corpus_folder):
    def stores():
        return {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()}

    def extract(model, extractor):
        return extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator)

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
        lambda: extract(model, EmoShareFeatureExtractor(floor="absolute")),
        lambda: extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator, "float32"),
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


def test_new_facts_and_labels_join_the_store_without_a_new_extraction(corpus, tmp_path, accelerator, capsys):
    model, extractor = model_with(), EmoShareFeatureExtractor("mel")
    before = extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator)
    assert before.metadata == {}
    lab = tmp_path / "corpus" / "lab"
    (lab / "clips.csv").write_text("filename,speaker,listeners\ntrain_001.wav,eve,12\n")
    header, first, *others = (lab / "train.csv").read_text().splitlines()
    (lab / "train.csv").write_text("\n".join([header, f"{first.split(',')[0]},0.25,0.75", *others]) + "\n")
    changed = load_corpus("csv", data_dir=tmp_path / "corpus", cache_dir=tmp_path / "cache")
    capsys.readouterr()
    store = extract_frame_features(changed, "train", model, extractor, tmp_path / "store", accelerator)
    assert "using" in capsys.readouterr().out
    assert store.metadata["speaker"] == [None, "eve", None, None, None]
    np.testing.assert_array_equal(store[0]["labels"], np.float32([0.25, 0.75]))
    assert store.fingerprint != before.fingerprint
    np.testing.assert_array_equal(changed.listeners("train"), [np.nan, 12, np.nan, np.nan, np.nan])


@pytest.mark.slow
def test_a_run_beside_this_one_waits_and_takes_what_the_other_extracted(corpus, tmp_path):
    """Two processes that know nothing of each other."""
    script = tmp_path / "extract.py"
    script.write_text(EXTRACTION.format(corpus=str(tmp_path / "corpus"), folder=str(tmp_path)))
    runs = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(run.communicate(timeout=120)[0].split("Frame features of train: ")[1].split()[0] for run in runs)
    assert outputs == ["extracting", "using"]
    assert len(list((tmp_path / "store").glob("*/state.json"))) == 1


EXTRACTION = """
from accelerate import Accelerator
from emoshare import EmoShareConfig, EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import load_corpus
from emoshare.training import features

features.CLIPS_PER_SHARD = 2
corpus = load_corpus("csv", data_dir="{corpus}", cache_dir="{folder}/cache")
clips = corpus.splits["train"]
model = EmoShareModel(EmoShareConfig(id2label={{0: "joy", 1: "awe"}}, conv_channels=(4,), lstm_hidden_size=4))
extractor = EmoShareFeatureExtractor("mel")
features.extract_frame_features(corpus, "train", model, extractor, "{folder}/store", Accelerator(cpu=True))
"""


def stop_after(shards, monkeypatch):
    """Stops as if the process were killed after this many shards."""
    shard_writer = features.shard_writer
    written = []

    @contextmanager
    def write(path, dtype):
        with shard_writer(path, dtype) as write_window:
            yield write_window
            if len(written) == shards:
                raise KeyboardInterrupt
        written.append(path)

    monkeypatch.setattr(features, "shard_writer", write)


def test_an_interrupted_extraction_goes_on_after_its_last_whole_shard(
    corpus, tmp_path, accelerator, monkeypatch, capsys
):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    model, extractor = model_with(backbone_config=backbone_config()), EmoShareFeatureExtractor()

    def extract(folder):
        return extract_frame_features(corpus, "train", model, extractor, tmp_path / folder, accelerator)

    extract("whole")
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            extract("parts")
    assert not list((tmp_path / "parts").glob("*/state.json"))
    (shard,) = (tmp_path / "parts").glob("*.unfinished/*.arrow")
    written = shard.stat().st_mtime_ns
    (shard.parent / "unfinished-1").write_bytes(b"half a shard")
    (shard.parent / "shard-00001-of-00002-000000.arrow").write_bytes(b"of a run with two processes")
    capsys.readouterr()
    extract("parts")
    assert "continuing after 2 of 5" in capsys.readouterr().out
    files = {}
    for folder in ("whole", "parts"):
        (store,) = (path for path in (tmp_path / folder).iterdir() if path.is_dir())
        files[folder] = {path.name: path.read_bytes() for path in store.iterdir()}
        if folder == "parts":
            assert (store / shard.name).stat().st_mtime_ns == written
    assert files["whole"] == files["parts"]
    assert len(files["whole"]) == 3 + 2 + 1  # shards, the two files of a dataset, and where each window is


def test_a_store_with_a_damaged_shard_is_mended(corpus, tmp_path, accelerator, monkeypatch, capsys):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    model, extractor = model_with(), EmoShareFeatureExtractor("mel")

    def extract():
        extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator)
        return files(tmp_path / "store")

    whole = extract()
    shards = sorted((tmp_path / "store").glob("*/shard-*"))
    written = [shard.stat().st_mtime_ns for shard in shards]
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    capsys.readouterr()
    assert extract() == whole
    output = capsys.readouterr()
    assert "is damaged: what cannot be read of it is extracted again" in output.err
    assert "continuing after 3 of 5" in output.out
    assert [shard.stat().st_mtime_ns == time for shard, time in zip(shards, written, strict=True)] == [
        True,
        False,
        True,
    ]


def test_audio_is_checked_where_its_features_are_not_there_yet(corpus, clips, tmp_path, accelerator, monkeypatch):
    model, extractor, read = model_with(), EmoShareFeatureExtractor("mel"), []
    data = DataArguments(dataset="csv", data_dir=str(tmp_path / "corpus"))

    def check(**fields):
        arguments = (model, extractor, replace(data, **fields), tmp_path / "store", accelerator, [-1])
        features.check_new_audio(corpus, *arguments)

    check()
    extract_frame_features(corpus, "devel", model, extractor, tmp_path / "store", accelerator)
    monkeypatch.setattr(audio, "audio_info", lambda clip: read.append(clip["path"]) or audio_info(clip))
    check()
    assert read == [clip["path"] for clip in clips["audio"]]  # those of devel need no check
    for split in ("train", "devel"):
        soundfile.write(tmp_path / "corpus" / "wav" / f"{split}_001.wav", speech(0.3)[:300], 16000)
    with pytest.raises(
        UserError, match=r"corpus: 2 problem\(s\)\n  lab/train\.csv, row 3: .*\n  lab/devel\.csv, row 3"
    ):
        check()
    soundfile.write(clips[2]["audio"]["path"], np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"3 problem\(s\)(?s:.*)train_002\.wav: 16000 of 16000 samples are not finite"):
        check(decode_audio=True)


@pytest.mark.slow
def test_a_full_disk_ends_with_a_clear_error_and_loses_nothing(corpus, tmp_path):
    script = tmp_path / "extract.py"
    text = EXTRACTION.format(corpus=str(tmp_path / "corpus"), folder=str(tmp_path))
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    load, _, extraction = text.partition("model = ")
    script.write_text(f"{load}{limit}model = {extraction}")
    result = run_script(script, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "OSError" in result.stderr
    assert "frame features cannot be written to" in result.stderr
    assert not list((tmp_path / "store").glob("*/state.json"))
    script.write_text(text)
    run_script(script, cwd=tmp_path)
    assert len(list((tmp_path / "store").glob("*/state.json"))) == 1


LAYERS = [-1, 0, 1, 2, "weighted"]  # all that a backbone of two layers has
POST_NORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False}


def contents(folders, corpus):
    """The features of each clip in each layer's store."""
    stores = {layer: FrameFeatureStore(folder, corpus, "train") for layer, folder in folders.items()}
    return {layer: [window["frame_features"] for window in store] for layer, store in stores.items()}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*")}


def times_of_shards(folder):
    """When each shard was written, by its store, whole or not, and its name."""
    return {(path.parent.stem, path.name): path.stat().st_mtime_ns for path in folder.glob("*/shard-*")}


@pytest.mark.parametrize("fields", [{}, POST_NORM], ids=["stable layer norm", "post-norm"])
def test_one_pass_writes_for_each_layer_the_store_of_a_model_of_that_layer(
    fields, corpus, clips, tmp_path, accelerator, capsys
):
    config, extractor = backbone_config(**fields), EmoShareFeatureExtractor()

    def model_of(layer):
        torch.manual_seed(3)
        return model_with(backbone_config=config, backbone_layer=layer)

    model = model_of(1)
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    arguments = (extractor, tmp_path / "together", accelerator, "float32")
    folders = extract_layers(clips, "train", model, *arguments, LAYERS)
    assert len(passes) == len(clips)
    capsys.readouterr()
    for layer in LAYERS:
        extract_frame_features(corpus, "train", model_of(layer), *arguments)
        assert f"using {folders[layer]}\n" in capsys.readouterr().out
        extract_frame_features(corpus, "train", model_of(layer), extractor, tmp_path / "alone", accelerator, "float32")
    together, alone = (
        {path.parent.name for path in (tmp_path / name).glob("*/state.json")} for name in ("together", "alone")
    )
    assert together == alone
    found = contents(folders, corpus)
    expected = contents({layer: tmp_path / "alone" / folder.name for layer, folder in folders.items()}, corpus)
    for index, row in enumerate(clips):
        waveform = torch.from_numpy(extractor(load_audio(row["audio"]), sampling_rate=16000)["input_values"][0])
        with torch.no_grad():
            plain = model.backbone(waveform[None], output_hidden_states=True)
        states = [plain.last_hidden_state[0], *(states[0] for states in plain.hidden_states)]
        for layer in LAYERS:
            np.testing.assert_array_equal(found[layer][index], expected[layer][index])
            own = torch.stack(states[1:]) if layer == "weighted" else states[layer + 1]
            np.testing.assert_allclose(found[layer][index], own.numpy(), atol=1e-5)


def test_layers_that_are_there_and_those_above_the_highest_are_not_extracted(clips, tmp_path, accelerator, capsys):
    model = model_with(backbone_config=backbone_config(num_hidden_layers=4))
    runs = []
    for index, layer in enumerate(model.backbone.encoder.layers.children()):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))

    def extract(layers):
        runs.clear()
        arguments = (EmoShareFeatureExtractor(), tmp_path / "store", accelerator, "float16")
        folders = extract_layers(clips, "train", model, *arguments, layers)
        return folders, capsys.readouterr().out

    first, _ = extract([3])
    assert runs == [0, 1, 2] * len(clips)
    written = files(tmp_path / "store")
    folders, output = extract([3, 1, 2])
    assert runs == [0, 1] * len(clips)
    assert f"train (layer 3): using {first[3]}" in output
    assert output.count("extracting 5 clips") == 2
    assert files(tmp_path / "store").items() >= written.items()
    assert len({*folders.values()}) == 3
    extract([1, 2, 3])
    assert runs == []


def test_what_decides_all_layers_is_read_once(clips, tmp_path, accelerator, monkeypatch):
    model = model_with(backbone_config=backbone_config())
    read = []
    read_file, state_dict = digests._read, model.backbone.state_dict
    monkeypatch.setattr(digests, "_read", lambda path: read.append(Path(path).name) or read_file(path))
    monkeypatch.setattr(model.backbone, "state_dict", lambda: read.append("weights") or state_dict())
    extract_layers(clips, "train", model, EmoShareFeatureExtractor(), tmp_path, accelerator, "float16", LAYERS)
    assert sorted(read) == [*clips["filename"], "weights"]


def test_a_shard_of_many_layers_holds_fewer_clips(clips, tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 6)
    model, extractor = model_with(backbone_config=backbone_config()), EmoShareFeatureExtractor()
    for layers, shards in ([0], 1), ([0, 1, 2], 3), (["weighted"], 3), ([0, 1, 2, "weighted"], 5):
        cache_dir = tmp_path / str(layers)
        folders = extract_layers(clips, "train", model, extractor, cache_dir, accelerator, "float16", layers)
        assert [len(list(folder.glob("shard-*"))) for folder in folders.values()] == [shards] * len(layers)


def test_the_number_of_shards_has_a_limit(corpus, clips, tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 1)
    model, extractor = model_with(backbone_config=backbone_config()), EmoShareFeatureExtractor()
    arguments = (clips, "train", model, extractor)
    folders = {}
    for most, shards in (1000, 5), (5, 5), (3, 3), (1, 1):
        monkeypatch.setattr(features, "SHARDS", most)
        folders |= {most: extract_layers(*arguments, tmp_path / str(most), accelerator, "float16", [0, "weighted"])}
        assert [len(list(folder.glob("shard-*"))) for folder in folders[most].values()] == [shards] * 2
    expected = contents(folders[1000], corpus)
    for of_layers in folders.values():
        for layer, found in contents(of_layers, corpus).items():
            for own, other in zip(found, expected[layer], strict=True):
                np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("written", range(10))
def test_an_extraction_of_layers_that_dies_between_any_two_shards_goes_on_there(
    written, clips, tmp_path, accelerator, monkeypatch
):
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 6)
    model = model_with(backbone_config=backbone_config())

    def extract(folder):
        arguments = (EmoShareFeatureExtractor(), tmp_path / folder, accelerator, "float16")
        return extract_layers(clips, "train", model, *arguments, [0, 2, -1])

    extract("whole")
    with monkeypatch.context() as patch:
        stop_after(written, patch)
        with nullcontext() if written == 9 else pytest.raises(KeyboardInterrupt):  # three shards of three layers
            extract("parts")
    shards = times_of_shards(tmp_path / "parts")
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    extract("parts")
    assert len(passes) == len(clips) - 2 * (written // 3) if written < 9 else not passes
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert times_of_shards(tmp_path / "parts").items() >= shards.items()


def test_shards_of_an_interrupted_extraction_serve_other_layers_too(corpus, clips, tmp_path, accelerator, monkeypatch):
    """Shards of three layers hold two clips, those of one layer all."""
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 6)
    model = model_with(backbone_config=backbone_config())

    def extract(folder, layers):
        arguments = (EmoShareFeatureExtractor(), tmp_path / folder, accelerator, "float16")
        return extract_layers(clips, "train", model, *arguments, layers)

    expected = contents(extract("whole", LAYERS), corpus)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            extract("parts", [0, 1, 2])
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            extract("parts", [1, "weighted"])
    extract("parts", [0])
    found = contents(extract("parts", LAYERS), corpus)
    for layer in LAYERS:
        assert len(found[layer]) == len(clips)
        for features_found, features_expected in zip(found[layer], expected[layer], strict=True):
            np.testing.assert_array_equal(features_found, features_expected)


def test_no_two_runs_wait_for_each_others_layers(clips, tmp_path, accelerator, monkeypatch):
    locked = []
    monkeypatch.setattr(parts, "FileLock", lambda path: locked.append(path) or nullcontext())
    model = model_with(backbone_config=backbone_config())
    for layers in (LAYERS, LAYERS[::-1]):
        locked.clear()
        folder = tmp_path / str(layers[0])
        extract_layers(clips, "train", model, EmoShareFeatureExtractor(), folder, accelerator, "float16", layers)
        assert len(locked) == len(LAYERS)
        assert locked == sorted(locked)
    locked.clear()
    extract_layers(clips, "train", model, EmoShareFeatureExtractor(), folder, accelerator, "float16", layers)
    assert locked == []  # another run may be extracting further layers next to finished stores


def extract_part(clips, model, folder, accelerator, part, layers=(0, 2)):
    part = None if part is None else Part.named(part)
    arguments = (EmoShareFeatureExtractor(), folder, accelerator, "float16", list(layers))
    return extract_layers(clips, "train", model, *arguments, part=part)


@pytest.fixture
def model_in_parts(monkeypatch):
    """Five clips are in three shards of each layer."""
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 4)
    return model_with(backbone_config=backbone_config())


@pytest.mark.parametrize(
    "order", [["1/3", "2/3", "3/3"], ["3/3", "1/3", "2/3"], ["2/2", "1/2"], ["1/1"], ["4/4", None]]
)
def test_parts_make_the_store_of_a_run_without_parts(order, clips, model_in_parts, tmp_path, accelerator, capsys):
    extract_part(clips, model_in_parts, tmp_path / "whole", accelerator, None)
    for part in order:
        assert not list((tmp_path / "parts").glob("*/state.json"))
        extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, part)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    output = capsys.readouterr().out
    if order[-1] is not None:
        assert f"train (layer 2): part {order[-1]} is there, and so are all others" in output
    for part in order[:-1]:
        assert f"train (layer 2): part {part} is there; others are not yet (clips missing: " in output


@pytest.mark.parametrize("written", range(4))
def test_a_part_that_was_killed_is_started_again(written, clips, model_in_parts, tmp_path, accelerator, monkeypatch):
    extract_part(clips, model_in_parts, tmp_path / "whole", accelerator, None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(written, patch)  # of the two shards of each of two layers
        extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2")
    shards = times_of_shards(tmp_path / "parts")
    assert len(shards) == written
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "2/2")
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert times_of_shards(tmp_path / "parts").items() >= shards.items()


def test_parts_that_were_cut_in_other_ways_do_not_hold_a_clip_twice(
    corpus, clips, model_in_parts, tmp_path, accelerator, monkeypatch
):
    """As when one part was extracted for other layers, which have other shards."""
    expected = contents(extract_part(clips, model_in_parts, tmp_path / "whole", accelerator, None, [0]), corpus)[0]
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2", [0])
    (unfinished,) = (tmp_path / "parts").glob("*.unfinished")
    (first,) = unfinished.glob("shard-*")
    shutil.copy(first, unfinished / "saved")
    first.unlink()
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 3)
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2", [0])
    shutil.move(unfinished / "saved", first)
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "2/2", [0])
    found = contents(extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, None, [0]), corpus)[0]
    assert len(found) == len(expected) == 5
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_part_leaves_the_store_to_one_that_has_written_all_but_not_ended(
    clips, model_in_parts, tmp_path, accelerator, monkeypatch, capsys
):
    """The other part looks just when the last shard has its name, and has not been read yet."""
    folder = extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2", [0])[0]
    capsys.readouterr()
    scan, looked = store.scan, []

    def scan_when_the_other_part_has_looked(shard):
        if not looked:
            looked.append(shard)
            features._finish_if_complete(folder, len(clips), "float16", "train", Part.named("1/2"))
        return scan(shard)

    monkeypatch.setattr(store, "scan", scan_when_the_other_part_has_looked)
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "2/2", [0])
    output = capsys.readouterr().out
    assert "part 1/2 is there; others are not yet (clips missing: 0 of 5, parts at work: 1)" in output
    assert f"part 2/2 is there, and so are all others: {folder}" in output
    extract_part(clips, model_in_parts, tmp_path / "whole", accelerator, None, [0])
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("other", ["part-1-of-3-1-4.lock", "part-1-of-2-2-4.lock", "part-2-of-2-1-2.lock"])
def test_a_part_waits_for_parts_that_divide_the_clips_in_another_way(
    other, clips, model_in_parts, tmp_path, accelerator, monkeypatch, capsys
):
    """With another number of parts, of processes, and of clips per shard."""
    (folder,) = extract_part(clips, model_in_parts, tmp_path / "whole", accelerator, None, [0]).values()
    unfinished = tmp_path / "parts" / f"{folder.name}.unfinished"
    unfinished.mkdir(parents=True)
    lock, naps = FileLock(unfinished / other), []
    lock.acquire()

    def nap(seconds):
        naps.append(sorted(path.name for path in unfinished.iterdir()))
        if len(naps) == 2:
            lock.release()

    monkeypatch.setattr(parts.time, "sleep", nap)
    extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2", [0])
    assert naps == [[other]] * 2
    assert capsys.readouterr().out.count(f"part 1/2 waits for parts that divide the clips in another way: {other}") == 1
    same = FileLock(unfinished / "part-2-of-2-1-4.lock")  # of which it has no clip
    with same:
        extract_part(clips, model_in_parts, tmp_path / "parts", accelerator, "1/2", [0])
    assert len(naps) == 2


def extract_without_others(folder, extract, process, processes, monkeypatch):
    """What one of several processes extracts; the last one finishes the store."""
    nothing = {"print": print, "wait_for_everyone": lambda: None, "device": torch.device("cpu")}
    one = SimpleNamespace(process_index=process, num_processes=processes, is_main_process=True, **nothing)
    with monkeypatch.context() as patch:
        if process < processes - 1:
            patch.setattr(features, "finish", lambda *_: None)
        return extract(folder, one)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A corpus of 30 clips, three of which are in a shard, and a function that extracts them."""
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 3)
    folder = write_corpus(tmp_path / "many", {"train": 30, "devel": 1}, labels=LABELS)
    corpus = load_corpus("csv", data_dir=folder, cache_dir=tmp_path / "cache")

    def extract(folder, accelerator, part=None):
        arguments = (model_with(), EmoShareFeatureExtractor("mel"), tmp_path / folder, accelerator, "float16", [-1])
        part = None if part is None else Part.named(part)
        return extract_layers(corpus.splits["train"], "train", *arguments, part=part)

    return corpus, extract


def extract_until(shards_of_each, extract, monkeypatch):
    """As if as many processes were killed when each had written so many shards, or had ended."""
    for process, shards in enumerate(shards_of_each):
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            stop_after(shards, patch)
            extract_without_others("found", extract, process, len(shards_of_each), monkeypatch)


@pytest.mark.parametrize("then", [[None], ["0/3", "1/3", "2/3"], ["part 1/2", "part 2/2"], ["part 3/3", None]])
@pytest.mark.parametrize("killed", [(3, 3), (5, 1), (0, 4), (2, 3, 0, 1), (1, 1, 1)], ids=str)
def test_an_extraction_goes_on_with_any_number_of_processes_or_parts(
    killed, then, many, tmp_path, accelerator, monkeypatch, capsys
):
    corpus, extract = many
    expected = contents(extract("whole", accelerator), corpus)[-1]
    extract_until(killed, extract, monkeypatch)
    before = times_of_shards(tmp_path / "found")
    extracted = []
    windows_of = features.windows_of
    monkeypatch.setattr(
        features, "windows_of", lambda row, clip, *_: extracted.append(clip) or windows_of(row, clip, *_)
    )
    missing = 30 - sum(min(3 * shards, len(range(p, 30, len(killed)))) for p, shards in enumerate(killed))
    for step in then:
        if step is None or step.startswith("part"):
            folders = extract("found", accelerator, step and step.removeprefix("part "))
        else:
            folders = extract_without_others("found", extract, *map(int, step.split("/")), monkeypatch)
    assert len(extracted) == len(set(extracted)) == missing
    found = contents(folders, corpus)[-1]
    assert len(found) == 30
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, other)
    assert times_of_shards(tmp_path / "found").items() >= before.items()
    assert "damaged" not in capsys.readouterr().err


def test_after_all_parts_but_one_several_processes_extract_that_one(many, tmp_path, accelerator, monkeypatch):
    corpus, extract = many
    expected = contents(extract("whole", accelerator), corpus)[-1]
    for number in (1, 2, 3, 5):
        extract("found", accelerator, f"{number}/5")
    before = times_of_shards(tmp_path / "found")
    assert len(before) == 8
    for process in range(4):
        folders = extract_without_others("found", extract, process, 4, monkeypatch)
    assert times_of_shards(tmp_path / "found").items() >= before.items()
    for own, other in zip(contents(folders, corpus)[-1], expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_of_a_store_of_several_processes_a_single_one_extracts_what_is_damaged(
    many, tmp_path, accelerator, monkeypatch, capsys
):
    _, extract = many
    for process in range(4):
        extract_without_others("found", extract, process, 4, monkeypatch)
    whole, before = files(tmp_path / "found"), times_of_shards(tmp_path / "found")
    damaged = sorted((tmp_path / "found").glob("*/shard-*"))[4]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    capsys.readouterr()
    extract("found", accelerator)
    output = capsys.readouterr()
    assert "continuing after 27 of 30" in output.out
    assert ".unfinished: removed 1 shard(s) that are damaged or hold clips that others hold, too; " in output.err
    assert f"is extracted again: {damaged.name}\n" in output.err
    assert files(tmp_path / "found") == whole
    after = times_of_shards(tmp_path / "found")
    assert {name for (_, name), time in after.items() if before[_, name] != time} == {damaged.name}


def test_gaps_of_other_processes_are_not_a_file_for_each_clip(many, tmp_path, monkeypatch):
    """One of four processes was slow: 1,000 of its clips are missing, and all clips after 8,000."""
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 128)
    written = {-1: [range(0, 8000, 4), range(1, 4000, 4), range(2, 8000, 4), range(3, 8000, 4)]}
    config = model_with().config
    for processes in (1, 2, 3, 4):
        shards = []
        for process in range(processes):
            mine = [range(process, 10000, processes)]
            shards += [shard for shard, _ in features._missing_shards(mine, written, config, 10000)]
        extracted = sorted(clip for shard in shards for clip in shard)
        assert extracted == [*range(4001, 8000, 4), *range(8000, 10000)]
        assert len(shards) <= 3000 / 128 + 4 * processes


def test_clips_that_are_read_ahead_of_an_accelerator_are_those_in_order(clips):
    model, extractor = SimpleNamespace(device=torch.device("cpu")), EmoShareFeatureExtractor("mel")
    expected = list(features._decoded(clips, [3, 0, 1, 4], model, extractor))
    model.device = torch.device("meta")
    for own, other in zip(features._decoded(clips, [3, 0, 1, 4], model, extractor), expected, strict=True):
        assert [window["filename"] for window in own] == [window["filename"] for window in other]
        np.testing.assert_array_equal(own[0]["inputs"]["input_features"], other[0]["inputs"]["input_features"])


@pytest.mark.slow
def test_parts_at_the_same_time_and_a_run_that_waits_for_them(corpus, clips, tmp_path, accelerator, monkeypatch):
    """Processes that know nothing of each other; a part is there twice, and the other one is missing."""
    script = tmp_path / "extract.py"
    text = EXTRACTION.format(corpus=str(tmp_path / "corpus"), folder=str(tmp_path))
    script.write_text(text.replace("import features\n", PART_OF_COMMAND_LINE))
    commands = [[sys.executable, script, *part] for part in (["1/2"], ["1/2"], [])]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [run.wait(timeout=120) for run in runs] == [0] * 3
    parts_folder = tmp_path / "store"
    monkeypatch.setattr(features, "CLIPS_PER_SHARD", 2)
    model = model_with(conv_channels=(4,), lstm_hidden_size=4)
    arguments = (EmoShareFeatureExtractor("mel"), tmp_path / "whole", accelerator)
    extract_frame_features(corpus, "train", model, *arguments)
    assert files(parts_folder) == files(tmp_path / "whole")


PART_OF_COMMAND_LINE = """import features
import sys
import time
from functools import partial
from emoshare.training.parts import Part

if sys.argv[1:]:
    features.extract_frame_features = lambda corpus, split, *arguments: features.extract_layers(
        corpus.splits[split], split, *arguments, "float16", [-1], part=Part.named(sys.argv[1])
    )
add_features = features._add_features
features._add_features = lambda *arguments: time.sleep(0.1) or add_features(*arguments)
"""

LAYERS_IN_TWO_PROCESSES = """
from contextlib import contextmanager

from accelerate import Accelerator
from emoshare import EmoShareFeatureExtractor, EmoShareModel
from emoshare.dataset_script import digests, load_corpus
from emoshare.training import features
from emoshare.training.store_names import read_clips_together

features.CLIPS_PER_SHARD = 2
corpus = load_corpus("csv", data_dir="{corpus}", cache_dir="{folder}/cache")
clips = corpus.splits["train"]
model = EmoShareModel.from_pretrained("{folder}/model")
accelerator = Accelerator(cpu=True)

digests.SETTLED_NS = 0
read, read_file = [], digests._read
digests._read = lambda path: read.append(path) or read_file(path)
read_clips_together(corpus, accelerator)
print(len(read), "clips read in process", accelerator.process_index)
if accelerator.is_main_process:
    corpus.fingerprints()
    print(len(read), "clips read when all are known")

arguments = (clips, "train", model, EmoShareFeatureExtractor(), "{folder}/two", accelerator, "float32", [0, 2])

shard_writer = features.shard_writer
written = []

@contextmanager
def write(path, dtype):
    with shard_writer(path, dtype) as write_window:
        yield write_window
        if len(written) == accelerator.process_index + 1:
            raise KeyboardInterrupt
    written.append(path)

features.shard_writer = write
try:
    features.extract_layers(*arguments)
except KeyboardInterrupt:
    print("interrupted in process", accelerator.process_index)
accelerator.wait_for_everyone()
features.shard_writer = shard_writer
features.extract_layers(*arguments)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_that_die_with_their_layers_out_of_step_go_on(corpus, clips, tmp_path, accelerator):
    """The first one between the two layers' shards, the second one after both."""
    model_with(backbone_config=backbone_config()).save_pretrained(tmp_path / "model")
    script = tmp_path / "extract.py"
    script.write_text(LAYERS_IN_TWO_PROCESSES.format(corpus=tmp_path / "corpus", folder=tmp_path))
    launch = (Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", 2, script)
    output = run_command(*launch, cwd=tmp_path).stdout
    for line in ("4 clips read in process 0", "3 clips read in process 1", "4 clips read when all are known"):
        assert line in output
    assert output.count("interrupted") == 2
    assert output.count("continuing after 1 of 3") == 1  # as the first process says it

    model = EmoShareModel.from_pretrained(tmp_path / "model")
    arguments = (EmoShareFeatureExtractor(), tmp_path / "one", accelerator, "float32")
    folders = extract_layers(clips, "train", model, *arguments, [0, 2])
    expected = contents(folders, corpus)
    found = contents({layer: tmp_path / "two" / folder.name for layer, folder in folders.items()}, corpus)
    for layer in folders:
        assert len(found[layer]) == len(clips)
        for shared, alone in zip(found[layer], expected[layer], strict=True):
            np.testing.assert_allclose(shared, alone, atol=1e-5)


def test_a_layer_that_the_model_does_not_have_is_refused_at_once(clips, tmp_path, accelerator):
    model = model_with(backbone_config=backbone_config())
    arguments = (EmoShareFeatureExtractor(), tmp_path / "store", accelerator, "float16")
    with pytest.raises(ValueError, match=r"^backbone_layer: got 3; expected -1 \(last_hidden_state\), 0 to 2"):
        extract_layers(clips, "train", model, *arguments, [1, 3])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("feature_type", ["waveform", "mel"])
def test_the_expected_disk_is_that_of_the_store(feature_type, dtype, tmp_path, accelerator):
    folder = write_corpus(tmp_path / "corpus", {"train": 24, "devel": 1}, labels=LABELS, mixed_formats=True)
    clips = load_corpus("csv", data_dir=folder, cache_dir=tmp_path / "cache").splits["train"]
    fields = {} if feature_type == "mel" else {"backbone_config": backbone_config(hidden_size=128)}
    model, extractor = model_with(**fields), EmoShareFeatureExtractor(feature_type, chunk_length_s=0.5)
    layers = [-1] if feature_type == "mel" else [0, -1, "weighted"]
    expected = expected_bytes(clips, model.config, extractor, dtype, layers)
    folders = extract_layers(clips, "train", model, extractor, tmp_path / "store", accelerator, dtype, layers)
    for layer, folder in folders.items():
        shards = sum(path.stat().st_size for path in folder.glob("shard-*"))
        assert expected[layer] == pytest.approx(shards, rel=0.02)


def test_the_expected_disk_of_a_large_split_is_that_of_a_part_of_it(clips, monkeypatch):
    config, extractor = model_with().config, EmoShareFeatureExtractor("mel")
    whole = expected_bytes(clips, config, extractor, "float16", [-1])[-1]
    monkeypatch.setattr(features, "FILES_OPENED", 3)
    for clip in (1, 3):
        Path(clips[clip]["audio"]["path"]).unlink()
    assert expected_bytes(clips, config, extractor, "float16", [-1])[-1] == pytest.approx(whole, rel=0.25)
    Path(clips[2]["audio"]["path"]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^clip train_002\.wav: not an audio file that can be decoded"):
        expected_bytes(clips, config, extractor, "float16", [-1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("bfloat16", 4e-3), ("float32", 0)])
def test_features_are_kept_in_the_dtype_that_was_asked_for(dtype, tolerance, corpus, clips, tmp_path, accelerator):
    extractor = EmoShareFeatureExtractor("mel")
    store = extract_frame_features(corpus, "train", model_with(), extractor, tmp_path / "store", accelerator, dtype)
    batch = store.collate([store[0]])
    assert batch["frame_features"].dtype == getattr(torch, dtype)
    expected = extractor(load_audio(clips[0]["audio"]), sampling_rate=16000)["input_features"][0]
    np.testing.assert_allclose(batch["frame_features"][0].float(), expected, rtol=tolerance, atol=1e-7)


def test_features_that_do_not_fit_are_named(corpus, tmp_path, accelerator, monkeypatch):
    monkeypatch.setattr(
        features, "_frame_features", lambda inputs, *_: [{-1: torch.full((3, 40), 1e5)} for _ in inputs]
    )
    arguments = (corpus, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator)
    with pytest.raises(ValueError, match=r"clip train_\d*\.wav: the largest feature, 1e\+05, does not fit float16"):
        extract_frame_features(*arguments, "float16")
    extract_frame_features(*arguments, "float32")


def test_a_backbone_with_counters_among_its_weights(corpus, tmp_path, accelerator):
    model = model_with(backbone_config=backbone_config(conv_pos_batch_norm=True))
    extractor = EmoShareFeatureExtractor()
    assert len(extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator)) == 5


def test_an_unreadable_clip_is_named_and_leaves_no_store(corpus, clips, tmp_path, accelerator):
    Path(clips[3]["audio"]["path"]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"clip train_003\.wav: .*not an audio file"):
        extract_frame_features(
            corpus, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator
        )
    assert not list((tmp_path / "store").glob("*/state.json"))


def test_a_clip_that_was_cut_is_named(corpus, clips, tmp_path, accelerator):
    path = Path(clips[3]["audio"]["path"])
    path.write_bytes(path.read_bytes()[:8000])
    arguments = (corpus, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator)
    with pytest.raises(ValueError, match=r"clip train_003\.wav: .*promises .* bytes of samples, and 7,956 are there"):
        extract_frame_features(*arguments)


def test_too_short_a_clip_is_named(corpus, clips, tmp_path, accelerator):
    soundfile.write(clips[1]["audio"]["path"], speech(0.3)[:300], 16000)
    with pytest.raises(ValueError, match=r"clip train_001\.wav: .*300 samples"):
        extract_frame_features(
            corpus, "train", model_with(), EmoShareFeatureExtractor("mel"), tmp_path / "store", accelerator
        )


def test_the_real_backbone_is_loaded_from_its_folder(corpus, clips, tmp_path, accelerator, backbone_folder):
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, id2label=dict(enumerate(LABELS)), **SMALL_HEAD)
    extractor = EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config)
    store = extract_frame_features(corpus, "train", model, extractor, tmp_path / "store", accelerator, "float32")
    waveform = torch.from_numpy(load_audio(clips[0]["audio"]))
    plain = model.backbone(waveform[None]).last_hidden_state[0].detach()
    np.testing.assert_allclose(store[0]["frame_features"], plain.numpy(), atol=1e-5)
