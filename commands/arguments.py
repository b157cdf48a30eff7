"""The commands of `emoshare` and their flags. This module imports nothing that takes long."""

import argparse
from dataclasses import fields

from ..training.arguments import DataArguments

OUTPUT_SUFFIXES = (".csv", ".jsonl")
TURN_SUFFIXES = (*OUTPUT_SUFFIXES, ".TextGrid", ".txt")


def parser():
    """Returns the `argparse.ArgumentParser` of all commands; `train` and `reproduce` parse their own flags."""
    parser = argparse.ArgumentParser(
        prog="emoshare",
        description="Emotion share: for a speech clip, the share of listeners who would perceive each emotion.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named, first = _source_flags("--model"), _source_flags("model")
    running, on_corpus, on_clips = _running_flags(batch_size=1), _corpus_flags(), _clip_arguments()
    _add_predict(commands, [named, running, on_clips])
    _add_serve(commands, [first, _running_flags(batch_size=8)])
    _add_embed(commands, [named, running, on_clips])
    _add_evaluate(commands, [named, running, on_corpus])
    _add_export(commands, [first])
    _add_ensemble(commands, [on_corpus])
    _add_merge(commands, [named])
    commands.add_parser("train", help="train a model: takes the flags of train.py", add_help=False)
    commands.add_parser("reproduce", help="the paper's tables: takes the flags of reproduce.py", add_help=False)
    return parser


def _source_flags(name):
    """Arguments that say where the model is; `name` is a flag or a positional argument."""
    flags = argparse.ArgumentParser(add_help=False)
    required = {"required": True} if name.startswith("-") else {"metavar": name.upper()}
    flags.add_argument(name, help="Hub id ORG/NAME or folder of an EmoShare model", **required)
    flags.add_argument("--revision", help="its branch, tag or commit")
    flags.set_defaults(model_argument=required.get("metavar", name))
    return flags


def _running_flags(batch_size):
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--batch_size",
        type=_positive,
        default=batch_size,
        help="windows per pass through the model (default: %(default)s); use 8 or more on a GPU",
    )
    flags.add_argument(
        "--device", type=_device, help="cpu or -1, cuda, cuda:1 or 1, ... (default: an accelerator if there is one)"
    )
    return flags


def _corpus_flags():
    help_of = {flag.name: flag.metadata["help"] for flag in fields(DataArguments)}  # these are flags of train.py too
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--dataset", required=True, help=help_of["dataset"])
    flags.add_argument("--data_dir", help=help_of["data_dir"])
    flags.add_argument(
        "--bootstrap",
        type=_not_negative,
        default=1000,
        help="resamples for 95 %% confidence intervals; 0 for none (default: 1000)",
    )
    flags.add_argument("--seed", type=_not_negative, default=0, help="seed of the resampling (default: 0)")
    return flags


def _clip_arguments():
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "inputs", nargs="+", metavar="FILE_OR_FOLDER", help="audio files, and folders to search for audio files"
    )
    return flags


def _add_predict(commands, parents):
    command = commands.add_parser(
        "predict",
        parents=parents,
        help="predict the shares of clips",
        description="Predicts the shares of clips, and writes a row per clip as soon as it is predicted. Broken files "
        "are listed at the end, and the exit code is then 1 (2: nothing could be done; 130: interrupted).",
        allow_abbrev=False,
    )
    command.add_argument(
        "--output",
        type=_output,
        metavar="FILE",
        help="FILE.csv (filename, a column per emotion) or FILE.jsonl; CSV to standard output if not given. "
        "For turns also FILE.TextGrid (Praat) or FILE.txt (labels for Audacity)",
    )
    turns = command.add_mutually_exclusive_group()
    turns.add_argument(
        "--segments",
        metavar="FILE",
        help="who speaks when in the recording: .rttm, .TextGrid, .csv (start, end, speaker), .srt, or Audacity's "
        "labels (.txt); predicts each turn, each speaker and the whole",
    )
    turns.add_argument(
        "--vad", action="store_true", help="predict each stretch of speech that Silero's detector finds, and the whole"
    )
    command.add_argument(
        "--tier", nargs="+", metavar="NAME", help="tiers of a TextGrid that hold turns, by speaker (default: all)"
    )
    command.set_defaults(fail=command.error)


def _add_embed(commands, parents):
    command = commands.add_parser(
        "embed",
        parents=parents,
        help="write the embeddings of clips",
        description="Writes a row for each clip: the input of each emotion's regressor, and the mean of the backbone's "
        "frame features. Broken files are listed at the end, and the exit code is then 1 (2: nothing could be done; "
        "130: interrupted).",
        allow_abbrev=False,
    )
    command.add_argument("--output", type=_parquet, metavar="FILE.parquet", required=True, help="file to write")


