"""A grid of training runs: the YAML file that describes it, and its cells."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import AutoConfig, AutoModel, set_seed

from ..configuration_emoshare import ARCHITECTURES, EmoShareConfig
from ..training.arguments import ACOUSTIC, arguments_of, read_yaml
from ..training.model import head_fields

KEYS = ("title", "output_dir", "train", "features", "architectures", "seeds")
# Flags of train.py that the grid sets by itself.
OWN_FLAGS = ("architecture", "feature_cache_dir", "output_dir", "resume_from_checkpoint", "seed")
PLACES = ("data_dir", "feature_cache_dir", "output_dir")  # flags that change no result
RANDOM_BACKBONE = "random_backbone"
SWEPT_ARCHITECTURE = "cnn_lstm_attention"


@dataclass(frozen=True)
class Cell:
    """
    One training run of a grid.

    Attributes:
        features: what the heads see, as the tables call it: a row of theirs.
        architecture: as `EmoShareConfig.architecture`.
        seed: of the run.
        layer: as `train.py --backbone_layer`.
        flags: of `train.py`, all of them.
        folder: `train.py --output_dir`.
    """

    features: str
    architecture: str
    seed: int
    layer: str
    flags: dict
    folder: Path

    @property
    def is_done(self):
        return (self.folder / "eval_results.json").is_file()

    @property
    def settings(self):
        """The flags that decide the cell's result."""
        return {name: value for name, value in self.flags.items() if name not in PLACES}


@dataclass(frozen=True)
class Grid:
    """
    Attributes:
        title: of the report.
        output_dir: where everything is: cells, features, report.
        cells: `list[Cell]`.
        random_backbones: configs of the backbones that are made, with random weights, by their folder.
    """

    title: str
    output_dir: Path
    cells: list[Cell]
    random_backbones: dict[Path, dict]


def read_grid(path, data_dir=None, output_dir=None, sweep_layers=False):
    """
    Reads a grid and checks every cell of it, before any of them is trained.

    Args:
        path: YAML file with `title`, `output_dir`, `train` (flags of train.py, of all cells), `features` (a row of the
            tables by its name: flags of train.py, or `random_backbone` and a backbone's config), `architectures`
            (flags, too) and `seeds`.
        data_dir: of the corpus, instead of the one in `train`.
        output_dir: instead of the one in the file.
        sweep_layers: whether to add a cell for each layer of each backbone.

    Returns:
        `Grid`.

    Raises:
        ValueError: on a key, value or combination that is not right, and on a backbone that cannot be fetched; names
            the line.
    """
    reader = _Reader(Path(path))
    grid = reader.entries
    if data_dir is not None:
        grid["train"]["data_dir"] = str(data_dir)
    folder = Path(output_dir or grid["output_dir"])
    cells, random_backbones = [], {}
    for row, own in grid["features"].items():
        flags = {**grid["train"], **(own or {})}
        if RANDOM_BACKBONE in flags:
            backbone_folder = folder / "backbones" / _slug(row)
            random_backbones[backbone_folder] = flags.pop(RANDOM_BACKBONE)
            flags["backbone"] = str(backbone_folder)
            backbone_config = reader.random_backbone_config(row)
        else:
            backbone_config = reader.backbone_config(row, flags)
        combinations = [
            (architecture, seed, str(flags.get("backbone_layer", -1)))
            for architecture in grid["architectures"]
            for seed in grid["seeds"]
        ]
        if sweep_layers and backbone_config is not None:
            swept = SWEPT_ARCHITECTURE if SWEPT_ARCHITECTURE in grid["architectures"] else combinations[0][0]
            combinations += [
                (swept, grid["seeds"][0], str(layer)) for layer in range(backbone_config.num_hidden_layers + 1)
            ]
        for architecture, seed, layer in dict.fromkeys(combinations):
            name = f"{_slug(row)}-{architecture}-layer{layer}-seed{seed}"
            of_cell = {
                **flags,
                **(grid["architectures"][architecture] or {}),
                "architecture": architecture,
                "seed": seed,
                "output_dir": str(folder / "cells" / name),
                "feature_cache_dir": str(folder / "features"),
            }
            if backbone_config is not None:
                of_cell["backbone_layer"] = layer
            cell = Cell(row, architecture, seed, layer, of_cell, folder / "cells" / name)
            reader.check(cell, backbone_config)
            cells.append(cell)
    return Grid(grid["title"], folder, cells, random_backbones)


