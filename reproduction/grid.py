"""The cells of a grid: which training runs there are."""

from dataclasses import dataclass
from pathlib import Path


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
