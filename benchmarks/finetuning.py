"""
Fine-tuning the encoder's upper layers: training from stored hidden states against training from waveforms.

    python benchmarks/finetuning.py

The encoder has the size of HuBERT Base and random weights; its last three layers train. A step is forward, backward and
update, on clips of 4 s. From waveforms, it runs either the same model, whose frozen part is fast and in eval mode, or,
as in a plain training loop, Transformers' HuBERT in training mode with its lower part frozen. It is measured with a
shared trunk, and with nine heads of the released sizes, which take most of the time of a step. The limit is the ratio
of the encoder's operations with and without the store.

Then come, in processes of their own, the peak memory of a step of 32 clips, against that of the heads alone plus Adam's
state for the tuned layers; the differences of losses and gradients between store and waveforms, for each dtype of the
store; and a task that needs tuning.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
from accelerate import Accelerator
from inference import encoder_operations, front_end_counts
from machine import DEVICE, PeakMemory, describe, least_cpu_seconds, seconds_of
from marked_frames import marked_frames, through
from transformers import AutoModel, HubertConfig

from emoshare import EMOTIONS, EmoShareConfig, EmoShareModel
from emoshare.evaluation.scores import Scorer
from emoshare.training.arguments import Arguments, DataArguments, ModelArguments, RunArguments
from emoshare.training.optimization import PLAIN
from emoshare.training.precision import training_dtype
from emoshare.training.steps import EncoderInTraining, heads_in_training, threads_for, train_step
from emoshare.training.trainer import HeadTrainer

LAYERS, SAMPLES = 3, 64000
CLIPS_PER_STEP, CLIPS_IN_MEMORY, ROUNDS = 16, 32, 2
ACCELERATOR = Accelerator(cpu=DEVICE.type == "cpu")
KINDS = ("heads alone", "three layers", "three layers, gradient checkpointing")
GIGABYTE = 1e9


def main():
    print(describe())
    print("\n| heads, dtype | from the store | from waveforms | Transformers from waveforms | speed-up over both |")
    print("|---|---|---|---|---|")
    for dtype in dict.fromkeys([training_dtype("auto", DEVICE), torch.float32]):
        for separate_heads in (False, True):
            print_steps(dtype, separate_heads)
    print_limit()
    print_memory()
    print_differences()
    print_task()


def tuned_model(separate_heads=True):
    torch.manual_seed(0)
    config = EmoShareConfig(backbone_config=HubertConfig(), finetuned_layers=LAYERS, separate_heads=separate_heads)
    return EmoShareModel(config).to(DEVICE)


def batches(model, clips):
    """The same clips from the store and from waveforms."""
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randn(clips, SAMPLES, generator=generator).to(DEVICE)
    with torch.no_grad():
        layer = model.config.backbone_config.num_hidden_layers - LAYERS
        states = model.frame_features(waveforms, layers=[layer]).by_layer[layer]
    common = {
        "labels": torch.rand(clips, len(EMOTIONS), generator=generator).to(DEVICE),
        "weights": torch.ones(clips, device=DEVICE),
        "weight_per_step": torch.full((len(EMOTIONS),), float(clips), device=DEVICE),
    }
    stored = {"frame_features": states, "attention_mask": torch.ones(states.shape[:2], device=DEVICE), **common}
    return stored, {"input_values": waveforms, "attention_mask": torch.ones_like(waveforms), **common}


class PlainEncoder(EncoderInTraining):
    """Transformers' own encoder as in a plain training loop: in training mode, with its lower part frozen."""

    def __init__(self, model, dtype):
        super().__init__(model, dtype, 1e-5, PLAIN, "best_epoch")
        self.plain = AutoModel.from_config(HubertConfig(layerdrop=0.0, apply_spec_augment=False)).to(DEVICE).train()
        self.plain.requires_grad_(False)
        self.plain.encoder.layers[-LAYERS:].requires_grad_(True)
        self.optimizer = type(self.optimizer)(self.plain, 1e-5, PLAIN)

    def frame_features(self, batch):
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.plain(batch["input_values"]).last_hidden_state
        return features.float(), torch.full((len(features),), features.shape[1], device=DEVICE)


def print_steps(dtype, separate_heads):
    model = tuned_model(separate_heads).train()
    stored, waveforms = batches(model, CLIPS_PER_STEP)
    ways = {
        "store": (encoder_of(model.trained_part(), dtype), stored),
        "waveforms": (encoder_of(model, dtype), waveforms),
        "plain": (PlainEncoder(model, dtype), waveforms),
    }
    heads = heads_in_training(model, 1e-4)
    seconds = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):  # the first round is a warm-up
        for name, (encoder, batch) in ways.items():
            step = partial(step_of, model, heads, encoder, batch)
            seconds[name].append(seconds_of(step) if DEVICE.type == "cuda" else least_cpu_seconds(step, 1)[0])
    store, ours, plain = (min(seconds[name][1:]) for name in ways)
    name = f"{'nine heads' if separate_heads else 'one trunk'}, {str(dtype).removeprefix('torch.')}"
    print(
        f"| {name} | {store:.2f} s | {ours:.2f} s | {plain:.2f} s | {ours / store:.2f}x, {plain / store:.2f}x |",
        flush=True,
    )


