"""
The command `emoshare`: predicts clips, trains and evaluates models from the terminal.

    emoshare predict clip.wav folder/ --model ORG/NAME --output shares.csv
    emoshare evaluate --model ORG/NAME --dataset csv --data_dir DIR
    emoshare train --dataset csv --data_dir DIR --output_dir outputs/mine
    emoshare ensemble outputs/a outputs/b --dataset csv --data_dir DIR --output_dir outputs/ensemble
"""

import argparse
import os
import sys
from pathlib import Path

import soundfile

# What libsndfile decodes, under its own names and further ones of the same formats; raw samples have no header.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"}
AUDIO_SUFFIXES |= {".aif", ".aifc", ".oga", ".opus", ".sph", ".snd"}
OUTPUT_SUFFIXES = (".csv", ".jsonl")

BROKEN_CLIPS, FAILED, INTERRUPTED = 1, 2, 130  # exit codes; argparse has 2 for wrong arguments, too


def main(argv=None):
    """Runs the command with `argv`, the process's own arguments if not given; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # these two read their own flags, --help among them
            from .train import main as train

            train(argv[1:])
            return 0
        if argv[:1] == ["reproduce"]:
            from .reproduce import main as reproduce

            return reproduce(argv[1:])
        return _run(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("emoshare: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments):
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # whoever read the rows has enough of them
        return FAILED
    except (OSError, ValueError) as error:
        print(f"emoshare {arguments.command}: error: {error}", file=sys.stderr)
        return FAILED


def predict(arguments):
    """`emoshare predict`: a row per clip, written as it comes. Broken files are listed at the end."""
    from transformers.utils.logging import tqdm

    from .evaluation.predictions import PredictionsCsv, PredictionsJsonLines

    clips = find_clips(arguments.inputs)
    emotion_share = _load_pipeline(arguments)
    labels = _labels_of(emotion_share)
    is_json = arguments.output is not None and arguments.output.endswith(".jsonl")
    no_bar = arguments.output is None and sys.stdout.isatty()  # rows on the terminal show by themselves how far it is
    broken = []
    try:
        with _open(arguments.output) as file, tqdm(total=len(clips), unit=" clips", disable=no_bar) as progress:
            predictions = (PredictionsJsonLines if is_json else PredictionsCsv)(file, labels)
            for clip, result in predict_each(emotion_share, clips):
                if isinstance(result, Exception):
                    broken.append(f"{clip}: {str(result).removeprefix(f'{clip}: ')}")
                else:
                    predictions.write(clip, _in_order(result, labels))
                progress.update()
    finally:
        if broken:
            print(
                f"\n{len(broken)} of {len(clips)} files could not be predicted:", *broken, sep="\n  ", file=sys.stderr
            )
    return BROKEN_CLIPS if broken else 0


def find_clips(inputs):
    """
    Args:
        inputs: paths of audio files, and of folders to search, with all folders in them, for files with a suffix that
            libsndfile decodes. Hidden files and folders, and links to folders, are passed over in this search.

    Returns:
        `list[str]`: the clips in the order of the inputs, those of a folder sorted; each once, under the first path
        that leads to it, which begins as the input does.

    Raises:
        FileNotFoundError: on an input that does not exist, or a folder without audio files.
        OSError: on a folder that cannot be read.
    """
    clips = {}
    for path in inputs:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = _search(path) if os.path.isdir(path) else [path]
        if not found:
            raise FileNotFoundError(f"{path}: no audio files in this folder; expected one of {_known_suffixes()}")
        for clip in found:
            # A link to a clip is a clip of its own: caches link clips of equal content to one file.
            folder, name = os.path.split(clip)
            clips.setdefault(os.path.join(os.path.realpath(folder), name), clip)
    return list(clips.values())


def _search(folder):
    def fail(error):
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES
        ]
    return sorted(found)


def _known_suffixes():
    return ", ".join(sorted(AUDIO_SUFFIXES))


def predict_each(emotion_share, clips):
    """
    Predicts many files in the pipeline's batches, and goes on past those that are broken. An iterator of a pipeline
    ends with the first error: here a new one begins behind the file that made it. Files that were read ahead of it are
    read once more.

    Args:
        emotion_share: `EmotionSharePipeline`.
        clips: paths of audio files.

    Yields:
        Each clip once, with what the pipeline returns for it, or with the `ValueError` or `OSError` that it raised. A
        broken clip comes before those that were read ahead of it.
    """
    runs = [list(clips)]
    while runs:
        run, read, done = runs.pop(), [], 0
        try:
            for result in emotion_share(_note_what_is_read(run, read)):
                yield run[done], result
                done += 1
        except (ValueError, OSError) as error:
            # The pipeline reads a clip whole before it asks for the next one: the broken one is the last it asked for.
            yield read[-1], error
            runs += [run[len(read) :], read[done:-1]]


def _note_what_is_read(clips, read):
    for clip in clips:
        read.append(clip)
        yield clip


def evaluate(arguments):
    """`emoshare evaluate`: predicts a split of a corpus and prints Spearman's ρ; the predictions are written first."""
    import numpy as np
    from transformers.pipelines.pt_utils import KeyDataset
    from transformers.utils.logging import tqdm

    from .evaluation.predictions import write_predictions
    from .training.evaluation import Scorer, score_table, write_results

    split = arguments.split
    clips, labels, references = _load_split(arguments)
    emotion_share = _load_pipeline(arguments)
    of_model = _labels_of(emotion_share)
    if sorted(of_model) != sorted(labels):
        raise ValueError(f"the model {arguments.model} has the labels {of_model}; the corpus has {labels}")
    output_dir = arguments.output_dir and Path(arguments.output_dir)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)

    results = tqdm(emotion_share(KeyDataset(clips, "audio")), total=len(clips), unit=" clips")
    shares = np.array([_in_order(result, labels) for result in results])
    if output_dir:
        write_predictions(output_dir / f"predictions_{split}.csv", clips["filename"], shares, labels)
    scores = Scorer(references, labels).scores(shares, bootstrap=arguments.bootstrap, seed=arguments.seed)
    print(f"\nSpearman's rho of {arguments.model} on {split}, {len(clips)} clips")
    print(score_table(scores, labels))
    if output_dir:
        results = {f"eval_{name}": score for name, score in scores.items()}
        write_results(output_dir / f"eval_results_{split}.json", results)
        print(f"Predictions and results: {output_dir}")
    return 0


