"""What runs are scored on: for folds, the predictions of all folds together."""

import numpy as np
import pytest
from conftest import read_csv
from fabricated_grid import cells_of_folds, fabricated_corpus, finish_cell, plan_cell
from scipy.stats import spearmanr

from emoshare.evaluation.scores import MEAN
from emoshare.reproduction.grid import Grid
from emoshare.reproduction.results import systems_of, write_results
from emoshare.reproduction.scored import scored_on
from emoshare.reproduction.significance import mean_scores
from emoshare.training.corpus import corpus_of_run

LABELS = ["joy", "awe"]


@pytest.fixture
def corpus():
    return fabricated_corpus(LABELS, speakers=7)


def scored(cells, corpus):
    first = corpus_of_run(corpus, cells[0].arguments.data)
    return scored_on(Grid("A grid", cells[0].folder.parent, cells, {}), first)


def shares_in(path):
    return {filename: [float(share) for share in shares] for filename, *shares in read_csv(path)[1:]}


def test_the_predictions_of_all_test_folds_are_scored_together(corpus, tmp_path):
    cells = cells_of_folds(tmp_path, corpus, "leave_one_out", "mel", bootstrap=50)
    (run,) = scored(cells, corpus).runs(cells)
    predicted = {}
    for cell in cells:
        predicted |= shares_in(cell.folder / "predictions_test.csv")
    assert len(predicted) == 100  # all of train and devel; the shares of test are not known
    true = {name: row for split in ("train", "devel") for name, row in named_shares(corpus, split)}
    pairs = np.array([[true[name], predicted[name]] for name in predicted])
    rhos = [spearmanr(pairs[:, 0, label], pairs[:, 1, label]).statistic for label in range(2)]
    assert [run.scores[label].rho for label in LABELS] == pytest.approx(rhos, abs=1e-12)
    assert run.scores[MEAN].rho == pytest.approx(np.mean(rhos), abs=1e-12)
    for score in run.scores.values():
        assert score.low < score.rho < score.high


def named_shares(corpus, split):
    return zip(corpus.splits[split]["filename"], corpus.shares(split).tolist(), strict=True)


def test_each_fold_has_its_own_score_too(corpus, tmp_path):
    cells = cells_of_folds(tmp_path, corpus, 3, "mel", bootstrap=50)
    (run,) = scored(cells, corpus).runs(cells)
    for cell, scores in zip(cells, run.of_folds, strict=True):
        fold = corpus_of_run(corpus, cell.arguments.data)
        predicted = np.array(list(shares_in(cell.folder / "predictions_test.csv").values()))
        for index, label in enumerate(LABELS):
            expected = spearmanr(fold.shares("test")[:, index], predicted[:, index]).statistic
            assert scores[label].rho == pytest.approx(expected, abs=1e-12)
    (system,) = systems_of([run, run])
    assert system.rhos_of_folds() == pytest.approx([scores[MEAN].rho for scores in run.of_folds])


def test_a_run_is_scored_when_all_of_its_folds_are_done(corpus, tmp_path):
    cells = [cell for seed in (0, 1) for cell in cells_of_folds(tmp_path, corpus, 3, "mel", seed=seed, bootstrap=0)]
    cells[4].results.unlink()
    assert [run.cell.seed for run in scored(cells, corpus).runs(cells)] == [0]


def test_predictions_of_other_folds_are_refused(corpus, tmp_path):
    cells = cells_of_folds(tmp_path, corpus, 3, "mel")
    path = cells[0].folder / "predictions_test.csv"
    path.write_text((cells[1].folder / "predictions_test.csv").read_text())
    with pytest.raises(ValueError, match=f"^{path}: (?s:.*) is not a clip of this split"):
        scored(cells, corpus).runs(cells)


def test_results_have_rows_for_each_fold(corpus, tmp_path):
    cells = cells_of_folds(tmp_path, corpus, 3, "mel", bootstrap=50)
    (run,) = scored(cells, corpus).runs(cells)
    write_results(tmp_path / "results.csv", [run])
    header, *rows = read_csv(tmp_path / "results.csv")
    assert header == ["features", "architecture", "layer", "seed", "fold", "label", "rho", "low", "high"]
    assert [row[4:6] for row in rows] == [[fold, label] for fold in ("all", *"012") for label in ("mean", *LABELS)]
    assert rows[0][6:] == [f"{number:.6f}" for number in vars(run.scores[MEAN]).values()]
    assert rows[3][6:] == [f"{run.of_folds[0][MEAN].rho:.6f}", "", ""]


def test_folds_say_what_they_are(corpus, tmp_path):
    cells = cells_of_folds(tmp_path, corpus, 3, "mel")
    folds = scored(cells, corpus)
    assert folds.sizes == "100 in 3 folds by speaker, 29 to 41 each"
    assert folds.units == "7 groups by speaker"
    assert sorted(speaker for speakers in folds.of_groups for speaker in speakers) == [f"s{n}" for n in range(7)]
    cells = cells_of_folds(tmp_path / "clips", corpus, 4, "mel", group_by=None)
    folds = scored(cells, corpus)
    assert (folds.sizes, folds.units, folds.groups) == ("100 in 4 folds, 25 each", "100 clips", None)


def test_what_is_resampled_is_what_the_runs_resampled(corpus, tmp_path):
    """With folds or without, by the same fact, another one or none."""
    cell = finish_cell(plan_cell(tmp_path, "mel", resample="speaker"), corpus)
    on_devel = scored([cell], corpus)
    assert (on_devel.groups, on_devel.units) == (corpus.metadata["devel"]["speaker"], "7 groups by speaker")
    cells = cells_of_folds(tmp_path / "folds", corpus, 4, "mel", group_by=None, bootstrap=50, resample="speaker")
    folds = scored(cells, corpus)
    assert (folds.units, folds.title, folds.of_groups) == ("7 groups by speaker", "4 folds", None)
    (run,) = folds.runs(cells)
    speakers = [speaker for facts in fold_corpora(corpus, cells) for speaker in facts["speaker"]]
    assert folds.groups.tolist() == speakers
    expected = mean_scores(folds.predictions(run)[None], folds.references, LABELS, speakers, 50)[MEAN]
    assert run.scores[MEAN] == expected
    with pytest.raises(ValueError, match="--resample: got 'nobody'; the corpus has speaker"):
        scored([plan_cell(tmp_path, "mfcc", resample="nobody")], corpus)


def fold_corpora(corpus, cells):
    return [corpus_of_run(corpus, cell.arguments.data).metadata["test"] for cell in cells]


def test_without_folds_devel_is_scored(corpus, tmp_path):
    cell = finish_cell(plan_cell(tmp_path, "mel"), corpus)
    on_devel = scored([cell], corpus)
    assert (on_devel.sizes, on_devel.units) == ("60 train, 40 devel, 10 test", "40 devel clips")
    (run,) = on_devel.runs([cell])
    assert run.of_folds == ()
    assert on_devel.predictions(run).shape == (40, 2)
