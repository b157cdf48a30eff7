"""
Trains the heads on stored frame features, all in one pass over the data; each emotion keeps the weights of its own best
devel epoch, or what else `--selection` says.

A head is dead if it gives the same share for every clip. In the authors' released design this happens when its last
ReLU closes for good: then it has no gradient and no ρ.
"""

import copy
import math
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate.utils import broadcast, tqdm

from ..evaluation.predictions import predict
from ..evaluation.scores import is_constant
from ..threads_emoshare import side_by_side
from .augmentation import Augmentation
from .batches import FeatureLoader
from .checkpoints import CheckpointClock, resume, save_checkpoint
from .label_weights import smoothed_weights
from .optimization import PLAIN, HeadOptimizer, Optimization
from .precision import training_dtype
from .randomness import dropout_at
from .selection import AVERAGED_EPOCHS, BestEpoch, RunningAverage
from .standardization import fit_standardization
from .user_errors import checking

SHUFFLED_EPOCHS = 3
# Increase it when the same settings train other weights: a run that began before does not resume.
TRAINING_VERSION = 2


class HeadInTraining:
    """
    One of a model's heads while it trains, with an optimizer of its own, so that it can stop or restart by itself.

    Args:
        model: `EmoShareModel`.
        index: of the head.
        labels: indices of its labels: one, or all with a shared trunk.
        learning_rate: of Adam (paper, section 2.5).
        optimization: `Optimization`.
        selection: as `--selection`: which weights are kept.
    """

    def __init__(self, model, index, labels, learning_rate, optimization, selection):
        self.index = index
        self.labels = labels
        self.model = model.select(labels)
        self.optimizer = HeadOptimizer(self.model, learning_rate, optimization)
        self.selection = selection
        self.average = None
        if selection == "average":
            self.average = RunningAverage(self.model, AVERAGED_EPOCHS * optimization.steps_per_epoch)
        self.best = BestEpoch()

    def compute_gradients(self, batch, place=None):
        """
        Forward and backward pass on a batch, in the dtype of its features.

        Args:
            batch: of `FeatureLoader`.
            place: seed of the run, epoch, step and process, which decide the dropout; `None` leaves it to the global
                random state.

        Returns:
            The batch's part of the loss. A batch of short clips holds many and one of long clips few, so it is not the
            batch's own mean, in which a long clip would count for more: it is the sum over the known shares, each by
            its window's weight, divided by what such a sum is on average over the epoch's steps. The mean over the
            steps of all processes is then the mean over all known shares, and so is what the gradients sum up to. A
            loss that compares the clips of a batch with each other is that of the batch as a whole, of this process's
            own clips, and counts by how many they are.
        """
        features, shares, weights = batch["frame_features"], batch["labels"][:, self.labels], batch["weights"]
        if weights.dim() == 2:  # of each share
            weights = weights[:, self.labels]
        with (
            torch.autocast(features.device.type, features.dtype, enabled=features.dtype != torch.float32),
            nullcontext() if place is None else dropout_at(self.model, *place, self.index),
        ):
            output = self.model(frame_features=features, attention_mask=batch["attention_mask"])
            loss = self.model.loss(output.logits, shares, weights, batch.get("listeners"), output.concentrations)
        of_shares = weights if weights.dim() == 2 else weights[:, None]
        weight = (of_shares * ~shares.isnan()).sum()  # which `loss` has divided by
        loss = loss * weight / batch["weight_per_step"][self.labels].sum().clamp(min=1e-9)
        loss.backward()
        return loss.detach()

    def update_weights(self):
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def weights_to_score(self):
        """Within this context, the model has the weights that devel is scored with: the averages, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    def keep_if_best(self, epoch, score):
        """Takes the score of an epoch, NaN if there is none; keeps the weights if they are the ones to keep so far."""
        self.best.take(self.selection, epoch, score, self.model.state_dict())

    def restart(self, epochs_done):
        """Forgets what was learned: the model has new initial weights."""
        self.best.restart(epochs_done)
        self.optimizer.begin(epochs_done)
        if self.average is not None:
            self.average.begin()

    def state_dict(self):
        state = {"weights": self.model.state_dict(), **self.optimizer.state_dict(), "best": asdict(self.best)}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state):
        self.model.load_state_dict(state["weights"])
        self.best = BestEpoch(**state["best"])
        self.optimizer.begin(self.best.restarted)
        self.optimizer.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def heads_in_training(model, learning_rate, optimization=PLAIN, selection="best_epoch"):
    """The model's heads, each with its labels: one label per head, or all of a shared trunk."""
    labels = range(model.config.num_labels)
    of_head = [[label] for label in labels] if model.config.separate_heads else [list(labels)]
    return [
        HeadInTraining(model, index, own, learning_rate, optimization, selection) for index, own in enumerate(of_head)
    ]


