import json
import re

import pytest
import yaml
from accelerate import Accelerator
from conftest import ROOT, SMALL_HEAD, write_corpus
from datasets import Dataset, DatasetDict

from emoshare.dataset_script import Corpus, load_corpus
from emoshare.reproduction.grid import claim_folder, make_random_backbones, read_grid, with_folds
from emoshare.reproduction.plan import describe

HUBERT = {
    "model_type": "hubert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


def write_grid(tmp_path, **changes):
    grid = {
        "title": "A grid",
        "output_dir": str(tmp_path / "grid"),
        "train": {"dataset": "synthetic", "conv_channels": [16, 8], "ffn_sizes": [8], "lstm_hidden_size": 8},
        "features": {"HuBERT (Small)": {"random_backbone": HUBERT}, "MFCC": {"acoustic_features": "mfcc"}},
        "architectures": {"cnn_lstm": {}, "transformer": {"learning_rate": 1e-3}},
        "seeds": [0, 3],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return path


def test_a_cell_for_each_row_architecture_and_seed(tmp_path):
    grid = read_grid(write_grid(tmp_path))
    assert [(cell.feature_set, cell.architecture, cell.seed, cell.layer) for cell in grid.cells] == [
        (row, architecture, seed, -1)
        for row in ("HuBERT (Small)", "MFCC")
        for architecture in ("cnn_lstm", "transformer")
        for seed in (0, 3)
    ]
    assert len({cell.folder for cell in grid.cells}) == 8
    assert len({cell.arguments.feature_cache_dir for cell in grid.cells}) == 1
    last = grid.cells[-1].arguments
    assert (last.model.acoustic_features, last.run.learning_rate, last.run.seed) == ("mfcc", 1e-3, 3)
    assert grid.cells[0].arguments.run.learning_rate == 1e-4


def test_a_sweep_adds_each_layer_of_each_backbone(tmp_path):
    cells = read_grid(write_grid(tmp_path), sweep_layers=True).cells
    swept = [(cell.feature_set, cell.architecture, cell.seed, cell.layer) for cell in cells if cell.layer != -1]
    assert swept == [("HuBERT (Small)", "cnn_lstm", 0, layer) for layer in range(3)]
    assert len(cells) == 8 + 3


def test_an_architecture_may_read_a_layer_of_its_own(tmp_path):
    layers = {"cnn_lstm": {"backbone_layer": "weighted"}, "statistics": {"backbone_layer": 1}, "transformer": {}}
    features = {"HuBERT (Small)": {"random_backbone": HUBERT, "backbone_layer": 0}}
    cells = read_grid(write_grid(tmp_path, architectures=layers, features=features, seeds=[0])).cells
    assert [(cell.architecture, cell.layer) for cell in cells] == [
        ("cnn_lstm", "weighted"),
        ("statistics", 1),
        ("transformer", 0),
    ]


def test_random_backbones_are_made_once_and_the_same_everywhere(tmp_path):
    grid = read_grid(write_grid(tmp_path))
    make_random_backbones(grid)
    (folder,) = grid.random_backbones
    weights = (folder / "model.safetensors").read_bytes()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    make_random_backbones(grid)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    elsewhere = read_grid(write_grid(tmp_path), output_dir=tmp_path / "elsewhere")
    make_random_backbones(elsewhere)
    (other,) = elsewhere.random_backbones
    assert other != folder
    assert (other / "model.safetensors").read_bytes() == weights


def corpus_of(speakers):
    columns = {"filename": list(map(str, range(len(speakers)))), "joy": [0.5] * len(speakers), "speaker": speakers}
    return Corpus("csv", DatasetDict(train=Dataset.from_dict(columns)), ["joy"], ["speaker"])


@pytest.mark.parametrize(("folds", "number"), [(3, 3), ("leave_one_out", 4)])
def test_a_cell_for_each_fold(folds, number, tmp_path):
    grid = read_grid(write_grid(tmp_path, folds=folds, group_by="speaker"))
    cells = with_folds(grid, corpus_of(["adam", "eve", "ida", "bob"])).cells
    assert len(grid.cells) == 8
    assert [(cell.feature_set, cell.architecture, cell.seed, cell.fold) for cell in cells] == [
        (cell.feature_set, cell.architecture, cell.seed, fold) for cell in grid.cells for fold in range(number)
    ]
    assert len({cell.folder for cell in cells}) == 8 * number
    assert cells[number - 1].folder.name == f"{grid.cells[0].folder.name}-fold{number - 1}"
    data = cells[-1].arguments.data
    assert (data.folds, data.group_by) == (str(folds), "speaker")
    assert len({cell.arguments.feature_cache_dir for cell in cells}) == 1


def test_without_folds_there_are_the_same_cells(tmp_path):
    grid = read_grid(write_grid(tmp_path))
    assert with_folds(grid, corpus_of(["adam"])) is grid
    assert grid.cells[0].fold is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"folds": 2}, "line 28: .*--folds: got '2'; expected a number from 3"),
        ({"folds": "each"}, "line 28: .*--folds: got 'each'"),
        ({"folds": [1, 2]}, r"line 28: .*folds is \[1, 2\]; expected a single value"),
        ({"folds": "leave_one_out"}, "line 28: .*leave_one_out needs --group_by"),
        ({"group_by": "speaker"}, "line 28: .*--group_by is for --folds"),
        ({"fold": 1}, "line 28: unknown key 'fold'; expected title, .*, folds, group_by"),
    ],
)
def test_wrong_folds_name_the_line(entries, message, tmp_path):
    with pytest.raises(ValueError, match=rf"grid\.yaml, {message}"):
        read_grid(write_grid(tmp_path, **entries))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("title: A grid", "titel: A grid", 1, "unknown key 'titel'"),
        ("  dataset: synthetic", "  datset: synthetic", 4, "unknown key 'datset'; did you mean 'dataset'"),
        ("lstm_hidden_size: 8", "lstm_hidden_size: wide", 10, "lstm_hidden_size.*invalid int value: 'wide'"),
        ("  transformer:", "  gru:", 23, "unknown architecture 'gru'; expected cnn_lstm, "),
        ("    learning_rate: 0.001", "    seed: 5", 24, "seed is set by the grid"),
        (
            "    learning_rate: 0.001",
            "    resample: sex",
            24,
            "resample must be the same for all cells; expected it un",
        ),
        ("acoustic_features: mfcc", "data_dir: elsewhere", 20, "data_dir must be the same for all cells"),
        ("acoustic_features: mfcc", "dataset: emodb", 20, "dataset must be the same for all cells"),
        ("  - 8\n  ffn", "  - 9\n  ffn", 5, "the last must be a multiple of 8"),
        ("acoustic_features: mfcc", "acoustic_features: plp", 20, "acoustic_features.*invalid choice: 'plp'"),
        ("acoustic_features: mfcc", "backbone: nobody/nothing", 19, "the backbone nobody/nothing cannot be fetched"),
        ("model_type: hubert", "model_type: hubbert", 13, "random_backbone: .*hubbert"),
        ("- 0\n- 3", "- zero", 25, "seeds is .'zero'.; expected a list of numbers"),
    ],
)
def test_errors_in_a_grid_name_the_line(old, new, line, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write_grid(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"grid\.yaml, line {line}: (?s:.*){message}"):
        read_grid(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A grid", "title: [A grid]", "line 1: title is .'A grid'.; expected text"),
        ("title: A grid", "null: A grid", "unknown key None"),
        ("  transformer:", "  5:", "architectures has the name 5; expected text, in quotes"),
        (
            "model_type: hubert",
            "model_type: hubert\n      apply_spec_augment: often",
            "line 13: random_backbone: .*apply_spec_augment",
        ),
        ("title: A grid", "title: \udcff", "not valid YAML"),
    ],
)
def test_what_is_no_text_or_number_is_named(old, new, message, tmp_path):
    path = write_grid(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"grid\.yaml(?s:.*){message}"):
        read_grid(path)


