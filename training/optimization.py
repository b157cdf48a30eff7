"""The update of weights: optimizer, learning rate schedule, and gradient clipping."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class Optimization:
    """
    Attributes:
        weight_decay: of AdamW; 0 for Adam.
        schedule: `"constant"`, or `"cosine"` from the learning rate to 0.
        warmup_ratio: fraction of the steps over which the learning rate grows from 0.
        max_grad_norm: the gradient of a part is clipped to this norm; 0 for no limit.
        epochs: planned number of epochs.
        steps_per_epoch: number of updates of the weights in an epoch.
    """

    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    max_grad_norm: float = 0.0
    epochs: int = 1
    steps_per_epoch: int = 1

    @classmethod
    def of_run(cls, run, steps_per_epoch):
        """From `RunArguments`."""
        return cls(
            run.weight_decay,
            run.lr_scheduler,
            run.warmup_ratio,
            run.max_grad_norm,
            run.num_train_epochs,
            steps_per_epoch,
        )

    @property
    def depends_on_epochs(self):
        """Whether a different number of epochs changes the learning rate of the first ones, too."""
        return self.schedule != "constant" or self.warmup_ratio > 0


PLAIN = Optimization()  # Adam with a constant learning rate


class PartOptimizer:
    """
    The optimizer and schedule of one part of a model.

    Args:
        module: its weights that need a gradient are trained; usually a head.
        learning_rate: of Adam (paper, section 2.5).
        settings: `Optimization`.

    Attributes:
        parameters: the weights that are trained.
    """

    def __init__(self, module, learning_rate, settings):
        self.module = module
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.learning_rate = learning_rate
        self.settings = settings
        self.begin(0)

    def begin(self, epochs_done):
        """Starts again, with a learning rate that is scheduled over the remaining epochs."""
        self.adam = self._adam()
        self.schedule = None
        if self.settings.depends_on_epochs:
            steps = (self.settings.epochs - epochs_done) * self.settings.steps_per_epoch
            warmup_steps = round(self.settings.warmup_ratio * steps)
            if self.settings.schedule == "cosine":
                self.schedule = get_cosine_schedule_with_warmup(self.adam, warmup_steps, steps)
            else:
                self.schedule = get_constant_schedule_with_warmup(self.adam, warmup_steps)

    def _adam(self):
        weight_decay = self.settings.weight_decay
        if not weight_decay:
            return torch.optim.Adam(self.parameters, lr=self.learning_rate, fused=True)
        groups = {True: [], False: []}
        for module in self.module.modules():
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                is_matrix = parameter.dim() > 1 and not isinstance(module, nn.LayerNorm)
                groups[is_matrix].append(parameter)
        return torch.optim.AdamW(
            [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
            lr=self.learning_rate,
            weight_decay=weight_decay,
            fused=True,
        )

    def step(self):
        """Updates the weights and clears their gradients."""
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.adam.step()
        if self.schedule is not None:
            self.schedule.step()
        self.adam.zero_grad()

    def state_dict(self):
        state = {"optimizer": self.adam.state_dict()}
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
