import json
import sys
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
from conftest import ROOT, run_command, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import LoopbackHub
from scipy.stats import spearmanr

METRIC = str(ROOT / "metrics" / "emotion_share_spearman")


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(METRIC)


def shares(rng, *shape):
    """Shares with many ties, like votes of few listeners."""
    return rng.integers(0, 8, size=shape) / 8


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), clips=st.integers(5, 60), labels=st.integers(1, 4))
def test_equal_to_scipy(seed, clips, labels):
    rng = np.random.default_rng(seed)
    predictions, references = rng.random((clips, labels)).round(1), shares(rng, clips, labels)
    if (np.ptp(predictions, axis=0) == 0).any() or (np.ptp(references, axis=0) == 0).any():
        return
    scores = evaluate.load(METRIC).compute(predictions=predictions, references=references)
    expected = [spearmanr(predictions[:, label], references[:, label]).statistic for label in range(labels)]
    assert [scores[f"spearman_{label}"] for label in range(labels)] == pytest.approx(expected, abs=1e-12)
    assert scores["spearman"] == pytest.approx(np.mean(expected), abs=1e-12)


def test_label_names_and_keys(metric):
    rng = np.random.default_rng(0)
    scores = metric.compute(predictions=rng.random((9, 2)), references=shares(rng, 9, 2), label_names=["joy", "awe"])
    assert set(scores) == {"spearman", "spearman_joy", "spearman_awe"}
    assert all(isinstance(score, float) for score in scores.values())


def test_null_references_are_left_out_label_by_label(metric):
    rng = np.random.default_rng(1)
    predictions, references = rng.random((20, 2)), shares(rng, 20, 2).tolist()
    references[3][0] = references[7][0] = None
    references[5][1] = float("nan")
    scores = metric.compute(predictions=predictions, references=references)
    for label, left_out in ((0, [3, 7]), (1, [5])):
        kept = [row for row in range(20) if row not in left_out]
        expected = spearmanr(predictions[kept, label], [references[row][label] for row in kept]).statistic
        assert scores[f"spearman_{label}"] == pytest.approx(expected, abs=1e-12)


def test_a_constant_prediction_counts_as_0_and_warns_by_name(metric):
    rng = np.random.default_rng(2)
    predictions = rng.random((20, 2))
    predictions[:, 1] = 0.3
    with pytest.warns(UserWarning, match="awe: the prediction is the same for every clip"):
        scores = metric.compute(predictions=predictions, references=shares(rng, 20, 2), label_names=["joy", "awe"])
    assert scores["spearman_awe"] == 0
    assert scores["spearman"] == scores["spearman_joy"] / 2


def test_constant_references_give_no_rho_and_are_left_out_of_the_mean(metric):
    rng = np.random.default_rng(3)
    references = shares(rng, 20, 2)
    references[:, 0] = 0.5
    with pytest.warns(UserWarning, match="joy: the references are constant"):
        scores = metric.compute(predictions=rng.random((20, 2)), references=references, label_names=["joy", "awe"])
    assert np.isnan(scores["spearman_joy"])
    assert scores["spearman"] == scores["spearman_awe"]


@pytest.mark.slow
def test_bootstrap_intervals_cover_what_they_should(metric):
    """In 60 samples of a population with known ρ, the 95 % interval misses it a few times at most."""
    rng = np.random.default_rng(4)
    population = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=20_000)
    true = spearmanr(*population.T).statistic
    covered = 0
    for seed in range(60):
        sample = population[rng.integers(len(population), size=80)]
        scores = metric.compute(predictions=sample[:, :1], references=sample[:, 1:], bootstrap=200, seed=seed)
        low, high = scores["spearman_0_ci95"]
        assert low < scores["spearman_0"] < high
        covered += low <= true <= high
    assert 50 <= covered <= 60


def test_bootstrap_follows_its_seed(metric):
    rng = np.random.default_rng(5)
    data = {"predictions": rng.random((30, 2)), "references": shares(rng, 30, 2)}
    first = metric.compute(**data, bootstrap=50, seed=1)
    assert metric.compute(**data, bootstrap=50, seed=1) == first
    assert metric.compute(**data, bootstrap=50, seed=2) != first


