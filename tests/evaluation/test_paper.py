import pytest

from emoshare import EMOTIONS
from emoshare.evaluation.paper import PAPER, PAPER_ARCHITECTURES, row_of
from emoshare.training.arguments import ModelArguments


@pytest.mark.parametrize(
    ("backbone", "acoustic_features", "backbone_layer", "row"),
    [
        ("facebook/hubert-large-ll60k", "mel", "-1", "HuBERT (Large)"),
        ("facebook/hubert-large-ll60k", "mel", "12", None),
        ("facebook/hubert-large-ll60k", "mel", "weighted", None),
        ("microsoft/wavlm-large", "mel", "-1", None),
        ("acoustic", "mfcc", "-1", "MFCC Features"),
        ("acoustic", "mel", "-1", None),
    ],
)
def test_the_row_of_the_same_features(backbone, acoustic_features, backbone_layer, row):
    arguments = ModelArguments(backbone=backbone, acoustic_features=acoustic_features, backbone_layer=backbone_layer)
    assert row_of(arguments) == row


def test_the_papers_numbers_are_complete():
    assert tuple(PAPER["emotions"]) == tuple(EMOTIONS)
    rows = set(PAPER["rows"].values())
    assert rows == set(PAPER["table_1"]) == set(PAPER["table_2"]["average"]) == set(PAPER["table_2"]["change"])
    assert all(tuple(row) == PAPER_ARCHITECTURES for row in PAPER["table_1"].values())
    all_rhos = [PAPER["baseline"], *(rhos for row in PAPER["table_1"].values() for rhos in row.values())]
    assert {len(rhos) for rhos in all_rhos} == {9}
