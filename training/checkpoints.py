"""The rolling checkpoint of a training run, and how a run resumes from it."""

import hashlib
import json
import shutil
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..dataset_script.whole_files import put_in_place, sync_all, writing
from .arguments import Arguments, DataArguments, ModelArguments, RunArguments

CHECKPOINT = "checkpoint-epoch-"
KEPT = ". The last checkpoint is kept"
SETTINGS = "run.json"
FILES = "files.json"  # a hash of each of the others


class CheckpointClock:
    """Tells, equally on all processes, whether this many minutes have passed since the last checkpoint."""

    def __init__(self, minutes):
        self.minutes = minutes
        self.restart()

    def restart(self):
        self.started = time.monotonic()

    def is_due(self):
        (passed,) = broadcast_object_list([time.monotonic() - self.started])  # since the start on the main process
        return passed >= 60 * self.minutes


def save_checkpoint(run, accelerator, progress, settings):
    """
    Replaces the last checkpoint by a new one. At any moment, one of the two is complete.

    Args:
        run: `RunArguments`.
        accelerator: `accelerate.Accelerator`, with which `progress` is registered.
        progress: `Progress`.
        settings: what must be unchanged when a run resumes from it, as a flat dict.
    """
    output_dir = Path(run.output_dir)
    folder = output_dir / f"{CHECKPOINT}{progress.epochs_done}"
    unfinished = output_dir / "unfinished-checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    with writing(folder, KEPT, unfinished):
        accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with writing(folder, KEPT, unfinished):
            (unfinished / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
            (unfinished / FILES).write_text(json.dumps(_fingerprints(unfinished)), encoding="utf-8")
            sync_all(unfinished)  # may fail on a full disk, so it comes before anything is removed
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
            put_in_place(unfinished, folder)
        _keep_only(folder, output_dir)
    accelerator.wait_for_everyone()


def _keep_only(folder, output_dir):
    for other in checkpoints(output_dir):
        if other != folder:
            shutil.rmtree(other)


def resume(run, accelerator, progress, settings):
    """
    Restores the checkpoint that `--resume_from_checkpoint` names, if any. For the last one, damaged checkpoints are
    skipped with a message; if all are damaged, the run begins again.

    Raises:
        ValueError: if there is no such checkpoint, or it is damaged, or from a run with other settings.
    """
    found = checkpoints_to_resume(run)
    if run.resume_from_checkpoint is None:
        earlier = checkpoints(run.output_dir)
        if earlier:
            accelerator.print(
                f"{earlier[-1]} of an earlier run will be replaced; to resume from it, add --resume_from_checkpoint"
            )
        return
    if run.resume_from_checkpoint == "last":
        folder = _last_whole(found, settings, accelerator)
        if folder is None:
            return
    else:
        (folder,) = found
        damage = damage_of(folder)
        if damage:
            raise ValueError(f"--resume_from_checkpoint: {folder} is damaged: {damage}")
        check_settings(folder, settings)
    accelerator.load_state(str(folder))
    if run.resume_from_checkpoint == "last" and accelerator.is_main_process:
        _keep_only(folder, run.output_dir)  # an older one may be half removed, if a run was killed
    accelerator.print(f"Resuming after epoch {progress.epochs_done}, from {folder}")


def checkpoints_to_resume(run):
    """
    The checkpoints that `--resume_from_checkpoint` lets a run choose from, oldest first: none if it is not given.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if run.resume_from_checkpoint is None:
        return []
    if run.resume_from_checkpoint == "last":
        found = checkpoints(run.output_dir)
        if not found:
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {run.output_dir}")
        return found
    folder = Path(run.resume_from_checkpoint)
    if not folder.is_dir():
        raise ValueError(f"--resume_from_checkpoint: {folder} does not exist")
    return [folder]


def _last_whole(folders, settings, accelerator):
    """The last checkpoint that is not damaged, or `None`. The main process checks, and tells the others."""
    for folder in reversed(folders):
        damage = None
        if accelerator.is_main_process:
            is_checkpoint = (folder / SETTINGS).is_file()
            damage = damage_of(folder) if is_checkpoint else f"it has no {SETTINGS}"
        (damage,) = broadcast_object_list([damage])
        if not damage:
            check_settings(folder, settings)
            return folder
        accelerator.print(f"{folder} is damaged ({damage}); it is left out")
    accelerator.print("No checkpoint is whole: the run begins again")
    return None


def damage_of(folder):
    """What is wrong with the files of a checkpoint, as text; empty if nothing is, or the folder is no checkpoint."""
    if not (folder / SETTINGS).is_file():
        return ""
    try:
        settings = _read(folder / SETTINGS)
        if not (folder / FILES).is_file():
            # Checkpoints of earlier versions have neither; `check_settings` refuses them.
            return f"it has no {FILES}" if "training_version" in settings else ""
        expected, found = _read(folder / FILES), _fingerprints(folder)
    except (OSError, ValueError) as error:
        return str(error)
    changed = [name for name, fingerprint in expected.items() if found.get(name) != fingerprint]
    return f"not as they were written: {', '.join(changed)}" if changed else ""


def _read(path):
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return values


def _fingerprints(folder):
    """The hash of each file's content, by its path in the folder, without the two files that describe the others."""
    fingerprints = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (SETTINGS, FILES):
            with path.open("rb") as file:
                fingerprints[name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return fingerprints


def check_settings(folder, settings):
    """Raises ValueError if the checkpoint is from a run with other settings."""
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"--resume_from_checkpoint: {folder} is not a checkpoint of train.py: it has no {SETTINGS}")
    # A flag that the checkpoint does not have did not exist then, which is equivalent to its default.
    defaults = Arguments(DataArguments(), ModelArguments(), RunArguments()).values("fixed_on_resume")
    then = {**defaults, **json.loads((folder / SETTINGS).read_text(encoding="utf-8"))}
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