def train_step(heads, batch, accelerator, num_threads, place=None):
    """
    One step of all `heads` on a batch: forward, backward, and the update of the weights.

    Args:
        heads: `HeadInTraining`s.
        batch: of `FeatureLoader`, its features in the dtype to train in.
        accelerator: `accelerate.Accelerator`.
        num_threads: heads that train at a time on a CPU.
        place: as in `HeadInTraining.compute_gradients`.

    Returns:
        (heads,) the loss of each.
    """
    run = partial(side_by_side, num_threads=num_threads if batch["labels"].device.type == "cpu" else 1)
    if accelerator.num_processes == 1:
        return torch.stack(run([partial(_step_alone, head, batch, place) for head in heads]))
    losses = run([partial(head.compute_gradients, batch, place) for head in heads])
    _average_gradients(heads, accelerator)
    run([head.update_weights for head in heads])
    return torch.stack(losses)


@contextmanager
def threads_for(model):
    """
    How a model's heads train on a CPU: several of them side by side, with one intra-op thread each, so that their
    results do not depend on the number of threads; a single trunk with all intra-op threads.

    Yields:
        How many heads train at a time.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1 if model.config.separate_heads else num_threads)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)


def _step_alone(head, batch, place):
    loss = head.compute_gradients(batch, place)
    head.update_weights()
    return loss


def _average_gradients(heads, accelerator):
    """Replaces gradients by their mean over all processes, in one exchange for all heads."""
    gradients = [
        parameter.grad for head in heads for parameter in head.model.parameters() if parameter.grad is not None
    ]
    averaged = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, averaged.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Progress:
    """
    Where a training run is. Checkpoints hold its state.

    Args:
        model: `EmoShareModel`, whose heads train.
        run: `RunArguments`.
        steps_per_epoch: on each process, by which schedules and averages are measured.

    Attributes:
        heads: `HeadInTraining`s, in the order of the model's heads.
        epochs_done: number of finished epochs.
        dead: indices of the labels whose heads were dead after the last epoch.
        history: a tuple (epoch, index of the label, training loss of its head, ρ on devel) per epoch and label.
    """

    def __init__(self, model, run, steps_per_epoch=1):
        self.model = model
        self.run = run
        self.optimization = Optimization.of_run(run, steps_per_epoch)
        self.heads = heads_in_training(model, run.learning_rate, self.optimization, run.selection)
        self.epochs_done = 0
        self.dead = []
        self.history = []

    @property
    def training(self):
        """The heads that have improved or restarted within the last `early_stopping_patience` epochs."""
        return [
            head
            for head in self.heads
            if self.epochs_done - max(head.best.epoch, head.best.restarted) < self.run.early_stopping_patience
        ]

    @property
    def selected(self):
        """The epoch of each label's weights, in the order of the labels; 0 if there was no ρ to select by."""
        return [head.best.epoch for head in self.heads for _ in head.labels]

    def update(self, losses, rhos, is_dead):
        """
        Takes the results of an epoch of the heads that are training.

        Args:
            losses: (these heads,) training loss.
            rhos: (labels of these heads,) their ρ on devel.
            is_dead: (labels of these heads,) bool. The ρ of a dead head does not count.
        """
        heads = self.training
        self.epochs_done += 1
        labels = labels_of(heads)
        self.dead = [label for label, dead in zip(labels, is_dead, strict=True) if dead]
        scores = np.where(is_dead, math.nan, rhos) if self.model.config.separate_heads else [mean_rho(rhos)]
        for head, score in zip(heads, scores, strict=True):
            head.keep_if_best(self.epochs_done, score)
        loss_of_label = [loss for head, loss in zip(heads, losses, strict=True) for _ in head.labels]
        self.history += zip([self.epochs_done] * len(labels), labels, loss_of_label, map(float, rhos), strict=True)

    def restart_dead_heads(self):
        """
        Re-initialises dead heads, with their seed + 1, + 2, ..., and clears their optimizers, at most
        `restart_dead_heads` times each.

        Returns:
            `dict` from the index of each such label to its new seed.
        """
        seeds = {}
        for label in self.dead:
            head, best = self.heads[label], self.heads[label].best
            if best.restarts < self.run.restart_dead_heads:
                head.restart(self.epochs_done)
                seeds[label] = (self.run.head_seeds[label] if self.run.head_seeds else self.run.seed) + best.restarts
                self.model.initialize_head(head.index, seeds[label])
        return seeds

    def restore_best(self):
        for head in self.heads:
            head.model.load_state_dict(head.best.weights)

    def state_dict(self):
        heads = [head.state_dict() for head in self.heads]
        return {"epochs_done": self.epochs_done, "dead": self.dead, "history": self.history, "heads": heads}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        self.dead = state["dead"]
        self.history = state["history"]
        for head, of_head in zip(self.heads, state["heads"], strict=True):
            head.load_state_dict(of_head)


