import json

import pytest

from emoshare.training.checkpoints import check_settings, checkpoints, damage_of


@pytest.mark.parametrize("name", ["run.json", "files.json"])
def test_json_of_another_kind_is_damage(name, tmp_path):
    for other in ("run.json", "files.json"):
        (tmp_path / other).write_text(json.dumps({} if other == "files.json" else {"training_version": 2}))
    assert not damage_of(tmp_path)
    for content in ("[]", "1", "null", '"seed"'):
        (tmp_path / name).write_text(content)
        assert damage_of(tmp_path) == f"{name} holds no JSON object"


def test_a_checkpoint_of_an_earlier_version_is_not_damaged_but_of_another_run(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0}')
    assert not damage_of(tmp_path)
    with pytest.raises(ValueError, match="training_version: None then, 2 now"):
        check_settings(tmp_path, {"seed": 0, "training_version": 2})


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "learning_rate": 0.1, "conv_channels": [8, 4]}')
    settings = {"seed": 0, "learning_rate": 0.1, "conv_channels": (8, 4)}
    check_settings(tmp_path, settings)
    with pytest.raises(ValueError, match="seed: 0 then, 1 now") as error:
        check_settings(tmp_path, {**settings, "seed": 1})
    assert "learning_rate" not in str(error.value)
    with pytest.raises(ValueError, match=r"it has no run\.json"):
        check_settings(tmp_path / "elsewhere", settings)


def test_a_flag_that_did_not_exist_yet_had_its_default(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0}')
    check_settings(tmp_path, {"seed": 0, "mixup": 0.0, "selection": "best_epoch"})
    with pytest.raises(ValueError, match=r"mixup: 0\.0 then, 0\.2 now"):
        check_settings(tmp_path, {"seed": 0, "mixup": 0.2})


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path):
    for name in ("checkpoint-epoch-9", "checkpoint-epoch-10", "checkpoint-epoch-3.bak"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-epoch-9", "checkpoint-epoch-10"]
