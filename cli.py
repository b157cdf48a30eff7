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

import argparse
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

OUTPUT_SUFFIXES = (".csv", ".jsonl")
TURN_SUFFIXES = (*OUTPUT_SUFFIXES, ".TextGrid", ".txt")
HUB_ID = re.compile(r"[\w.-]*\w[\w.-]*(/[\w.-]+)?")

BROKEN_CLIPS, FAILED, INTERRUPTED = 1, 2, 130  # exit codes; argparse uses 2 for wrong arguments too


def main(argv=None):
    """
    Runs the command with `argv`, the process's own arguments if not given; returns the exit code. Nothing that takes
    long is imported until the arguments are found to be right.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:  # these two read their own flags, --help among them
            from .training.command import main as train

            return train(argv[1:], "emoshare train")
        if argv[:1] == ["reproduce"]:
            from .reproduction.command import main as reproduce

            return reproduce(argv[1:], "emoshare reproduce")
        return _run(_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("emoshare: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments):
    import torch

    from .evaluation.clips import printable

    try:
        code = arguments.run(arguments)
        if sys.stdout is not None:  # closed
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the output wants no more of it
        _forget_output()
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        lines = [printable(line) for line in _reason(error).splitlines()]  # a corpus has a line for each problem
        print(
            f"emoshare {arguments.command}: error:", *lines[:1], *(f"\n{line}" for line in lines[1:]), file=sys.stderr
        )
        _forget_output()
    return FAILED


def _forget_output():
    """What standard output did not take cannot be written when Python ends, either: it would complain once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reason(error):
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def predict(arguments):
    """
    `emoshare predict`: a row per clip, written as soon as it is predicted; with `--segments` or `--vad`, a row per
    turn, speaker and recording. Files that were broken or gave a warning are listed at the end.
    """
    from .evaluation.clips import find_clips, predict_each, shares_of
    from .evaluation.predictions import PredictionsCsv, PredictionsJsonLines

    suffix = f".{(arguments.output or '.csv').rpartition('.')[2].lower()}"
    if arguments.tier and not arguments.segments:
        arguments.fail("--tier: is for --segments FILE.TextGrid")
    if arguments.segments or arguments.vad:
        return _predict_conversations(arguments, suffix)
    if suffix not in OUTPUT_SUFFIXES:
        arguments.fail(
            f"--output: got {arguments.output!r}; expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}, or "
            "--segments or --vad, whose turns can be written there"
        )
    clips = find_clips(arguments.inputs)
    emotion_share = _load_pipeline(arguments)
    labels = emotion_share.model.config.labels
    with _open(arguments.output) as file:
        predictions = (PredictionsJsonLines if suffix == ".jsonl" else PredictionsCsv)(file, labels)
        results = predict_each(emotion_share, clips)
        return _write_each(
            arguments, len(clips), results, lambda clip, result: predictions.write(clip, shares_of(result, labels))
        )


def _predict_conversations(arguments, suffix):
    from .conversations.segment_files import read_segments
    from .conversations.turn_files import OF_ONE_RECORDING, TURN_WRITERS
    from .conversations.voice_activity import SpeechDetector
    from .evaluation.clips import find_clips, predict_conversations

    clips = find_clips(arguments.inputs)
    if len(clips) > 1 and (arguments.segments or suffix in OF_ONE_RECORDING):
        flag = "--segments" if arguments.segments else f"--output: {arguments.output}"
        raise ValueError(f"{flag}: is for one recording; got {len(clips)} files")
    if arguments.segments:
        segments = read_segments(arguments.segments, clips[0], arguments.tier)
    else:
        find_speech = SpeechDetector()
    emotion_share = _load_pipeline(arguments)
    if arguments.segments:  # an error in the one file of segments ends the command
        results = ((clip, emotion_share(clip, segments=segments)) for clip in clips)
    else:
        results = predict_conversations(emotion_share, clips, find_speech)
    with _open(arguments.output) as file:
        turns = TURN_WRITERS[suffix](file, emotion_share.model.config.labels)
        return _write_each(arguments, len(clips), results, turns.write)


