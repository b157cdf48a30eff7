"""What reports and cards say about the weights that a run keeps, by the value of `--selection`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
        note: after "Spearman's rho on devel", in brackets.
        result: about the scores on devel of one run.
        results: about those of several runs.
        limit: what the scores do not say.
    """

    note: str
    result: str
    results: str
    limit: str


_BY_RANKS = (
    "Its epochs were selected by the challenge's score, which compares the ranks of clips within an emotion, not by "
    "how well its shares are calibrated."
)
SELECTIONS = {
    "best_epoch": Selection(
        "epochs are selected on devel, so a little optimistic",
        "Epochs were selected on devel too, so the scores are a little optimistic.",
        "Each emotion's epoch is selected on devel too, so all of these are a little optimistic.",
        _BY_RANKS,
    ),
    "last_epoch": Selection(
        "the weights are those of the last epoch",
        "The weights are those of the last epoch: no epoch was selected on devel.",
        "Weights are those of the last epoch: no epoch is selected on devel.",
        "The score compares the ranks of clips within an emotion, and does not say how well shares are calibrated.",
    ),
    "average": Selection(
        "of a running average of weights; epochs are selected on devel by a smoothed rho, so a little optimistic",
        "The weights are a running average over the steps of training. The epoch was selected on devel too, by ρ "
        "smoothed over several epochs, so the scores are a little optimistic.",
        "Weights are running averages over the steps of training. Each emotion's epoch is selected on devel too, by a "
        "smoothed ρ, so all of these are a little optimistic.",
        _BY_RANKS,
    ),
}
