import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from accelerate import Accelerator
from conftest import small_model, write_corpus
from datasets import DatasetDict, load_from_disk

from emoshare import EmoShareFeatureExtractor
from emoshare.dataset_script import load_corpus
from emoshare.training import window_index
from emoshare.training.features import extract_frame_features
from emoshare.training.store import (
    FrameFeatureStore,
    ResplitFeatureStore,
    begin,
    clips_missing,
    finish,
    is_complete,
    is_whole,
    shard_path,
    shard_writer,
    written_shards,
)

LABELS = ["joy", "awe"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "data", {"train": 5, "devel": 1}, labels=LABELS)
    return load_corpus("csv", data_dir=folder / "data", cache_dir=folder / "cache")


def window(clip, start, frames, value=1.0):
    features = np.full((frames, 2), value, dtype=np.float16)
    return {"clip": clip, "start": start, "num_samples": 100 + frames, "features": features}


def write_shard(path, windows, dtype):
    with shard_writer(path, dtype) as write:
        for window in windows:
            write(window)


def write_store(folder, shards, corpus, processes=1):
    """`shards`: for each process, a list of its shards."""
    unfinished = folder / "store.unfinished"
    begin(unfinished)
    for process, windows_of_shards in enumerate(shards):
        for windows in windows_of_shards:
            of_clips = [window["clip"] for window in windows]
            write_shard(shard_path(unfinished, of_clips, process, processes), windows, "float16")
    finish(unfinished, folder / "store", "float16")
    return FrameFeatureStore(folder / "store", corpus, "train")


def test_windows_come_in_the_order_of_the_clips_whichever_process_wrote_them(corpus, tmp_path):
    shards = [
        [[window(0, 50, 4, 0.5), window(0, 0, 3, 0.0)], [window(4, 0, 9, 4.0)], [window(2, 0, 6, 2.0)]],
        [[window(3, 0, 7, 3.0)], [window(1, 0, 5, 1.0)]],
    ]
    store = write_store(tmp_path, shards, corpus, processes=2)
    assert [window["frame_features"][0, 0] for window in store] == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    assert [len(window["frame_features"]) for window in store] == store.num_frames.tolist() == [3, 4, 5, 6, 7, 9]
    assert store.clip_of_window.tolist() == [0, 0, 1, 2, 3, 4]
    assert store.num_samples.tolist() == [103, 104, 105, 106, 107, 109]
    assert store.weights.tolist() == pytest.approx([103 / 207, 104 / 207, 1, 1, 1, 1])
    clip = corpus.splits["train"][3]
    np.testing.assert_allclose(store[4]["labels"], [clip["joy"], clip["awe"]])


def test_datasets_reads_a_store(corpus, tmp_path):
    write_store(tmp_path, [[[window(clip, 0, 3 + clip) for clip in range(5)]]], corpus)
    dataset = load_from_disk(str(tmp_path / "store"))
    assert dataset.column_names == ["clip", "start", "num_samples", "shape", "features"]
    assert dataset[2]["shape"] == [5, 2]
    assert dataset[2]["features"] == [1.0] * 10


def test_features_are_sliced_from_the_mapped_file_without_copying(corpus, tmp_path):
    store = write_store(tmp_path, [[[window(clip, 0, 2000) for clip in range(5)]]], corpus)
    before = pa.total_allocated_bytes()
    features = [item["frame_features"] for item in store]
    assert pa.total_allocated_bytes() - before < 1000
    assert not any(array.flags.owndata or array.flags.writeable for array in features)


def test_a_store_of_other_clips_is_refused(corpus, tmp_path):
    write_store(tmp_path, [[[window(clip, 0, 3) for clip in range(5)]]], corpus)
    of_three = replace(corpus, splits=DatasetDict(train=corpus.splits["train"].select(range(3))))
    with pytest.raises(ValueError, match="other clips than the split's 3; delete the folder"):
        FrameFeatureStore(tmp_path / "store", of_three, "train")


