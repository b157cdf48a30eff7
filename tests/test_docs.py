"""README and pages: the real parsers accept their commands, their Python runs, and their links work."""

import argparse
import ast
import re
import shlex
import shutil
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, SMALL_BACKBONE, SMALL_HEAD, run_command, speech, write_corpus, write_csv
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from emoshare import EmoShareFeatureExtractor, EmoShareModel, cli, load_audio
from emoshare.dataset_script import __main__ as publish
from emoshare.training.arguments import parse_arguments

sys.path.append(str(ROOT / "benchmarks"))

import real_speech

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "dataset_script", "docs/reproduction")),
        ROOT / "metrics" / "emotion_share_spearman" / "README.md",
    ]
)
WORDS_OF_README = 900
# What a command line begins with, in a block without a language too.
PROGRAMS = ("accelerate", "emoshare", "hf", "make", "pip", "python", "torchrun", ".venv/bin/python", ".")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED_BLOCK = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
# Files of this repository, not those that commands write.
FILE = re.compile(r"[\w*./-]+\.(py|yaml|md|cfg|toml)")


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks_of(page, *languages):
    return [code for language, code in BLOCK.findall(text_of(page)) if language in languages]


def prose_of(page):
    """The page without its code blocks."""
    return INDENTED_BLOCK.sub("", BLOCK.sub("", text_of(page)))


def code_spans_of(page):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def links_of(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def commands_of(page):
    """The command lines in a page's code blocks, as lists of words."""
    without_fenced = BLOCK.sub("", text_of(page))
    indented = [re.sub("^ {4}", "", code, flags=re.MULTILINE) for code in INDENTED_BLOCK.findall(without_fenced)]
    lines = "\n".join([*blocks_of(page, "sh"), *indented]).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page, words) for page in PAGES for words in commands_of(page)]


class Parsed(BaseException):
    """Raised by a parser after it has accepted all arguments, so that nothing is run."""


@pytest.fixture
def stop_when_parsed(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        raise Parsed(parse_args(parser, *arguments))

    def stop(main, argv):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed) as parsed:
            main(argv)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        return parsed.value.args[0]

    return stop


def check_command(words, stop_when_parsed):
    """Fails, or exits as the parser does, if a command line would not work."""
    program, *arguments = words
    if program == "accelerate" and arguments[0] == "launch":
        launch = launch_command_parser().parse_args(arguments[1:])
        check_script(launch.training_script, launch.training_script_args, stop_when_parsed)
    elif program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        check_script(launch.training_script, launch.training_script_args, stop_when_parsed)
    elif program == "emoshare" and arguments[0] == "train":
        parse_arguments(arguments[1:])
    elif program == "emoshare" and arguments != ["--help"]:
        stop_when_parsed(cli.main, arguments)
    elif program in ("python", ".venv/bin/python") and arguments[:2] == ["-m", "emoshare.dataset_script"]:
        stop_when_parsed(publish.main, arguments[2:])
    elif program in ("python", ".venv/bin/python") and arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).is_file(), words
    elif program == "python":
        check_script(arguments[0], arguments[1:], stop_when_parsed)
    elif program == "make":
        assert is_target(arguments[0]), words
    elif program == "pip":
        check_installation(arguments)
    elif program == "hf":
        subcommand = [word for word in arguments[:2] if word.isalpha() and word.islower()]
        help_text = run_command(
            Path(sys.executable).with_name("hf"), *subcommand, "--help", cwd=ROOT, COLUMNS="200"
        ).stdout
        assert {word for word in arguments if word.startswith("--")} <= set(re.findall(r"--[\w-]+", help_text)), words
    else:
        assert words in (["emoshare", "--help"], [".", ".venv/bin/activate"]), f"no check for {words}"


def is_target(name):
    return re.search(rf"^{name}:", text_of(ROOT / "Makefile"), re.MULTILINE)


def check_script(script, arguments, stop_when_parsed):
    assert (ROOT / script).is_file(), script
    if script == "train.py" and arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_arguments(arguments)
    elif script == "train.py":
        parse_arguments(arguments)
    elif script in ("reproduce.py", "convert_released_checkpoint.py"):
        parsed = stop_when_parsed(import_module(f"emoshare.{script[:-3]}").main, arguments)
        assert script != "reproduce.py" or parsed.config.is_file()
    elif script in ("benchmarks/real_speech.py", "benchmarks/espeak_voices.py"):
        stop_when_parsed(import_module(Path(script).stem).main, arguments)
    else:  # these have no flags
        assert not any(argument.startswith("-") for argument in arguments)


def check_installation(arguments):
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        if argument.startswith("."):  # this package, and perhaps an extra of it
            extra = argument.removeprefix(".").strip("[]")
            assert not extra or re.search(rf"^{extra} =$", text_of(ROOT / "setup.cfg"), re.MULTILINE)
        elif argument not in real_speech.LIBRARIES.values():  # which that benchmark alone needs
            requirement = Requirement(argument)
            assert version(requirement.name) in requirement.specifier, argument


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name_of(page)}: {' '.join(w)}" for page, w in COMMANDS])
def test_commands_are_taken(page, words, stop_when_parsed, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words, stop_when_parsed)


def test_every_page_is_read_for_commands():
    assert len(COMMANDS) > 50
    for page in PAGES:
        unmarked = [line for code in blocks_of(page, "") for line in code.splitlines()]
        assert [line for line in unmarked if line.split(" ")[0] in PROGRAMS] == [], f"{page}: a block without 'sh'"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_sentences_exist(page, stop_when_parsed):
    """Including flags that no code block shows."""
    known = flags_of_all_parsers(stop_when_parsed)
    mentioned = {word for span in code_spans_of(page) for word in span.split() if re.fullmatch(r"--\w+", word)}
    assert mentioned - known == set()


