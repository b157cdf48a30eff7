"""What reports and cards say about the weights that a run keeps, by the value of `--selection`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        note: after "Spearman's rho on devel", in brackets.
        result: about the scores on devel, a sentence.
        limit: what the scores do not say, a sentence.
    """

    note: str
    result: str
    limit: str


_BY_RANKS = (
    "Its epochs were selected by the challenge's score, which compares the ranks of clips within an emotion, not by "
    "how well its shares are calibrated."
)
SELECTIONS = {
    "best_epoch": Selection(
        "epochs are selected on devel, so a little optimistic",
        "Epochs were selected on devel too, so the scores are a little optimistic.",
        _BY_RANKS,
    ),
    "last_epoch": Selection(
        "the weights are those of the last epoch",
        "The weights are those of the last epoch: no epoch was selected on devel.",
        "The score compares the ranks of clips within an emotion, and does not say how well shares are calibrated.",
    ),
    "average": Selection(
        "of a running average of weights; epochs are selected on devel by a smoothed rho, so a little optimistic",
        "The weights are a running average over the steps of training. The epoch was selected on devel too, by ρ "
        "smoothed over several epochs, so the scores are a little optimistic.",
        _BY_RANKS,
    ),
}
