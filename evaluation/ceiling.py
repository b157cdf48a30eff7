"""
The noise ceiling: the Spearman's ρ that a perfect predictor reaches against the shares of a finite panel of listeners.

Splitting the panel into halves and stepping up their correlation by Spearman and Brown's formula assumes that votes
scatter in the same way for every clip. Votes do not: hardly any for a clip that nobody hears as angry, many for one
that divides the panel. On rare emotions the formula is off by up to 0.25 (panels of 3 to 20, 15 distributions). So the
distribution of the true shares is estimated first: whatever the number of votes, a clip's votes are binomial given its
true share. The ceiling follows from it, and is what all ways of splitting a panel, of any size, say together.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import betainc, logit, ndtr
from scipy.stats import binom, rankdata

from .scores import MEAN

MIN_CLIPS = 30  # with fewer, the estimate scatters by more than 0.1
# How far a share may be from one of whole votes, as it was rounded to two decimals; but never by this much of a vote.
ROUNDING = 0.0051
MOST_OF_A_VOTE = 0.25

# True shares lie on a grid that is even in arcsin(sqrt(share)), where votes scatter equally everywhere. Their
# distribution is a mixture of two families: betas of this concentration (a + b), which reach to 0 and 1, and normal
# distributions of the logit. All are smooth, and narrow enough for panels of up to 20 listeners. Weights that fit best
# would pile up on a few, so they are only improved so many times.
GRID = 200
CONCENTRATION = 128
LOGITS, LOGIT_DEVIATION = np.arange(-3.5, 3.51, 0.5), 0.5
STEPS = 400


@dataclass(frozen=True)
class NoiseCeiling:
    """
    Attributes:
        rhos: by label, and for their mean by `MEAN`; a label is not there if nothing can be said of it. Empty if there
            is no ceiling at all.
        clips: how many clips it was estimated from.
        reason: why there is none; empty if there is one, or nothing is known about listeners.
    """

    rhos: dict = field(default_factory=dict)
    clips: int = 0
    reason: str = ""

    @property
    def text(self):
        """A line about it, for the terminal and the model card; empty if nothing is known about listeners."""
        if self.reason:
            return f"No noise ceiling: {self.reason}."
        if not self.rhos:
            return ""
        return (
            f"Noise ceiling: because panels are small, a perfect predictor would have a mean rho of about "
            f"{self.rhos[MEAN]:.3f} (estimated from the votes on {self.clips} clips)."
        )


def noise_ceiling(shares, listeners, labels):
    """
    Estimates the noise ceiling from shares and numbers of listeners alone. Each label is taken by itself, so it does
    not matter whether a listener may choose several. Clips whose listeners are not known are left out.

    Args:
        shares: (clips, labels) true shares, NaN where one is not known.
        listeners: (clips,) number of listeners, NaN where it is not known.
        labels: label names.

    Returns:
        `NoiseCeiling`. Within 0.02 of the true one for the mean over emotions, given a thousand clips. Exactly 3 or 4
        listeners a clip leave the distribution open, and the estimate may be higher than that where nearly all clips
        have a share near 0 and the rest one near 1.
    """
    known = ~np.isnan(listeners)
    if not known.any():
        return NoiseCeiling()
    shares, listeners = shares[known], listeners[known]
    votes = shares * listeners[:, None]
    allowed = np.minimum(ROUNDING * listeners, MOST_OF_A_VOTE)[:, None]
    broken = np.abs(votes - np.round(votes)) > allowed  # False where a share is not known
    reason = ""
    if len(shares) < MIN_CLIPS:
        reason = f"the listeners of only {len(shares)} clips are known; expected {MIN_CLIPS} or more"
    elif broken.any():
        reason = f"{broken.sum()} of {(~np.isnan(votes)).sum()} shares are no whole number of votes of their listeners"
    elif listeners.max() < 2:
        reason = "no clip has two listeners, whose votes could differ"
    if reason:
        return NoiseCeiling(clips=len(shares), reason=reason)
    rhos = {}
    for label, column in zip(labels, np.round(votes).T, strict=True):
        is_known = ~np.isnan(column)
        if len(np.unique((column / listeners)[is_known])) > 1:
            rhos[label] = _expected_rho(column[is_known], listeners[is_known])
    if not rhos:
        return NoiseCeiling(clips=len(shares), reason="no label's share differs between clips")
    return NoiseCeiling({MEAN: float(np.mean(list(rhos.values()))), **rhos}, len(shares))


def _expected_rho(votes, listeners):
    """Spearman's ρ that is expected between clips' true shares and the shares of their panels."""
    panels, panel_of_clip, clips = np.unique(
        np.stack([listeners, votes]), axis=1, return_inverse=True, return_counts=True
    )
    weights = clips / clips.sum()
    posterior = _posterior(*panels, weights)  # (panels, grid)
    on_grid = weights @ posterior
    ranks = np.cumsum(on_grid) - on_grid / 2  # of true shares, from 0 to 1
    shown = np.zeros(len(weights))
    shown[panel_of_clip.ravel()] = rankdata(votes / listeners)
    shown -= weights @ shown
    true = posterior @ ranks - on_grid @ ranks  # expected rank of a clip's true share
    spread = (weights @ shown**2) * (on_grid @ (ranks - on_grid @ ranks) ** 2)
    return float((weights * shown) @ true / np.sqrt(spread))


def _posterior(listeners, votes, weights):
    """How likely each true share of the grid is (panels, grid), given a panel's votes and what all panels show."""
    true_shares = _evenly_in_arcsine(GRID)
    likelihood = binom.pmf(votes[:, None], listeners[:, None], true_shares)  # (panels, grid)
    parts = _smooth_distributions()
    of_part = likelihood @ parts.T
    mixture = np.full(len(parts), 1 / len(parts))
    for _ in range(STEPS):
        mixture = weights @ (of_part * mixture / (of_part @ mixture)[:, None])
    joint = likelihood * (mixture @ parts)
    return joint / joint.sum(axis=1, keepdims=True)


def _smooth_distributions():
    """The distributions of true shares that are mixed, (distributions, grid)."""
    edges = np.sin(np.linspace(0, np.pi / 2, GRID + 1)) ** 2
    centres = _evenly_in_arcsine(int(np.pi / 2 * np.sqrt(CONCENTRATION + 1)) + 1)[:, None]  # about a deviation apart
    betas = betainc(CONCENTRATION * centres, CONCENTRATION * (1 - centres), edges)
    normals = ndtr((logit(edges) - LOGITS[:, None]) / LOGIT_DEVIATION)
    return np.diff(np.concatenate([betas, normals]), axis=1)


def _evenly_in_arcsine(count):
    return np.sin((np.arange(count) + 0.5) / count * np.pi / 2) ** 2
