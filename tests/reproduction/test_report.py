import re

import numpy as np
import pytest
from conftest import read_csv
from fabricated_grid import cells_of_folds, fabricated_corpus, finish_cell, plan_cell
from PIL import Image
from scipy.stats import spearmanr

from emoshare import EMOTIONS
from emoshare.evaluation import figures as shares_figure
from emoshare.evaluation.predictions import read_predictions
from emoshare.evaluation.selections import SELECTIONS
from emoshare.reproduction import figures, report
from emoshare.reproduction.grid import Grid
from emoshare.reproduction.report import write_report
from emoshare.training.corpus import corpus_of_run

LABELS = ["joy", "awe"]
ARCHITECTURES = ("cnn_lstm", "cnn_lstm_attention")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(report, "RESAMPLES", 50)


def cells_of(folder, corpus, features="mel", seeds=(0,), noises=(0.3, 0.1), **flags):
    return [
        finish_cell(plan_cell(folder, features, architecture, seed, **flags), corpus, noise)
        for architecture, noise in zip(ARCHITECTURES, noises, strict=True)
        for seed in seeds
    ]


def page_of(folder, cells, corpus, failed=None):
    write_report(Grid("A grid", folder, cells, {}), corpus, failed or {})
    return (folder / "README.md").read_text(encoding="utf-8")


def section(page, heading):
    (found,) = [part for part in page.split("\n## ") if part.startswith(heading)]
    return found


def figures_of(folder):
    return {path.name for path in (folder / "figures").iterdir()}


def both(*names):
    return {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}


def test_a_whole_grid(tmp_path):
    corpus = fabricated_corpus(LABELS)
    cells = cells_of(tmp_path, corpus, seeds=(0, 1, 2))
    cells += cells_of(tmp_path, corpus, "mfcc", noises=(0.2, 0.2), selection="last_epoch")
    page = page_of(tmp_path / "report", cells, corpus)
    assert page.startswith("# A grid\n\n**These are not the paper's results.**")
    assert "Clips: 60 train, 40 devel, 10 test. Finished: 8 of 8 cells." in page
    assert "0.428" not in page  # no value of the paper's Table 1 for another corpus
    assert re.search(r"\| mel \| Architecture 2 \| \*\*0\.\d{3}\*\* ± 0\.\d{3} \|", section(page, "Table 1"))
    assert "ρ with its 95 % interval over 40 devel clips." in section(page, "Table 1")
    for selection in ("best_epoch", "last_epoch"):
        assert SELECTIONS[selection].results in section(page, "Table 1")
    assert "mel, Architecture 2, seed" in section(page, "Figure 2")
    assert "| mel | 3 | +" in section(page, "Architecture 2 against 1")
    assert section(page, "Architecture 2 against 1").count("Architecture 2 is better on these clips") == 1
    assert "Fit to be submitted: 8 of 8." in page
    assert "not done" not in page
    assert "failed" not in page
    assert figures_of(tmp_path / "report") == both("shares", "architectures", "training_loss", "labels")
    assert len(read_csv(tmp_path / "report" / "results.csv")) == 1 + 8 * 3
    for name in figures_of(tmp_path / "report"):
        assert f"(figures/{name})" in page
        if name.endswith(".png"):
            assert np.ptp(np.asarray(Image.open(tmp_path / "report" / "figures" / name).convert("L"))) > 100


@pytest.mark.usefixtures("_no_figures")
def test_one_group_has_no_interval_and_so_no_verdict(tmp_path):
    corpus = fabricated_corpus(LABELS, speakers=1)
    page = page_of(tmp_path / "report", cells_of(tmp_path, corpus, resample="speaker"), corpus)
    assert re.search(r"\| mel \| 1 \| \+0\.\d+ \| – \| one group: no interval \|", section(page, "Architecture 2"))
    assert "nan" not in page


@pytest.fixture
def _no_figures(monkeypatch):
    for module in (figures, shares_figure):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: path.touch())


def rhos_by_language(page):
    """The scores of each system by language."""
    header, _, *rows = re.findall(r"^\| (.*) \|$", section(page, "Languages"), re.MULTILINE)
    languages = [name.split(", ") for name in header.split(" | ")[2:]]
    return languages, [[float(cell.split()[0]) for cell in row.split(" | ")[2:]] for row in rows]


