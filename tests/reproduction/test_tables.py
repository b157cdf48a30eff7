import pytest
from fabricated_grid import plan_cell, write_scores

from emoshare import EMOTIONS
from emoshare.evaluation.paper import PAPER
from emoshare.reproduction.results import read_run, systems_of
from emoshare.reproduction.tables import (
    average,
    average_of_better,
    claims_table,
    percentage_change,
    table_1,
    table_2,
)

BACKBONES = {row: backbone for backbone, row in PAPER["rows"].items()}


def systems(folder, labels, *cells):
    """The results of cells, each given as features, architecture, rhos and flags."""
    made = []
    for number, (features, architecture, rhos, flags) in enumerate(cells):
        cell = plan_cell(folder / str(number), features, architecture, **flags)
        made.append(read_run(write_scores(cell, labels, rhos), labels))
    return systems_of(made)


def the_papers_grid(folder):
    cells = []
    for row, of_architecture in PAPER["table_1"].items():
        name = BACKBONES[row]
        flags = {"backbone": "acoustic", "acoustic_features": name} if name == "mfcc" else {"backbone": name}
        cells += [(row, architecture, rhos, flags) for architecture, rhos in of_architecture.items()]
    return systems(folder, EMOTIONS, *cells)


def cells_of(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def row(table, *first):
    (found,) = [cells for cells in cells_of(table) if cells[: len(first)] == list(first)]
    return found


@pytest.mark.parametrize("name", ["HuBERT (Base)", "HuBERT (Large)", "MFCC Features"])
def test_table_2_follows_from_the_papers_table_1(name):
    published = PAPER["table_2"]
    value = average_of_better(PAPER["table_1"][name])
    assert value == published["average"][name]
    assert average(PAPER["baseline"]) == published["baseline_average"]
    change = percentage_change(value, average(PAPER["baseline"]))
    assert change == pytest.approx(published["change"][name], abs=0.05)


@pytest.mark.parametrize(
    ("name", "printed", "follows"), [("wav2vec2.0 (Base)", 0.425, 0.426), ("wav2vec2.0 (Large)", 0.274, 0.281)]
)
def test_two_averages_of_the_papers_table_2_do_not_follow(name, printed, follows):
    assert PAPER["table_2"]["average"][name] == printed
    assert average_of_better(PAPER["table_1"][name]) == follows
    # The printed changes are those of the printed averages.
    assert percentage_change(printed, 0.5) == pytest.approx(PAPER["table_2"]["change"][name], abs=0.05)


def test_a_grid_with_the_papers_values_is_the_paper(tmp_path):
    grid = the_papers_grid(tmp_path)
    table = table_2(grid, EMOTIONS, with_paper=True)
    large = row(table, "HuBERT (Large)")
    assert large == [
        "HuBERT (Large)", "0.523", "+4.6 %", "0.523", "+4.6 %", "0.517", "+3.4 %", "0.522", "+4.4 %"
    ]  # fmt: skip
    assert row(table, "wav2vec2.0 (Large)")[:5] == ["wav2vec2.0 (Large)", "0.281", "-43.8 %", "0.274", "-45.2 %"]
    best = row(table_1(grid, EMOTIONS, with_paper=True), "HuBERT (Large)", "Architecture 2", "here")
    # As in the paper, but for Excitement, Interest and Tiredness, which are Architecture 1's.
    bold = [name for name, cell in zip([*EMOTIONS, "mean"], best[3:], strict=True) if cell.startswith("**")]
    assert bold == ["Anger", "Boredom", "Calmness", "Concentration", "Determination", "Sadness", "mean"]
    claims = claims_table(grid, EMOTIONS, "ComParE", has_baseline=True)
    for claim, _, papers, grids in cells_of(claims)[2:]:
        assert papers == grids, claim
    gains = [row(claims, f"Architecture 2 over 1, {name}")[2] for name in ("wav2vec 2.0 Base", "HuBERT Base")]
    assert gains == ["+2.0 %", "+1.6 %"]
    assert row(claims, "Architecture 2 over 1, HuBERT Large")[1:3] == ["1 to 1.8 %", "+0.9 %"]
    assert row(claims, "wav2vec 2.0 Base over Large")[1:3] == ["55 %", "+51.6 %"]
    assert row(claims, "HuBERT Large over the challenge's baseline")[1:3] == ["4.6 %", "+4.6 %"]


def test_the_papers_values_and_differences_stand_below(tmp_path):
    rhos = [0.5] * 9
    grid = systems(tmp_path, EMOTIONS, ("mine", "cnn_lstm", rhos, {"backbone": "facebook/hubert-base-ls960"}))
    here, paper, difference = cells_of(table_1(grid, EMOTIONS, with_paper=True))[2:]
    assert here[:4] == ["mine", "Architecture 1", "here", "**0.500**"]
    assert paper[2:5] == ["paper", "0.418", "0.545"]
    assert difference[2:5] == ["difference", "+0.082", "-0.045"]
    assert (paper[-1], difference[-1]) == ("0.494", "+0.006")


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("transformer", {"backbone": "facebook/hubert-base-ls960"}),
        ("cnn_lstm", {"backbone": "facebook/hubert-base-ls960", "layer": "6"}),
        ("cnn_lstm", {"backbone": "microsoft/wavlm-large"}),
        ("cnn_lstm", {"backbone": "facebook/hubert-base-ls960", "finetune_last_layers": 2}),
        ("cnn_lstm", {"backbone": "acoustic", "acoustic_features": "mel"}),
    ],
)
def test_what_the_paper_has_not_run_has_nothing_below(architecture, flags, tmp_path):
    grid = systems(tmp_path, EMOTIONS, ("mine", architecture, [0.5] * 9, flags))
    assert len(cells_of(table_1(grid, EMOTIONS, with_paper=True))) == 3