def test_a_batch_is_padded_to_its_longest(corpus, tmp_path):
    store = write_store(tmp_path, [[[window(clip, 0, 3 + clip) for clip in range(5)]]], corpus)
    batch = store.collate([store[0], store[2]])
    assert batch["frame_features"].shape == (2, 5, 2)
    assert batch["attention_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch["window"].tolist() == [0, 2]
    assert batch["frame_features"][0, 3:].abs().sum() == 0
    assert (batch["frame_features"][0, :3] == 1).all()


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    broken = [window(0, 0, 3), {**window(1, 0, 3), "start": "not a number"}]
    with pytest.raises(pa.ArrowInvalid):
        write_shard(tmp_path / "shard.arrow", broken, "float16")
    assert not list(tmp_path.iterdir())


def damage(shard, how):
    content = shard.read_bytes()
    if how == "gone":
        shard.unlink()
        return
    with pa.OSFile(str(shard)) as file:
        stream = pa.ipc.open_stream(file)
        for _ in range(2):
            stream.read_next_batch()
        end_of_second = file.tell()
    kept = {"empty": 0, "in the middle": len(content) // 2, "after a window": end_of_second, "at the end": -1}[how]
    shard.write_bytes(content[:kept])


@pytest.mark.parametrize("how", ["gone", "empty", "in the middle", "after a window", "at the end"])
def test_a_damaged_shard_is_found(how, corpus, tmp_path):
    first = [window(0, 0, 30), window(1, 0, 30), window(1, 130, 30)]  # the clip 1 has two windows
    write_store(tmp_path, [[first, [window(clip, 0, 5) for clip in (2, 3, 4)]]], corpus)
    store = tmp_path / "store"
    assert is_whole(store)
    first, _ = sorted(store.glob("shard-*"))
    damage(first, how)
    assert not is_whole(store)
    store.rename(tmp_path / "store.unfinished")
    begin(tmp_path / "store.unfinished")
    assert written_shards(tmp_path / "store.unfinished") == [range(2, 5)]


def test_a_store_without_its_list_of_shards_is_none(corpus, tmp_path):
    write_store(tmp_path, [[[window(clip, 0, 3) for clip in range(5)]]], corpus)
    state = tmp_path / "store" / "state.json"
    for content in ("{", "[]", '{"_data_files": 5}', '{"_data_files": [{"filename": ["a"]}]}', '{"_data_files": []}'):
        state.write_text(content)
        assert not is_whole(tmp_path / "store")
    assert not is_whole(tmp_path / "nothing")


def test_of_a_store_the_shards_alone_are_read(corpus, tmp_path):
    write_store(tmp_path, [[[window(clip, 0, 3) for clip in range(5)]]], corpus)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "store" / name).write_text('{"features": 5}')
    assert len(FrameFeatureStore(tmp_path / "store", corpus, "train")) == 5


def shard_of(folder, clips):
    """Writes a shard of a range of clips."""
    path = shard_path(folder, clips, clips[0] % clips.step, clips.step)
    write_shard(path, [window(clip, 0, 3) for clip in clips], "float16")
    return path


@pytest.mark.parametrize("is_alone", [True, False])
def test_whole_shards_are_kept_whatever_number_of_processes_wrote_them(is_alone, tmp_path):
    folder = tmp_path / "store.unfinished"
    assert begin(folder) == []
    shards = [range(1, 7, 2), range(9, 10, 2), range(6, 8, 1)[::2], range(8, 13, 4), range(2, 3)]
    for clips in shards:
        shard_of(folder, clips)
    (folder / "unfinished-1").write_bytes(b"half a shard")
    assert begin(folder, is_alone) == []
    assert (folder / "unfinished-1").exists() == (not is_alone)
    assert {tuple(clips) for clips in written_shards(folder)} == {(1, 3, 5), (9,), (6,), (8, 12), (2,)}
    assert clips_missing(folder, 14) == 6
    assert not is_complete(folder, 14)
    for clips in (range(0, 5, 4), range(7, 12, 4), range(10, 11), range(13, 14)):
        shard_of(folder, clips)
    assert clips_missing(folder, 14) == 0
    assert is_complete(folder, 14)
    assert not is_complete(folder, 13)


@pytest.mark.parametrize("is_alone", [True, False])
def test_of_shards_that_hold_the_same_clip_the_largest_is_kept(is_alone, tmp_path):
    folder = tmp_path / "store.unfinished"
    begin(folder)
    small, large, apart, same = (
        shard_of(folder, clips) for clips in (range(1, 6, 2), range(3, 9), range(9, 12, 2), range(10, 13, 2))
    )
    assert not is_complete(folder, 13)
    assert begin(folder, is_alone) == [small.name]
    assert sorted(folder.glob("shard-*")) == sorted([large, apart, same])


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize(
    "name", ["shard-00001-of-00002-000000.arrow", "shard-00000-of-00000-000000-000002.arrow", "shard-of-clips.arrow"]
)
def test_a_shard_whose_name_does_not_say_its_clips_goes(name, is_alone, tmp_path):
    folder = tmp_path / "store.unfinished"
    begin(folder)
    whole = shard_of(folder, range(3))
    shutil.copy(whole, folder / name)
    assert is_complete(folder, 3)
    assert begin(folder, is_alone) == [name]
    assert list(folder.glob("shard-*")) == [whole]


def test_released_sizes_take_an_eighth_of_the_released_arrays(corpus, tmp_path):
    """Clips of 4 s: 199 frames of 1024 in float16, against 398 in float64."""
    features = np.zeros((199, 1024), dtype=np.float16)
    windows = [{"clip": clip, "start": 0, "num_samples": 64000, "features": features} for clip in range(5)]
    write_store(tmp_path, [[windows]], corpus)
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) / 5
    assert 398 * 1024 * 8 / size > 7.9