def embed(arguments):
    """`emoshare embed`: a row per clip. Files that were broken or gave a warning are listed at the end."""
    from .embeddings_emoshare import embedding_widths
    from .evaluation.clips import find_clips, predict_each
    from .evaluation.embeddings import embeddings_parquet

    clips = find_clips(arguments.inputs)
    emotion_share = _load_pipeline(arguments)
    with embeddings_parquet(arguments.output, embedding_widths(emotion_share.model)) as add:
        results = predict_each(emotion_share, clips, return_embedding=True)
        return _write_each(arguments, len(clips), results, lambda clip, result: add(clip, result["embedding"]))


def _write_each(arguments, number, results, write):
    """
    Writes what was predicted of each clip as soon as it is there. Broken clips are listed at the end.

    Args:
        arguments: of the command.
        number: of clips.
        results: iterator of (clip, result), where a result may be an exception.
        write: function of a clip and its result.

    Returns:
        The exit code.
    """
    from transformers.utils.logging import tqdm

    from .evaluation.clips import printable

    no_bar = arguments.output is None and os.isatty(1)  # rows on the terminal show the progress themselves
    broken = []
    try:
        with _warnings_at_the_end(), tqdm(total=number, unit=" clips", disable=no_bar) as progress:
            for clip, result in results:
                if isinstance(result, Exception):
                    broken.append(printable(f"{clip}: {_reason(result).removeprefix(f'{clip}: ')}"))
                else:
                    write(clip, result)
                progress.update()
    finally:
        if broken:
            summary = f"\n{len(broken)} of {number} files could not be predicted:"
            print(summary, *broken, sep="\n  ", file=sys.stderr)
    return BROKEN_CLIPS if broken else 0


@contextmanager
def _warnings_at_the_end():
    """Warnings, of audio that is cut off, silent or clipped above all, one line each: not amid rows and progress."""
    from .evaluation.clips import printable

    with warnings.catch_warnings(record=True) as noted:
        try:
            yield
        finally:
            if noted:
                messages = [printable(str(warning.message)) for warning in noted]
                print("\nWarnings:", *messages, sep="\n  ", file=sys.stderr)


def evaluate(arguments):
    """
    `emoshare evaluate`: predicts a split of a corpus, writes the predictions, and prints Spearman's ρ. Broken clips are
    listed at the end, and the others scored.
    """
    import numpy as np
    from transformers.utils.logging import tqdm

    from .dataset_script.audio import message_of
    from .evaluation.clips import predict_each, shares_of
    from .evaluation.groups import check_fact, resampled_units

    split = arguments.split
    corpus = _load_corpus(arguments)
    if split not in corpus.splits:
        raise ValueError(f"--split: got {split!r}; the corpus has {', '.join(corpus.splits)}")
    if np.isnan(corpus.shares(split)).all():
        raise ValueError(f"--split: {split!r} has no known shares; there is nothing to score against")
    for fact in arguments.by:
        check_fact("--by", fact, corpus)
    units = resampled_units(corpus, split, arguments.resample)
    emotion_share = _load_pipeline(arguments)
    of_model = emotion_share.model.config.labels
    if sorted(of_model) != sorted(corpus.labels):
        raise ValueError(f"the model {arguments.model} has the labels {of_model}; the corpus has {corpus.labels}")
    if arguments.output_dir:
        Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)

    clips = corpus.audio(split)
    shares, broken = {}, {}
    with _warnings_at_the_end():
        results = predict_each(emotion_share, clips, strict=True)
        for clip, result in tqdm(results, total=len(clips), unit=" clips"):
            if isinstance(result, Exception):
                table, row = corpus.place(split, clip.index)
                broken[clip.index] = f"{table}, row {row}: {clip.filename}: {message_of(result, clip)}"
            else:
                shares[clip.index] = shares_of(result, corpus.labels)
    try:
        if not shares:
            raise ValueError(f"none of the {len(clips)} clips of {split} could be predicted")
        predicted = sorted(shares)
        _score(arguments, corpus, predicted, np.array([shares[index] for index in predicted]), units)
    finally:
        if broken:
            summary = f"\n{len(broken)} of {len(clips)} clips could not be predicted, and are not in the scores:"
            print(summary, *(broken[index] for index in sorted(broken)), sep="\n  ", file=sys.stderr)
    return BROKEN_CLIPS if broken else 0