def flags_of_all_parsers(stop_when_parsed):
    """The flags of every parser that this repository makes, and of the two launchers."""
    known = {flag for parser in (launch_command_parser(), get_args_parser()) for flag in parser._option_string_actions}
    add_argument, added = argparse._ActionsContainer.add_argument, []

    def note_and_add(container, *names, **options):
        added.extend(names)
        return add_argument(container, *names, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse._ActionsContainer, "add_argument", note_and_add)
        parse_arguments([])
        stop_when_parsed(cli.main, ["predict", "clip.wav", "--model", "DIR"])
        stop_when_parsed(publish.main, ["--config", "csv", "--output_dir", "DIR"])
        stop_when_parsed(real_speech.main, ["--data_dir", "DIR"])
        stop_when_parsed(import_module("emoshare.reproduce").main, ["--config", "configs/synthetic_grid.yaml"])
    return known | set(added)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in links_of(page):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        if anchor:
            assert anchor in anchors_of(linked), target


def anchors_of(page):
    """The anchors that GitHub makes from the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_readme_leads_to_every_page():
    readme = ROOT / "README.md"
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links_of(readme)}
    assert set(PAGES) - linked == {readme}


def test_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) <= WORDS_OF_README


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_targets_in_sentences_exist(page):
    for span in code_spans_of(page):
        program, *arguments = span.split() or [""]
        if program == "make":
            assert is_target(arguments[0]), span
        for name in arguments if program in PROGRAMS else [span]:
            if FILE.fullmatch(name) and not name.startswith("outputs/") and "NAME" not in name:
                assert any(True for folder in (ROOT, page.parent, ROOT / "tests") for _ in folder.glob(name)), span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles_and_imports(page):
    for code in blocks_of(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert [alias.name for alias in node.names if not hasattr(import_module(node.module), alias.name)] == []
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    import_module(alias.name)


def test_yaml_is_yaml():
    blocks = [(page, code) for page in PAGES for code in blocks_of(page, "yaml")]
    assert blocks
    for page, code in blocks:
        assert isinstance(yaml.safe_load(code.strip().strip("-")), dict), page


def test_nobody_is_told_to_force_bfloat16():
    texts = [*PAGES, *ROOT.glob("configs/*.yaml"), *ROOT.glob("*.py")]
    assert [path for path in texts if re.search(r"mixed_precision:? \"?bf16", text_of(path))] == []


@pytest.fixture(scope="module")
def reader(tmp_path_factory, backbone_folder):
    """A reader's folder, with small versions of all files and models that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    model = EmoShareModel.from_backbone_pretrained(backbone_folder, **SMALL_HEAD).eval()
    extractor = EmoShareFeatureExtractor.for_backbone(backbone_folder, model.config.backbone_config)
    for name in ("outputs/demo", "outputs/mine", "ORG/NAME"):
        model.save_pretrained(folder / name)
        extractor.save_pretrained(folder / name)
    for name in ("hubert-base-ls960", "hubert-large-ll60k"):
        shutil.copytree(backbone_folder, folder / "facebook" / name)
    (folder / "metrics").symlink_to(ROOT / "metrics")
    soundfile.write(folder / "meeting.wav", speech(20.0), 16000)
    (folder / "turns.rttm").write_text("SPEAKER meeting 1 0.5 4.0 <NA> <NA> ada <NA> <NA>\n")
    for name in ["clip.wav", *(f"clip_{number}.wav" for number in range(100))]:
        soundfile.write(folder / name, speech(0.3), 16000)
    (folder / "folder").mkdir()
    shutil.copy(folder / "clip.wav", folder / "folder" / "a.wav")
    write_corpus(folder / "DIR", {"train": 6, "devel": 6, "test": 4})
    clips = ["train_000", "train_001", *(f"test_00{number}" for number in range(4))]
    facts = [[f"{clip}.wav", "eve", "f", "de", "12"] for clip in clips]
    write_csv(folder / "DIR" / "lab" / "clips.csv", ["filename", "speaker", "sex", "language", "listeners"], facts)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/using.md",
        "docs/conversations.md",
        "docs/training.md",
        "metrics/emotion_share_spearman/README.md",
    ],
)
def test_python_runs(page, reader, monkeypatch):
    """From the first block of a page to its last; `publishing.md`, which needs the Hub, is run in `test_hub.py`."""
    monkeypatch.chdir(reader)
    namespace = {"waveform": load_audio("clip.wav"), "frame_features": torch.zeros(1, 9, SMALL_BACKBONE["hidden_size"])}
    for code in blocks_of(ROOT / page, "python"):
        if "load_dataset(" in code:  # of a dataset on the Hub
            continue
        exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        ("README.md", "predict"),
        ("docs/command_line.md", "predict"),
        ("docs/command_line.md", "embed"),
        ("docs/command_line.md", "evaluate"),
        ("docs/conversations.md", "predict"),
        ("docs/conversations.md", "embed"),
    ],
)
def test_emoshare_runs(page, command, reader, monkeypatch):
    monkeypatch.chdir(reader)
    commands = [words for words in commands_of(ROOT / page) if words[:2] == ["emoshare", command]]
    assert commands
    for words in commands:
        assert cli.main(words[1:]) == 0