@pytest.mark.usefixtures("_no_figures")
def test_scores_by_language(tmp_path):
    corpus = fabricated_corpus(LABELS, {"train": 20, "devel": 90}, languages=("Zulu", "Twi", None, "Twi"))
    split = corpus.splits["devel"]
    rare = ["Igbo" if number < 3 else value for number, value in enumerate(split["language"])]
    corpus.splits["devel"] = split.remove_columns("language").add_column("language", rare)
    cells = cells_of(tmp_path, corpus, seeds=(0, 1))
    page = page_of(tmp_path / "report", cells, corpus)
    languages, rhos = rhos_by_language(page)
    assert languages == [["Twi", "44 clips"], ["Zulu", "22 clips"]]
    assert "fewer than 10 clips: 24." in section(page, "Languages")
    true, filenames = corpus.shares("devel"), corpus.filenames("devel")
    for number, runs in enumerate([cells[:2], cells[2:]]):
        for (language, _), rho in zip(languages, rhos[number], strict=True):
            own = np.array([value == language for value in rare])
            of_runs = [read_predictions(cell.folder / "predictions_devel.csv", filenames, LABELS) for cell in runs]
            expected = [spearmanr(shares[own, label], true[own, label])[0] for shares in of_runs for label in (0, 1)]
            assert rho == pytest.approx(np.mean(expected), abs=5e-4)


@pytest.mark.usefixtures("_no_figures")
def test_scores_by_language_of_all_folds(tmp_path):
    corpus = fabricated_corpus(LABELS, speakers=6, languages=("Twi", "Zulu"))
    cells = cells_of_folds(tmp_path, corpus, 3, "mel", noise=0.1, bootstrap=0)
    page = page_of(tmp_path / "report", cells, corpus_of_run(corpus, cells[0].arguments.data))
    languages, ((twi, zulu),) = rhos_by_language(page)
    assert languages == [["Twi", "50 clips"], ["Zulu", "50 clips"]]
    assert min(twi, zulu) > 0.5


@pytest.mark.usefixtures("_no_figures")
@pytest.mark.parametrize("languages", [(), ("Twi",), ("Twi", None)])
def test_a_single_language_has_no_section(languages, tmp_path):
    corpus = fabricated_corpus(LABELS, languages=languages)
    assert "## Languages" not in page_of(tmp_path / "report", cells_of(tmp_path, corpus), corpus)


@pytest.mark.slow
def test_the_same_cells_give_the_same_files(tmp_path):
    corpus = fabricated_corpus(LABELS)
    cells = cells_of(tmp_path, corpus)
    for name in ("first", "second"):
        page_of(tmp_path / name, cells, corpus)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")]
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_a_grid_of_folds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_GROUPS", 2)
    save, drawn = figures.save_figure, ("architectures.svg", "folds.svg")
    for module in (figures, shares_figure):  # not all are drawn, as each takes half a second
        monkeypatch.setattr(
            module, "save_figure", lambda figure, path: save(figure, path) if path.name in drawn else path.touch()
        )
    corpus = fabricated_corpus(LABELS, speakers=7)
    cells = [
        cell
        for architecture, noise in zip(ARCHITECTURES, (0.3, 0.1), strict=True)
        for seed in (0, 1)
        for cell in cells_of_folds(tmp_path, corpus, 3, "mel", architecture, seed, noise=noise, bootstrap=20)
    ]
    cells[-1].results.unlink()
    page = page_of(tmp_path / "report", cells, corpus_of_run(corpus, cells[0].arguments.data))
    assert "They are on a corpus of one's own, 3 folds by speaker; the paper's are on" in page
    assert "Clips: 100 in 3 folds by speaker, 29 to 41 each." in page
    assert "Finished: 11 of 12 cells" in page
    assert re.search(r"\| mel \| Architecture 1 \| 0\.\d{3} ± 0\.\d{3} \|", section(page, "Table 1"))
    # The second seed of Architecture 2 lacks a fold.
    assert re.search(r"\| mel \| Architecture 2 \| \*\*0\.\d{3}\*\* \| ", section(page, "Table 1"))
    folds = section(page, "Folds")
    assert "50 resamples of 7 groups by speaker" in folds
    assert "| fold | clips | speaker | mel, Architecture 1 | mel, Architecture 2 |" in folds
    of_folds = re.findall(r"^\| (\d) \| (\d+) \| (.*?) \| (0\.\d{3}) \| (0\.\d{3}) \|$", folds, re.MULTILINE)
    assert [fold for fold, *_ in of_folds] == ["0", "1", "2"]
    assert sum(int(clips) for _, clips, *_ in of_folds) == 100
    assert sorted(len(re.findall("s\\d", speakers)) for _, _, speakers, *_ in of_folds) == [0, 2, 2]
    assert "| 3 of them |" in folds
    rhos = np.array([[float(rho) for rho in rhos] for *_, first, second in of_folds for rhos in [(first, second)]])
    means = re.search(r"\| mean ± deviation \|  \|  \| (0\.\d{3}) ± (0\.\d{3}) \| (0\.\d{3}) ± ", folds)
    assert float(means[1]) == pytest.approx(rhos[:, 0].mean(), abs=0.001)
    assert float(means[2]) == pytest.approx(rhos[:, 0].std(ddof=1), abs=0.001)
    assert float(means[3]) == pytest.approx(rhos[:, 1].mean(), abs=0.001)
    assert re.search(r"\| \*\*pooled\*\*, 95 % interval \|  \|  \| 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) \| 0\.", folds)
    assert "mel, Architecture 2, seed 0, on all test folds" in section(page, "Figure 2")
    assert "50 resamples of 7 groups by speaker" in section(page, "Architecture 2 against 1")
    assert "| mel | 2 and 1 | +0." in section(page, "Architecture 2 against 1")
    assert section(page, "Cells that are not done").strip().endswith("mel, Architecture 2, seed 1, fold 2")
    assert "Test predictions" not in page
    assert "| fold |" not in section(page, "Settings")
    assert "mean Spearman's ρ on the test folds" in (tmp_path / "report" / "figures" / "architectures.svg").read_text()
    of_folds = (tmp_path / "report" / "figures" / "folds.svg").read_text()
    for text in ("mean Spearman's ρ on the test folds", "one fold", "95 % interval"):
        assert f"<!-- {text} -->" in of_folds
    assert figures_of(tmp_path / "report") == both("shares", "architectures", "training_loss", "labels", "folds")


