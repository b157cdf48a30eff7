"""
Trains the heads on stored frame features, all side by side in one pass over the data; each emotion keeps the weights of
its own best devel epoch.

A network is dead that gives the same share for every clip, as the authors' released design does once its last ReLU is
closed for good: it has no gradient then, and no ρ.
"""

import math
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from accelerate.utils import tqdm

from ..losses_emoshare import mse as known_mse
from .batches import FeatureLoader
from .checkpoints import CheckpointClock, resume, save_checkpoint
from .evaluation import is_constant, predict_shares
from .launch import training_dtype


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


class Network:
    """
    One of the model's heads while it trains.

    Args:
        head: the `EmotionHead`.
        labels: the indices of its labels: one, or all of a shared trunk.
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`.
    """

    def __init__(self, head, labels, run, accelerator):
        self.head = head
        self.labels = labels
        self.best = BestEpoch()
        # Adam (paper, section 2.5), one for each network, so that each can stop or start anew by itself.
        optimizer = torch.optim.Adam(head.parameters(), lr=run.learning_rate, fused=True)
        self.trained, self.optimizer = accelerator.prepare(head, optimizer)

    def step(self, features, lengths, shares, accelerator):
        """One step on a batch, in the dtype of its features; returns the mean squared error per known share."""
        with torch.autocast(features.device.type, features.dtype, enabled=features.dtype != torch.float32):
            predicted, _ = self.trained(features, lengths)
        loss = known_mse(predicted, shares[:, self.labels])
        accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def update(self, epoch, score):
        """Takes the score of an epoch, NaN if there is none; keeps the weights if it is the best."""
        best = self.best
        if score > best.score:
            best.score, best.epoch = float(score), epoch
        if best.epoch in (0, epoch):
            best.weights = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}


def networks_of(model, run, accelerator):
    """The model's heads, each with its labels: one label per head, or all of a shared trunk."""
    labels = range(model.config.num_labels)
    of_head = [[label] for label in labels] if model.config.separate_heads else [list(labels)]
    return [Network(head, own, run, accelerator) for head, own in zip(model.heads, of_head, strict=True)]


def release(networks, accelerator):
    """
    Lets go of what trained the networks, while their process group is there. Otherwise, the group would end with the
    last of the DistributedDataParallel wrappers, as Python clears it up: that waits for gloo's thread, which may wait
    for Python (seen in PyTorch 2.11).
    """
    for network in networks:
        network.trained, network.optimizer = None, None
    accelerator.free_memory()


class Progress:
    """
    Where a training run is: the epochs done, and each network's best one. What a checkpoint keeps beside the weights
    and the optimizers.

    Args:
        model: `EmoShareModel`, whose heads are the networks.
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`.
    """

    def __init__(self, model, run, accelerator):
        self.model = model
        self.run = run
        self.networks = networks_of(model, run, accelerator)
        self.epochs_done = 0
        self.dead = []  # indices of the labels that were dead after the last epoch
        self.history = []  # (epoch, index of the label, training loss of its network, ρ on devel)

    @property
    def training(self):
        """The networks that have become better, or started anew, in the last `early_stopping_patience` epochs."""
        patience = self.run.early_stopping_patience
        bests = [network.best for network in self.networks]
        waited = [self.epochs_done - max(best.epoch, best.restarted) for best in bests]
        return [network for network, epochs in zip(self.networks, waited, strict=True) if epochs < patience]

    def update(self, losses, rhos, is_dead):
        """
        Takes what an epoch gave the networks that are training.

        Args:
            losses: (these networks,) training loss.
            rhos: (labels of these networks,) their ρ on devel.
            is_dead: (labels of these networks,) bool. Where a network is dead, its ρ does not count.
        """
        networks = self.training
        self.epochs_done += 1
        labels = labels_of(networks)
        self.dead = [label for label, dead in zip(labels, is_dead, strict=True) if dead]
        scores = np.where(is_dead, math.nan, rhos) if self.model.config.separate_heads else [mean_rho(rhos)]
        for network, score in zip(networks, scores, strict=True):
            network.update(self.epochs_done, score)
        of_label = [loss for network, loss in zip(networks, losses, strict=True) for _ in network.labels]
        self.history += zip([self.epochs_done] * len(labels), labels, of_label, map(float, rhos), strict=True)

    def restart_dead_networks(self, labels, accelerator):
        """
        Gives dead networks fresh weights, from their seed + 1, + 2, ..., and their optimizers no memory of the old
        ones, at most `restart_dead_heads` times each; all others go on as they are.

        Args:
            labels: label names.
            accelerator: `accelerate.Accelerator`.
        """
        for index in self.dead:
            network, best = self.networks[index], self.networks[index].best
            if best.restarts < self.run.restart_dead_heads:
                best.restarts += 1
                best.restarted = self.epochs_done
                seed = (self.run.head_seeds[index] if self.run.head_seeds else self.run.seed) + best.restarts
                self.model.initialize_head(index, seed)
                for parameter in network.head.parameters():
                    network.optimizer.state.pop(parameter, None)
                accelerator.print(
                    f"{labels[index]} is dead: it gives the same share for every devel clip; started anew with seed "
                    f"{seed} ({best.restarts} of {self.run.restart_dead_heads})"
                )

    def restore_best(self):
        for network in self.networks:
            network.head.load_state_dict(network.best.weights)

    def state_dict(self):
        best = [asdict(network.best) for network in self.networks]
        return {"epochs_done": self.epochs_done, "best": best, "dead": self.dead, "history": self.history}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        self.dead = state["dead"]
        self.history = state["history"]
        for network, best in zip(self.networks, state["best"], strict=True):
            network.best = BestEpoch(**best)