def test_a_killed_process_leaves_nothing_of_a_random_backbone_for_ever(tmp_path):
    grid = read_grid(write_grid(tmp_path), output_dir=tmp_path / "out")
    (folder,) = grid.random_backbones
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    (unfinished / "backbone").mkdir(parents=True)
    (unfinished / "backbone" / "config.json").write_text("{")
    make_random_backbones(grid)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").is_file()


def test_a_part_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="seeds missing or empty"):
        read_grid(write_grid(tmp_path, seeds=[]))


def test_a_folder_belongs_to_one_cell(tmp_path):
    cell = read_grid(write_grid(tmp_path)).cells[0]
    claim_folder(cell)
    claim_folder(cell)
    assert json.loads((cell.folder / "cell.json").read_text())["conv_channels"] == [16, 8]
    (changed, *_) = read_grid(write_grid(tmp_path, train={"dataset": "synthetic", "conv_channels": [8]})).cells
    with pytest.raises(ValueError, match=r"conv_channels was \[16, 8\], now \[8\]"):
        claim_folder(changed)


def test_a_folder_of_an_earlier_version_is_accepted(tmp_path):
    """Its notes have only the flags given in the YAML file, as written there."""
    path = write_grid(tmp_path, train={"dataset": "synthetic", "conv_channels": [16, 8], "learning_rate": "1e-3"})
    cell = read_grid(path).cells[0]
    cell.folder.mkdir(parents=True)
    note = {"dataset": "synthetic", "conv_channels": [16, 8], "learning_rate": "1e-3", "push_backbone": False}
    note |= {"backbone": cell.arguments.model.backbone, "architecture": "cnn_lstm", "seed": 0, "backbone_layer": "-1"}
    (cell.folder / "cell.json").write_text(json.dumps(note))
    claim_folder(cell)
    (cell.folder / "cell.json").write_text(json.dumps({**note, "learning_rate": "1e-4"}))
    with pytest.raises(ValueError, match=r"other settings: learning_rate was 0\.0001, now 0\.001; take"):
        claim_folder(cell)


