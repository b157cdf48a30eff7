"""The parts of a head that pool all steps of a clip into one vector (paper, Eq. 1 and 2; and statistics over time)."""

import torch
from torch import nn

from .frames_emoshare import masked_mean

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILES_OF_SLOPES = (0.05, 0.25, 0.75, 0.95)
SLOPE_STEPS = 2  # a slope is taken from this many steps before to as many after
VARIANCE_FLOOR = 1e-5
QUERIES = 4
LARGEST_DEVIATION = 5.0  # statistics are clipped at this many standard deviations


class MeanPooling(nn.Module):
    """The mean over a clip's own steps (Eq. 1)."""

    def __init__(self, config, width):
        super().__init__()
        self.width = width

    def forward(self, states, last_states, mask):
        """As `AttentionPooling.forward`; there are no weights."""
        return masked_mean(states, mask), None


class AttentionPooling(nn.Module):
    """
    Scaled dot-product attention over all steps (Eq. 2a and 2b), with one query from the last LSTM states. The scores
    are divided by the square root of the LSTM's width, as in the authors' code.
    """

    def __init__(self, config, width):
        super().__init__()
        self.width = width
        self.query = nn.Linear(config.lstm_num_layers * width, width)
        self.weight_norm = nn.Identity()
        if config.normalization == "sequence":
            self.weight_norm = nn.LayerNorm((1, config.max_frames // config.pool_size))

    def forward(self, states, last_states, mask):
        """
        Args:
            states: (batch, steps, width), the encoder's output: keys and values.
            last_states: (batch, layers * width), each layer's state at the clip's last step.
            mask: (batch, steps) bool, true on a clip's own steps.

        Returns:
            The weighted sum (batch, width) and the weights (batch, steps).
        """
        query = self.query(last_states)
        scores = torch.einsum("bw,bsw->bs", query, states) / states.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        weights = self.weight_norm(weights[:, None])[:, 0] * mask
        return torch.einsum("bs,bsw->bw", weights, states), weights


class AttentiveStatisticsPooling(nn.Module):
    """
    Mean and standard deviation over time, weighted by attention (Okabe et al., Interspeech 2018), once for each of
    several queries.
    """

    def __init__(self, config, width):
        super().__init__()
        self.width = 2 * QUERIES * width
        self.scores = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, QUERIES))

    def forward(self, states, last_states, mask):
        """As `AttentionPooling.forward`. `last_states` are not used; the weights are the mean over the queries."""
        scores = self.scores(states).masked_fill(~mask[..., None], -torch.inf)
        weights = scores.softmax(dim=1).transpose(1, 2)  # (batch, queries, steps)
        centre = masked_mean(states, mask)[:, None]  # a difference of squares is accurate only for small numbers
        mean = weights @ (states - centre)
        variance = weights @ (states - centre).square() - mean.square()
        statistics = torch.cat([mean + centre, variance.clamp(min=VARIANCE_FLOOR).sqrt()], dim=-1)
        return statistics.flatten(1), weights.mean(dim=1)


class StatisticsPooling(nn.Module):
    """Mean and standard deviation over a clip's own steps, standardised over the training set."""

    statistics_per_value = 2

    def __init__(self, config, width):
        super().__init__()
        self.width = self.statistics_per_value * width
        self.standardization = Standardization(self.width)

    def forward(self, states, last_states, mask):
        """As `AttentionPooling.forward`; there are no weights."""
        return self.standardization(self.statistics(states, mask)), None

    def statistics(self, states, mask):
        """(batch, steps, width) and (batch, steps) bool -> (batch, statistics), not yet standardised."""
        return torch.cat(_mean_and_deviation(states, mask), dim=1)


class FunctionalsPooling(StatisticsPooling):
    """
    Functionals as in classical systems: mean, standard deviation and quantiles over time of each value, and standard
    deviation, mean absolute value and quantiles of its slope; standardised over the training set.
    """

    statistics_per_value = 2 + len(QUANTILES) + 2 + len(QUANTILES_OF_SLOPES)

    def statistics(self, states, mask):
        """As `StatisticsPooling.statistics`. Slopes of a clip that is too short for them are 0."""
        slopes = torch.zeros_like(states[:, :1])
        slopes_mask = mask[:, :1]
        if states.shape[1] > 2 * SLOPE_STEPS:
            is_inside = mask[:, 2 * SLOPE_STEPS :]
            slopes = (states[:, 2 * SLOPE_STEPS :] - states[:, : -2 * SLOPE_STEPS]) / 2
            slopes = slopes.masked_fill(~is_inside[..., None], 0)
            slopes_mask = is_inside | mask[:, : is_inside.shape[1]] & ~is_inside.any(dim=1, keepdim=True)
        _, deviation_of_slopes = _mean_and_deviation(slopes, slopes_mask)
        return torch.cat(
            [
                *_mean_and_deviation(states, mask),
                *_quantiles(states, mask, QUANTILES),
                deviation_of_slopes,
                masked_mean(slopes.abs(), slopes_mask),
                *_quantiles(slopes, slopes_mask, QUANTILES_OF_SLOPES),
            ],
            dim=1,
        )


class Standardization(nn.Module):
    """
    Brings each statistic to zero mean and unit deviation over the training set. Mean and deviation are not learned, but
    set once, before the first epoch.
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("deviation", torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self):
        """Makes this module the identity, as it is after a checkpoint without these buffers was loaded."""
        self.mean.zero_()
        self.deviation.fill_(1)

    def forward(self, statistics):
        """(batch, width) -> (batch, width), in the same dtype"""
        scaled = (statistics - self.mean) / self.deviation
        return scaled.clamp(-LARGEST_DEVIATION, LARGEST_DEVIATION).to(statistics.dtype)


def _mean_and_deviation(states, mask):
    mean = masked_mean(states, mask)
    variance = masked_mean((states - mean[:, None]).square(), mask)
    return mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()


def _quantiles(states, mask, quantiles):
    """Quantiles over a clip's own steps, linear between two steps: a list of (batch, width)."""
    ordered = _sorted(states.masked_fill(~mask[..., None], torch.inf))
    last = mask.sum(dim=1) - 1
    values = []
    for quantile in quantiles:
        place = quantile * last  # (batch,)
        below = place.floor().long()
        lower, upper = (_step(ordered, index) for index in (below, torch.minimum(below + 1, last)))
        values.append(lower + (place - below)[:, None].to(states.dtype) * (upper - lower))
    return values


def _sorted(states):
    """Sorts (batch, steps, width) in ascending order along the steps; may overwrite its argument."""
    is_plain = states.device.type == "cpu" and not torch.compiler.is_exporting()
    if not is_plain or states.requires_grad or states.dtype == torch.bfloat16:
        return states.sort(dim=1).values
    states.numpy().sort(axis=1)  # more than ten times as fast as PyTorch's sort on CPUs
    return states


def _step(states, index):
    """(batch, steps, width) and (batch,) -> (batch, width)"""
    return states[torch.arange(states.shape[0], device=states.device), index]


POOLINGS = {
    "mean": MeanPooling,
    "attention": AttentionPooling,
    "attentive_statistics": AttentiveStatisticsPooling,
    "statistics": StatisticsPooling,
    "functionals": FunctionalsPooling,
}
