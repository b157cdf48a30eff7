"""
Trains the heads on stored frame features; each emotion keeps the weights of its own best devel epoch.

A network is dead that gives the same share for every clip, as the authors' released design does once its last ReLU is
closed for good: it has no gradient then, and no ρ.
"""

import math
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader

from .checkpoints import resume, save_checkpoint
from .evaluation import is_constant, predict_shares
from .features import collate
from .model import initialize_head


@dataclass
class BestEpoch:
    """
    What one network has reached: the paper trains and selects a network per emotion (section 2.4). Epoch 0 is none:
    there was no ρ to select by, and the weights are the latest. `restarts` counts how often the network was dead and
    started anew, the last time after epoch `restarted`.
    """

    score: float = -math.inf
    epoch: int = 0
    restarts: int = 0
    restarted: int = 0
    weights: dict = field(default_factory=dict)


class Progress:
    """
    Where a training run is: the epochs done, and each network's best one. What a checkpoint keeps beside the weights
    and the optimizer.

    Args:
        model: `EmoShareModel`, whose heads are the networks.
        run: `RunArguments`.
    """

    def __init__(self, model, run):
        self.model = model
        self.patience = run.early_stopping_patience
        self.epochs_done = 0
        self.best = [BestEpoch() for _ in model.heads]
        self.dead = []  # indices of the labels that were dead after the last epoch

    def update(self, rhos, is_dead):
        """
        Takes the labels' devel ρ after an epoch, and which of them come out of a dead network, whose ρ does not count.
        Keeps the weights of the networks that have become better.
        """
        self.epochs_done += 1
        self.dead = np.flatnonzero(is_dead).tolist()
        # One score per network: its emotion's ρ, or the mean over a shared trunk's.
        scores = np.where(is_dead, math.nan, rhos) if len(self.best) == len(rhos) else [mean_rho(rhos)]
        for best, head, score in zip(self.best, self.model.heads, scores, strict=True):
            if score > best.score:  # never where there is no ρ, NaN
                best.score, best.epoch = float(score), self.epochs_done
            if best.epoch in (0, self.epochs_done):
                best.weights = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}

    @property
    def is_over(self):
        """Whether no network has become better, or was started anew, for `early_stopping_patience` epochs."""
        return all(self.epochs_done - max(best.epoch, best.restarted) >= self.patience for best in self.best)

    def restore_best(self):
        for best, head in zip(self.best, self.model.heads, strict=True):
            head.load_state_dict(best.weights)

    def state_dict(self):
        return {"epochs_done": self.epochs_done, "best": [asdict(best) for best in self.best], "dead": self.dead}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        self.best = [BestEpoch(**best) for best in state["best"]]
        self.dead = state["dead"]


def train_heads(model, train, devel, score, run, accelerator, settings):
    """
    Trains the model's heads on `train` and leaves each with the weights of its best epoch on `devel`.

    Args:
        model: `EmoShareModel`; its backbone is set aside meanwhile.
        train, devel: `FrameFeatureStore`.
        score: function of the predicted devel shares (clips, labels) to the labels' ρ (labels,).
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`.
        settings: what must not change between a checkpoint and the run that goes on from it, as a flat dict.

    Returns:
        `Progress`.
    """
    backbone, model.backbone = model.backbone, None  # not needed: neither in memory, nor synchronised, nor checkpointed
    if backbone is not None:
        backbone.to("cpu")
    wrapped, optimizer, loader = prepare_training(model, train, run, accelerator)
    progress = Progress(model, run)
    accelerator.register_for_checkpointing(progress)
    fingerprints = {"train": train.fingerprint, "devel": devel.fingerprint}
    settings = {**settings, **fingerprints, "processes": accelerator.num_processes}
    resume(run, accelerator, progress, settings)

    for epoch in range(progress.epochs_done, run.num_train_epochs):
        if run.restart_dead_heads:
            restart_dead_heads(progress, optimizer, run, train.labels, accelerator)
        if progress.is_over:
            break
        loader.set_epoch(epoch)
        loss = train_epoch(wrapped, optimizer, loader, accelerator, f"Epoch {epoch + 1}/{run.num_train_epochs}")
        shares = predict_shares(wrapped, devel, run.per_device_train_batch_size, accelerator)
        rhos = score(shares)
        progress.update(rhos, is_constant(shares))
        _report(epoch + 1, loss, rhos, progress.dead, train.labels, accelerator)
        save_checkpoint(run, accelerator, progress, settings)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # from here on in float32, as the saved model is used
    progress.restore_best()
    model.backbone = backbone
    model.to(accelerator.device)
    return progress


def prepare_training(model, train, run, accelerator):
    """Adam with the run's learning rate (section 2.5) and shuffled batches; returns model, optimizer and loader."""
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    loader = DataLoader(train, batch_size=run.per_device_train_batch_size, shuffle=True, collate_fn=collate)
    return accelerator.prepare(model, optimizer, loader)


def train_epoch(model, optimizer, loader, accelerator, description):
    """One pass over the training data; returns the mean squared error per share."""
    model.train()
    losses = []
    for batch in tqdm(loader, desc=description, unit=" batches", leave=False):
        output = model(
            input_features=batch["input_features"], attention_mask=batch["attention_mask"], labels=batch["shares"]
        )
        # The loss is a mean over emotions: times their networks, each network has the gradient of its own MSE.
        accelerator.backward(output.loss * len(accelerator.unwrap_model(model).heads))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())
    return float(accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))


def restart_dead_heads(progress, optimizer, run, labels, accelerator):
    """
    Gives dead networks fresh weights, and the optimizer no memory of them; all others go on as they are.

    Args:
        progress: `Progress`, which knows the dead networks and counts the restarts of each.
        optimizer: of the networks.
        run: `RunArguments`: `restart_dead_heads` times at most, with the network's seed + 1, + 2, ...
        labels: label names.
        accelerator: `accelerate.Accelerator`.
    """
    for index in progress.dead:
        network = progress.best[index]
        if network.restarts < run.restart_dead_heads:
            network.restarts += 1
            network.restarted = progress.epochs_done
            seed = (run.head_seeds[index] if run.head_seeds else run.seed) + network.restarts
            initialize_head(progress.model, index, seed)
            for parameter in progress.model.heads[index].parameters():
                optimizer.state.pop(parameter, None)
            accelerator.print(
                f"{labels[index]} is dead: it gives the same share for every devel clip; started anew with seed {seed} "
                f"({network.restarts} of {run.restart_dead_heads})"
            )


def mean_rho(rhos):
    """Mean over the labels that have a ρ; NaN if none has."""
    known = rhos[~np.isnan(rhos)]
    return float(known.mean()) if len(known) else math.nan


def _report(epoch, loss, rhos, dead, labels, accelerator):
    scores = ["dead" if index in dead else f"{rho:.2f}" for index, rho in enumerate(rhos)]
    per_label = ", ".join(f"{label} {score}" for label, score in zip(labels, scores, strict=True))
    accelerator.print(f"epoch {epoch}: loss {loss:.5f}, devel rho {mean_rho(rhos):.3f} ({per_label})")
    values = {f"devel_spearman_{label}": float(rho) for label, rho in zip(labels, rhos, strict=True)}
    accelerator.log({"train_loss": loss, "devel_spearman": mean_rho(rhos), **values}, step=epoch)
