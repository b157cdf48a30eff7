"""Losses between predicted and true shares, by the name that `EmoShareConfig.loss` gives them."""

from inspect import signature

# Width of the pairwise sigmoids of `rank`, in standard deviations of a label's predicted shares in the batch.
RANK_TEMPERATURE = 0.2
# Least such standard deviation, so that gradients stay finite.
LEAST_SPREAD = 0.01
# Least variances of true shares and of ranks: below these, all clips of a batch count as equal.
LEAST_VARIANCE = 1e-8
LEAST_VARIANCE_OF_RANKS = 1e-4
# Probabilities are kept this far from 0 and 1, at which a single vote against them would be impossible.
LEAST_PROBABILITY = 1e-6
SHIFT = 8  # from this argument on, Stirling's series with two terms is exact in float32


def mse(predicted, true, weights=None):
    """
    Mean squared error over the known shares (paper, section 2.5).

    Args:
        predicted: (batch, labels) shares.
        true: (batch, labels) shares; NaN where unknown, which adds nothing.
        weights: (batch,) weight of each clip, or (batch, labels) of each share, 0 or more; `None` weighs all alike.

    Returns:
        Scalar float32; 0 if no share is known, or only shares of weight 0.
    """
    weights, true = _weights_of_known(true, weights)
    return _mean_of_known((predicted.float() - true).square(), weights)


def ccc(predicted, true, weights=None):
    """
    1 minus the concordance correlation coefficient over the batch, averaged over the labels. The coefficient depends on
    order, level and spread of the shares, and is 1 only if predicted and true shares are the same.

    A label whose known shares are all equal, as in a batch of one clip, has no coefficient and adds nothing.

    Args and returns: as `mse`.
    """
    weights, true = _weights_of_known(true, weights)
    total, predicted = weights.sum(dim=0), predicted.float()  # (labels,), (batch, labels)
    weights = weights / total.where(total > 0, 1)
    mean_predicted, mean_true = _mean(predicted, weights), _mean(true, weights)
    predicted, true = predicted - mean_predicted, true - mean_true
    variance, covariance = _mean(true.square(), weights), _mean(predicted * true, weights)
    differ = variance > LEAST_VARIANCE
    spread = _mean(predicted.square(), weights) + variance + (mean_predicted - mean_true).square()
    return _mean_over_labels(1 - 2 * covariance / spread.where(differ, 1), total * differ)


def rank(predicted, true, weights=None, temperature=RANK_TEMPERATURE):
    """
    1 minus a differentiable Spearman's ρ over the batch, averaged over the labels.

    The rank of a clip is the number of clips below it, where "below" is a sigmoid of the difference of two predicted
    shares; clips with equal shares have equal ranks, the average of their places. The width of the sigmoids is
    `temperature` times the standard deviation of the label's predicted shares. So the loss does not depend on the scale
    of the shares, and a rare label is ranked as sharply as a frequent one. As the temperature goes to 0, ρ becomes
    SciPy's.

    Only the order of the clips counts; the level of the predicted shares is left to chance. A label whose known shares
    are all equal, as in a batch of one clip, has no ρ and adds nothing. Memory grows with the square of the batch.

    Args and returns: as `mse`, and

        temperature: the smaller, the closer to Spearman's ρ, and the fewer pairs have a gradient.
    """
    weights, true = _weights_of_known(true, weights)
    total, predicted = weights.sum(dim=0), predicted.float()  # (labels,), (batch, labels)
    weights = weights / total.where(total > 0, 1)
    variance = _mean((predicted - _mean(predicted, weights)).square(), weights)
    width = temperature * variance.clamp(min=LEAST_SPREAD**2).sqrt()
    # (batch, batch, labels) -> (batch, labels), from 0 to 1
    ranks = _mean(((predicted[:, None] - predicted) / width).sigmoid(), weights, dim=1)
    true_ranks = _mean((true[:, None] > true) + 0.5 * (true[:, None] == true), weights, dim=1)
    ranks, true_ranks = ranks - _mean(ranks, weights), true_ranks - _mean(true_ranks, weights)
    variance_of_true = _mean(true_ranks.square(), weights)
    differ = variance_of_true > LEAST_VARIANCE
    variances = _mean(ranks.square(), weights).clamp(min=LEAST_VARIANCE_OF_RANKS) * variance_of_true.where(differ, 1)
    return _mean_over_labels(1 - _mean(ranks * true_ranks, weights) / variances.sqrt(), total * differ)


def binomial(predicted, true, weights=None, listeners=None):
    """
    Negative log-likelihood of a clip's votes, in nats, averaged over the clips, if each listener perceives the emotion
    with the predicted share as probability. This is the cross-entropy of the shares times the number of listeners, so a
    share from many listeners counts for more than one from a few.

    Args and returns: as `mse`, and

        listeners: (batch,) number of listeners of each clip; NaN counts as one listener, and `None` is NaN for all.
            Shares times listeners need not be whole numbers.
    """
    weights, true = _weights_of_known(true, weights)
    probability = predicted.float().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    losses = -(true * probability.log() + (1 - true) * (-probability).log1p())
    return _mean_of_known(losses * _number_of_listeners(true, listeners), weights)


