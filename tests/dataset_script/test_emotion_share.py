import datasets
import pytest
from conftest import read_csv, write_corpus, write_csv

from emoshare import EMOTIONS, load_audio
from emoshare.dataset_script import EmotionShare, load_emotion_share
from emoshare.dataset_script.synthetic import SyntheticCorpus

SMALL = SyntheticCorpus(train=6, devel=4, test=3, train_speakers=3, other_speakers=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_builder_has_a_config_for_each_corpus():
    names = [config.name for config in EmotionShare.BUILDER_CONFIGS]
    assert names == ["compare2023", "crema_d", "csv", "emodb", "synthetic"]
    assert issubclass(EmotionShare, datasets.DatasetBuilder)


def test_compare2023_rows(corpus_folder):
    with pytest.warns(UserWarning, match="31745"):
        splits = load_emotion_share("compare2023", data_dir=corpus_folder)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "devel": 8, "test": 4}
    assert splits["train"].column_names == ["filename", "audio", *EMOTIONS]
    in_file = read_csv(corpus_folder / "lab" / "devel.csv")[1:]
    for row, expected in zip(splits["devel"], in_file, strict=True):
        assert row["filename"] == expected[0]
        assert [row[emotion] for emotion in EMOTIONS] == [float(share) for share in expected[1:]]
        assert load_audio(row["audio"]).ndim == 1


def test_unknown_test_labels_are_null(tmp_path):
    folder = write_corpus(tmp_path / "data", {"train": 2, "devel": 2, "test": 2})
    names = [[row[0], *["?"] * 9] for row in read_csv(folder / "lab" / "test.csv")[1:]]
    write_csv(folder / "lab" / "test.csv", ["filename", *EMOTIONS], names)
    with pytest.warns(UserWarning, match="published"):
        splits = load_emotion_share("compare2023", data_dir=folder)
    assert splits["test"]["Anger"][:] == [None, None]


def test_csv_takes_any_labels_and_needs_no_test_split(tmp_path):
    folder = write_corpus(tmp_path / "data", {"train": 3, "devel": 2}, labels=["joy", "awe"])
    splits = load_emotion_share("csv", data_dir=str(folder))
    assert list(splits) == ["train", "devel"]
    assert splits["train"].column_names == ["filename", "audio", "joy", "awe"]


def test_a_changed_label_is_seen(tmp_path):
    folder = write_corpus(tmp_path / "data", {"train": 3, "devel": 2}, labels=["joy"])
    assert load_emotion_share("csv", data_dir=folder)["train"]["joy"][0] != 0.125
    rows = read_csv(folder / "lab" / "train.csv")
    rows[1][1] = "0.125"
    write_csv(folder / "lab" / "train.csv", rows[0], rows[1:])
    assert load_emotion_share("csv", data_dir=folder)["train"]["joy"][0] == 0.125


def test_synthetic_is_built_once(tmp_path):
    splits = load_emotion_share("synthetic", synthetic=SMALL)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "devel": 4, "test": 3}
    assert splits["train"].column_names == ["filename", "audio", *EMOTIONS]
    path = splits["devel"][0]["audio"]["path"]
    before = (tmp_path / path).stat().st_mtime_ns
    again = load_emotion_share("synthetic", synthetic=SMALL)
    assert again["devel"][0] == splits["devel"][0]
    assert (tmp_path / path).stat().st_mtime_ns == before
    assert not list((tmp_path / "cache" / "emoshare_synthetic").glob("unfinished-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "iemocap"}, "unknown corpus 'iemocap'; expected one of compare2023, crema_d, csv, emodb, synthetic"),
        ({"name": "csv"}, "data_dir: the corpus 'csv' needs a folder"),
        ({"name": "synthetic", "data_dir": "somewhere"}, "makes its own"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_emotion_share(**arguments)
