import os
import sys
from pathlib import Path

import pytest
from conftest import run_command, run_python, run_script

pytestmark = pytest.mark.slow

SCRIPT = """
import torch
from emoshare.training.arguments import parse_arguments
from emoshare.training.launch import start
accelerator = start(parse_arguments(["--output_dir", "out", {flags}]))
print("threads", torch.get_num_threads(), "processes", accelerator.num_processes)
"""


def write_script(folder, *flags):
    path = folder / "start.py"
    path.write_text(SCRIPT.format(flags=", ".join(map(repr, flags))))
    return path


def test_one_process_uses_all_cores_whatever_the_launcher_set(tmp_path):
    output = run_python(write_script(tmp_path), cwd=tmp_path, OMP_NUM_THREADS="1").stdout
    cores = len(os.sched_getaffinity(0))
    assert f"threads {cores} processes 1" in output


def test_several_processes_that_accelerate_does_not_see_are_refused(tmp_path):
    """If accelerate does not know the accelerator that torch reports, each process believes it is the only one."""
    script = write_script(tmp_path)
    script.write_text("import torch\ntorch.accelerator.is_available = lambda: True\n" + script.read_text())
    result = run_command(
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        "--nproc_per_node",
        2,
        script,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode != 0
    assert "2 processes were launched, but accelerate sees one" in result.stderr


def test_a_launch_without_ranks_is_refused_instead_of_waiting_for_the_others(tmp_path):
    result = run_script(write_script(tmp_path), cwd=tmp_path, check=False, WORLD_SIZE="2")
    assert result.returncode != 0
    assert "WORLD_SIZE is 2, but LOCAL_RANK is not set" in result.stderr
    assert "torchrun --nproc_per_node N train.py" in result.stderr


def test_tasks_of_a_cluster_that_were_not_told_of_each_other_are_refused(tmp_path):
    result = run_script(write_script(tmp_path), cwd=tmp_path, check=False, SLURM_STEP_NUM_TASKS="2")
    assert result.returncode != 0
    assert "2 processes were launched, but accelerate sees one" in result.stderr


def test_a_tracker_that_is_not_installed_is_named(tmp_path):
    result = run_script(write_script(tmp_path, "--report_to", "comet_ml"), cwd=tmp_path, check=False)
    assert "'comet_ml' is not installed" in result.stderr


def test_an_unknown_tracker_is_named(tmp_path):
    result = run_script(write_script(tmp_path, "--report_to", "notebook"), cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "notebook" in result.stderr
