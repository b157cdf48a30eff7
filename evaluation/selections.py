"""Texts for reports and cards on how the weights of a run were selected, by the value of `--selection`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        note: follows "Spearman's rho on devel", in brackets.
        result: describes the devel scores of one run.
        results: describes the devel scores of several runs.
        limit: describes what the scores do not measure.
    """

    note: str
    result: str
    results: str
    limit: str


_BY_RANKS = (
    "Its epochs were selected by the challenge's score, which compares the ranks of clips within an emotion, and not "
    "by calibration."
)
SELECTIONS = {
    "best_epoch": Selection(
        "epochs are selected on devel, so a little optimistic",
        "Epochs were also selected on devel, so the scores are a little optimistic.",
        "Each emotion's epoch is also selected on devel, so all scores are a little optimistic.",
        _BY_RANKS,
    ),
    "last_epoch": Selection(
        "the weights are those of the last epoch",
        "The weights are those of the last epoch: no epoch was selected on devel.",
        "Weights are those of the last epoch: no epoch is selected on devel.",
        "The score compares the ranks of clips within an emotion, and does not measure calibration.",
    ),
    "average": Selection(
        "of a running average of weights; epochs are selected on devel by a smoothed rho, so a little optimistic",
        "The weights are a running average over training steps. The epoch was also selected on devel, by ρ smoothed "
        "over several epochs, so the scores are a little optimistic.",
        "Weights are running averages over training steps. Each emotion's epoch is also selected on devel, by a "
        "smoothed ρ, so all scores are a little optimistic.",
        _BY_RANKS,
    ),
}
