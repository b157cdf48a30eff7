"""The command line of `train.py`: flags, or one YAML file of them and then flags that override it."""

import difflib
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from ..dataset_script.corpora import CORPORA, is_published

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
ACOUSTIC = "acoustic"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _flag(default, help, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = _flag(
        "synthetic",
        "'synthetic' for the embedded corpus, 'compare2023', 'csv' for a folder in its layout with labels of your own, "
        "or a dataset that `python -m emoshare.dataset_script` published: its Hub id ORG/NAME or folder",
    )
    data_dir: str | None = _flag(None, "folder with wav/*.wav and lab/{train,devel,test}.csv: of compare2023 and csv")
    max_train_samples: int | None = _flag(None, "train on the first so many clips only")
    feature_cache_dir: str | None = _flag(None, "where frame features are kept; OUTPUT_DIR/features if not given")
    feature_dtype: Literal["float16", "bfloat16", "float32"] = _flag("float16", "how frame features are kept")

    def __post_init__(self):
        if is_published(self.dataset):
            if not Path(self.dataset).is_dir() and not HUB_ID.fullmatch(self.dataset):
                raise ValueError(
                    f"--dataset: got {self.dataset!r}; expected {', '.join(CORPORA)}, a Hub id ORG/NAME or a folder"
                )
            if Path(self.dataset, "lab").is_dir():
                raise ValueError(
                    f"--dataset: {self.dataset} holds clips and CSVs; expected --dataset csv --data_dir {self.dataset}"
                )
            if self.data_dir is not None:
                raise ValueError(f"--data_dir is for compare2023 and csv; got --dataset {self.dataset}")
        if self.max_train_samples is not None:
            _require_positive(self, "max_train_samples")


@dataclass
class ModelArguments:
    """What to train; the fields of `EmoShareConfig`, where its documentation says more."""

    backbone: str = _flag(ACOUSTIC, "'acoustic' for no backbone, or the Hub id or folder of a speech encoder")
    backbone_revision: str | None = _flag(None, "its branch, tag or commit")
    backbone_layer: str = _flag("-1", "-1: last hidden state; k: hidden_states[k]; 'weighted': a learned sum of all")
    acoustic_features: Literal["mel", "mfcc"] = _flag("mel", "frame features of --backbone acoustic")
    architecture: Literal["cnn_lstm", "cnn_lstm_attention", "transformer"] = _flag(
        "cnn_lstm_attention", "the paper's 1 or 2, or the transformer that it tried and dropped"
    )
    conv_channels: list[int] | None = _flag(None, "output channels of the convolutions; the released ones if not given")
    pool_size: int = _flag(2, "frames per step after max-pooling")
    lstm_hidden_size: int = _flag(512, "width of the LSTM")
    lstm_num_layers: int = _flag(2, "layers of the LSTM")
    ffn_sizes: list[int] | None = _flag(None, "hidden sizes of the FFNN; the released ones if not given")
    normalization: Literal["frame", "none", "sequence"] = _flag(
        "frame", "LayerNorms; 'sequence' is the released network"
    )
    max_frames: int = _flag(398, "length that normalization 'sequence' pads to; 797 for acoustic features")
    output_activation: Literal["sigmoid", "relu"] = _flag("sigmoid", "last activation")
    separate_heads: bool = _flag(True, "one network per emotion, or one with all outputs")
    chunk_length_s: float = _flag(8.0, "longest window in seconds; longer clips are cut")

    def __post_init__(self):
        if self.backbone_layer != "weighted" and not self.backbone_layer.removeprefix("-").isdigit():
            raise ValueError(f"--backbone_layer: got {self.backbone_layer!r}; expected an integer or 'weighted'")
        _require_positive(self, "pool_size", "lstm_hidden_size", "lstm_num_layers", "max_frames", "chunk_length_s")
        if self.backbone == ACOUSTIC and (self.backbone_layer != "-1" or self.backbone_revision is not None):
            raise ValueError("--backbone_layer and --backbone_revision are for a backbone; got --backbone acoustic")
        if self.backbone != ACOUSTIC and self.acoustic_features != "mel":
            raise ValueError(f"--acoustic_features is for --backbone acoustic; got --backbone {self.backbone}")


@dataclass
class RunArguments:
    """How to train, and what to write."""

    output_dir: str = _flag("outputs/emoshare", "folder for the model, the results and the checkpoint")
    num_train_epochs: int = _flag(50, "passes over the training data, at most")
    per_device_train_batch_size: int = _flag(32, "clips per step on each device, on average: long ones are fewer")
    learning_rate: float = _flag(1e-4, "of Adam")
    mixed_precision: Literal["auto", "bf16", "no"] = _flag(
        "auto", "heads compute in bfloat16 where the hardware has it"
    )
    early_stopping_patience: int = _flag(10, "epochs without a better devel score after which an emotion is done")
    seed: int = _flag(0, "of the initial weights and the order of clips")
    head_seeds: list[int] | None = _flag(None, "of the initial weights, one for each emotion's network")
    restart_dead_heads: int = _flag(
        0, "start a network anew, at most so often, that gives the same share for every devel clip"
    )
    bootstrap: int = _flag(1000, "resamples for the confidence intervals of the final scores; 0 for none")
    controls: bool = _flag(False, "after training, run the controls that the demo's numbers should be read beside")
    checkpoint_minutes: float = _flag(5.0, "time between checkpoints, at least; 0 for one after each epoch")
    report_to: str = _flag("none", "experiment tracker: none, tensorboard, wandb, ... as accelerate knows them")
    push_to_hub: bool = _flag(False, "publish model, feature extractor, pipeline and card on the Hugging Face Hub")
    hub_model_id: str | None = _flag(None, "name of its repository there: ORG/NAME")
    hub_private: bool = _flag(False, "whether that repository is private, if it is a new one")
    push_backbone: bool = _flag(
        True, "the saved model holds the backbone's weights too; false: the heads alone, loading fetches the backbone"
    )
    resume_from_checkpoint: str | None = _flag(
        None,
        "go on from a checkpoint folder, or from the last one in OUTPUT_DIR if no folder follows",
        nargs="?",
        const="last",
    )

    def __post_init__(self):
        _require_positive(
            self, "num_train_epochs", "per_device_train_batch_size", "learning_rate", "early_stopping_patience"
        )
        if not self.output_dir:
            raise ValueError("--output_dir: got nothing; expected a folder")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub: needs --hub_model_id ORG/NAME")
        if not self.push_to_hub and (self.hub_model_id or self.hub_private):
            raise ValueError("--hub_model_id and --hub_private are for --push_to_hub, which was not given")
        for name, seeds in [("seed", [self.seed]), ("head_seeds", self.head_seeds or [])]:
            for seed in seeds:
                if not 0 <= seed < 2**32:
                    raise ValueError(f"--{name}: got {seed}; expected 0 to {2**32 - 1}")
        for name in ("bootstrap", "restart_dead_heads", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name}: got {getattr(self, name)}; expected 0 or more")


def _require_positive(arguments, *names):
    for name in names:
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name}: got {value}; expected a positive number")


