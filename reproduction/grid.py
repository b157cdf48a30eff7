"""A grid of training runs: its YAML file and its cells."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, set_seed

from ..architectures_emoshare import ARCHITECTURES
from ..backbone_emoshare import config_of_backbone, family_of
from ..configuration_emoshare import EmoShareConfig
from ..dataset_script.folds import divide
from ..dataset_script.whole_files import put_in_place, whole_file, work_folder, writing
from ..evaluation.scores import RESULTS, read_made_from
from ..training.arguments import ACOUSTIC, Arguments, arguments_of, read_yaml

KEYS = ("title", "output_dir", "train", "features", "architectures", "seeds")
FOLD_KEYS = ("folds", "group_by")  # optional
# Flags of train.py that the grid sets itself.
OWN_FLAGS = (
    "architecture",
    "feature_cache_dir",
    "output_dir",
    "part",
    "resume_from_checkpoint",
    "seed",
    "fold",
    *FOLD_KEYS,
)
# Flags that are the same for all cells: the report scores all of them on the clips of one corpus.
FLAGS_OF_ALL = ("dataset", "data_dir", "streaming", "resample")
RANDOM_BACKBONE = "random_backbone"
SWEPT_ARCHITECTURE = "cnn_lstm_attention"  # architecture of the cells of a layer sweep, if the grid has it


@dataclass(frozen=True)
class Cell:
    """
    One training run of a grid.

    Attributes:
        feature_set: name of the features that the heads take, and of their row in the tables.
        arguments: `Arguments` of the run.
    """

    feature_set: str
    arguments: Arguments

    @property
    def architecture(self):
        """As `EmoShareConfig.architecture`."""
        return self.arguments.model.architecture

    @property
    def layer(self):
        """As `EmoShareConfig.backbone_layer`."""
        return self.arguments.model.layer

    @property
    def seed(self):
        return self.arguments.run.seed

    @property
    def fold(self):
        """The number of the fold that is test; `None` for a grid without folds."""
        return self.arguments.data.fold

    @property
    def folder(self):
        return Path(self.arguments.run.output_dir)

    @property
    def is_done(self):
        return self.results.is_file() and not self.has_damaged_results

    @property
    def results(self):
        """Path of its results file."""
        return self.folder / RESULTS

    @property
    def has_damaged_results(self):
        try:
            read_made_from(self.results)
        except FileNotFoundError:
            return False
        except ValueError:
            return True
        return False


@dataclass(frozen=True)
class Grid:
    """
    Attributes:
        title: title of the report.
        output_dir: folder for the cells, features and report.
        cells: `list[Cell]`.
        random_backbones: configs of the backbones to create with random weights, by their folder.
    """

    title: str
    output_dir: Path
    cells: list[Cell]
    random_backbones: dict[Path, dict]


def read_grid(path, data_dir=None, output_dir=None, sweep_layers=False):
    """
    Reads a grid and checks all of its cells, before any of them is trained.

    Args:
        path: YAML file with `title`, `output_dir`, `train` (flags of train.py for all cells), `features` (by the name
            of a row in the tables: flags of train.py, or `random_backbone` with a backbone's config), `architectures`
            (by name: flags of train.py) and `seeds`; optionally the flags `folds` and `group_by`.
        data_dir: folder of the corpus, instead of the one in `train`.
        output_dir: output folder, instead of the one in the file.
        sweep_layers: whether to add a cell for each layer of each backbone.

    Returns:
        `Grid`; if it has folds, only with the cells of the first fold: see `with_folds`.

    Raises:
        ValueError: on an invalid key, value or combination, or a backbone that cannot be fetched; names the line.
    """
    reader = _Reader(Path(path))
    entries = reader.entries
    if data_dir is not None:
        entries["train"]["data_dir"] = str(data_dir)
    folder = Path(output_dir or entries["output_dir"])
    cells, random_backbones = [], {}
    for row, own in entries["features"].items():
        flags = {**entries["train"], **(own or {})}
        if RANDOM_BACKBONE in flags:
            flags["backbone"] = str(folder / "backbones" / _slug(row))
            random_backbones[Path(flags["backbone"])] = flags.pop(RANDOM_BACKBONE)
            backbone_config = reader.random_backbone_config(row)
        else:
            backbone_config = reader.backbone_config(row, flags)
        for architecture, seed, layer in _combinations(entries, flags, backbone_config, sweep_layers):
            name = f"{_slug(row)}-{architecture}-layer{layer}-seed{seed}"
            of_cell = {
                **flags,
                **(entries["architectures"][architecture] or {}),
                "architecture": architecture,
                "seed": seed,
                "output_dir": str(folder / "cells" / name),
                "feature_cache_dir": str(folder / "features"),
                **reader.first_fold,
            }
            if backbone_config is not None:
                of_cell["backbone_layer"] = layer
            cells.append(Cell(row, reader.arguments(row, name, of_cell, backbone_config)))
    return Grid(entries["title"], folder, cells, random_backbones)


def with_folds(grid, corpus):
    """
    Args:
        grid: `Grid` as `read_grid` returns it.
        corpus: `Corpus` with its own splits; the number of folds may depend on its groups.

    Returns:
        `Grid` with each cell once for every fold; the same grid if it has no folds.

    Raises:
        ValueError: if the corpus cannot be divided into such folds.
    """
    data = grid.cells[0].arguments.data
    if data.folds is None:
        return grid
    num_folds = len(divide(corpus, data.num_folds, data.group_by))
    return replace(grid, cells=[_on_fold(cell, fold) for cell in grid.cells for fold in range(num_folds)])


def _on_fold(cell, fold):
    arguments = cell.arguments
    run = replace(arguments.run, output_dir=f"{arguments.run.output_dir}-fold{fold}")
    return replace(cell, arguments=replace(arguments, data=replace(arguments.data, fold=fold), run=run))


def _combinations(entries, flags, backbone_config, sweep_layers):
    """The architecture, seed and layer of each cell of a row."""
    combinations = [
        (architecture, seed, str({**flags, **(own or {})}.get("backbone_layer", -1)))
        for architecture, own in entries["architectures"].items()
        for seed in entries["seeds"]
    ]
    if sweep_layers and backbone_config is not None:
        swept = SWEPT_ARCHITECTURE if SWEPT_ARCHITECTURE in entries["architectures"] else combinations[0][0]
        layers = range(family_of(backbone_config).num_layers(backbone_config) + 1)
        combinations += [(swept, entries["seeds"][0], str(layer)) for layer in layers]
    return list(dict.fromkeys(combinations))


class _Reader:
    """Reads and checks a grid's YAML file. Errors name the line."""

    def __init__(self, path):
        self.path = path
        self.entries = read_yaml(path)
        self.lines = {}
        self._find_lines(yaml.compose(path.read_text(encoding="utf-8")), ())
        self._check_shape()

    def _find_lines(self, node, keys):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self.lines[*keys, key.value] = key.start_mark.line + 1
                self._find_lines(value, (*keys, key.value))

    def error(self, keys, message):
        line = self.lines.get(keys)  # none if the key is not text, such as null or 5
        return ValueError(f"{self.path}{f', line {line}' if line else ''}: {message}")

    def _check_shape(self):
        for key in self.entries:
            if key not in (*KEYS, *FOLD_KEYS):
                raise self.error((key,), f"unknown key {key!r}; expected {', '.join((*KEYS, *FOLD_KEYS))}")
        missing = [key for key in KEYS if not self.entries.get(key)]
        if missing:
            raise ValueError(f"{self.path}: {', '.join(missing)} missing or empty")
        for key in ("train", "features", "architectures"):
            if not isinstance(self.entries[key], dict):
                raise self.error((key,), f"{key} is {self.entries[key]!r}; expected lines of the form 'name: ...'")
        for key in ("title", "output_dir"):
            if not isinstance(self.entries[key], str):
                raise self.error((key,), f"{key} is {self.entries[key]!r}; expected text")
        for keys, flags in self._flags():
            if not isinstance(keys[-1], str):
                raise ValueError(f"{self.path}: {keys[0]} has the name {keys[-1]!r}; expected text, in quotes")
            if not isinstance(flags, dict | None):
                raise self.error(keys, f"{keys[-1]} is {flags!r}; expected flags of train.py and their values")
            for name in flags or {}:
                if name in OWN_FLAGS:
                    raise self.error((*keys, name), f"{name} is set by the grid")
                if name in FLAGS_OF_ALL and keys != ("train",):
                    raise self.error((*keys, name), f"{name} must be the same for all cells; expected it under train")
        for name in self.entries["architectures"]:
            if name not in ARCHITECTURES:
                raise self.error(
                    ("architectures", name), f"unknown architecture {name!r}; expected {', '.join(ARCHITECTURES)}"
                )
        seeds = self.entries["seeds"]
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise self.error(("seeds",), f"seeds is {seeds!r}; expected a list of numbers")
        slugs = [_slug(row) for row in self.entries["features"]]
        if len(set(slugs)) != len(slugs):
            raise self.error(("features",), f"features: two rows would have the same folder: {sorted(slugs)}")

    def _flags(self):
        yield ("train",), self.entries["train"]
        for part in ("features", "architectures"):
            for name, flags in self.entries[part].items():
                yield (part, name), flags

    @property
    def first_fold(self):
        """Flags of train.py for the first fold; empty if the grid has no folds."""
        flags = {key: self.entries[key] for key in FOLD_KEYS if self.entries.get(key) is not None}
        return {**flags, "fold": 0} if flags else {}

    def backbone_config(self, row, flags):
        """The config of a row's backbone, from its folder or the Hub; `None` for acoustic features."""
        backbone = flags.get("backbone", ACOUSTIC)
        if backbone == ACOUSTIC:
            return None
        try:
            return config_of_backbone(backbone, flags.get("backbone_revision"))
        except (OSError, ValueError) as error:
            raise self.error(("features", row), f"the backbone {backbone} cannot be fetched: {error}") from error

    def random_backbone_config(self, row):
        try:
            return AutoConfig.for_model(**self.entries["features"][row][RANDOM_BACKBONE])
        except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise self.error(("features", row, RANDOM_BACKBONE), f"{RANDOM_BACKBONE}: {reason}") from error

    def arguments(self, row, name, flags, backbone_config):
        """
        A cell's `Arguments`. Flags are checked as in train.py, and their combination by the model's config.

        Args:
            row: name of the cell's features.
            name: name of its folder.
            flags: its flags of train.py.
            backbone_config: config of its backbone; `None` for acoustic features.
        """
        try:
            arguments = arguments_of(flags, "train.py")
            model = arguments.model
            EmoShareConfig(backbone_config=backbone_config, **model.backbone_fields, **model.config_fields)
        except ValueError as error:
            scopes = [("features", row), ("architectures", flags["architecture"]), ("train",), ()]
            unknown = re.search("unknown key '(.*?)'", str(error))
            suspects = [unknown[1]] if unknown else [flag for flag in flags if re.search(rf"\b{flag}\b", str(error))]
            lines = [(*scope, flag) for scope in scopes for flag in suspects if (*scope, flag) in self.lines]
            raise self.error(lines[0] if lines else scopes[0], f"{name}: {error}") from error
        return arguments


def make_random_backbones(grid):
    """Creates the grid's random backbones, unless they exist; always with the same weights."""
    for folder, fields in grid.random_backbones.items():
        if not (folder / "config.json").is_file():
            set_seed(0)
            model = AutoModel.from_config(AutoConfig.for_model(**fields))
            with work_folder(folder.with_name(f"unfinished-{folder.name}")) as unfinished, writing(folder):
                model.save_pretrained(unfinished / "backbone")
                put_in_place(unfinished / "backbone", folder)


def claim_folder(cell):
    """
    Creates the cell's folder, and records in it the flags that determine the cell's result.

    Raises:
        ValueError: if the folder holds a cell with other flags.
    """
    note = cell.folder / "cell.json"
    settings = cell.arguments.values("changes_results")
    if note.is_file():
        # A flag that is missing from the note was not given or did not exist yet, so it had its default value.
        before = arguments_of(json.loads(note.read_text(encoding="utf-8")), note).values("changes_results")
        changed = [name for name in settings if settings[name] != before[name]]
        if changed:
            changes = "; ".join(f"{name} was {before[name]!r}, now {settings[name]!r}" for name in changed)
            raise ValueError(f"{cell.folder} holds a cell with other settings: {changes}; take another output_dir")
    cell.folder.mkdir(parents=True, exist_ok=True)
    with whole_file(note, encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2) + "\n")


def _slug(name):
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()