def print_limit():
    """Prints the limit without heads, if all operations take the same time; backward counts as two forward passes."""
    front_end, _, frames = front_end_counts(HubertConfig(), SAMPLES)
    lower = encoder_operations(HubertConfig(num_hidden_layers=HubertConfig().num_hidden_layers - LAYERS), frames)
    tuned = 3 * (encoder_operations(HubertConfig(), frames) - lower)
    ratio = (front_end + lower + tuned) / tuned
    print(f"\nOperations of the encoder: from waveforms {ratio:.2f} times those from the store")


def encoder_of(model, dtype):
    return EncoderInTraining(model, dtype, 1e-5, PLAIN, "best_epoch")


def step_of(model, heads, encoder, batch):
    with threads_for(model) as num_threads:
        train_step(heads, batch, ACCELERATOR, num_threads, (0, 0, 0, 0), encoder)


def print_memory():
    """
    Runs each kind in a process of its own, because freed memory of one would be reused by the next. With this variable,
    glibc returns freed memory at once, so that only memory in use counts.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    peaks = [
        float(subprocess.check_output([sys.executable, __file__, "--peak", kind], env=environment)) for kind in KINDS
    ]
    model = tuned_model()
    state = 2 * 4 * sum(weight.numel() for weight in model.backbone.parameters() if weight.requires_grad) / GIGABYTE
    print(f"\nPeak memory, {CLIPS_IN_MEMORY} clips of 4 s, nine heads of the released sizes, float32:")
    for kind, peak in zip(KINDS, peaks, strict=True):
        print(f"  {kind}: {peak:.2f} GB, {peak / (peaks[0] + state):.2f} times the heads plus {state:.2f} GB of Adam")


def print_peak(kind):
    """Prints the peak memory of two steps, in gigabytes."""
    model = tuned_model().train()
    if "checkpointing" in kind:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch, _ = batches(model, CLIPS_IN_MEMORY)
    heads = heads_in_training(model, 1e-4)
    encoder = None if kind == KINDS[0] else encoder_of(model.trained_part(), torch.float32)
    with PeakMemory() as memory:
        for _ in range(2):
            step_of(model, heads, encoder, batch)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else memory.peak
    print(peak / GIGABYTE)


def print_differences():
    """Prints the largest difference of losses, and the relative norm of that of gradients, without dropout."""
    model = tuned_model(separate_heads=False).eval()
    stored, waveforms = batches(model, CLIPS_PER_STEP)
    losses, gradients = computed(model, model, waveforms)
    print("\nStore against waveforms, float32: largest difference of a loss; relative difference of gradients:")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = {**stored, "frame_features": stored["frame_features"].to(dtype)}
        own_losses, own_gradients = computed(model, model.trained_part(), rounded)
        of_losses = (own_losses - losses).abs().max().item()
        of_gradients = norm(own_gradients[name] - gradient for name, gradient in gradients.items())
        of_gradients /= norm(gradients.values())
        print(f"  store in {str(dtype).removeprefix('torch.')}: {of_losses:.1e}; {of_gradients:.1e}")


def norm(tensors):
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def computed(model, part, batch):
    heads = heads_in_training(model, 1e-4)
    losses = encoder_of(part, torch.float32).compute_gradients(
        batch,
        lambda of_heads: torch.stack([head.compute_gradients(own) for head, own in zip(heads, of_heads, strict=True)]),
    )
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return losses, gradients


def print_task():
    """Prints the best mean ρ on devel of linear heads on frozen random layers, and with these layers tuned."""
    small = HubertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    fields = {"backbone_config": small, "architecture": "statistics", "id2label": {0: "first", 1: "second"}}
    rhos = {}
    for layers in (0, 2):
        torch.manual_seed(0)
        model = EmoShareModel(EmoShareConfig(finetuned_layers=2, **fields))
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        stores = {"train": marked_frames(400, seed=1), "devel": marked_frames(200, seed=2)}
        if not layers:
            stores = {split: through(model, store) for split, store in stores.items()}
            torch.manual_seed(0)
            model = EmoShareModel(EmoShareConfig(**fields))
        rhos[layers] = best_mean(model, stores, layers)
        for name, weight in model.state_dict().items():
            is_trained = name.startswith("heads.") or (layers and name.startswith("backbone.encoder.layers."))
            if not is_trained and not torch.equal(weight.cpu(), before[name]):
                raise RuntimeError(f"{name} was frozen, and has changed")
    print(
        f"\nMean rho of a task that needs tuning: frozen {rhos[0]:.3f}, tuned {rhos[2]:.3f}; frozen weights unchanged"
    )


def best_mean(model, stores, layers):
    scorer = Scorer(stores["devel"].shares, list(model.config.labels))
    rate = {"finetune_learning_rate": 3e-3} if layers else {}
    with tempfile.TemporaryDirectory() as folder:
        run = RunArguments(output_dir=folder, num_train_epochs=8, learning_rate=3e-3, mixed_precision="no", **rate)
        arguments = Arguments(DataArguments(), ModelArguments(backbone="a/b", finetune_last_layers=layers), run)
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        accelerator.print = lambda *_: None
        progress = HeadTrainer(model, stores, scorer.rhos, arguments, accelerator).fit()
    return sum(head.best.score for head in progress.heads) / len(progress.heads)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print_peak(sys.argv[-1])
    else:
        started = time.perf_counter()
        main()
        print(f"\n{time.perf_counter() - started:.0f} s in all")
