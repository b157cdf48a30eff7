"""The results that the paper published: its Tables 1 and 2, and the challenge's baseline."""

import json
from pathlib import Path

from .scores import MEAN

PAPER = json.loads((Path(__file__).parent / "paper_results.json").read_text(encoding="utf-8"))
# The architectures of its Table 1, as `EmoShareConfig.architecture` names them.
PAPER_ARCHITECTURES = tuple(next(iter(PAPER["table_1"].values())))


def row_of(arguments):
    """
    Args:
        arguments: `ModelArguments`.

    Returns:
        Name of the row of the paper's Table 1 with these frame features, or `None`. The paper uses the last hidden
        state of a frozen backbone.
    """
    if arguments.layer != -1 or arguments.tunes_backbone:
        return None
    return PAPER["rows"].get(arguments.acoustic_features if arguments.is_acoustic else arguments.backbone)


def rhos_of(row, architecture):
    """
    Args:
        row: name of a row of the paper's Table 1, or `None`.
        architecture: as `EmoShareConfig.architecture`.

    Returns:
        `dict[str | None, float]`: the paper's ρ by emotion, and their `MEAN`; empty if it does not have this row and
        architecture.
    """
    rhos = PAPER["table_1"].get(row, {}).get(architecture)
    return {MEAN: sum(rhos) / len(rhos), **dict(zip(PAPER["emotions"], rhos, strict=True))} if rhos else {}
