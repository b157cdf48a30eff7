"""Starts the distributed run that `accelerate launch` or `torchrun` asked for."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed

# For the slowest process: extraction waits for all of them.
LONGEST_WAIT = timedelta(hours=12)
# How the launchers of the field say how many processes they started.
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
HOW_TO_LAUNCH = (
    "Launch with 'torchrun --nproc_per_node N train.py' on CPUs, or with "
    "'accelerate launch --multi_gpu --num_processes N train.py' on GPUs."
)


def start(run, settings):
    """
    Args:
        run: `RunArguments`.
        settings: what an experiment tracker should know of the run, as a flat dict.

    Returns:
        The `Accelerator`: several processes are seen as such, a CPU run uses all cores, seeds are set.

    Raises:
        RuntimeError: if several processes were launched, but each takes itself for the only one.
    """
    launched = max(int(os.environ.get(name, "1")) for name in PROCESS_COUNTS)
    has_rank = int(os.environ.get("LOCAL_RANK", "-1")) >= 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_rank:  # accelerate would wait for the others for ever
        raise RuntimeError(f"WORLD_SIZE is {launched}, but LOCAL_RANK is not set. {HOW_TO_LAUNCH}")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: predictions must be the pipeline's
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # see `training_dtype`
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.output_dir,
    )
    if launched > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees one: each would train and write on its own. "
            + HOW_TO_LAUNCH
        )
    if run.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to: the tracker {run.report_to!r} is not installed")
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread per process.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, _usable_cores() // local_processes))
    set_seed(run.seed)
    accelerator.init_trackers("emoshare", config={name: str(value) for name, value in settings.items()})
    return accelerator


def training_dtype(run, device):
    """
    What heads compute in: bfloat16 where the hardware has it, unless `--mixed_precision` or accelerate's launcher says
    otherwise. Weights, predictions and scores are float32 in any case.
    """
    requested = run.mixed_precision
    if requested == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "bf16"):
            raise ValueError(f"accelerate launch --mixed_precision {launched}: heads train in float32 or bf16")
        has_bfloat16 = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16", False),
        }
        requested = "bf16" if launched == "bf16" or has_bfloat16.get(device.type, lambda: False)() else "no"
    return {"bf16": torch.bfloat16, "no": torch.float32}[requested]


def _usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