def test_one_cell_of_many_is_enough(tmp_path):
    corpus = fabricated_corpus(LABELS)
    cells = [plan_cell(tmp_path, "mel", architecture) for architecture in ("transformer", *ARCHITECTURES)]
    finish_cell(cells[0], corpus)
    page = page_of(tmp_path / "report", cells, corpus, failed={cells[1].folder.name: "ValueError:\nno memory"})
    assert "Finished: 1 of 3 cells." in page
    assert section(page, "Cells that failed").strip().endswith(f"- `{cells[1].folder.name}`: ValueError: no memory")
    missing = section(page, "Cells that are not done")
    assert missing.strip().endswith("- `mel--1-cnn_lstm_attention-0`: mel, Architecture 2, seed 0")
    assert cells[1].folder.name + "`" not in missing
    assert "Architecture 2 against 1" not in page
    assert "| mel | – | " in section(page, "Table 2")


def test_before_any_cell_is_done(tmp_path):
    corpus = fabricated_corpus(LABELS)
    page = page_of(tmp_path / "report", [plan_cell(tmp_path, "mel")], corpus)
    assert "Finished: 0 of 1 cells." in page
    assert "Table 1" not in page
    assert figures_of(tmp_path / "report") == both("labels")


def test_labels_of_which_nothing_is_known(tmp_path):
    labels = ["joy", "envy"]
    corpus = fabricated_corpus(labels, sizes={"train": 30, "devel": 20}, unknown=["envy"])
    with pytest.warns(UserWarning, match="envy: the references are constant or fewer than two"):
        cells = cells_of(tmp_path, corpus)
    page = page_of(tmp_path / "report", cells, corpus)
    assert re.search(r"\| mel \| Architecture 1 \| 0\.\d{3} \| – \| 0\.\d{3} \|", section(page, "Table 1"))
    assert "| envy | – | – | – | – |" in section(page, "Labels")
    assert "Test predictions" not in page  # there is no test split
    rows = read_csv(tmp_path / "report" / "results.csv")
    assert [row[4:] for row in rows if row[4] == "envy"] == [["envy", "", "", ""]] * 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_grid_without_any_rho(tmp_path):
    corpus = fabricated_corpus(["envy"], unknown=["envy"])
    page = page_of(tmp_path / "report", cells_of(tmp_path, corpus), corpus)
    assert "| mel | Architecture 1 | – | – |" in page
    assert "Figure 2" not in page


