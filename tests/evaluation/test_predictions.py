import math

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import read_csv, small_model, write_corpus, write_csv

from emoshare import EmoShareFeatureExtractor, EmotionSharePipeline
from emoshare.dataset_script import load_corpus
from emoshare.evaluation.predictions import predict, read_predictions, read_submission, write_predictions
from emoshare.training.batches import FeatureLoader
from emoshare.training.features import extract_frame_features

FILENAMES = ["b.wav", "a.wav", "c.wav"]
LABELS = ["joy", "awe"]
ROWS = [["b.wav", "0.5", "0"], ["a.wav", "0.25", "1"], ["c.wav", "1e-3", "0.125"]]


def written(folder, rows, header=("filename", *LABELS)):
    write_csv(folder / "predictions.csv", list(header), rows)
    return folder / "predictions.csv"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("chunk_length_s", [8.0, 0.25])
def test_predictions_are_those_of_the_pipeline(chunk_length_s, dtype, tolerance, tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"train": 1, "devel": 6}, labels=LABELS)
    corpus = load_corpus("csv", data_dir=folder, cache_dir=tmp_path / "cache")
    model = small_model(id2label=dict(enumerate(LABELS)))
    extractor = EmoShareFeatureExtractor("mel", chunk_length_s=chunk_length_s)
    accelerator = Accelerator(cpu=True)
    store = extract_frame_features(corpus, "devel", model, extractor, tmp_path / "store", accelerator, dtype)
    shares = predict(model, FeatureLoader(store, model.config, 4, accelerator), accelerator)
    assert shares.shape == (6, 2)
    pipeline = EmotionSharePipeline(model=model, feature_extractor=extractor, device="cpu")
    for row, predicted in zip(corpus.splits["devel"], shares, strict=True):
        scores = {share["label"]: share["score"] for share in pipeline(row["audio"])}
        assert scores == pytest.approx(dict(zip(LABELS, predicted, strict=True)), abs=tolerance)


def test_written_predictions(tmp_path):
    write_predictions(tmp_path / "p.csv", ["b.wav", "a.wav"], np.array([[0.25, 1 / 3], [0, 1]]), LABELS)
    assert read_csv(tmp_path / "p.csv") == [
        ["filename", "joy", "awe"],
        ["b.wav", "0.25", "0.333333333"],
        ["a.wav", "0", "1"],
    ]


def test_predictions_come_back_as_they_were_written(tmp_path):
    shares = np.random.default_rng(0).random((3, 2))
    write_predictions(tmp_path / "predictions.csv", FILENAMES, shares, LABELS)
    assert read_submission(tmp_path / "predictions.csv", FILENAMES, LABELS) == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        (ROWS[:2], ["c.wav of this split is missing"]),
        ([*ROWS, ROWS[0]], ["row 5: b.wav is listed again; first in row 2"]),
        ([*ROWS, ["d.wav", "0", "0"]], ["row 5: 'd.wav' is not a clip of this split"]),
        ([ROWS[0], ROWS[2], ROWS[1]], ["row 3: got c.wav; expected a.wav, the order of the split's list"]),
        ([ROWS[0], ["a.wav", "", "1"], ROWS[2]], ["row 3: joy is ''; expected a finite number"]),
        ([ROWS[0], ["a.wav", "0", "nan"], ROWS[2]], ["row 3: awe is 'nan'; expected a finite number"]),
        ([ROWS[0], ["a.wav", "inf", "0_5"], ROWS[2]], ["row 3: joy is 'inf'", "row 3: awe is '0_5'"]),
        ([ROWS[0], ["a.wav", "0"], ROWS[2]], ["row 3: has 2 fields; expected 3"]),
        ([], ["b.wav of this split is missing", "a.wav of this split is missing", "c.wav of this split is missing"]),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(rows, messages, tmp_path):
    path = written(tmp_path, rows)
    with pytest.raises(ValueError, match=str(len(messages)) + r" problem\(s\)") as error:
        read_predictions(path, FILENAMES, LABELS)
    assert str(error.value).startswith(f"{path}: ")
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("header", [("filename", "awe", "joy"), ("filename", "joy"), ("file", *LABELS)])
def test_other_columns_are_refused(header, tmp_path):
    with pytest.raises(ValueError, match=r"row 1: got the columns \[.*\]; expected \['filename', 'joy', 'awe'\]"):
        read_predictions(written(tmp_path, ROWS, header), FILENAMES, LABELS)
    (tmp_path / "predictions.csv").write_text("")
    with pytest.raises(ValueError, match=r"row 1: got the columns \[\]"):
        read_predictions(tmp_path / "predictions.csv", FILENAMES, LABELS)


def test_a_share_beyond_1_can_be_read_and_not_submitted(tmp_path):
    path = written(tmp_path, [ROWS[0], ["a.wav", "1.25", "-0.5"], ROWS[2]])
    assert read_predictions(path, FILENAMES, LABELS)[1].tolist() == [1.25, -0.5]
    with pytest.raises(ValueError, match=r"row 3: joy is 1.25; expected a number in \[0, 1\]\n  row 3: awe is -0.5"):
        read_submission(path, FILENAMES, LABELS)


def test_many_problems_are_counted_and_some_shown(tmp_path):
    filenames = [f"{number}.wav" for number in range(20)]
    path = written(tmp_path, [[name, str(math.nan), "0"] for name in filenames])
    with pytest.raises(ValueError, match=r"20 problem\(s\)") as error:
        read_predictions(path, filenames, LABELS)
    assert str(error.value).count("\n") == 6
    assert str(error.value).endswith("... and 15 more")