def test_resamples_with_constant_references_are_said_and_left_out(metric):
    references = np.zeros((6, 1))
    references[0] = 1
    with pytest.warns(UserWarning, match=r"rare: \d+ of 100 resamples"):
        scores = metric.compute(
            predictions=np.arange(6.0)[:, None], references=references, label_names=["rare"], bootstrap=100
        )
    assert np.isfinite(scores["spearman_rare_ci95"]).all()


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([[0.1, np.nan], [0.2, 0.3]], [[0, 1], [1, 0]], {}, "1 predictions are NaN"),
        ([[0.1], [0.2]], [[0, 1], [1, 0]], {}, r"shape \(2, 1\), references \(2, 2\)"),
        ([[0.1, 0.2], [0.2]], [[0, 1], [1, 0]], {}, r"rows of \[1, 2\] values"),
        ([[0.1], [0.2]], [[0], [1]], {"label_names": ["a", "b"]}, "2 names for 1 labels"),
        ([[0.1, 0], [0.2, 1]], [[0, 1], [1, 0]], {"label_names": ["a", "a"]}, "1 names for 2 labels"),
        ([[0.1], [0.2]], [[0], [1]], {"label_names": ["ci95"]}, "'spearman_ci95'] would be both"),
        ([[0.1, 0], [0.2, 1]], [[0, 1], [1, 0]], {"label_names": ["a_ci95", "a"]}, "'spearman_a_ci95'] would be both"),
        ([[0.1], [0.2]], [[0], [1]], {"bootstrap": -1}, "bootstrap is -1"),
    ],
)
def test_wrong_inputs_are_refused(metric, predictions, references, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)


def test_add_batch_gives_what_compute_gives(metric):
    rng = np.random.default_rng(6)
    predictions, references = rng.random((25, 3)), shares(rng, 25, 3)
    for start in range(0, 25, 10):
        batch = slice(start, start + 10)
        metric.add_batch(predictions=predictions[batch], references=references[batch])
    assert metric.compute() == metric.compute(predictions=predictions, references=references)


def test_nothing_warns_where_nothing_is_wrong(metric):
    rng = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        metric.compute(predictions=rng.random((30, 2)), references=shares(rng, 30, 2), bootstrap=20)


SCRIPT = """
import sys
import evaluate, numpy as np
rank = int(sys.argv[1])
metric = evaluate.load({metric!r}, num_process=2, process_id=rank, experiment_id="two", cache_dir=sys.argv[2])
rng = np.random.default_rng(0)
predictions, references = rng.random((10, 2)), rng.integers(0, 5, size=(10, 2)) / 4
metric.add_batch(predictions=predictions[rank::2], references=references[rank::2])
scores = metric.compute()
whole = evaluate.load({metric!r}, cache_dir=sys.argv[2] + "/alone" + sys.argv[1])
expected = whole.compute(predictions=predictions, references=references)
assert scores is None if rank else abs(scores["spearman"] - expected["spearman"]) < 1e-12, scores
"""


@pytest.mark.slow
def test_two_processes_score_together_on_the_main_one(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    script = tmp_path / "score.py"
    script.write_text(SCRIPT.replace("import evaluate, numpy", "import evaluate\nimport numpy").format(metric=METRIC))
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run_python, script, rank, tmp_path / "cache", cwd=tmp_path) for rank in (0, 1)]:
            done.result()


BY_ID = """
import json, sys
sys.modules["emoshare"] = None
import evaluate
metric = evaluate.load("org/emotion_share_spearman")
print(json.dumps(metric.compute(**json.loads(sys.argv[1]), bootstrap=20)))
"""