def _score(arguments, corpus, predicted, shares, units):
    """
    Prints and writes what `emoshare evaluate` found: the shares (clips, labels) of the clips with the indices
    `predicted`. `units` of all clips are resampled as a whole, unless they are `None`.
    """

    from .dataset_script.facts import are_names
    from .dataset_script.tables import FILENAME
    from .evaluation.ceiling import noise_ceiling
    from .evaluation.groups import as_json, as_text, compare
    from .evaluation.predictions import write_predictions
    from .evaluation.scores import Scorer, score_table, write_scores

    split, labels = arguments.split, corpus.labels
    references, listeners = corpus.shares(split)[predicted], corpus.listeners(split)[predicted]

    units = units and [units[index] for index in predicted]
    scores = Scorer(references, labels).scores(shares, arguments.bootstrap, arguments.seed, units)
    ceiling = noise_ceiling(references, listeners, labels)
    output_dir = arguments.output_dir and Path(arguments.output_dir)
    if output_dir:
        filenames = corpus.column(split, FILENAME)[predicted]
        write_predictions(output_dir / f"predictions_{split}.csv", filenames, shares, labels)
    print(f"\nSpearman's rho of {arguments.model} on {split}, {len(predicted)} clips")
    print(score_table(scores, ceiling=ceiling))
    if ceiling.text:
        print(ceiling.text)
    groups = {}
    for fact in arguments.by:
        values = [corpus.metadata[split][fact][index] for index in predicted]
        resampling = arguments.bootstrap, arguments.seed, units
        comparison = compare(
            values, shares, references, labels, *resampling, fact == arguments.resample or are_names(fact)
        )
        print(as_text(fact, comparison))
        groups[fact] = as_json(comparison)
    if output_dir:
        made_from, left_out = _made_from(corpus, split, predicted), len(corpus.splits[split]) - len(predicted)
        write_scores(output_dir / f"eval_results_{split}.json", scores, made_from, left_out, ceiling, groups)
        print(f"Predictions and results: {output_dir}")


def ensemble(arguments):
    """`emoshare ensemble`: checks the predictions of runs, averages them, and prints ρ of each and of their mean."""
    from .evaluation.predictions import read_members, write_predictions
    from .evaluation.scores import MEAN, RESULTS, Scorer, score_table, write_scores

    output_dir = Path(arguments.output_dir)
    folders = [Path(folder).resolve() for folder in arguments.run_dirs]
    if output_dir.resolve() in folders:
        raise ValueError(f"--output_dir: {output_dir} is one of the runs, whose predictions would be overwritten")
    if len(set(folders)) < len(folders):
        raise ValueError(f"RUN_DIR: got a run more than once: {' '.join(arguments.run_dirs)}")
    corpus = _load_corpus(arguments)
    members = read_members(arguments.run_dirs, corpus)
    means = {split: shares.mean(axis=0) for split, shares in members.items()}
    scorer = Scorer(corpus.shares("devel"), corpus.labels)
    scores = scorer.scores(means["devel"], arguments.bootstrap, arguments.seed)
    made_from = _made_from(corpus, "devel", range(len(means["devel"])))
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, shares in means.items():
        path = output_dir / f"predictions_{split}.csv"
        write_predictions(path, corpus.filenames(split), shares, corpus.labels)
    write_scores(output_dir / RESULTS, scores, made_from)

    print(f"\nSpearman's rho on devel, {len(corpus.splits['devel'])} clips")
    for folder, shares in zip(arguments.run_dirs, members["devel"], strict=True):
        print(f"  {scorer.scores(shares)[MEAN].rho:.3f}   {folder}")
    print(f"  {scores[MEAN].rho:.3f}   their mean\n\nTheir mean, by emotion")
    print(score_table(scores))
    print(f"Predictions and results: {output_dir}")
    return 0


