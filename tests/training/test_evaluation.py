import json
import math

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import small_model, write_corpus

from emoshare import EmoShareFeatureExtractor, EmotionSharePipeline
from emoshare.dataset_script import load_emotion_share
from emoshare.training.batches import FeatureLoader
from emoshare.training.evaluation import Scorer, predict_shares, write_results
from emoshare.training.features import extract_frame_features

LABELS = ["joy", "awe"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("chunk_length_s", [8.0, 0.25])
def test_predictions_are_those_of_the_pipeline(chunk_length_s, dtype, tolerance, tmp_path):
    folder = write_corpus(tmp_path / "corpus", {"train": 1, "devel": 6}, labels=LABELS)
    clips = load_emotion_share("csv", data_dir=folder, cache_dir=tmp_path / "cache")["devel"]
    model = small_model(id2label=dict(enumerate(LABELS)))
    extractor = EmoShareFeatureExtractor("mel", chunk_length_s=chunk_length_s)
    accelerator = Accelerator(cpu=True)
    store = extract_frame_features(clips, "devel", model, extractor, tmp_path / "store", accelerator, dtype)
    shares = predict_shares(model.heads, FeatureLoader(store, model.config, 4, accelerator), accelerator)
    assert shares.shape == (6, 2)
    pipeline = EmotionSharePipeline(model=model, feature_extractor=extractor, device="cpu")
    for row, predicted in zip(clips, shares, strict=True):
        scores = {share["label"]: share["score"] for share in pipeline(row["audio"])}
        assert scores == pytest.approx(dict(zip(LABELS, predicted, strict=True)), abs=tolerance)


def test_the_scorer_gives_one_rho_per_label():
    references = np.random.default_rng(0).random((20, 2))
    scorer = Scorer(references, LABELS)
    assert scorer.rhos(references, [0, 1]) == pytest.approx([1, 1])
    assert scorer.rhos(references * [1, -1], [0, 1]) == pytest.approx([1, -1])
    assert scorer.rhos(-references[:, [1]], [1]) == pytest.approx([-1])
    assert set(scorer.scores(references, bootstrap=10)) >= {"spearman", "spearman_awe", "spearman_awe_ci95"}


def test_written_results_are_json_even_without_a_rho(tmp_path):
    write_results(tmp_path / "r.json", {"eval_spearman": 0.5, "eval_spearman_joy": math.nan, "ci": [math.nan, 1.0]})
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "eval_spearman": 0.5,
        "eval_spearman_joy": None,
        "ci": [None, 1.0],
    }