def train_heads(model, train, devel, score, run, accelerator, settings):
    """
    Trains the model's heads on `train` and leaves each with the weights of its best epoch on `devel`.

    Args:
        model: `EmoShareModel`; its backbone is set aside meanwhile.
        train, devel: `FrameFeatureStore`.
        score: function of predicted devel shares (clips, n) and the indices of their n labels to the labels' ρ (n,).
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`.
        settings: what must not change between a checkpoint and the run that goes on from it, as a flat dict.

    Returns:
        `Progress`.
    """
    backbone, model.backbone = model.backbone, None  # no room for it on the device, nor in checkpoints
    if backbone is not None:
        backbone.to("cpu")
    progress = Progress(model, run, accelerator)
    loader = FeatureLoader(train, model.config, run.per_device_train_batch_size, accelerator, seed=run.seed)
    devel_loader = FeatureLoader(devel, model.config, run.per_device_train_batch_size, accelerator)
    dtype = training_dtype(run, accelerator.device)
    accelerator.print(
        f"Training {len(progress.networks)} networks in {str(dtype).removeprefix('torch.')}, {len(loader)} batches an "
        f"epoch, {loader.padding:.1%} of their frames padding"
    )
    accelerator.register_for_checkpointing(progress)
    fingerprints = {"train": train.fingerprint, "devel": devel.fingerprint}
    settings = {**settings, **fingerprints, "dtype": str(dtype), "processes": accelerator.num_processes}
    resume(run, accelerator, progress, settings)
    clock = CheckpointClock(run.checkpoint_minutes)

    while progress.epochs_done < run.num_train_epochs:
        if run.restart_dead_heads:
            progress.restart_dead_networks(train.labels, accelerator)
        networks = progress.training
        if not networks:
            break
        loader.set_epoch(progress.epochs_done)
        description = f"Epoch {progress.epochs_done + 1}/{run.num_train_epochs}"
        epoch = train_epoch(networks, loader, accelerator, dtype, description)
        shares = predict_shares([network.head for network in networks], devel_loader, accelerator)
        rhos = score(shares, labels_of(networks))
        progress.update(epoch.losses, rhos, is_constant(shares))
        _report(progress, epoch, networks, rhos, train.labels, accelerator)
        is_over = progress.epochs_done == run.num_train_epochs or not progress.training
        if is_over or clock.is_due():
            save_checkpoint(run, accelerator, progress, settings)
            clock.restart()
    progress.restore_best()
    release(progress.networks, accelerator)
    model.backbone = backbone
    model.to(accelerator.device)
    return progress


def labels_of(networks):
    """The indices of the networks' labels, in their order."""
    return [label for network in networks for label in network.labels]


@dataclass
class Epoch:
    """
    Attributes:
        losses: mean squared error per known share, of each network.
        seconds: how long it took.
        waiting: share of that spent on waiting for data.
    """

    losses: list[float]
    seconds: float
    waiting: float


def train_epoch(networks, loader, accelerator, dtype, description):
    """One pass over the training data for all of `networks`: features are read once for them; returns an `Epoch`."""
    started, waited = time.perf_counter(), loader.waited
    for network in networks:
        network.trained.train()
    losses = []
    for batch in tqdm(loader, desc=description, unit=" batches", leave=False):
        features = batch["features"].to(dtype)
        steps = [network.step(features, batch["lengths"], batch["shares"], accelerator) for network in networks]
        losses.append(torch.stack(steps))
    losses = accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean").tolist()
    seconds = time.perf_counter() - started
    return Epoch(losses, seconds, (loader.waited - waited) / seconds)


def mean_rho(rhos):
    """Mean over the labels that have a ρ; NaN if none has."""
    known = rhos[~np.isnan(rhos)]
    return float(known.mean()) if len(known) else math.nan


def _report(progress, epoch, networks, rhos, labels, accelerator):
    trained = dict(zip(labels_of(networks), rhos, strict=True))
    # A network that has stopped stands where it was best.
    stopped = {label: network.best.score for network in progress.networks for label in network.labels}
    rhos = np.array([trained.get(index, stopped[index]) for index in range(len(labels))])
    scores = []
    for index, rho in enumerate(rhos):
        state = "dead" if index in progress.dead else f"{rho:.2f}"
        scores.append(f"{labels[index]} {state}" + ("" if index in trained else " done"))
    number, loss = progress.epochs_done, np.mean(epoch.losses)
    accelerator.print(
        f"epoch {number}: loss {loss:.5f}, devel rho {mean_rho(rhos):.3f} ({', '.join(scores)}); "
        f"{epoch.seconds:.1f} s, {epoch.waiting:.1%} of it waiting for data"
    )
    values = {f"devel_spearman_{label}": float(rho) for label, rho in zip(labels, rhos, strict=True)}
    accelerator.log(
        {"train_loss": loss, "devel_spearman": mean_rho(rhos), "waiting": epoch.waiting, **values}, step=number
    )
