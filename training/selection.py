"""Which weights a head keeps: those of its best epoch on devel, those of the last epoch, or an average."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

AVERAGED_EPOCHS = 3  # weights are averaged over about this many epochs
SMOOTHED_EPOCHS = 5  # devel scores of averaged weights are smoothed over this many epochs


@dataclass
class BestEpoch:
    """
    The best epoch of a head so far: the paper trains and selects a network per emotion (section 2.4).

    Attributes:
        score: its ρ on devel; with `--selection average`, the smoothed ρ.
        epoch: its number; 0 if no epoch had a ρ, and the weights are the latest.
        restarts: how often the head was dead and re-initialised.
        restarted: the epoch after which it last was.
        weights: the head's state dict.
        latest: with `--selection average`, ρ of the latest epochs since the last restart, NaN where there was none.
    """

    score: float = -math.inf
    epoch: int = 0
    restarts: int = 0
    restarted: int = 0
    weights: dict = field(default_factory=dict)
    latest: list[float] = field(default_factory=list)

    def take(self, selection, epoch, score, weights):
        """
        Args:
            selection: as `--selection`.
            epoch: number of the finished epoch.
            score: its ρ on devel, NaN if there is none.
            weights: the head's state dict, which is copied if it is kept.
        """
        if selection == "average":
            score = self._smoothed(score)
        if score > self.score or selection == "last_epoch":
            self.score, self.epoch = float(score), epoch
        if self.epoch in (0, epoch):
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def _smoothed(self, score):
        """
        The mean over the latest epochs. Epochs without a ρ, and those before the first, count as 0, so that a lucky
        first epoch does not win.
        """
        self.latest = [*self.latest, float(score)][-SMOOTHED_EPOCHS:]
        if math.isnan(score):
            return score
        return sum(rho for rho in self.latest if not math.isnan(rho)) / SMOOTHED_EPOCHS

    def restart(self, epoch):
        """Notes that the head begins again with new weights after this epoch."""
        self.restarts += 1
        self.restarted = epoch
        self.latest = []


class RunningAverage:
    """
    The mean of the weights of a head, or of another part of a model: at first over all steps, and then an exponential
    moving average with a decay of 1 - 1 / `num_steps` per step.

    Args:
        module: its weights that need a gradient are averaged; usually a head.
        num_steps: number of steps over which the average is taken.
    """

    def __init__(self, module, num_steps):
        self.parameters = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
        self.num_steps = num_steps
        self.begin()

    def begin(self):
        """Forgets all steps."""
        self.steps = 0
        self.averages = [parameter.clone() for parameter in self.parameters]

    def update(self):
        """Takes the weights after a step."""
        self.steps += 1
        torch._foreach_lerp_(self.averages, self.parameters, 1 / min(self.steps, self.num_steps))

    @contextmanager
    def in_place(self):
        """Within this context, the averages are the model's weights."""
        latest = [parameter.clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, latest)

    def state_dict(self):
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        torch._foreach_copy_(self.averages, state["averages"])
