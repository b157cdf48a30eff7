"""The command line of a training run: wrong flags are reported before anything that takes long is imported."""

from .arguments import parse_arguments
from .user_errors import run_entry_point


def main(argv, name="train.py"):
    """
    `train.py` and `emoshare train`; messages begin with `name`. Returns the exit code, which is 2 if something that the
    user gave is wrong.
    """
    return run_entry_point(name, parse_arguments, _run, argv)


def _run(arguments):
    from .launch import start
    from .run import extract, train

    accelerator = start(arguments)
    (train if arguments.data.part is None else extract)(arguments, accelerator)
    accelerator.end_training()
