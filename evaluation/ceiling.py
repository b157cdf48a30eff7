"""
The noise ceiling: the Spearman's ρ that a perfect predictor reaches against the shares of a finite panel of listeners.

Correlating two halves of the panel and applying the Spearman-Brown formula would assume that votes have the same
variance for every clip. They do not: votes hardly vary for a clip that nobody hears as angry, and vary a lot for one
that divides the panel. On rare emotions the formula is off by up to 0.25 (panels of 3 to 20, 15 distributions). So the
distribution of the true shares is estimated first, given that a clip's votes are binomial given its true share. The
ceiling follows from this distribution, and uses panels of all sizes together.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.special import betainc, logit, ndtr
from scipy.stats import binom, rankdata

from .scores import MEAN

MIN_CLIPS = 30  # with fewer, the estimate scatters by more than 0.1
# How far a share, rounded to two decimals, may be from a whole number of votes; and the most it may be, in votes.
ROUNDING = 0.0051
MOST_OF_A_VOTE = 0.25

# True shares lie on a grid that is even in arcsin(sqrt(share)), where the variance of votes is the same everywhere.
# Their distribution is a mixture of two families: betas of this concentration (a + b), which reach to 0 and 1, and
# normal distributions of the logit. All are smooth, and narrow enough for panels of up to 20 listeners. The
# best-fitting weights would concentrate on a few components, so the number of EM steps is limited.
GRID = 200
CONCENTRATION = 128
LOGITS, LOGIT_DEVIATION = np.arange(-3.5, 3.51, 0.5), 0.5
STEPS = 400


@dataclass(frozen=True)
class NoiseCeiling:
    """
    Attributes:
        rhos: highest ρ to expect, by label, and by `MEAN` for their mean; without the labels for which it cannot be
            estimated. Empty if there is no ceiling at all.
        clips: number of clips that it was estimated from.
        reason: why there is no ceiling; empty if there is one, or if the listeners are unknown.
    """

    rhos: dict = field(default_factory=dict)
    clips: int = 0
    reason: str = ""

    @property
    def text(self):
        """A line for the terminal and the model card; empty if the listeners are unknown."""
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
    Estimates the noise ceiling from shares and numbers of listeners alone. Each label is treated separately, so
    listeners may choose one or several labels. Clips with an unknown number of listeners are left out.

    Args:
        shares: (clips, labels) true shares, NaN where unknown.
        listeners: (clips,) number of listeners, NaN where unknown.
        labels: label names.

    Returns:
        `NoiseCeiling`. With a thousand clips, the mean over emotions is within 0.02 of the truth. If every clip has
        exactly 3 or 4 listeners, their votes do not determine the distribution, and the estimate may be too high by
        more than that where nearly all clips have a share near 0 and the others one near 1.
    """
    known = ~np.isnan(listeners)
    if not known.any():
        return NoiseCeiling()
    shares, listeners = shares[known], listeners[known]
    votes = shares * listeners[:, None]
    allowed = np.minimum(ROUNDING * listeners, MOST_OF_A_VOTE)[:, None]
    broken = np.abs(votes - np.round(votes)) > allowed  # False where a share is unknown
    reason = ""
    if len(shares) < MIN_CLIPS:
        reason = f"the listeners of only {len(shares)} clips are known; expected {MIN_CLIPS} or more"
    elif broken.any():
        reason = f"{broken.sum()} of {(~np.isnan(votes)).sum()} shares are not a whole number of their listeners' votes"
    elif listeners.max() < 2:
        reason = "no clip has two or more listeners"
    if reason:
        return NoiseCeiling(clips=len(shares), reason=reason)
    rhos = {}
    for label, column in zip(labels, np.round(votes).T, strict=True):
        is_known = ~np.isnan(column)
        if len(np.unique((column / listeners)[is_known])) > 1:
            rhos[label] = _expected_rho(column[is_known], listeners[is_known])
    if not rhos:
        return NoiseCeiling(clips=len(shares), reason="every label has the same share for all clips")
    return NoiseCeiling({MEAN: float(np.mean(list(rhos.values()))), **rhos}, len(shares))


def _expected_rho(votes, listeners):
    """The expected Spearman's ρ between the true shares of clips and the shares of their panels."""
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
    true = posterior @ ranks - on_grid @ ranks  # expected centred rank of a panel's true share
    spread = (weights @ shown**2) * (on_grid @ (ranks - on_grid @ ranks) ** 2)
    return float((weights * shown) @ true / np.sqrt(spread))


def _posterior(listeners, votes, weights):
    """Posterior probability of each true share on the grid (panels, grid), given a panel's votes and all panels."""
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
    """The components of the mixture of true shares, (components, grid)."""
    edges = np.sin(np.linspace(0, np.pi / 2, GRID + 1)) ** 2
    centres = _evenly_in_arcsine(int(np.pi / 2 * np.sqrt(CONCENTRATION + 1)) + 1)[:, None]  # a deviation apart
    betas = betainc(CONCENTRATION * centres, CONCENTRATION * (1 - centres), edges)
    normals = ndtr((logit(edges) - LOGITS[:, None]) / LOGIT_DEVIATION)
    return np.diff(np.concatenate([betas, normals]), axis=1)


def _evenly_in_arcsine(count):
    return np.sin((np.arange(count) + 0.5) / count * np.pi / 2) ** 2