# Settings of the ablation that decide nothing in the recipe, which takes the last epoch: a cell needs no intervals.
OF_ABLATION = ("early_stopping_patience", "bootstrap")


@pytest.mark.parametrize(("name", "rows"), [("emodb_folds", 2), ("emodb_ablation", 13)])
def test_grids_of_folds_are_valid_and_have_the_recipes_settings(name, rows, tmp_path):
    grid = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    recipe = yaml.safe_load((ROOT / "configs" / "small_corpus.yaml").read_text())
    own = ("dataset", *OF_ABLATION)
    assert {key: value for key, value in grid["train"].items() if key not in own}.items() <= recipe.items()
    grid["train"]["dataset"] = "csv"
    cells = with_folds(read_grid(write_grid(tmp_path, **grid), data_dir="DIR"), corpus_of(list("abcdefghij"))).cells
    assert len(cells) == rows * 3 * 10


def test_the_papers_grid_is_valid(tmp_path, monkeypatch, backbone_folder):
    """Its backbones are on the Hub: here, a folder stands for each."""
    grid = yaml.safe_load((ROOT / "configs" / "paper_grid.yaml").read_text())
    for flags in grid["features"].values():
        if flags["backbone"] != "acoustic":
            flags["backbone"] = str(backbone_folder)
    path = write_grid(tmp_path, **grid)
    cells = read_grid(path, data_dir="DIR").cells
    assert len(cells) == 6 * 3 * 3
    assert {cell.arguments.data.data_dir for cell in cells} == {"DIR"}


def test_cells_that_tune_a_backbone_are_counted_by_what_they_read(tmp_path):
    """Tuned upper layers read the features below them, a tuned backbone none; the cost of tuning is not measured."""
    write_corpus(tmp_path / "corpus", {"train": 4, "devel": 4})
    train = {"dataset": "csv", "data_dir": str(tmp_path / "corpus"), **SMALL_HEAD}
    tuned = {"cnn_lstm": {"finetune_last_layers": 1}, "statistics": {"finetune": "all"}, "transformer": {}}
    features = {"HuBERT": {"random_backbone": HUBERT}}
    grid = read_grid(write_grid(tmp_path, train=train, architectures=tuned, features=features, seeds=[0]))
    make_random_backbones(grid)
    corpus = load_corpus("csv", tmp_path / "corpus", tmp_path / "cache")
    lines = describe(grid, corpus, Accelerator(cpu=True)).splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("HuBERT: ")] == [
        "HuBERT: features of 1 layers",
        "HuBERT: features of 0 layers",
        "HuBERT: features of 1 layers",
    ]
    is_marked = {line.split()[0]: "plus tuning the backbone" in line for line in lines[1:] if "layer-1" in line}
    assert is_marked == {
        "hubert-cnn_lstm-layer-1-seed0": True,
        "hubert-statistics-layer-1-seed0": True,
        "hubert-transformer-layer-1-seed0": False,
    }
    assert "at most, plus tuning the backbone" in lines[-1]


def test_a_cell_with_a_checkpoint_is_interrupted_and_one_with_a_folder_alone_is_to_do(tmp_path):
    write_corpus(tmp_path / "corpus", {"train": 4, "devel": 4})
    train = {"dataset": "csv", "data_dir": str(tmp_path / "corpus"), **SMALL_HEAD}
    grid = read_grid(write_grid(tmp_path, train=train, features={"MFCC": {"acoustic_features": "mfcc"}}))
    for cell in grid.cells:  # as a grid does before it trains the first one
        claim_folder(cell)
    (grid.cells[1].folder / "checkpoint-epoch-3").mkdir()
    corpus = load_corpus("csv", tmp_path / "corpus", tmp_path / "cache")
    lines = describe(grid, corpus, Accelerator(cpu=True)).splitlines()
    states = [re.search("interrupted|to do|done", line)[0] for line in lines if "-layer-1-seed" in line]
    assert states == ["to do", "interrupted", "to do", "to do"]