def test_two_stores_of_the_same_features_and_other_labels_differ(corpus, tmp_path):
    store = write_store(tmp_path, [[[window(clip, 0, 3) for clip in range(5)]]], corpus)
    other = FrameFeatureStore(tmp_path / "store", replace(corpus, labels=LABELS[::-1]), "train")
    assert store.fingerprint != other.fingerprint
    shutil.rmtree(tmp_path / "store")


@pytest.fixture
def resplit(corpus, tmp_path):
    """The splits of the corpus with windows of their own, in two shards, and three clips of both as a new split."""
    stores = {}
    for split, clips in corpus.splits.items():
        windows = [window(clip, 0, 3 + clip, 10 * len(clips) + clip) for clip in range(len(clips))]
        long = window(0, 50, 2, 10 * len(clips) + 0.5)
        of_split = replace(corpus, splits=DatasetDict(train=clips))
        (tmp_path / split).mkdir()
        shards = [shard for shard in (windows[1:], [long, windows[0]]) if shard]
        stores[split] = write_store(tmp_path / split, [shards], of_split)
    other = corpus.resplit({"train": [0, 3, 5], "devel": [1, 4]})
    return stores, other


def five_shards(corpus, folder):
    return write_store(folder, [[[window(clip, 0, 3 + clip, clip)] for clip in range(5)]], corpus)


def test_a_store_of_an_earlier_version_has_no_index_and_opens(corpus, tmp_path):
    store = five_shards(corpus, tmp_path)
    (tmp_path / "store" / "windows.arrow").unlink()
    assert is_whole(tmp_path / "store")
    other = FrameFeatureStore(tmp_path / "store", corpus, "train")
    for name in ("clip_of_window", "num_samples", "num_frames", "weights", "shard", "offset"):
        np.testing.assert_array_equal(getattr(other, name), getattr(store, name))
    for own, first in zip(other, store, strict=True):
        np.testing.assert_array_equal(own["frame_features"], first["frame_features"])


@pytest.mark.parametrize("position", [0, 200, -200, -1])
def test_a_damaged_index_is_found_and_made_again(position, corpus, tmp_path):
    five_shards(corpus, tmp_path)
    store, unfinished = tmp_path / "store", tmp_path / "store.unfinished"
    index = store / "windows.arrow"
    whole = index.read_bytes()
    damaged = bytearray(whole)
    damaged[position] ^= 1
    index.write_bytes(damaged)
    assert not is_whole(store)
    with pytest.raises(ValueError, match="store: is damaged; delete the folder"):
        FrameFeatureStore(store, corpus, "train")
    store.rename(unfinished)
    assert begin(unfinished) == []
    assert written_shards(unfinished) == [range(clip, clip + 1) for clip in range(5)]
    finish(unfinished, store, "float16")
    assert index.read_bytes() == whole
    for content in (b"", whole[:8]):
        index.write_bytes(content)
        assert not is_whole(store)