def _add_evaluate(commands, parents):
    command = commands.add_parser(
        "evaluate",
        parents=parents,
        help="score a model on a corpus",
        description="Predicts a split of a corpus and scores it: Spearman's rho per emotion and mean. Broken clips are "
        "left out and listed at the end, and the exit code is then 1 (2: nothing could be done; 130: interrupted).",
        allow_abbrev=False,
    )
    command.add_argument("--split", default="devel", help="train, devel or test (default: devel)")
    command.add_argument(
        "--by",
        nargs="+",
        action="extend",
        default=[],
        metavar="FACT",
        help="group clips by a fact of the corpus (sex, speaker, ...), score each group, and test whether they differ",
    )
    command.add_argument(
        "--resample",
        metavar="FACT",
        help="resample whole groups sharing this fact, usually speaker (default: single clips)",
    )
    command.add_argument("--output_dir", metavar="DIR", help="write predictions and results to this folder")


def _add_export(commands, parents):
    command = commands.add_parser(
        "export",
        parents=parents,
        help="write a model as an ONNX file, to use it without PyTorch",
        description="Writes DIR/onnx/model.onnx, with preprocessing, and DIR/onnx/emoshare_runtime.py, which runs it "
        "with numpy, soundfile and onnxruntime alone. Says which operators the file needs, and how far its shares are "
        "from the model's.",
        allow_abbrev=False,
    )
    command.add_argument("--output", metavar="DIR", required=True, help="folder, the model's own or another one")
    command.add_argument(
        "--int8", action="store_true", help="write DIR/onnx/model_int8.onnx too: a quarter of the size, not exact"
    )


def _add_ensemble(commands, parents):
    command = commands.add_parser(
        "ensemble",
        parents=parents,
        help="check and average the predictions of several runs",
        description="Checks the predictions of runs on devel and test against the corpus (each clip once, in its "
        "order, shares in [0, 1]) and writes their mean in the challenge's format; those of a single run are checked "
        "and copied. Prints Spearman's rho on devel of each run and of the mean. If the runs were chosen by their "
        "scores on devel, where their epochs were chosen too, the score of the ensemble is optimistic: only the test "
        "split shows how good it is.",
        allow_abbrev=False,
    )
    command.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="folders with predictions_devel.csv and predictions_test.csv"
    )
    command.add_argument("--output_dir", metavar="DIR", required=True, help="folder for predictions and results")


def _add_merge(commands, parents):
    command = commands.add_parser(
        "merge",
        parents=parents,
        help="merge the adapters of a model into its layers, so that it does not need PEFT",
        description="Merges the adapters of a model (LoRA) into their layers, and writes the model. Its predictions "
        "are the same except for rounding, and it does not need PEFT. A model that was saved without its backbone is "
        "written without it again.",
        allow_abbrev=False,
    )
    command.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the merged model")
    command.set_defaults(device="cpu", batch_size=1)


def _add_serve(commands, parents):
    command = commands.add_parser(
        "serve",
        parents=parents,
        help="answer requests for shares over HTTP",
        description="Answers POST /predict with the shares of a clip, and GET /health, /metrics and /docs. Requests "
        "that arrive at the same time go through the model together. On SIGTERM and Ctrl-C, it answers all accepted "
        "requests and ends.",
        allow_abbrev=False,
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    command.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    command.add_argument(
        "--allow_url",
        action="append",
        default=[],
        metavar="HOST_OR_URL",
        help="HOST, HOST:PORT or https://HOST/PATH: audio may be named by URLs there; can be given several times "
        "(default: nowhere)",
    )
    for name, default, text in (
        ("max_megabytes", 25, "size of an upload in megabytes"),
        ("max_seconds", 600, "length of a clip in seconds"),
        ("max_waiting", 64, "number of clips without an answer"),
        ("upload_seconds", 60, "duration of an upload in seconds"),
    ):
        command.add_argument(
            f"--{name}", type=_positive, default=default, metavar="NUMBER", help=f"{text}, at most (default: {default})"
        )


def _port(text):
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number from 0 to 65535")
    return int(text)


def _output(path):
    return _ending(path, *TURN_SUFFIXES)


def _parquet(path):
    return _ending(path, ".parquet")


def _ending(path, *suffixes):
    if not path.lower().endswith(tuple(suffix.lower() for suffix in suffixes)):
        raise argparse.ArgumentTypeError(f"got {path!r}; expected a name that ends in {' or '.join(suffixes)}")
    return path


def _device(name):
    """PyTorch's name of a device, or the number of an accelerator."""
    if not name.removeprefix("-").isdigit():
        return name
    if int(name) < -1:
        raise argparse.ArgumentTypeError(f"got {name!r}; expected a name, the number of an accelerator, or -1 (CPU)")
    return "cpu" if int(name) == -1 else int(name)


def _not_negative(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, 0 or more")
    return int(text)


def _positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, 1 or more")
    return int(text)
