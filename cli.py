"""
The command `emoshare`: predicts clips, trains and evaluates models from the terminal.

    emoshare predict clip.wav folder/ --model ORG/NAME --output shares.csv
    emoshare serve ORG/NAME --port 8000
    emoshare predict meeting.wav --segments turns.rttm --model ORG/NAME --output shares.TextGrid
    emoshare embed clip.wav folder/ --model ORG/NAME --output embeddings.parquet
    emoshare evaluate --model ORG/NAME --dataset csv --data_dir DIR
    emoshare export ORG/NAME --output DIR --int8
    emoshare ensemble outputs/a outputs/b --dataset csv --data_dir DIR --output_dir outputs/ensemble
    emoshare merge --model ORG/NAME --output_dir merged
    emoshare train --dataset csv --data_dir DIR --output_dir outputs/mine
    emoshare reproduce --config configs/paper_grid.yaml --data_dir DIR
"""

import os
import sys
from importlib import import_module

from .commands.arguments import parser

FAILED, INTERRUPTED = 2, 130  # exit codes; argparse uses 2 for wrong arguments too


def main(argv=None):
    """
    Runs the command with the arguments `argv`, by default those of the process, and returns the exit code. Slow imports
    happen only after the arguments have been checked.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # these two parse their own flags, including --help
            from .training.command import main as train

            return train(argv[1:], "emoshare train")
        if argv[:1] == ["reproduce"]:
            from .reproduction.command import main as reproduce

            return reproduce(argv[1:], "emoshare reproduce")
        return _run(parser().parse_args(argv))
    except KeyboardInterrupt:
        print("emoshare: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments):
    import torch

    from .commands.output import reason_of
    from .evaluation.clips import printable

    try:
        code = import_module(f".commands.{arguments.command}", __package__).run(arguments)
        if sys.stdout is not None:  # `None`: it was closed
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has stopped reading, as `head` does
        _forget_output()
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        lines = [printable(line) for line in reason_of(error).splitlines()]  # a corpus has a line for each problem
        print(
            f"emoshare {arguments.command}: error:", *lines[:1], *(f"\n{line}" for line in lines[1:]), file=sys.stderr
        )
        _forget_output()
    return FAILED


def _forget_output():
    """Drops output that could not be written, which Python would otherwise try to write once more when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