def test_of_all_files_of_a_store_the_last_ones_are_mapped(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(window_index, "MAPS", 2)
    store = five_shards(corpus, tmp_path)
    items = [store[index]["frame_features"] for index in (0, 1, 2, 0, 3, 4, 3)]
    assert list(store.files.maps) == [4, 3]
    assert [item[0, 0] for item in items] == [0, 1, 2, 0, 3, 4, 3]  # also those whose file is not kept any more


def test_opening_a_store_takes_no_memory_for_each_window(corpus, tmp_path):
    """Nor does it look at each: 4.7 kB and 64 microseconds a window were measured with a table of Arrow's."""
    store = write_store(tmp_path, [[[window(clip, start, 1) for clip in range(5) for start in range(200)]]], corpus)
    assert len(store) == 1000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    store = FrameFeatureStore(tmp_path / "store", corpus, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (peak + pa.total_allocated_bytes() - before) / len(store) < 150


def test_a_split_of_several_stores_has_their_windows(resplit):
    stores, corpus = resplit
    store = ResplitFeatureStore(stores, corpus, "train")
    items = [store[index] for index in range(len(store))]
    # Clip 0 of train has two windows, and so has the only clip of devel, which is the sixth of all.
    assert [item["frame_features"][0, 0] for item in items] == [50, 50.5, 53, 10, 10.5]
    assert store.clip_of_window.tolist() == [0, 0, 1, 2, 2]
    assert store.num_frames.tolist() == [3, 2, 6, 3, 2]
    assert store.num_samples.tolist() == [103, 102, 106, 103, 102]
    assert store.weights.tolist() == pytest.approx([103 / 205, 102 / 205, 1, 103 / 205, 102 / 205])
    clips = corpus.splits["train"]
    for item, clip in zip(items, store.clip_of_window.tolist(), strict=True):
        np.testing.assert_allclose(item["labels"], [clips[clip]["joy"], clips[clip]["awe"]])
    assert store.collate(items)["frame_features"].shape == (5, 6, 2)
    assert vars(store).keys() == vars(stores["train"]).keys()
    assert store.listeners.shape == (3,)


def test_a_split_of_several_stores_copies_no_features(resplit):
    stores, corpus = resplit
    before = pa.total_allocated_bytes()
    store = ResplitFeatureStore(stores, corpus, "train")
    features = [item["frame_features"] for item in store]
    assert pa.total_allocated_bytes() == before
    assert not any(array.flags.owndata or array.flags.writeable for array in features)


def test_other_splits_are_other_stores(resplit):
    stores, corpus = resplit
    whole = replace(corpus.whole, labels=[])  # so that no shares differ
    splits = [whole.resplit({"train": clips}) for clips in ([0, 3, 5], [0, 3, 5], [0, 3, 4])]
    first, same, other = (ResplitFeatureStore(stores, split, "train").fingerprint for split in splits)
    assert first == same != other


def test_listeners_come_with_the_clips_of_a_batch(corpus, tmp_path):
    windows = [window(0, 0, 3), window(0, 50, 4), *(window(clip, 0, 3) for clip in range(1, 5))]
    store = write_store(tmp_path, [[windows]], corpus)
    batch = store.collate([store[0], store[1]])
    assert batch["listeners"].isnan().all()
    clips = corpus.splits["train"].add_column("listeners", [3.0, None, 20.0, 5.0, 7.0])
    with_listeners = replace(corpus, splits=DatasetDict(train=clips), facts=["listeners"])
    other = FrameFeatureStore(tmp_path / "store", with_listeners, "train")
    np.testing.assert_array_equal(other.listeners, np.float32([3, np.nan, 20, 5, 7]))
    batch = other.collate([other[0], other[1], other[2], other[3]])
    np.testing.assert_array_equal(batch["listeners"], np.float32([3, 3, np.nan, 20]))
    assert other.fingerprint != store.fingerprint


def test_an_extraction_is_such_a_store(corpus, tmp_path):
    model, accelerator = small_model(id2label=dict(enumerate(LABELS))), Accelerator(cpu=True)
    store = extract_frame_features(corpus, "train", model, EmoShareFeatureExtractor("mel"), tmp_path, accelerator)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert len(load_from_disk(str(folder))) == len(store) == 5