@pytest.mark.slow
def test_it_is_published_as_a_space_and_loads_by_id(metric, tmp_path):
    """With the command that its README gives."""
    rng = np.random.default_rng(8)
    data = {"predictions": rng.random((9, 2)).tolist(), "references": shares(rng, 9, 2).tolist()}
    with LoopbackHub() as hub:
        upload = ["upload", "org/emotion_share_spearman", METRIC, ".", "--repo-type", "space"]
        environment = hub.environment(tmp_path / "publisher")
        run_command(Path(sys.executable).parent / "hf", *upload, cwd=tmp_path, **environment)
        _, files = hub.repositories["spaces/org/emotion_share_spearman"].commits[-1]
        # `evaluate` would count the download on a server elsewhere.
        environment = {**hub.environment(tmp_path / "home"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        result = run_python("-c", BY_ID, json.dumps(data), cwd=tmp_path, **environment)
    assert {"README.md", "emotion_share_spearman.py", "index.html", "requirements.txt"} <= set(files)
    assert json.loads(result.stdout.splitlines()[-1]) == metric.compute(**data, bootstrap=20)


def test_the_interval_of_the_mean_is_of_resamples_with_all_labels(metric):
    """Where nobody hears the rare emotion, which is hard to predict, the mean would be over the other alone."""
    rng = np.random.default_rng(0)
    predictions, references = rng.random((60, 2)), np.zeros((60, 2))
    references[:, 0] = predictions[:, 0] + 0.1 * rng.random(60)
    references[0, 1] = 1.0
    with pytest.warns(UserWarning) as warned:
        scores = metric.compute(
            predictions=predictions, references=references, label_names=["common", "rare"], bootstrap=200
        )
    assert [str(warning.message).split(" of 200")[0][:6] for warning in warned] == ["mean: ", "rare: "]
    ends = [(scores["spearman_common_ci95"][end] + scores["spearman_rare_ci95"][end]) / 2 for end in (0, 1)]
    assert scores["spearman_ci95"] == pytest.approx(ends, abs=0.02)


def test_a_single_group_gives_no_interval_and_one_warning(metric):
    rng = np.random.default_rng(0)
    data = {"predictions": rng.random((20, 2)), "references": rng.random((20, 2))}
    with pytest.warns(UserWarning, match="all clips belong to one group") as warned:
        scores = metric.compute(**data, bootstrap=10, groups=["eve"] * 20)
    assert len(warned) == 1
    assert np.isnan(scores["spearman_ci95"]).all()


def test_groups_are_resampled_whole(metric):
    rng = np.random.default_rng(4)
    references = shares(rng, 40, 2)
    predictions = references + rng.normal(0, 0.3, size=references.shape)
    arguments = {"predictions": predictions, "references": references, "bootstrap": 40}
    one = metric.compute(**arguments, groups=["only one"] * 40)
    assert np.isnan(one["spearman_ci95"]).all()  # one group says nothing about others
    each = metric.compute(**arguments, groups=list(range(40)))
    assert each == metric.compute(**arguments)  # as if there were no groups
    of_two = metric.compute(**arguments, groups=["a", "b"] * 20)
    ends = [spearmanr(predictions[start::2, 0], references[start::2, 0]).statistic for start in (0, 1)]
    low, high = of_two["spearman_0_ci95"]
    assert (low, high) == (pytest.approx(min(ends)), pytest.approx(max(ends)))
    with pytest.raises(ValueError, match="groups has 3 entries for 40 clips"):
        metric.compute(**arguments, groups=["a", "b", "c"])


def test_rho_within_clips_is_a_figure_of_its_own(metric):
    rng = np.random.default_rng(5)
    references, predictions = shares(rng, 30, 5), rng.random((30, 5))
    arguments = {"predictions": predictions, "references": references, "bootstrap": 20}
    scores = metric.compute(**arguments, within_clips=True)
    expected = [spearmanr(*rows).statistic for rows in zip(predictions, references, strict=True)]
    assert scores["within_clip_spearman"] == pytest.approx(np.mean(expected))
    low, high = scores.pop("within_clip_spearman_ci95")
    assert low < scores.pop("within_clip_spearman") < high
    assert scores == metric.compute(**arguments)


@pytest.mark.filterwarnings("ignore:.*same for every clip")
def test_the_average_shares_have_a_high_rho_within_clips_alone(metric):
    rng = np.random.default_rng(6)
    references = np.array([0.1, 0.3, 0.5, 0.7]) + 0.1 * rng.random((30, 4))
    scores = metric.compute(
        predictions=np.tile([0.1, 0.3, 0.5, 0.7], (30, 1)), references=references, within_clips=True
    )
    assert (scores["spearman"], scores["within_clip_spearman"]) == (0.0, pytest.approx(1.0))


@pytest.mark.filterwarnings("ignore:.*same for every clip")
def test_clips_without_a_rho_of_their_own_are_left_out(metric):
    references = [[0.1, 0.2, None], [0.5, 0.5, 0.5], [None, None, 0.3], [0.2, 0.4, 0.6]]
    predictions = [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.3, 0.3, 0.3]]
    scores = metric.compute(predictions=predictions, references=references, within_clips=True)
    assert scores["within_clip_spearman"] == 0.5  # of the first clip, 1, and of the last, whose prediction is constant