@pytest.mark.slow
def test_the_synthetic_corpus_is_called_synthetic(tmp_path):
    corpus = fabricated_corpus(EMOTIONS, name="synthetic")
    page = page_of(tmp_path / "report", cells_of(tmp_path, corpus), corpus)
    assert "**These are not the paper's results.** The corpus is synthetic" in page
    assert "They say nothing about people" in page


@pytest.mark.slow
def test_the_papers_values_are_given_for_its_own_corpus(tmp_path):
    corpus = fabricated_corpus(EMOTIONS, name="compare2023")
    flags = {"features": "HuBERT L", "backbone": "facebook/hubert-large-ll60k"}
    page = page_of(tmp_path / "report", cells_of(tmp_path, corpus, **flags), corpus)
    assert "not the paper's results" not in page
    assert "**The splits are not the challenge's**, which have 31,745 train, 9,925 devel, 10,143 test" in page
    assert "|  |  | paper | 0.467 | 0.575 |" in section(page, "Table 1")
    assert "| 0.523 | +4.6 % |" in section(page, "Table 2")
    assert "| wav2vec 2.0 Base over Large | 55 % | +51.6 % | not run |" in section(page, "What the paper's text says")
    texts = (tmp_path / "report" / "figures" / "architectures.svg").read_text()
    assert "<!-- challenge baseline -->" in texts
    assert "<!-- Architecture 2 in the paper -->" in texts


def test_a_sweep_of_layers(tmp_path):
    corpus = fabricated_corpus(LABELS)
    noises = {"0": 0.5, "2": 0.05, "10": 0.3, "-1": 0.3, "weighted": 0.4}
    cells = [
        finish_cell(plan_cell(tmp_path, "HuBERT", layer=layer, backbone="a/b"), corpus, noise)
        for layer, noise in noises.items()
    ]
    cells += cells_of(tmp_path, corpus)
    page = page_of(tmp_path / "report", cells, corpus)
    assert "| HuBERT | Architecture 1 | 2 | 0." in section(page, "Layers")
    assert "| HuBERT, layer 10 |" in section(page, "Table 1")
    texts = re.findall("<!-- (.*?) -->", (tmp_path / "report" / "figures" / "layers.svg").read_text())
    assert [text for text in texts if text in {"0", "2", "10", "last", "all"}] == ["0", "2", "10", "last", "all"]
    assert "mel" not in texts  # it has one layer
    of_figure_3 = (tmp_path / "report" / "figures" / "architectures.svg").read_text()
    assert "<!-- HuBERT -->" in of_figure_3
    assert "layer 10" not in of_figure_3


def test_test_predictions_that_are_not_fit_are_named(tmp_path):
    corpus = fabricated_corpus(LABELS)
    cells = cells_of(tmp_path, corpus)
    path = cells[1].folder / "predictions_test.csv"
    path.write_text(re.sub(r"test_3.wav,[\d.]+,", "test_3.wav,1.5,", path.read_text()))
    page = section(page_of(tmp_path / "report", cells, corpus), "Test predictions")
    assert "Fit to be submitted: 1 of 2." in page
    assert f"- `{cells[1].folder.name}`: predictions_test.csv: 1 problem(s) row 5: joy is 1.5; expected" in page
    assert str(tmp_path) not in page


def test_settings_say_what_differs_and_hide_folders(tmp_path, backbone_folder):
    corpus = fabricated_corpus(LABELS)
    cells = cells_of(tmp_path, corpus, learning_rate=1e-3, acoustic_features="mel")
    cells += cells_of(tmp_path, corpus, "HuBERT", learning_rate=1e-3, backbone=str(backbone_folder))
    page = page_of(tmp_path / "report", cells, corpus)
    settings = section(page, "Settings")
    assert f"| backbone | acoustic (mel); {backbone_folder.name} (HuBERT) |" in settings
    assert "| architecture | cnn_lstm, cnn_lstm_attention |" in settings
    assert "| learning_rate | 0.001 |" in settings
    assert "output_dir" not in settings
    assert str(tmp_path) not in page


def test_cells_of_another_corpus_are_refused(tmp_path):
    corpus = fabricated_corpus(LABELS)
    cells = cells_of(tmp_path, corpus)
    other = fabricated_corpus(LABELS, sizes={"train": 60, "devel": 39})
    with pytest.raises(
        ValueError, match=r"predictions_devel.csv: 1 problem\(s\)\n  row 41: 'devel_39.wav' is not a clip"
    ):
        page_of(tmp_path / "report", cells, other)