def merge(arguments):
    """`emoshare merge`: writes a model with adapters as one whose layers are tuned, which does not need PEFT."""
    from .dataset_script.whole_files import writing

    output_dir = Path(arguments.output_dir)
    if output_dir.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output_dir: {output_dir} is the model itself, which would be overwritten")
    emotion_share = _load_pipeline(arguments, dtype="float32")
    config = emotion_share.model.config
    if not config.lora_rank:
        raise ValueError(f"--model: {arguments.model} has no adapters")
    emotion_share.model.merge_adapters()
    with writing(output_dir):
        emotion_share.save_pretrained(output_dir, include_backbone=config.include_backbone)
    print(f"Model without adapters: {output_dir}")
    return 0


def export(arguments):
    """`emoshare export`: writes a model as an ONNX file, and the file that runs it, and says what was written."""
    model, feature_extractor = _load_model(arguments, "float32")
    try:
        files = model.export_onnx(arguments.output, feature_extractor, int8=arguments.int8)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"cannot export {arguments.model}: {error}") from error
    for file in files:
        operators = ", ".join(f"{name} ({count})" for name, count in file.operators.items())
        print(f"{file.path}: {file.num_bytes / 1e6:.1f} MB, opset {file.opset}")
        print(f"  shares of noise differ from the model's by at most {file.difference:.1e}")
        print(f"  operators: {operators}")
    print(f"To run it, with numpy, soundfile and onnxruntime alone: {files[0].path.with_name('emoshare_runtime.py')}")
    return 0


def serve(arguments):
    """`emoshare serve`: answers requests until a signal comes, and then those that it has accepted."""
    try:
        from .serving.command import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'emoshare[serve]' has all it takes") from error
    return serve(arguments, partial(_load_pipeline, arguments))


def _load_corpus(arguments):
    from accelerate import PartialState

    from .training.arguments import DataArguments
    from .training.corpus import load_run_corpus

    return load_run_corpus(DataArguments(dataset=arguments.dataset, data_dir=arguments.data_dir), PartialState())


def _made_from(corpus, split, indices):
    """`Corpus.fingerprints` of what was scored: the clips of a split with these indices."""
    import datasets

    return replace(corpus, splits=datasets.DatasetDict({split: corpus.splits[split].select(indices)})).fingerprints()


def _load_pipeline(arguments, dtype="auto"):
    from transformers import pipeline

    from .training.precision import set_precision_of_evaluation

    model, feature_extractor = _load_model(arguments, dtype)
    with _errors_of_loading(arguments):
        emotion_share = pipeline(
            "emotion-share",
            model=model,
            feature_extractor=feature_extractor,
            device=arguments.device,
            batch_size=arguments.batch_size,
        )
        set_precision_of_evaluation(emotion_share.model)
    return emotion_share


