"""
The parts of a model that are trained, which are its heads and the part of the encoder that is tuned with them, if any;
and a training step.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch

from ..frames_emoshare import length_mask
from ..threads_emoshare import side_by_side
from .optimization import PLAIN, PartOptimizer
from .randomness import FastMasks, dropout_at, random_at
from .selection import AVERAGED_EPOCHS, BestEpoch, RunningAverage


class PartInTraining:
    """
    A part of a model while it trains, with an optimizer of its own.

    Args:
        module: holds the part; weights that need no gradient are not trained.
        learning_rate: of Adam.
        optimization: `Optimization`.
        selection: which weights are kept, as `--selection`.
    """

    def __init__(self, module, learning_rate, optimization, selection):
        self.module = module
        self.optimizer = PartOptimizer(module, learning_rate, optimization)
        self.selection = selection
        self.average = None
        if selection == "average":
            self.average = RunningAverage(module, AVERAGED_EPOCHS * optimization.steps_per_epoch)
        self.best = BestEpoch()

    @property
    def parameters(self):
        """The weights that are trained."""
        return self.optimizer.parameters

    @property
    def weights(self):
        """The weights that are kept from an epoch, by name."""
        return self.module.state_dict()

    def load_weights(self, weights):
        """Loads weights that were kept from an epoch."""
        self.module.load_state_dict(weights)

    def update_weights(self):
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def weights_to_score(self):
        """Within this context, the model has the weights with which devel is scored: the averages, if there are any."""
        return nullcontext() if self.average is None else self.average.in_place()

    def keep_if_best(self, epoch, score):
        """Takes the score of an epoch, NaN if there is none, and keeps the weights if they are the best so far."""
        self.best.take(self.selection, epoch, score, self.weights)

    def state_dict(self):
        state = {"weights": self.weights, **self.optimizer.state_dict(), "best": asdict(self.best)}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state):
        self.load_weights(state["weights"])
        self.best = BestEpoch(**state["best"])
        self.optimizer.begin(self.best.restarted)
        self.optimizer.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


class HeadInTraining(PartInTraining):
    """
    A head in training, which can stop or restart independently of others.

    Args:
        model: `EmoShareModel`.
        index: of the head.
        labels: indices of its labels: one, or all with a shared trunk.
        learning_rate: of Adam (paper, section 2.5).
        optimization, selection: as in `PartInTraining`.
    """

    def __init__(self, model, index, labels, learning_rate, optimization, selection):
        self.index = index
        self.labels = labels
        self.model = model.select(labels)
        super().__init__(self.model, learning_rate, optimization, selection)

    def compute_gradients(self, batch, place=None, fraction=1.0):
        """
        Forward and backward pass on a batch, in the dtype of its features.

        Args:
            batch: of `FeatureLoader`.
            place: seed of the run, epoch, step and process, which determine the dropout; `None` draws it from the
                global random state.
            fraction: factor on the gradients.

        Returns:
            The batch's part of the loss. Batches of short clips hold more clips than batches of long ones, so this is
            not the batch's own mean, in which a long clip would count for more. It is the sum over the known shares,
            each times the weight of its window, divided by the mean of the summed weights over the epoch's steps. So
            the mean over the steps of all processes is the mean over all known shares, and the gradients add up
            accordingly. A loss that compares clips with each other does so within this process's batch, and is weighted
            by the number of clips.
        """
        features, shares, weights = batch["frame_features"], batch["labels"][:, self.labels], batch["weights"]
        if weights.dim() == 2:  # of each share
            weights = weights[:, self.labels]
        with (
            autocast(features.device, features.dtype),
            nullcontext() if place is None else dropout_at(self.model, *place, self.index),
        ):
            output = self.model(frame_features=features, attention_mask=batch["attention_mask"])
            loss = self.model.loss(output.logits, shares, weights, batch.get("listeners"), output.concentrations)
        of_shares = weights if weights.dim() == 2 else weights[:, None]
        weight = (of_shares * ~shares.isnan()).sum()  # by which `loss` was divided
        loss = loss * weight / batch["weight_per_step"][self.labels].sum().clamp(min=1e-9)
        (loss * fraction).backward()
        return loss.detach()

    def restart(self, epochs_done):
        """Forgets what was learned, after the model was given new initial weights."""
        self.best.restart(epochs_done)
        self.optimizer.begin(epochs_done)
        if self.average is not None:
            self.average.begin()


class EncoderInTraining(PartInTraining):
    """
    The tuned part of a model's encoder, which all heads share: its upper layers, adapters in these, or all of it.

    Args:
        model: `EmoShareModel.trained_part`.
        dtype: of the heads' input, and of the encoder's matrix products.
        learning_rate, optimization, selection: as in `PartInTraining`.
    """

    def __init__(self, model, dtype, learning_rate, optimization, selection):
        self.model = model
        self.dtype = dtype
        module = model.upper_layers
        if module is None:
            module = model.backbone
            model.family.run_all_layers(module)
        super().__init__(module, learning_rate, optimization, selection)

    @property
    def weights(self):
        return {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}

    def load_weights(self, weights):
        self.module.load_state_dict(weights, strict=False)

    def frame_features(self, batch):
        """
        Args:
            batch: of `FeatureLoader`.

        Returns:
            The heads' input, (batch, frames, width) float32, or (batch, layers, frames, width) for `"weighted"`; and
            each clip's number of frames, (batch,) int64.
        """
        with autocast(self.model.device, self.dtype), FastMasks():
            inputs = batch[self.model.main_input_name].float()
            features = self.model.frame_features(inputs, batch["attention_mask"])
        return features.by_layer[self.model.config.backbone_layer].float(), features.lengths

    def compute_gradients(self, batch, train_heads, place=None, num_threads=None):
        """
        Forward and backward pass on a batch, including the heads.

        Args:
            batch: of `FeatureLoader`.
            train_heads: function of a list of batches, one per head, with `frame_features` that need gradients; runs
                each head forward and backward.
            place: as in `HeadInTraining.compute_gradients`.
            num_threads: number of threads for the encoder on a CPU.

        Returns:
            What `train_heads` returns.
        """
        with intra_op_threads(num_threads), nullcontext() if place is None else random_at(self.model.device, *place):
            features, lengths = self.frame_features(batch)
        # Each head has a copy that collects its gradient, so that heads can train side by side on threads.
        of_head = features.detach().to(self.dtype)
        copies = [of_head.detach().requires_grad_() for _ in range(len(self.model.heads))]
        past = {**batch, "attention_mask": length_mask(lengths, features.shape[-2])}
        losses = train_heads([{**past, "frame_features": copy} for copy in copies])
        gradient = torch.zeros_like(features)
        for copy in copies:
            gradient += copy.grad
            copy.grad = None
        with intra_op_threads(num_threads), FastMasks():
            features.backward(gradient)
        return losses


def heads_in_training(model, learning_rate, optimization=PLAIN, selection="best_epoch"):
    """The model's heads, each with its labels: one label per head, or all of a shared trunk."""
    labels = range(model.config.num_labels)
    of_head = [[label] for label in labels] if model.config.separate_heads else [list(labels)]
    return [
        HeadInTraining(model, index, own, learning_rate, optimization, selection) for index, own in enumerate(of_head)
    ]


