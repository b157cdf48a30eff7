"""
Trains the heads on stored frame features, all in one pass over the data. Each emotion keeps the weights of its own best
devel epoch, or those that `--selection` chooses. If a part of the encoder is tuned, which all emotions share, they all
keep the epoch with the best mean.

A head is dead if it predicts the same share for every clip. In the authors' released design this happens when its last
ReLU closes for good: the head then has no gradient and no ρ.
"""

import copy
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import broadcast, tqdm

from ..evaluation.predictions import predict
from ..evaluation.scores import is_constant
from .augmentation import Augmentation
from .batches import FeatureLoader
from .checkpoints import CheckpointClock, resume, save_checkpoint
from .label_weights import smoothed_weights
from .optimization import Optimization
from .precision import training_dtype
from .standardization import fit_standardization
from .steps import Accumulation, EncoderInTraining, heads_in_training, threads_for, train_step
from .user_errors import checking

SHUFFLED_EPOCHS = 3
# Increase this when the same settings lead to different weights: earlier checkpoints are then refused.
TRAINING_VERSION = 4


class Progress:
    """
    The progress of a training run. Checkpoints hold its state.

    Args:
        model: `EmoShareModel`, whose heads train, and any part of its encoder that is not frozen.
        run: `RunArguments`.
        steps_per_epoch: number of updates of the weights in an epoch, for schedules and averages.
        dtype: of an encoder's matrix products.

    Attributes:
        heads: `HeadInTraining`s, in the order of the model's heads.
        encoder: `EncoderInTraining`; `None` if the encoder is frozen, or there is none.
        epochs_done: number of finished epochs.
        dead: indices of the labels whose heads were dead after the last epoch.
        history: a tuple (epoch, index of the label, training loss of its head, ρ on devel) for each epoch and label.
    """

    def __init__(self, model, run, steps_per_epoch=1, dtype=torch.float32):
        self.model = model
        self.run = run
        self.optimization = Optimization.of_run(run, steps_per_epoch)
        self.heads = heads_in_training(model, run.learning_rate, self.optimization, run.selection)
        self.encoder = None
        if model.config.tunes_backbone:
            of_run = run.finetune_learning_rate, self.optimization, run.selection
            self.encoder = EncoderInTraining(model.trained_part(), dtype, *of_run)
        self.epochs_done = 0
        self.dead = []
        self.history = []

    @property
    def parts(self):
        """The heads, and the encoder if it is tuned."""
        return self.heads if self.encoder is None else [*self.heads, self.encoder]

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
        """For each label, the epoch of its weights; 0 if there was no ρ to select by."""
        return [head.best.epoch for head in self.heads for _ in head.labels]

    def update(self, losses, rhos, is_dead):
        """
        Takes the results of an epoch.

        Args:
            losses: training loss of each head that is training.
            rhos: ρ on devel of each label of these heads.
            is_dead: bool for each label of these heads. The ρ of a dead head does not count.
        """
        heads = self.training
        self.epochs_done += 1
        labels = labels_of(heads)
        self.dead = [label for label, dead in zip(labels, is_dead, strict=True) if dead]
        # A part that all labels share has one best epoch for all, and so have heads that train with it.
        has_own_epochs = self.model.config.separate_heads and self.encoder is None
        parts = heads if has_own_epochs else self.parts
        scores = np.where(is_dead, math.nan, rhos) if has_own_epochs else [mean_rho(rhos)] * len(parts)
        for part, score in zip(parts, scores, strict=True):
            part.keep_if_best(self.epochs_done, score)
        loss_of_label = [loss for head, loss in zip(heads, losses, strict=True) for _ in head.labels]
        self.history += zip([self.epochs_done] * len(labels), labels, loss_of_label, map(float, rhos), strict=True)

    def restart_dead_heads(self):
        """
        Re-initialises dead heads, with their seed plus the number of their restarts, and clears their optimizers; each
        head at most `restart_dead_heads` times.

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
        for part in self.parts:
            part.load_weights(part.best.weights)

    def state_dict(self):
        heads = [head.state_dict() for head in self.heads]
        state = {"epochs_done": self.epochs_done, "dead": self.dead, "history": self.history, "heads": heads}
        return state if self.encoder is None else {**state, "encoder": self.encoder.state_dict()}

    def load_state_dict(self, state):
        self.epochs_done = state["epochs_done"]
        self.dead = state["dead"]
        self.history = state["history"]
        for head, of_head in zip(self.heads, state["heads"], strict=True):
            head.load_state_dict(of_head)
        if self.encoder is not None:
            self.encoder.load_state_dict(state["encoder"])


class HeadTrainer:
    """
    Trains a model's heads on the train split, and leaves each with the weights that `--selection` chooses: by default,
    those of its best epoch on devel. Any part of the encoder that is not frozen trains with them.

    Args:
        model: `EmoShareModel`.
        stores: by split, for `train` and `devel`: `FrameFeatureStore`s of what the model's `trained_part` takes, or
            `InputStore`s if that is the feature extractor's output.
        score: function that computes ρ (n,) from predicted devel shares (clips, n) and the indices of their n labels.
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
        steps = -(-len(self.loader) // self.run.gradient_accumulation_steps)
        self.progress = Progress(model, self.run, steps, self.dtype)
        self.encoder = self.progress.encoder
        if self.run.gradient_checkpointing:
            # Before Transformers 5.24 there is only the older name, which later versions warn about.
            name = "activation_checkpointing_enable"
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
        self._make_weights_equal_on_all_processes()
        fit_standardization(self.model, self.loader, accelerator, self.encoder)

    def fit(self):
        """
        Trains until all heads are done or the last epoch is over; resumes from a checkpoint if the run asks for it.

        Returns:
            `Progress`.
        """
        progress, accelerator = self.progress, self.accelerator
        accelerator.print(
            f"Training {len(progress.heads)} head(s) in {str(self.dtype).removeprefix('torch.')}, {len(self.loader)} "
            f"batches per epoch, {self.loader.padding:.1%} of their frames padding"
        )
        if self.encoder is not None:
            size = sum(parameter.numel() for parameter in self.encoder.parameters)
            accelerator.print(
                f"{size:,} weights of the encoder that they share train with them: all emotions have one epoch, chosen "
                "by their mean"
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
                for part in heads if self.encoder is None else progress.parts:
                    stack.enter_context(part.weights_to_score())
                model = self.model.select(labels) if self.encoder is None else self.encoder.model
                shares = predict(model, self.devel_loader, accelerator)
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
        """What must be unchanged when a run resumes from a checkpoint, as a flat dict."""
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
        """One pass over the training data for all of `heads`, for which features are read once."""
        number = self.progress.epochs_done
        self.loader.set_epoch(number)
        self.augmentation.set_epoch(number)
        for part in heads if self.encoder is None else self.progress.parts:
            part.module.train()
        started, waited = time.perf_counter(), self.loader.waited
        losses = []
        description = f"Epoch {number + 1}/{self.run.num_train_epochs}"
        with threads_for(self.model) as num_threads:
            for step, batch in enumerate(tqdm(self.loader, desc=description, unit=" batches", leave=False)):
                name = self.loader.store.input_name
                batch[name] = batch[name].to(self.dtype if self.encoder is None else torch.float32)
                batch = self.augmentation(batch, step)
                place = (self.run.seed, number, step, self.accelerator.process_index)
                where = Accumulation.at(step, self.run.gradient_accumulation_steps, len(self.loader))
                losses.append(train_step(heads, batch, self.accelerator, num_threads, place, self.encoder, where))
        losses = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean").tolist()
        seconds = time.perf_counter() - started
        return Epoch(losses, seconds, (self.loader.waited - waited) / seconds)

    def _make_weights_equal_on_all_processes(self):
        if self.accelerator.num_processes > 1:
            for part in self.progress.parts:
                for parameter in part.parameters:
                    parameter.data.copy_(broadcast(parameter.data))

    def _restart_dead_heads(self):
        for label, seed in self.progress.restart_dead_heads().items():
            self.accelerator.print(
                f"{self.labels[label]} is dead: its head gives the same share for every devel clip; re-initialised "
                f"with seed {seed} ({self.progress.heads[label].best.restarts} of {self.run.restart_dead_heads})"
            )

    def _report(self, epoch, rhos):
        """Prints and logs an epoch; `rhos` are by the index of each label that trained in it."""
        progress = self.progress
        # A head that is done stays at its best score, or keeps its latest weights if it never had one.
        latest = {label: rho for _, label, _, rho in progress.history}
        scores = {
            label: head.best.score if label not in rhos and head.best.epoch else latest[label]
            for head in progress.heads
            for label in head.labels
        }
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
    A control: trains a new model of the same kind for a few epochs on shares of other clips, permuted separately for
    each emotion. Nothing is selected on devel, so its devel ρ should be near 0.

    Args:
        model, stores, score, arguments, accelerator: as in `HeadTrainer`. The model is not changed, unless its encoder
            is tuned: then the encoder must not have been trained yet, and is trained here.

    Returns:
        `np.ndarray`: (clips, labels) predicted devel shares.
    """
    if not model.config.tunes_backbone:
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
    return predict(model.trained_part(), trainer.devel_loader, accelerator)


@dataclass
class Epoch:
    """
    Attributes:
        losses: training loss of each head, the mean over all clips.
        seconds: duration of the epoch.
        waiting: fraction of it spent waiting for data.
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