def _load_model(arguments, dtype):
    """The installed classes: `import emoshare` has registered them, so none of the repository's code runs."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    from .feature_extraction_emoshare import EmoShareFeatureExtractor

    _check_model_folder(arguments)
    source = {"revision": arguments.revision, "trust_remote_code": False}
    with _errors_of_loading(arguments):
        model_type = AutoConfig.from_pretrained(arguments.model, **source).model_type
        if model_type != "emoshare":
            raise ValueError(f"its model_type is {model_type!r}; expected 'emoshare'")
        feature_extractor = AutoFeatureExtractor.from_pretrained(arguments.model, **source)
        if not isinstance(feature_extractor, EmoShareFeatureExtractor):
            raise ValueError(f"its feature extractor is {type(feature_extractor).__name__}, and not EmoShare's")
        return AutoModel.from_pretrained(arguments.model, dtype=dtype, **source), feature_extractor


@contextmanager
def _errors_of_loading(arguments):
    try:
        yield
    # RuntimeError: torch has no such device, or no room there. ImportError: a model with adapters, and no PEFT.
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if os.path.isdir(arguments.model):
            raise ValueError(f"cannot load {arguments.model}: {' '.join(str(error).split())}") from error
        first = str(error).partition("\n")[0]  # the Hub's clients have advice after it
        where = "there is no such folder here, and from the Hub: " if isinstance(error, OSError) else ""
        raise ValueError(f"cannot load {arguments.model}: {where}{first}") from error


def _check_model_folder(arguments):
    """Says of a folder what is missing, and of a mistyped one that it does not exist, before the Hub is asked."""
    folder = Path(arguments.model)
    if arguments.model and folder.is_dir():
        if arguments.revision is not None:
            raise ValueError(f"--revision: is for repositories on the Hub; {folder} is a folder")
        for name in ("config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"cannot load {folder}: it has no {name}, so it is not a complete model")
            try:
                fields = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"cannot load {folder}: {name} is not valid JSON ({error})") from error
            if not isinstance(fields, dict):
                raise ValueError(f"cannot load {folder}: {name} is not a JSON object")
    elif folder.exists() or not HUB_ID.fullmatch(arguments.model):
        flag = "MODEL" if arguments.command == "export" else "--model"
        raise ValueError(f"{flag}: got {arguments.model!r}; expected a folder, or a Hub id ORG/NAME")


@contextmanager
def _open(path):
    """The output file, or standard output: written line by line, so that an interrupted run leaves all rows so far."""
    if path is None and sys.stdout is None:
        raise ValueError("standard output is closed; expected --output FILE")
    try:
        with open(
            sys.stdout.fileno() if path is None else path,
            "w",
            buffering=1,
            newline="",
            encoding="utf-8",
            errors="surrogateescape",  # names of files need not be UTF-8
            closefd=path is not None,
        ) as file:
            yield file
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, "standard output" if path is None else path) from error


def _parser():
    parser = argparse.ArgumentParser(
        prog="emoshare",
        description="Emotion share: for a speech clip, the share of listeners who would perceive each emotion.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of_model, on_corpus = _model_flags("--model", batch_size=1), _corpus_flags()
    _add_predict(commands, [of_model])
    _add_serve(commands, [_model_flags("model", batch_size=8)])
    _add_embed(commands, [of_model])
    _add_evaluate(commands, [of_model, on_corpus])
    _add_export(commands)
    _add_ensemble(commands, [on_corpus])
    _add_merge(commands)
    commands.add_parser("train", help="train a model: takes the flags of train.py", add_help=False)
    commands.add_parser("reproduce", help="the paper's tables: takes the flags of reproduce.py", add_help=False)
    return parser


def _model_flags(name, batch_size):
    flags = argparse.ArgumentParser(add_help=False)
    required = {"required": True} if name.startswith("-") else {"metavar": name.upper()}
    flags.add_argument(name, help="Hub id ORG/NAME or folder of an EmoShare model", **required)
    flags.add_argument("--revision", help="its branch, tag or commit")
    flags.add_argument(
        "--batch_size",
        type=_positive,
        default=batch_size,
        help="windows per pass through the model (default: %(default)s); a GPU wants 8 or more",
    )
    flags.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, 1, ... (default: an accelerator if there is one)"
    )
    return flags


def _corpus_flags():
    from .training.arguments import DataArguments

    help_of = {flag.name: flag.metadata["help"] for flag in fields(DataArguments)}  # the same flags as train.py's
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--dataset", required=True, help=help_of["dataset"])
    flags.add_argument("--data_dir", help=help_of["data_dir"])
    flags.add_argument(
        "--bootstrap",
        type=_not_negative,
        default=1000,
        help="resamples for 95 %% confidence intervals; 0 for none (default: 1000)",
    )
    flags.add_argument("--seed", type=_not_negative, default=0, help="of the resampling (default: 0)")
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
        "inputs", nargs="+", metavar="FILE_OR_FOLDER", help="audio files, and folders to search for audio files"
    )
    command.add_argument(
        "--output",
        type=_output,
        metavar="FILE",
        help="FILE.csv (filename, a column per emotion) or FILE.jsonl; CSV to standard output if not given. Of turns "
        "also FILE.TextGrid (Praat) or FILE.txt (labels for Audacity)",
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
    command.set_defaults(run=predict, fail=command.error)


def _add_embed(commands, parents):
    command = commands.add_parser(
        "embed",
        parents=parents,
        help="the embeddings of clips",
        description="Writes a row for each clip: what each emotion's regressor takes, and the mean of the backbone's "
        "frame features. Broken files are listed at the end, and the exit code is then 1 (2: nothing could be done; "
        "130: interrupted).",
        allow_abbrev=False,
    )
    command.add_argument(
        "inputs", nargs="+", metavar="FILE_OR_FOLDER", help="audio files, and folders to search for audio files"
    )
    command.add_argument("--output", type=_parquet, metavar="FILE.parquet", required=True, help="file to write")
    command.set_defaults(run=embed)


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
        help="score each group of clips by a fact of the corpus (sex, speaker, ...), and test whether groups differ",
    )
    command.add_argument(
        "--resample",
        metavar="FACT",
        help="resample all clips with the same value of this fact together, speaker as a rule (default: single clips)",
    )
    command.add_argument("--output_dir", metavar="DIR", help="write predictions and results to this folder")
    command.set_defaults(run=evaluate)


def _add_export(commands):
    command = commands.add_parser(
        "export",
        help="write a model as an ONNX file, to use it without PyTorch",
        description="Writes DIR/onnx/model.onnx, with preprocessing, and DIR/onnx/emoshare_runtime.py, which runs it "
        "with numpy, soundfile and onnxruntime alone. Says which operators the file needs, and how far its shares are "
        "from the model's.",
        allow_abbrev=False,
    )
    command.add_argument("model", metavar="MODEL", help="Hub id ORG/NAME or folder of an EmoShare model")
    command.add_argument("--revision", help="its branch, tag or commit")
    command.add_argument("--output", metavar="DIR", required=True, help="folder, the model's own or another one")
    command.add_argument(
        "--int8", action="store_true", help="write DIR/onnx/model_int8.onnx too: a quarter of the size, not exact"
    )
    command.set_defaults(run=export)


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
    command.set_defaults(run=ensemble)


def _add_merge(commands):
    command = commands.add_parser(
        "merge",
        help="make a model that needs no PEFT of one with adapters",
        description="Makes the adapters of a model (LoRA) a part of the layers that they are in, and writes the model. "
        "It predicts the same but for rounding, and does not need PEFT. A model that was saved without its backbone is "
        "written without it again.",
        allow_abbrev=False,
    )
    command.add_argument("--model", required=True, help="Hub id ORG/NAME or folder of an EmoShare model")
    command.add_argument("--revision", help="its branch, tag or commit")
    command.add_argument("--output_dir", metavar="DIR", required=True, help="folder for the model without adapters")
    command.set_defaults(run=merge, device="cpu", batch_size=1)


def _add_serve(commands, parents):
    command = commands.add_parser(
        "serve",
        parents=parents,
        help="answer requests for shares over HTTP",
        description="Answers POST /predict with the shares of a clip, and GET /health, /metrics and /docs. Requests "
        "that come at the same time go through the model together. SIGTERM and Ctrl-C end it when what was accepted "
        "has been answered.",
        allow_abbrev=False,
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    command.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    command.add_argument(
        "--allow_url",
        action="append",
        default=[],
        metavar="HOST_OR_URL",
        help="HOST, HOST:PORT or https://HOST/PATH: audio may be named by URLs there; can be given several times "
        "(default: nowhere)",
    )
    for name, default, text in (
        ("max_megabytes", 25, "size of an upload"),
        ("max_seconds", 600, "length of a clip"),
        ("max_waiting", 64, "clips that have no answer yet"),
        ("upload_seconds", 60, "seconds that an upload may take"),
    ):
        command.add_argument(
            f"--{name}", type=_positive, default=default, metavar="NUMBER", help=f"{text}, at most (default: {default})"
        )
    command.set_defaults(run=serve)


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
