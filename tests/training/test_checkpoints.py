import pytest

from emoshare.training.checkpoints import check_settings, checkpoints


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "learning_rate": 0.1, "conv_channels": [8, 4]}')
    settings = {"seed": 0, "learning_rate": 0.1, "conv_channels": (8, 4)}
    check_settings(tmp_path, settings)
    with pytest.raises(ValueError, match="seed: 0 then, 1 now") as error:
        check_settings(tmp_path, {**settings, "seed": 1})
    assert "learning_rate" not in str(error.value)
    with pytest.raises(ValueError, match=r"it has no run\.json"):
        check_settings(tmp_path / "elsewhere", settings)


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path):
    for name in ("checkpoint-epoch-9", "checkpoint-epoch-10", "checkpoint-epoch-3.bak"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-epoch-9", "checkpoint-epoch-10"]