def _load_split(arguments):
    """The split to score on: its clips, a `datasets.Dataset`; the label names; the shares (clips, labels), or NaN."""
    import numpy as np
    from accelerate import PartialState

    from .dataset_script.corpus import known_shares
    from .training.arguments import DataArguments
    from .training.corpus import load_splits

    data = DataArguments(dataset=arguments.dataset, data_dir=arguments.data_dir)
    splits, labels = load_splits(data, PartialState())
    if arguments.split not in splits:
        raise ValueError(f"--split: got {arguments.split!r}; the corpus has {', '.join(splits)}")
    clips = splits[arguments.split]
    shares = known_shares(clips, labels)
    if np.isnan(shares).all():
        raise ValueError(f"--split: {arguments.split!r} has no known shares; there is nothing to score against")
    return clips, labels, shares


def ensemble(arguments):
    """`emoshare ensemble`: checks the predictions of runs, averages them, prints devel ρ of each and of the mean."""
    from accelerate import PartialState

    from .dataset_script.corpus import known_shares
    from .evaluation.predictions import read_members, write_predictions
    from .training.arguments import DataArguments
    from .training.corpus import load_splits
    from .training.evaluation import Scorer, score_table, write_results

    output_dir = Path(arguments.output_dir)
    folders = [Path(folder).resolve() for folder in arguments.run_dirs]
    if output_dir.resolve() in folders:
        raise ValueError(f"--output_dir: {output_dir} is one of the runs, whose predictions would be written over")
    if len(set(folders)) < len(folders):
        raise ValueError(f"RUN_DIR: got a run more than once: {' '.join(arguments.run_dirs)}")
    data = DataArguments(dataset=arguments.dataset, data_dir=arguments.data_dir)
    splits, labels = load_splits(data, PartialState())
    members = read_members(arguments.run_dirs, splits, labels)
    means = {split: shares.mean(axis=0) for split, shares in members.items()}
    scorer = Scorer(known_shares(splits["devel"], labels), labels)
    scores = scorer.scores(means["devel"], bootstrap=arguments.bootstrap, seed=arguments.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, shares in means.items():
        write_predictions(output_dir / f"predictions_{split}.csv", splits[split]["filename"], shares, labels)
    write_results(output_dir / "eval_results.json", {f"eval_{name}": score for name, score in scores.items()})

    print(f"\nSpearman's rho on devel, {len(splits['devel'])} clips")
    for folder, shares in zip(arguments.run_dirs, members["devel"], strict=True):
        print(f"  {scorer.scores(shares)['spearman']:.3f}   {folder}")
    print(f"  {scores['spearman']:.3f}   their mean\n\nOf the mean, by emotion")
    print(score_table(scores, labels))
    print(f"Predictions and results: {output_dir}")
    return 0


def _load_pipeline(arguments):
    """The installed classes: `import emoshare` has registered them, so no code of the repository is run."""
    from transformers import pipeline

    try:
        return pipeline(
            "emotion-share",
            model=arguments.model,
            revision=arguments.revision,
            device=arguments.device,
            batch_size=arguments.batch_size,
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: torch has no such device, or no room there
        raise ValueError(f"cannot load {arguments.model}: {error}") from error


def _labels_of(emotion_share):
    config = emotion_share.model.config
    return [config.id2label[index] for index in range(config.num_labels)]


def _in_order(result, labels):
    """The shares that the pipeline gave for a clip, in the order of the labels."""
    shares = {share["label"]: share["score"] for share in result}
    return [shares[label] for label in labels]


def _open(path):
    """The output file, or standard output: line by line, so that an interrupted run leaves all rows so far."""
    return open(
        sys.stdout.fileno() if path is None else path,
        "w",
        buffering=1,
        newline="",
        encoding="utf-8",
        errors="surrogateescape",  # names of files need not be UTF-8
        closefd=path is not None,
    )


def _parser():
    parser = argparse.ArgumentParser(
        prog="emoshare",
        description="Emotion share: for a speech clip, the share of listeners who would perceive each emotion.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of_model = argparse.ArgumentParser(add_help=False)
    of_model.add_argument("--model", required=True, help="Hub id ORG/NAME or folder of an EmoShare model")
    of_model.add_argument("--revision", help="its branch, tag or commit")
    of_model.add_argument(
        "--batch_size", type=_positive, default=1, help="windows per pass through the model (default: 1; more on a GPU)"
    )
    of_model.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, 1, ... (default: an accelerator if there is one)"
    )

    command = commands.add_parser(
        "predict",
        parents=[of_model],
        help="predict the shares of clips",
        description="Predicts the shares of clips: a row per clip, written as it comes. Goes on past broken files, "
        "lists them at the end, and then exits with 1 (2: nothing could be done; 130: interrupted).",
        allow_abbrev=False,
    )
    command.add_argument(
        "inputs", nargs="+", metavar="FILE_OR_FOLDER", help="audio files, and folders to search for audio files"
    )
    command.add_argument(
        "--output",
        type=_output,
        metavar="FILE",
        help="FILE.csv (filename, a column per emotion) or FILE.jsonl; CSV to standard output if not given",
    )
    command.set_defaults(run=predict)

    on_corpus = argparse.ArgumentParser(add_help=False)
    on_corpus.add_argument("--dataset", required=True, help="the corpus, as train's --dataset: csv, compare2023, ...")
    on_corpus.add_argument("--data_dir", help="its folder, with wav/*.wav and lab/{train,devel,test}.csv")
    on_corpus.add_argument(
        "--bootstrap",
        type=_not_negative,
        default=1000,
        help="resamples for 95 %% confidence intervals; 0 for none (default: 1000)",
    )
    on_corpus.add_argument("--seed", type=_not_negative, default=0, help="of the resampling (default: 0)")

    command = commands.add_parser(
        "evaluate",
        parents=[of_model, on_corpus],
        help="score a model on a corpus",
        description="Predicts a split of a corpus and scores it: Spearman's rho per emotion and mean.",
        allow_abbrev=False,
    )
    command.add_argument("--split", default="devel", help="train, devel or test (default: devel)")
    command.add_argument("--output_dir", metavar="DIR", help="write predictions and results into this folder")
    command.set_defaults(run=evaluate)

    command = commands.add_parser(
        "ensemble",
        parents=[on_corpus],
        help="check and average the predictions of several runs",
        description="Checks the predictions of runs on devel and test against the corpus (each clip once, in its "
        "order, shares in [0, 1]) and writes their mean, as the challenge takes it; one run is checked and copied. "
        "Prints Spearman's rho on devel of each run and of the mean. Members chosen by their scores on devel, where "
        "their epochs were chosen too, make that of the ensemble optimistic: only test tells how good it is.",
        allow_abbrev=False,
    )
    command.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="folders with predictions_devel.csv and predictions_test.csv"
    )
    command.add_argument("--output_dir", metavar="DIR", required=True, help="folder for predictions and results")
    command.set_defaults(run=ensemble)

    commands.add_parser("train", help="train a model: takes what train.py takes", add_help=False)
    commands.add_parser("reproduce", help="the paper's tables: takes what reproduce.py takes", add_help=False)
    return parser


def _output(path):
    if not path.endswith(OUTPUT_SUFFIXES):
        raise argparse.ArgumentTypeError(f"got {path!r}; expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}")
    return path


def _device(name):
    return int(name) if name.removeprefix("-").isdigit() else name


def _not_negative(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, 0 or more")
    return int(text)


def _positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