class _Reader:
    """A grid's YAML file; what is wrong with it is told with the line."""

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
        return ValueError(f"{self.path}, line {self.lines[keys]}: {message}")

    def _check_shape(self):
        for key in self.entries:
            if key not in KEYS:
                raise self.error((key,), f"unknown key {key!r}; expected {', '.join(KEYS)}")
        missing = [key for key in KEYS if not self.entries.get(key)]
        if missing:
            raise ValueError(f"{self.path}: {', '.join(missing)} missing or empty")
        for key in ("train", "features", "architectures"):
            if not isinstance(self.entries[key], dict):
                raise self.error((key,), f"{key} is {self.entries[key]!r}; expected lines of the form 'name: ...'")
        for keys, flags in self._flags():
            if not isinstance(flags, dict | None):
                raise self.error(keys, f"{keys[-1]} is {flags!r}; expected flags of train.py and their values")
            for name in flags or {}:
                if name in OWN_FLAGS:
                    raise self.error((*keys, name), f"{name} is set by the grid")
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

    def backbone_config(self, row, flags):
        """The config of a row's backbone, from its folder or the Hub; `None` for acoustic features."""
        backbone = flags.get("backbone", ACOUSTIC)
        if backbone == ACOUSTIC:
            return None
        try:
            return AutoConfig.from_pretrained(backbone, revision=flags.get("backbone_revision"))
        except (OSError, ValueError) as error:
            raise self.error(("features", row), f"the backbone {backbone} cannot be fetched: {error}") from error

    def random_backbone_config(self, row):
        try:
            return AutoConfig.for_model(**self.entries["features"][row][RANDOM_BACKBONE])
        except (TypeError, ValueError) as error:
            raise self.error(("features", row, RANDOM_BACKBONE), f"{RANDOM_BACKBONE}: {error}") from error

    def check(self, cell, backbone_config):
        """Raises what train.py would say of the cell's flags, and the model's config of their combination."""
        try:
            _, model, _ = arguments_of(cell.flags, "train.py")
            layer = {} if backbone_config is None else {"backbone_layer": cell.layer}
            if layer and cell.layer != "weighted":
                layer = {"backbone_layer": int(cell.layer)}
            EmoShareConfig(backbone_config=backbone_config, **layer, **head_fields(model))
        except ValueError as error:
            scopes = [("features", cell.features), ("architectures", cell.architecture), ("train",)]
            named = [
                (*scope, name)
                for scope in scopes
                for name in cell.flags
                if (*scope, name) in self.lines and re.search(rf"\b{name}\b", str(error))
            ]
            unknown = re.search("unknown key '(.*?)'", str(error))
            if unknown:
                named = [(*scope, unknown[1]) for scope in scopes if (*scope, unknown[1]) in self.lines]
            raise self.error(named[0] if named else scopes[0], f"{cell.folder.name}: {error}") from error


def make_random_backbones(grid):
    """Writes the backbones that the grid makes by itself, unless they are there: the same weights at every time."""
    for folder, fields in grid.random_backbones.items():
        if not (folder / "config.json").is_file():
            set_seed(0)
            AutoModel.from_config(AutoConfig.for_model(**fields)).save_pretrained(folder)


def claim_folder(cell):
    """
    Makes the cell's folder, and notes what is trained in it.

    Raises:
        ValueError: if it holds a cell of other settings.
    """
    note = cell.folder / "cell.json"
    settings = json.loads(json.dumps(cell.settings))
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            told = "; ".join(f"{name} was {before.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            raise ValueError(f"{cell.folder} holds a cell of other settings: {told}; take another output_dir")
    cell.folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _slug(name):
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()