class HeadTrainer:
    """
    Trains a model's heads on the train split, and leaves each with the weights that `--selection` chooses: by default,
    those of its best epoch on devel.

    Args:
        model: `EmoShareModel`.
        stores: `FrameFeatureStore` of `train` and `devel`.
        score: function of predicted devel shares (clips, n) and the indices of their n labels to the labels' ρ (n,).
        arguments: `Arguments`.
        accelerator: `accelerate.Accelerator`.
    """

    def __init__(self, model, stores, score, arguments, accelerator):
        self.model = model.to(accelerator.device)
        self.score = score
        self.arguments = arguments
        self.run = arguments.run
        self.accelerator = accelerator
        self.labels = model.config.labels
        self.dtype = training_dtype(self.run.mixed_precision, accelerator.device)
        batch_size = self.run.per_device_train_batch_size
        train = stores["train"]
        share_weights = smoothed_weights(train.shares) if self.run.label_weights == "smoothed" else None
        self.loader = FeatureLoader(train, model.config, batch_size, accelerator, self.run.seed, share_weights)
        self.devel_loader = FeatureLoader(stores["devel"], model.config, batch_size, accelerator)
        self.augmentation = Augmentation(self.run, model.config, stores["train"], accelerator)
        self.progress = Progress(model, self.run, len(self.loader))
        self._make_weights_equal_on_all_processes()
        fit_standardization(self.model, self.loader, accelerator)

    def fit(self):
        """
        Trains until all heads are done, or the epochs are over; resumes from a checkpoint if the run asks for it.

        Returns:
            `Progress`.
        """
        progress, accelerator = self.progress, self.accelerator
        accelerator.print(
            f"Training {len(progress.heads)} head(s) in {str(self.dtype).removeprefix('torch.')}, {len(self.loader)} "
            f"batches per epoch, {self.loader.padding:.1%} of their frames padding"
        )
        accelerator.register_for_checkpointing(progress)
        with checking(is_of_all=True):
            resume(self.run, accelerator, progress, self.settings)
        clock = CheckpointClock(self.run.checkpoint_minutes)
        while progress.training and progress.epochs_done < self.run.num_train_epochs:
            self._restart_dead_heads()
            heads = progress.training
            epoch = self.train_epoch(heads)
            labels = labels_of(heads)
            with ExitStack() as stack:
                for head in heads:
                    stack.enter_context(head.weights_to_score())
                shares = predict(self.model.select(labels), self.devel_loader, accelerator)
                rhos = self.score(shares, labels)
                progress.update(epoch.losses, rhos, is_constant(shares))
            self._report(epoch, dict(zip(labels, rhos, strict=True)))
            is_over = progress.epochs_done == self.run.num_train_epochs or not progress.training
            if is_over or clock.is_due():
                save_checkpoint(self.run, accelerator, progress, self.settings)
                clock.restart()
        progress.restore_best()
        return progress

    @property
    def settings(self):
        """What must be the same when a run resumes from a checkpoint, as a flat dict."""
        settings = self.arguments.values("fixed_on_resume")
        if self.progress.optimization.depends_on_epochs:
            settings["num_train_epochs"] = self.run.num_train_epochs
        return {
            **settings,
            "train": self.loader.store.fingerprint,
            "devel": self.devel_loader.store.fingerprint,
            "dtype": str(self.dtype),
            "processes": self.accelerator.num_processes,
            "training_version": TRAINING_VERSION,
        }

    def train_epoch(self, heads):
        """One pass over the training data for all of `heads`, which share the reading of features."""
        number = self.progress.epochs_done
        self.loader.set_epoch(number)
        self.augmentation.set_epoch(number)
        for head in heads:
            head.model.train()
        started, waited = time.perf_counter(), self.loader.waited
        losses = []
        description = f"Epoch {number + 1}/{self.run.num_train_epochs}"
        with threads_for(self.model) as num_threads:
            for step, batch in enumerate(tqdm(self.loader, desc=description, unit=" batches", leave=False)):
                batch["frame_features"] = batch["frame_features"].to(self.dtype)
                batch = self.augmentation(batch, step)
                place = (self.run.seed, number, step, self.accelerator.process_index)
                losses.append(train_step(heads, batch, self.accelerator, num_threads, place))
        losses = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean").tolist()
        seconds = time.perf_counter() - started
        return Epoch(losses, seconds, (self.loader.waited - waited) / seconds)

    def _make_weights_equal_on_all_processes(self):
        if self.accelerator.num_processes > 1:
            for parameter in self.model.heads.parameters():
                parameter.data.copy_(broadcast(parameter.data))

    def _restart_dead_heads(self):
        for label, seed in self.progress.restart_dead_heads().items():
            self.accelerator.print(
                f"{self.labels[label]} is dead: its head gives the same share for every devel clip; re-initialised "
                f"with seed {seed} ({self.progress.heads[label].best.restarts} of {self.run.restart_dead_heads})"
            )

    def _report(self, epoch, rhos):
        """Prints and logs an epoch; `rhos` by the index of each label that trained in it."""
        progress = self.progress
        # A head that is done stays at its best score.
        scores = {label: rhos.get(label, head.best.score) for head in progress.heads for label in head.labels}
        texts = []
        for index, label in enumerate(self.labels):
            text = "dead" if index in progress.dead else f"{scores[index]:.2f}"
            texts.append(f"{label} {text}" + ("" if index in rhos else " done"))
        number, loss, mean = progress.epochs_done, np.mean(epoch.losses), mean_rho(np.array(list(scores.values())))
        self.accelerator.print(
            f"epoch {number}: loss {loss:.5f}, devel rho {mean:.3f} ({', '.join(texts)}); "
            f"{epoch.seconds:.1f} s, {epoch.waiting:.1%} of it waiting for data"
        )
        values = {f"devel_spearman_{label}": float(scores[index]) for index, label in enumerate(self.labels)}
        self.accelerator.log(
            {"train_loss": loss, "devel_spearman": mean, "waiting": epoch.waiting, **values}, step=number
        )


