"""The clone, the wheel, and the names they must work under."""

import shutil
import subprocess
import zipfile

import pytest
from conftest import ROOT, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the repository, as a clone has them, in a folder whose name is no Python identifier."""
    folder = tmp_path_factory.mktemp("clone") / "emo-share.x"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_tests_run_in_a_folder_of_any_name(clone):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_configuration.py"]
    result = run_python(*arguments, cwd=clone)
    assert " passed" in result.stdout


def test_the_wheel_is_complete_and_importable(clone, tmp_path):
    run_python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, clone, cwd=tmp_path)
    (wheel,) = tmp_path.glob("emoshare-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        archive.extractall(tmp_path / "installed")
    assert {
        "emoshare/modeling_emoshare.py",
        "emoshare/train.py",
        "emoshare/handler.py",
        "emoshare/serving/application.py",
        "emoshare/training/trainer.py",
        "emoshare/conversations/segment_files.py",
        "emoshare/evaluation/paper_results.json",
        "emoshare/evaluation/model_card.md",
        "emoshare/evaluation/model_card_calibration.md",
        "emoshare/reproduction/report.md",
        "emoshare/dataset_script/README.md",
        "emoshare/dataset_script/dataset_card.md",
        "emoshare/metrics/emotion_share_spearman/emotion_share_spearman.py",
        "emoshare/metrics/emotion_share_spearman/spearman.py",
        "emoshare/metrics/emotion_share_spearman/README.md",
        "emoshare/metrics/emotion_share_spearman/index.html",
        "emoshare/metrics/emotion_share_spearman/requirements.txt",
        "emoshare/configs/demo.yaml",
        "emoshare/accelerate_config.yaml",
    } <= names
    assert not [name for name in names if "tests" in name or name.startswith("train")]
    assert "emoshare = emoshare.cli:main" in entry_points
    code = "import emoshare; print(emoshare.__file__); from emoshare.cli import main; main(['train', '--help'])"
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in result.stdout
    assert "usage: emoshare train" in result.stdout
