import json
import math

import numpy as np
import pytest
from accelerate import Accelerator

from emoshare.evaluation import scores as scores_module
from emoshare.evaluation.ceiling import NoiseCeiling
from emoshare.evaluation.scores import (
    MEAN,
    Score,
    Scorer,
    read_history,
    read_scores,
    report,
    score_table,
    write_history,
    write_scores,
)
from emoshare.evaluation.selections import SELECTIONS

LABELS = ["joy", "awe"]


def test_the_scorer_gives_one_rho_per_label():
    references = np.random.default_rng(0).random((20, 2))
    scorer = Scorer(references, LABELS)
    assert scorer.rhos(references, [0, 1]) == pytest.approx([1, 1])
    assert scorer.rhos(references * [1, -1], [0, 1]) == pytest.approx([1, -1])
    assert scorer.rhos(-references[:, [1]], [1]) == pytest.approx([-1])
    scores = scorer.scores(references * [1, -1], bootstrap=10)
    assert list(scores) == [MEAN, *LABELS]
    assert scores["awe"].rho == pytest.approx(-1)
    assert scores["awe"].low == pytest.approx(-1)
    assert scores[MEAN].low <= scores[MEAN].rho <= scores[MEAN].high
    assert math.isnan(scorer.scores(references)["joy"].low)


def test_nothing_is_copied_into_a_cache_to_score():
    """`evaluate.load` would copy: a copy truncated by a kill would stay there for ever."""
    assert scores_module.spearman_scores.__module__ == "emoshare.metrics.emotion_share_spearman.spearman"


@pytest.mark.parametrize(
    "damage",
    [
        {"eval_spearman": "0.5"},
        {"eval_spearman_joy": [0.5]},
        {"eval_spearman_awe": True},
        {"eval_spearman_ci95": 0.5},
        {"eval_spearman_joy_ci95": [0.5]},
        {"eval_spearman_joy_ci95": [0.5, "0.6"]},
    ],
)
def test_damaged_results_are_named(damage, tmp_path):
    references = np.random.default_rng(0).random((20, 2))
    write_scores(tmp_path / "results.json", Scorer(references, LABELS).scores(references, bootstrap=10))
    values = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**values, **damage}))
    with pytest.raises(ValueError, match=rf"results\.json: {next(iter(damage))} is "):
        read_scores(tmp_path / "results.json", LABELS)


def test_written_scores_are_json_under_the_metrics_names(tmp_path):
    references = np.random.default_rng(0).random((20, 2))
    scorer = Scorer(references, LABELS)
    for bootstrap, intervals in [
        (10, {"eval_spearman_ci95", "eval_spearman_joy_ci95", "eval_spearman_awe_ci95"}),
        (0, set()),
    ]:
        scores = scorer.scores(references, bootstrap)
        write_scores(tmp_path / "r.json", scores)
        written = json.loads((tmp_path / "r.json").read_text())
        assert set(written) == {"eval_spearman", "eval_spearman_joy", "eval_spearman_awe"} | intervals
        assert read_scores(tmp_path / "r.json", LABELS) == pytest.approx(scores, nan_ok=True)


def test_written_scores_are_json_even_without_a_rho(tmp_path):
    write_scores(tmp_path / "r.json", {MEAN: Score(0.5, math.nan, 1.0), "joy": Score(math.nan)})
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "eval_spearman": 0.5,
        "eval_spearman_ci95": [None, 1.0],
        "eval_spearman_joy": None,
        "eval_spearman_joy_ci95": [None, None],
    }
    assert math.isnan(read_scores(tmp_path / "r.json", ["joy"])["joy"].rho)


def test_scores_on_a_fold_are_written_too(tmp_path):
    scores, of_fold = {MEAN: Score(0.5), "joy": Score(0.5)}, {MEAN: Score(0.25), "joy": Score(math.nan)}
    write_scores(tmp_path / "r.json", scores, of_fold=of_fold)
    assert json.loads((tmp_path / "r.json").read_text())["test"] == {"spearman": 0.25, "spearman_joy": None}
    assert read_scores(tmp_path / "r.json", ["joy"])[MEAN].rho == 0.5


def test_a_label_may_be_called_as_the_mean_is():
    scores = {MEAN: Score(0.25), "mean": Score(0.5, 0.4, 0.6)}
    table = score_table(scores, {"mean": "   epoch 3"})
    assert [line.split() for line in table.splitlines()] == [
        ["mean", "0.250"],
        ["mean", "0.500", "95", "%", "CI", "0.400", "to", "0.600", "epoch", "3"],
    ]


def test_written_history_comes_back(tmp_path):
    history = [(1, 0, 0.5, 0.1), (1, 1, 0.25, math.nan), (2, 0, 0.125, 0.2)]
    write_history(tmp_path / "history.csv", history, LABELS)
    assert (tmp_path / "history.csv").read_text() == (
        "epoch,label,train_loss,devel_spearman\n1,joy,0.5,0.100000\n1,awe,0.25,\n2,joy,0.125,0.200000\n"
    )
    assert read_history(tmp_path / "history.csv") == {"joy": ([1, 2], [0.5, 0.125]), "awe": ([1], [0.25])}


def test_a_history_may_say_which_epochs_were_selected(tmp_path):
    history = [(1, 0, 0.5, 0.1), (1, 1, 0.25, 0.3), (2, 0, 0.125, 0.2)]
    write_history(tmp_path / "history.csv", history, LABELS, [2, 1])
    assert (tmp_path / "history.csv").read_text().splitlines() == [
        "epoch,label,train_loss,devel_spearman,selected",
        "1,joy,0.5,0.100000,0",
        "1,awe,0.25,0.300000,1",
        "2,joy,0.125,0.200000,1",
    ]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_report_says_how_weights_were_selected(selection, capsys):
    scores, shares = {MEAN: Score(0.5), "joy": Score(0.5)}, np.array([[0.1], [0.2]])
    ceiling = NoiseCeiling({MEAN: 0.75, "joy": 0.75}, clips=400)
    report(scores, shares, [7], ceiling, Accelerator(cpu=True), selection)
    printed = capsys.readouterr().out
    assert f"Spearman's rho on devel ({SELECTIONS[selection].note})" in printed
    assert "   ceiling 0.750   epoch 7\n" in printed
    assert f"\n{ceiling.text}\n" in printed


def test_training_losses_end_where_the_training_ended(tmp_path):
    assert read_history(tmp_path / "training_history.csv") == {}
    (tmp_path / "training_history.csv").write_text(
        "epoch,label,train_loss,devel_spearman\n1,joy,0.5,0.1\n1,awe,0.25,\n2,joy,0.125,0.2\n2,awe,,\n"
    )
    assert read_history(tmp_path / "training_history.csv") == {"joy": ([1, 2], [0.5, 0.125]), "awe": ([1], [0.25])}