def predict_after_shuffling(model, stores, score, arguments, accelerator):
    """
    A control: trains a new model of the same kind for a few epochs on shares that belong to other clips, permuted
    separately for each emotion. Nothing is selected on devel, so its devel ρ should be near 0.

    Args:
        model, stores, score, arguments, accelerator: as in `HeadTrainer`; the model stays as it is.

    Returns:
        `np.ndarray`: (clips, labels) predicted devel shares.
    """
    model = copy.deepcopy(model.select(range(model.config.num_labels)))
    for index in range(len(model.heads)):
        model.initialize_head(index, arguments.run.seed + index)
    train = copy.copy(stores["train"])
    train.shares = np.random.default_rng(arguments.run.seed).permuted(train.shares, axis=0)
    arguments = replace(arguments, run=replace(arguments.run, num_train_epochs=SHUFFLED_EPOCHS))
    trainer = HeadTrainer(model, {**stores, "train": train}, score, arguments, accelerator)
    for _ in range(SHUFFLED_EPOCHS):
        trainer.train_epoch(trainer.progress.heads)
        trainer.progress.epochs_done += 1
    return predict(model, trainer.devel_loader, accelerator)


@dataclass
class Epoch:
    """
    Attributes:
        losses: training loss of each head, the mean over all clips.
        seconds: how long it took.
        waiting: fraction of that spent on waiting for data.
    """

    losses: list[float]
    seconds: float
    waiting: float


def labels_of(heads):
    """The indices of the heads' labels, in their order."""
    return [label for head in heads for label in head.labels]


def mean_rho(rhos):
    """Mean over the labels that have a ρ; NaN if none has."""
    known = rhos[~np.isnan(rhos)]
    return float(known.mean()) if len(known) else math.nan
