"""Starts the distributed run that `accelerate launch` or `torchrun` asked for."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed

from .precision import keep_float32, training_dtype
from .user_errors import checking

# Extraction waits for the slowest process.
LONGEST_WAIT = timedelta(hours=12)
# Environment variables in which launchers put the number of processes.
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
HOW_TO_LAUNCH = (
    "Launch with 'torchrun --nproc_per_node N train.py' on CPUs, or with "
    "'accelerate launch --multi_gpu --num_processes N train.py' on GPUs."
)


def start(arguments):
    """
    Starts a run: seeds are set, a CPU run uses all cores, and an experiment tracker gets the settings.

    Args:
        arguments: `Arguments`.

    Returns:
        The `Accelerator` of all processes.

    Raises:
        UserError: if several processes were launched, but each would run as if it were alone; or the device or this
            installation does not support what a flag asks for.
    """
    with checking(is_of_all=True):
        return _start(arguments)


def _start(arguments):
    run = arguments.run
    launched = max(int(os.environ.get(name, "1")) for name in PROCESS_COUNTS)
    has_rank = int(os.environ.get("LOCAL_RANK", "-1")) >= 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not has_rank:  # accelerate would wait for the others forever
        raise ValueError(f"WORLD_SIZE is {launched}, but LOCAL_RANK is not set. {HOW_TO_LAUNCH}")
    keep_float32()  # predictions must equal those of the pipeline on a CPU
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # see `training_dtype`
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.output_dir,
    )
    if launched > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees one: each would train and write on its own. "
            + HOW_TO_LAUNCH
        )
    if run.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to: the tracker {run.report_to!r} is not installed")
    training_dtype(run.mixed_precision, accelerator.device)  # raises if the device does not support it
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread per process.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, _usable_cores() // local_processes))
    set_seed(run.seed)
    settings = arguments.values("changes_results")
    accelerator.init_trackers("emoshare", config={name: str(value) for name, value in settings.items()})
    return accelerator


def _usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
