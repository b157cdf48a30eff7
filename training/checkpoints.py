"""The rolling checkpoint of a training run, and how a run resumes from it."""

import json
import shutil
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

CHECKPOINT = "checkpoint-epoch-"
SETTINGS = "run.json"


class CheckpointClock:
    """Says, equally on all processes, whether this many minutes have passed since the last checkpoint."""

    def __init__(self, minutes):
        self.minutes = minutes
        self.restart()

    def restart(self):
        self.started = time.monotonic()

    def is_due(self):
        (passed,) = broadcast_object_list([time.monotonic() - self.started])  # of the main process
        return passed >= 60 * self.minutes


def save_checkpoint(run, accelerator, progress, settings):
    """
    Replaces the last checkpoint by a new one; at any moment, one of them is complete.

    Args:
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`, with which `progress` is registered.
        progress: `Progress`.
        settings: what must be the same when a run resumes from it, as a flat dict.
    """
    output_dir = Path(run.output_dir)
    folder = output_dir / f"{CHECKPOINT}{progress.epochs_done}"
    unfinished = output_dir / "unfinished-checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / SETTINGS).write_text(json.dumps(settings))
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        unfinished.rename(folder)
        for other in checkpoints(output_dir):
            if other != folder:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def resume(run, accelerator, progress, settings):
    """
    Restores the checkpoint that `--resume_from_checkpoint` names, if any.

    Raises:
        ValueError: if there is no such checkpoint, or it is from a run with other settings.
    """
    found = checkpoints(run.output_dir)
    if run.resume_from_checkpoint is None:
        if found:
            accelerator.print(
                f"{found[-1]} of an earlier run will be replaced; to resume from it, add --resume_from_checkpoint"
            )
        return
    if run.resume_from_checkpoint == "last":
        if not found:
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {run.output_dir}")
        folder = found[-1]
    else:
        folder = Path(run.resume_from_checkpoint)
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint: {folder} does not exist")
    check_settings(folder, settings)
    accelerator.load_state(str(folder))
    accelerator.print(f"Resuming after epoch {progress.epochs_done}, from {folder}")


def check_settings(folder, settings):
    """Raises ValueError if the checkpoint is from a run with other settings."""
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"--resume_from_checkpoint: {folder} is not a checkpoint of train.py: it has no {SETTINGS}")
    then = json.loads((folder / SETTINGS).read_text())
    now = json.loads(json.dumps(settings))
    changed = [f"{name}: {then.get(name)!r} then, {now[name]!r} now" for name in now if then.get(name) != now[name]]
    if changed:
        raise ValueError(f"--resume_from_checkpoint: {folder} is from another run: " + "; ".join(changed))


def checkpoints(output_dir):
    """The checkpoint folders in `output_dir`, oldest first."""
    folders = {
        int(folder.name.removeprefix(CHECKPOINT)): folder
        for folder in Path(output_dir).glob(f"{CHECKPOINT}*")
        if folder.name.removeprefix(CHECKPOINT).isdigit()
    }
    return [folders[epoch] for epoch in sorted(folders)]