def test_claims_are_about_one_row_with_a_frozen_backbone(tmp_path):
    cells = []
    for architecture, rhos in PAPER["table_1"]["HuBERT (Base)"].items():
        for row_here, tuned in {
            "frozen": {},
            "tuned": {"finetune_last_layers": 2},
            "dropout": {"dropout": 0.5},
        }.items():
            others = [rho / 2 for rho in rhos] if tuned else rhos
            cells.append((row_here, architecture, others, {"backbone": "facebook/hubert-base-ls960", **tuned}))
    claim = "Architecture 2 over 1, HuBERT Base"
    with_tuned = systems(tmp_path / "tuned", EMOTIONS, *(cell for cell in cells if cell[0] != "dropout"))
    assert row(claims_table(with_tuned, EMOTIONS, "ComParE", True), claim)[2:] == ["+1.6 %", "+1.6 %"]
    assert row(table_2(with_tuned, EMOTIONS, True), "tuned")[3:5] == ["–", "–"]
    several = systems(tmp_path / "several", EMOTIONS, *cells)
    assert row(claims_table(several, EMOTIONS, "ComParE", True), claim)[2:] == ["+1.6 %", "several rows"]


def test_labels_without_rho_and_means_over_seeds(tmp_path):
    labels = ["joy|awe", "envy"]
    grid = systems(
        tmp_path,
        labels,
        ("mel", "cnn_lstm", [0.2, None], {"seed": 0}),
        ("mel", "cnn_lstm", [0.3, None], {"seed": 1}),
        ("mel", "transformer", [0.25, None], {"seed": 0}),
    )
    table = table_1(grid, labels, with_paper=False)
    assert table.splitlines()[0] == r"| features | architecture | joy\|awe | envy | mean |"
    assert row(table, "mel", "Architecture 1")[2:] == ["**0.250** ± 0.071", "–", "**0.250** ± 0.071"]
    assert row(table, "mel", "Transformer (ours)")[2:] == ["**0.250**", "–", "**0.250**"]
    # Without Architecture 2 there is no better of the two; the transformer is not among them.
    assert row(table_2(grid, labels, with_paper=False), "mel") == ["mel", "–", "0.250", "0.250"]


def test_the_better_architecture_is_taken_for_each_emotion(tmp_path):
    grid = systems(
        tmp_path,
        ["joy", "awe"],
        ("mel", "cnn_lstm", [0.5, 0.1], {}),
        ("mel", "cnn_lstm_attention", [0.1, 0.3], {}),
        ("mel", "transformer", [0.9, 0.9], {}),
    )
    table = table_2(grid, ["joy", "awe"], with_paper=False)
    assert row(table, "mel") == ["mel", "0.400", "0.300", "0.200", "0.900"]


def test_a_percentage_of_nothing_is_none(tmp_path):
    grid = systems(
        tmp_path,
        EMOTIONS,
        ("mfcc", "cnn_lstm", [-0.1] * 9, {"acoustic_features": "mfcc"}),
        ("mfcc", "cnn_lstm_attention", [0.1] * 9, {"acoustic_features": "mfcc"}),
    )
    claims = claims_table(grid, EMOTIONS, "mine", has_baseline=False)
    assert row(claims, "Architecture 2 over 1, acoustic features")[3] == "–"
    assert row(claims, "HuBERT Large over the challenge's baseline")[3] == "no baseline"
    assert row(claims, "Architecture 2 over 1, HuBERT Base")[3] == "not run"