@dataclass(frozen=True)
class Accumulation:
    """
    The place of a batch among those whose gradients are accumulated for one step.

    Attributes:
        batches: number of batches in the step.
        is_last: whether this batch is the last one, after which the weights are updated.
    """

    batches: int = 1
    is_last: bool = True

    @classmethod
    def at(cls, batch, batches_per_step, batches_per_epoch):
        """For a batch by its number in the epoch, from 0. The last step of an epoch may have fewer batches."""
        first = batch - batch % batches_per_step
        batches = min(batches_per_step, batches_per_epoch - first)
        return cls(batches, batch == first + batches - 1)


ALONE = Accumulation()


def train_step(heads, batch, accelerator, num_threads, place=None, encoder=None, accumulation=ALONE):
    """
    Trains all `heads` on a batch: forward, backward and, after the last batch of a step, the update of the weights.

    Args:
        heads: `HeadInTraining`s.
        batch: of `FeatureLoader`; without an encoder, its features are in the dtype to train in.
        accelerator: `accelerate.Accelerator`.
        num_threads: number of heads that train at a time on a CPU.
        place: as in `HeadInTraining.compute_gradients`.
        encoder: `EncoderInTraining` that trains with the heads; `None` if there is none.
        accumulation: `Accumulation`. The gradient of a step is the mean over its batches and over all processes.

    Returns:
        (heads,) the loss of each head.
    """
    run = partial(side_by_side, num_threads=num_threads if batch["labels"].device.type == "cpu" else 1)
    updates_alone = accumulation.is_last and accelerator.num_processes == 1

    def train_heads(batches):
        tasks = zip(heads, batches, strict=True)
        return torch.stack(run([partial(_train, *task, place, accumulation, updates_alone) for task in tasks]))

    if encoder is None:
        losses = train_heads([batch] * len(heads))
    else:
        losses = encoder.compute_gradients(batch, train_heads, place, num_threads)
    if accumulation.is_last:
        parts = heads if encoder is None else [*heads, encoder]
        if accelerator.num_processes > 1:
            _average_gradients(parts, accelerator)
            run([head.update_weights for head in heads])
        if encoder is not None:
            encoder.update_weights()
    return losses


def _train(head, batch, place, accumulation, updates):
    loss = head.compute_gradients(batch, place, 1 / accumulation.batches)
    if updates:
        head.update_weights()
    return loss


def _average_gradients(parts, accelerator):
    """Replaces gradients by their mean over all processes, with one reduction for all parts."""
    gradients = [parameter.grad for part in parts for parameter in part.parameters if parameter.grad is not None]
    averaged = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, mean in zip(gradients, averaged.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@contextmanager
def threads_for(model):
    """
    Sets the threads with which a model's heads train on a CPU. Separate heads train side by side with one intra-op
    thread each, so that their results do not depend on the number of threads; a shared trunk uses all intra-op threads.

    Yields:
        The number of heads that train at a time.
    """
    num_threads = torch.get_num_threads()
    with intra_op_threads(1 if model.config.separate_heads else num_threads):
        yield num_threads


@contextmanager
def intra_op_threads(number):
    """Within this context, PyTorch uses this many threads on a CPU; `None` changes nothing."""
    before = torch.get_num_threads()
    if number in (None, before):
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device, dtype):
    """Within this context, matrix products are in this dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
