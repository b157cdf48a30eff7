"""Losses between predicted and true shares, by the name that `EmoShareConfig.loss` gives them."""


def mse(predicted, true, weights=None):
    """
    Mean squared error over the known shares (paper, section 2.5).

    Args:
        predicted: (batch, labels) shares.
        true: (batch, labels) shares; NaN where a share is unknown, which adds nothing.
        weights: (batch,) weight of each clip, 0 or more; `None` weighs all clips alike.

    Returns:
        Scalar float32; 0 if no share is known, or only in clips of weight 0.
    """
    known = ~true.isnan()
    errors = (predicted.float() - true.float()).masked_fill(~known, 0).square()
    if weights is None:
        return errors.sum() / known.sum().clamp(min=1)
    weights = weights.float()[:, None] * known
    total = weights.sum()
    return (errors * weights).sum() / total.where(total > 0, 1)


# Each is a function of predicted and true shares and weights, as `mse`. An entry here is all that a new loss takes.
LOSSES = {"mse": mse}
