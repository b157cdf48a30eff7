import math

import pytest
from conftest import read_csv
from fabricated_grid import plan_cell, write_scores

from emoshare.evaluation.scores import MEAN
from emoshare.reproduction.results import read_run, systems_of, write_results

LABELS = ["joy", "mean"]  # a label may have the name of the mean


def runs_of(folder, *rhos):
    cells = [plan_cell(folder, "mel", seed=seed) for seed in range(len(rhos))]
    return [read_run(write_scores(cell, LABELS, rho), LABELS) for cell, rho in zip(cells, rhos, strict=True)]


def test_a_system_is_the_mean_of_its_seeds(tmp_path):
    (system,) = systems_of(runs_of(tmp_path, [0.2, 0.1], [0.4, 0.1], [0.3, None]))
    assert system.rho("joy") == pytest.approx(0.3)
    assert system.spread("joy") == pytest.approx(0.1)
    assert system.rho("mean") == pytest.approx(0.1)  # of the two seeds that have one
    assert system.rho(MEAN) == pytest.approx((0.15 + 0.25 + 0.3) / 3)


def test_one_seed_has_no_spread_and_a_label_may_have_no_rho(tmp_path):
    (system,) = systems_of(runs_of(tmp_path, [0.2, None]))
    assert math.isnan(system.spread("joy"))
    assert math.isnan(system.rho("mean"))
    assert system.rho(MEAN) == 0.2


def test_features_architecture_and_layer_make_a_system(tmp_path):
    cells = [
        plan_cell(tmp_path, "HuBERT", layer=layer, architecture=architecture, backbone="facebook/hubert-base-ls960")
        for layer in ("-1", "3", "weighted")
        for architecture in ("cnn_lstm", "cnn_lstm_attention")
    ]
    systems = systems_of(read_run(write_scores(cell, LABELS, [0.1, 0.2]), LABELS) for cell in cells)
    assert [system.row for system in systems[::2]] == ["HuBERT", "HuBERT, layer 3", "HuBERT, weighted layers"]
    assert [system.architecture for system in systems[:2]] == ["cnn_lstm", "cnn_lstm_attention"]
    # The paper took the last hidden state, and nothing else.
    assert [system.paper_row for system in systems[::2]] == ["HuBERT (Base)", None, None]


def test_results_have_a_row_for_each_label_and_the_mean(tmp_path):
    write_results(tmp_path / "results.csv", runs_of(tmp_path, [0.25, None]))
    assert read_csv(tmp_path / "results.csv") == [
        ["features", "architecture", "layer", "seed", "label", "rho", "low", "high"],
        ["mel", "cnn_lstm", "-1", "0", "mean", "0.250000", "", ""],
        ["mel", "cnn_lstm", "-1", "0", "joy", "0.250000", "", ""],
        ["mel", "cnn_lstm", "-1", "0", "mean", "", "", ""],
    ]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a JSON file"), ('{"eval_spearman": 0.5}', "has no 'eval_spearman_joy'")]
)
def test_results_that_cannot_be_read_are_named(text, message, tmp_path):
    cell = plan_cell(tmp_path, "mel")
    cell.folder.mkdir()
    (cell.folder / "eval_results.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_run(cell, LABELS)
    assert str(error.value).startswith(f"{cell.folder}/eval_results.json: ")