def binomial_rank(predicted, true, weights=None):
    """
    `rank` plus `binomial` with one listener per clip, which is the cross-entropy of the shares. The cross-entropy sets
    the level of the shares, and `rank` their order, even where they are small and differ little.

    Args and returns: as `mse`.
    """
    return binomial(predicted, true, weights) + rank(predicted, true, weights)


def beta_binomial(predicted, true, weights=None, listeners=None, concentrations=None):
    """
    Negative log-likelihood of a clip's votes, in nats, averaged over the clips, if the probability of a vote is itself
    drawn for each clip, from a Beta distribution with the predicted share as mean. Its concentration, the sum of its
    two parameters, says how certain the share is; with infinite concentration the loss is `binomial`.

    Args and returns: as `mse`, and

        listeners: (batch,) number of listeners of each clip. The vote of one listener carries no information about the
            concentration; nor does a clip whose number is NaN, which counts as one listener. `None` is NaN for all.
            Shares times listeners need not be whole numbers: the Gamma function takes any.
        concentrations: (batch, labels), above 0; `None` is infinite.
    """
    if concentrations is None or listeners is None:
        return binomial(predicted, true, weights, listeners)
    weights, true = _weights_of_known(true, weights)
    probability = predicted.float().clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    # A quotient of Gamma functions each for those who perceive the emotion, for the others, and for all listeners.
    signs, offsets = true.new_tensor([1, -1, 0]), true.new_tensor([0, 1, 1])
    starts = concentrations.float()[..., None] * (probability[..., None] * signs + offsets)
    votes = _number_of_listeners(true, listeners)[..., None] * (true[..., None] * signs + offsets)
    log_likelihood = (_log_rising(starts, votes) * true.new_tensor([1, 1, -1])).sum(dim=-1)
    of_one = true * probability.log() + (1 - true) * (-probability).log1p()
    return _mean_of_known(-of_one.where(listeners.isnan()[:, None], log_likelihood), weights)


# Each loss is a function of predicted shares, true shares and weights of clips or of shares, as `mse`. A new loss needs
# nothing but an entry here. A loss with a parameter `listeners` gets the number of listeners of each clip; for one with
# a parameter `concentrations`, the heads predict a concentration with each share.
LOSSES = {
    "mse": mse,
    "ccc": ccc,
    "rank": rank,
    "binomial": binomial,
    "binomial_rank": binomial_rank,
    "beta_binomial": beta_binomial,
}
# Losses that take shares as probabilities of a vote, which must lie between 0 and 1.
LIKELIHOODS = ("binomial", "binomial_rank", "beta_binomial")


def takes(name, parameter):
    """Whether a loss has a parameter of this name: `"listeners"` or `"concentrations"`."""
    return parameter in signature(LOSSES[name]).parameters


def _weights_of_known(true, weights):
    """(batch, labels) weights and true shares, both float32, and 0 where a share is unknown."""
    known = ~true.isnan()
    if weights is None:
        weights = known.float()
    else:
        weights = (weights if weights.dim() == 2 else weights[:, None]).float() * known
    return weights, true.float().masked_fill(~known, 0)


def _mean(values, weights, dim=0):
    """Weighted mean over the batch. Not a matrix product, which autocast would compute in 16 bits."""
    return (values * weights).sum(dim=dim)


def _mean_over_labels(losses, weights):
    """Weighted mean over labels of losses (labels,); a label of weight 0 adds nothing."""
    return _mean_of_known(losses.where(weights > 0, 0), weights)


def _mean_of_known(losses, weights):
    total = weights.sum()
    return (losses * weights).sum() / total.where(total > 0, 1)


def _number_of_listeners(true, listeners):
    """(batch, 1) float32, 1 where unknown."""
    return true.new_ones(len(true), 1) if listeners is None else listeners.float().nan_to_num(nan=1.0)[:, None]


def _log_rising(start, steps):
    """
    log(Γ(start + steps) / Γ(start)) in float32, without the cancellation of two large logarithms: both arguments are
    moved up by `SHIFT`, where Stirling's series holds.
    """
    moved = start + SHIFT
    rising = (moved - 0.5) * (steps / moved).log1p() + steps * ((moved + steps).log() - 1)
    rising = rising + _end_of_stirling(moved + steps) - _end_of_stirling(moved)
    below = start[..., None] + start.new_tensor(range(SHIFT))
    return rising - (steps[..., None] / below).log1p().sum(dim=-1)


def _end_of_stirling(value):
    return (1 / 12 - 1 / (360 * value * value)) / value
