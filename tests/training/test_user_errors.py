"""Errors that the user of a run can fix are reported once, without a traceback."""

import pytest

from emoshare.training import user_errors
from emoshare.training.user_errors import UserError, checking, run_entry_point, together


def fail_with(error):
    def fail(*_):
        raise error

    return fail


def parse(argv, name):
    return argv


def refuse(argv, name):
    print("usage: ...")
    raise SystemExit(2)


@pytest.fixture
def _second_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(user_errors, "TIME_TO_SPEAK", 0)


@pytest.mark.parametrize("error", [UserError("--data_dir: nothing there"), OSError("--data_dir: nothing there")])
def test_an_error_is_a_line_and_an_exit_code(error, capsys):
    assert run_entry_point("train.py", parse, fail_with(error), []) == 2
    assert capsys.readouterr().err == "train.py: error: --data_dir: nothing there\n"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError, KeyError])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(error, match="a bug"):
        run_entry_point("train.py", parse, fail_with(error("a bug")), [])


def test_a_file_of_flags_that_cannot_be_read_is_an_error_too(capsys):
    assert run_entry_point("train.py", fail_with(PermissionError("a.yaml: no")), list, []) == 2
    assert capsys.readouterr().err == "train.py: error: a.yaml: no\n"


def test_the_exit_code_is_that_of_the_run():
    assert run_entry_point("train.py", parse, lambda _: None, []) == 0
    assert run_entry_point("reproduce.py", parse, lambda _: 1, []) == 1


@pytest.mark.usefixtures("_second_process")
def test_what_all_processes_find_is_reported_by_the_main_one_alone(capsys):
    error = UserError("no", is_of_all=True)
    for parser, run in [(parse, fail_with(error)), (refuse, list), (fail_with(PermissionError("no")), list)]:
        with pytest.raises(SystemExit) as end:
            run_entry_point("train.py", parser, run, [])
        assert end.value.code == 2
        assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("_second_process")
def test_what_one_process_finds_is_reported_by_itself(capsys):
    assert run_entry_point("train.py", parse, fail_with(UserError("clip a.wav: broken")), []) == 2
    assert "clip a.wav: broken" in capsys.readouterr().err


def test_checks_raise_what_the_entry_points_say():
    with pytest.raises(UserError, match=r"^no$"), checking():
        raise ValueError("no")
    with pytest.raises(TypeError), checking():
        raise TypeError("a bug")
    for error in (ValueError("no"), FileNotFoundError("no")):
        with pytest.raises(UserError, match=r"^no$") as raised:
            together(fail_with(error))
        assert raised.value.is_of_all
    with pytest.raises(TypeError):
        together(fail_with(TypeError("a bug")))
    assert together(lambda: 3) == 3
