"""`load_corpus` and `CORPORA`: what every corpus must provide."""

import re
import time

import datasets
import numpy as np
import pytest
from conftest import read_csv, write_corpus, write_csv
from huggingface_hub import DatasetCard
from transformers import pipeline

from emoshare import EMOTIONS, load_audio
from emoshare.dataset_script import CORPORA, Corpus, CorpusInfo, EmotionShare, audio, load_corpus, streamed
from emoshare.dataset_script.__main__ import main
from emoshare.dataset_script.tables import ClipTable, CorpusTables

LABELS = ["joy", "awe"]
FACTS = [["train_001.wav", "12", "adam"], ["devel_000.wav", "?", "eve"], ["test_000.wav", "7", ""]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A user's corpus with facts; the shares of the test split are unknown."""
    folder = write_corpus(tmp_path / "corpus", {"train": 3, "devel": 2, "test": 1}, labels=LABELS)
    write_csv(folder / "lab" / "test.csv", ["filename"], [["test_000.wav"]])
    write_csv(folder / "lab" / "clips.csv", ["filename", "listeners", "speaker"], FACTS)
    return folder


def check(corpus, folder):
    """Checks that it is the corpus in `folder`, wherever it was loaded from."""
    assert corpus.name == "csv"
    assert corpus.info is CORPORA["csv"]
    assert (corpus.labels, corpus.facts) == (LABELS, ["listeners", "speaker"])
    assert list(corpus.splits) == ["train", "devel", "test"]
    assert corpus.splits["train"].column_names == ["filename", "audio", *LABELS, "listeners", "speaker"]
    in_file = [[float(share) for share in row[1:]] for row in read_csv(folder / "lab" / "train.csv")[1:]]
    assert corpus.shares("train").dtype == np.float64
    np.testing.assert_array_equal(corpus.shares("train"), in_file)
    np.testing.assert_array_equal(corpus.shares("test"), [[np.nan, np.nan]])
    assert corpus.metadata == {
        "train": {"listeners": [None, 12.0, None], "speaker": [None, "adam", None]},
        "devel": {"listeners": [None, None], "speaker": ["eve", None]},
        "test": {"listeners": [7.0], "speaker": [None]},
    }
    np.testing.assert_array_equal(corpus.listeners("train"), [np.nan, 12, np.nan])
    np.testing.assert_array_equal(corpus.listeners("test"), [7])
    row = corpus.splits["devel"][1]
    np.testing.assert_array_equal(load_audio(row["audio"]), load_audio(folder / "wav" / "devel_001.wav"))


def test_a_local_corpus_with_facts(folder):
    check(load_corpus("csv", data_dir=str(folder)), folder)


def test_a_published_corpus_with_facts(folder, tmp_path):
    main(["--config", "csv", "--data_dir", str(folder), "--output_dir", str(tmp_path / "published")])
    check(load_corpus(str(tmp_path / "published")), folder)


def test_a_long_clip_is_read_no_more_often_than_a_short_one(folder, tmp_path, model_folder, monkeypatch):
    """A row holds the whole file: to read it for each window would take longer than to decode it."""
    main(["--config", "csv", "--data_dir", str(folder), "--output_dir", str(tmp_path / "published")])
    (clip, *_) = load_corpus(str(tmp_path / "published")).audio("train")
    emotion_share = pipeline("emotion-share", model=str(model_folder))
    expected = emotion_share(str(folder / "wav" / "train_000.wav"), chunk_length_s=0.1, return_timeline=True)
    reads = []
    monkeypatch.setattr(audio, "audio_of", lambda row: reads.append(row) or streamed.audio_of(row))
    assert emotion_share(clip, chunk_length_s=0.1, return_timeline=True) == expected
    assert len(expected["timeline"]) > 3
    assert len(reads) == 4  # path and bytes, of the audio and for its name


def test_changed_facts_are_seen(folder):
    load_corpus("csv", data_dir=folder)
    write_csv(folder / "lab" / "clips.csv", ["filename", "age"], [["devel_000.wav", "33"]])
    assert load_corpus("csv", data_dir=folder).metadata["devel"] == {"age": [33.0, None]}


def test_a_corpus_without_facts(corpus_folder):
    with pytest.warns(UserWarning, match="ComParE 2023 has {'train': 31745"):
        corpus = load_corpus("compare2023", data_dir=corpus_folder)
    assert (corpus.name, corpus.labels, corpus.facts) == ("compare2023", list(EMOTIONS), [])
    assert corpus.metadata == {"train": {}, "devel": {}, "test": {}}
    assert corpus.shares("devel").shape == (8, 9)
    np.testing.assert_array_equal(corpus.listeners("devel"), [np.nan] * 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "csv"}, "data_dir: the corpus 'csv' needs a folder"),
        ({"dataset": "org/name", "data_dir": "here"}, "data_dir: got here, but org/name is a published dataset"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(**arguments)


def test_columns_are_read_whole():
    """Value by value, the shares of 50,000 clips would take 13 s; row by row, those of folds would take 2."""
    rng = np.random.default_rng(0)
    shares = rng.random((50_000, 9))
    columns = {"filename": [f"{clip}.wav" for clip in range(50_000)], "age": [None, *range(1, 50_000)]}
    clips = datasets.Dataset.from_dict({**columns, **dict(zip(EMOTIONS, shares.T, strict=True))})
    corpus = Corpus("csv", datasets.DatasetDict({"train": clips}), list(EMOTIONS), ["age"])
    train, devel = np.split(rng.permutation(50_000), [40_000])
    folds = corpus.resplit({"train": train, "devel": devel})
    start = time.process_time()
    np.testing.assert_array_equal(corpus.shares("train"), shares)
    np.testing.assert_array_equal(folds.shares("train"), shares[train])
    assert corpus.shares("train").flags.f_contiguous  # otherwise runs of earlier versions do not resume
    assert folds.filenames("devel") == [f"{clip}.wav" for clip in devel]
    assert folds.metadata["devel"]["age"] == [int(clip) or None for clip in devel]
    assert time.process_time() - start < 1.5
    with pytest.raises(ValueError, match="read-only"):
        corpus.shares("train")[0] = 0


@pytest.mark.parametrize("name", CORPORA)
def test_all_is_known_about_each_corpus(name):
    info = CORPORA[name]
    assert all([info.title, info.description, info.licence, info.licence_note, info.source])
    assert (info.licence_name is not None) == (info.licence == "other")
    assert info.labels is None or len(set(info.labels)) == len(info.labels)
    assert info.split_sizes is None or set(info.split_sizes) >= {"train", "devel"}
    assert bool(info.caution) >= info.is_synthetic  # no score of a synthetic corpus without a caution
    if info.noise_ceiling:
        assert 0 < info.noise_ceiling("devel") < 1


# A corpus in a layout of its own, which is one function and one entry.


def load_interviews(info, data_dir, cache_dir):
    """A folder of clips per split; the file's name holds speaker and shares in percent."""
    splits = {}
    for split in ("train", "devel"):
        paths = sorted((data_dir / split).iterdir())
        parts = [path.stem.split("-") for path in paths]
        splits[split] = ClipTable(
            filenames=[path.name for path in paths],
            paths=paths,
            shares=[[float(calm) / 100, 0.5] for _, calm in parts],
            facts={"speaker": [speaker for speaker, _ in parts], "listeners": [20] * len(paths)},
        )
    return CorpusTables(list(info.labels), splits)


@pytest.fixture
def interviews(wav, tmp_path, monkeypatch):
    info = CorpusInfo(
        title="the interviews",
        description="Interviews that were never held.",
        licence="other",
        licence_name="interviews-licence",
        licence_note="The data: for nobody.",
        source="From nowhere.",
        loader=load_interviews,
        layout="train/*.wav and devel/*.wav",
        labels=("calm", "haste"),
        split_sizes={"train": 2, "devel": 1},
        citation="@misc{interviews}\n",
        is_redistributable=False,
    )
    monkeypatch.setitem(CORPORA, "interviews", info)
    for name in ("train/01-25.wav", "train/02-75.wav", "devel/03-50.wav"):
        (tmp_path / "interviews" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "interviews" / name).symlink_to(wav)
    return tmp_path / "interviews"


def check_interviews(corpus, wav):
    assert corpus.name == "interviews"
    assert corpus.info.title == "the interviews"
    assert (corpus.labels, corpus.facts) == (["calm", "haste"], ["speaker", "listeners"])
    np.testing.assert_array_equal(corpus.shares("train"), [[0.25, 0.5], [0.75, 0.5]])
    np.testing.assert_array_equal(corpus.listeners("devel"), [20])
    assert corpus.metadata["train"]["speaker"] == ["01", "02"]
    np.testing.assert_array_equal(load_audio(corpus.splits["devel"][0]["audio"]), load_audio(wav))


def test_a_corpus_is_added_by_one_entry(interviews, wav, recwarn):
    check_interviews(load_corpus("interviews", data_dir=interviews), wav)
    assert not [warning for warning in recwarn if "published" in str(warning.message)]
    assert "interviews" in [config.name for config in EmotionShare.BUILDER_CONFIGS]
    with pytest.raises(ValueError, match=re.escape("'interviews' needs a folder with train/*.wav and devel/*.wav")):
        load_corpus("interviews")
    (interviews / "train" / "02-75.wav").unlink()
    with pytest.warns(UserWarning, match="{'train': 1, 'devel': 1} clips; the interviews has {'train': 2"):
        load_corpus("interviews", data_dir=interviews)


def test_an_added_corpus_is_published_as_what_it_is(interviews, wav, tmp_path):
    main(["--config", "interviews", "--data_dir", str(interviews), "--output_dir", str(tmp_path / "published")])
    card = DatasetCard.load(tmp_path / "published" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "interviews-licence")
    assert card.data.pretty_name == "Emotion Share: the interviews"
    for text in ("From nowhere.", "@misc{interviews}", "| `speaker`, `listeners` | facts about the clip"):
        assert text in card.text
    check_interviews(load_corpus(str(tmp_path / "published")), wav)