class _Parser(HfArgumentParser):
    """Says what is wrong by a ValueError."""

    def __init__(self):
        super().__init__((DataArguments, ModelArguments, RunArguments), prog="train.py", allow_abbrev=False)
        self.usage = "train.py [CONFIG.yaml] [--FLAG VALUE ...]"

    def error(self, message):
        raise ValueError(message)

    def parse(self, flags):
        # parse_args, unlike parse_args_into_dataclasses, refuses unknown flags by itself, and reads no other file.
        values = vars(self.parse_args(flags))
        data, model, run = (
            arguments(**{name: values[name] for name in arguments.__dataclass_fields__})
            for arguments in self.dataclass_types
        )
        _check_together(model, run)
        return data, model, run


def parse_arguments(argv):
    """
    Args:
        argv: `[]` for the demo; flags; or the path of a YAML file (`flag: value`), and then flags that override it.

    Returns:
        `DataArguments`, `ModelArguments`, `RunArguments`. Anything unknown, abbreviated or of a wrong type ends the
        program with a message that names it.
    """
    parser = _Parser()
    if not argv:
        argv = [str(DEFAULT_CONFIG)]
    try:
        if argv[0].endswith((".yaml", ".yml")):
            path = Path(argv[0])
            argv = _flags(read_yaml(path), path, parser) + argv[1:]
        return parser.parse(argv)
    except ValueError as error:
        return HfArgumentParser.error(parser, str(error))


def arguments_of(entries, source):
    """
    Args:
        entries: dict of flags and values, as a YAML file of `parse_arguments` has them.
        source: where they are from, for messages.

    Returns:
        What `parse_arguments` returns.

    Raises:
        ValueError: on anything unknown or of a wrong type; names it.
    """
    parser = _Parser()
    return parser.parse(_flags(entries, source, parser))


def _check_together(model, run):
    if run.push_to_hub and not run.push_backbone and Path(model.backbone).exists():
        raise ValueError(
            f"--push_backbone false: the backbone is the local folder {model.backbone}, which nobody else could fetch"
        )
    for name in ("head_seeds", "restart_dead_heads"):
        if getattr(run, name) and not model.separate_heads:
            raise ValueError(f"--{name} is for a network per emotion; got --separate_heads false")


def fixed_settings(data, model, run):
    """The arguments that decide a run's result, as a flat dict; of the corpus, its content counts, not its place."""
    settings = {**asdict(data), **asdict(model), **asdict(run)}
    free = (
        "data_dir",
        "feature_cache_dir",
        "output_dir",
        "num_train_epochs",
        "early_stopping_patience",
        "bootstrap",
        "controls",
        "checkpoint_minutes",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "push_backbone",
        "resume_from_checkpoint",
    )
    return {name: value for name, value in settings.items() if name not in free}


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"given more than once: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """
    A YAML file of keys and values as a dict.

    Raises:
        ValueError: if there is none, or it holds anything else, or a key twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    with path.open(encoding="utf-8") as file:
        try:
            entries = yaml.load(file, Loader=_UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    return entries


def _flags(entries, source, parser):
    """The entries of a YAML file as command line flags, so that both are checked in the same way."""
    known = {
        name: field.type
        for arguments in parser.dataclass_types
        for name, field in arguments.__dataclass_fields__.items()
    }
    flags = []
    for name, value in entries.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{source}: unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
        if value is None:
            continue  # as if the key were not there
        is_list = getattr(known[name], "__origin__", None) is list
        if isinstance(value, dict) or (isinstance(value, list) and not is_list):
            raise ValueError(f"{source}: {name} is {value!r}; expected a single value")
        if known[name] is str and isinstance(value, bool | float):
            raise ValueError(f"{source}: {name} is {value!r}; expected text")
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(str(entry) for entry in values)]
    return flags
