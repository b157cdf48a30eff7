"""What the paper published: its Tables 1 and 2, and the challenge's baseline."""

import json
from pathlib import Path

from .arguments import ACOUSTIC

PAPER = json.loads((Path(__file__).parent / "paper_results.json").read_text(encoding="utf-8"))


def row_of(backbone, acoustic_features, backbone_layer):
    """
    Args:
        backbone, acoustic_features, backbone_layer: as `train.py` takes them.

    Returns:
        The row of the paper's Table 1 that has these features, or `None`. The paper takes the last hidden state.
    """
    if str(backbone_layer) != "-1":
        return None
    return PAPER["rows"].get(acoustic_features if backbone == ACOUSTIC else backbone)
