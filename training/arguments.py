"""The command line of `train.py`: flags, or a YAML file of flags followed by flags that override it."""

import argparse
import difflib
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from ..dataset_script.corpora import CORPORA, is_published
from ..dataset_script.folds import LEAST_FOLDS
from ..evaluation.selections import SELECTIONS
from ..fields_emoshare import ACOUSTIC_FEATURES, CHOICES, DEFAULTS
from .parts import Part

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
ACOUSTIC = "acoustic"
LEAVE_ONE_OUT = "leave_one_out"
_PROPERTIES = ("changes_results", "fixed_on_resume", "on_card", "is_config_field")  # of a flag, not for argparse
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _flag(default, help, changes_results=True, fixed_on_resume=None, on_card=True, **options):
    """
    A flag of the command line.

    Args:
        default, help, options: as in `add_argument` of `argparse`.
        changes_results: whether another value leads to another model or other scores; grids can vary such flags.
        fixed_on_resume: whether it must be unchanged when a run resumes from a checkpoint; by default, as
            `changes_results`.
        on_card: whether the model card shows it.
    """
    metadata = {
        "help": help,
        "changes_results": changes_results,
        "fixed_on_resume": changes_results if fixed_on_resume is None else fixed_on_resume,
        "on_card": on_card,
        **options,
    }
    if isinstance(default, tuple):  # a dataclass wants a new list for each object
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _place(default, help):
    """A flag that changes no result, such as the place of a folder."""
    return _flag(default, help, changes_results=False, on_card=False)


def _head_flag(name, help):
    """A flag for a field of `EmoShareConfig`, with the same name and default."""
    if name in CHOICES:
        help = f"{help}: {', '.join(CHOICES[name])}"
    return _flag(DEFAULTS[name], help, is_config_field=True)


@dataclass
class DataArguments:
    """What to train on."""

    dataset: str = _flag(
        "synthetic",
        f"the corpus: {', '.join(CORPORA)} ('csv': your own folder and labels); or the Hub id ORG/NAME or the folder "
        "of a dataset that `python -m emoshare.dataset_script` published",
    )
    data_dir: str | None = _place(
        None,
        "folder of the corpus: "
        + "; ".join(f"{info.layout} for {name}" for name, info in CORPORA.items() if info.needs_data_dir),
    )
    max_train_samples: int | None = _flag(None, "train only on the first N clips")
    folds: str | None = _flag(
        None,
        "divide all clips (of test, those whose shares are known) into this many folds: one is test, the next one "
        f"devel, and the others train; '{LEAVE_ONE_OUT}': a fold for each value of --group_by",
    )
    fold: int | None = _flag(None, "which of --folds is test, from 0")
    group_by: str | None = _flag(
        None, "a fact about the clips, such as speaker: clips with the same value are in the same fold"
    )
    decode_audio: bool = _place(
        False, "before training, decode each clip to its end to find damage, instead of reading its header"
    )
    feature_cache_dir: str | None = _place(
        None, "folder of the stored frame features; OUTPUT_DIR/features if not given"
    )
    feature_dtype: Literal["float16", "bfloat16", "float32"] = _flag("float16", "dtype of the stored frame features")
    streaming: bool = _place(
        False, "read the audio of a published dataset from its Parquet files, on the Hub for example, without a copy"
    )
    part: str | None = _place(
        None,
        "K/N, such as 3/16: extract only the frame features of part K of N, and end; for machines that share nothing "
        "but --feature_cache_dir",
    )

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
                with_folder = ", ".join(name for name, info in CORPORA.items() if info.needs_data_dir)
                raise ValueError(f"--data_dir is for {with_folder}; got --dataset {self.dataset}")
        if self.max_train_samples is not None:
            _require_positive(self, "max_train_samples")
        if self.part is not None:
            Part.named(self.part)
        if self.streaming and not is_published(self.dataset):
            raise ValueError(f"--streaming is for published datasets; got --dataset {self.dataset}")
        self._check_folds()

    @property
    def chosen_part(self):
        """`--part` as a `Part`; `None` for a run that extracts everything and then trains."""
        return None if self.part is None else Part.named(self.part)

    def _check_folds(self):
        if self.folds is None:
            for name in ("group_by", "fold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} is for --folds, which was not given")
            return
        is_number = self.folds.isdecimal() and int(self.folds) >= LEAST_FOLDS
        if not is_number and self.folds != LEAVE_ONE_OUT:
            raise ValueError(
                f"--folds: got {self.folds!r}; expected a number from {LEAST_FOLDS}, for test, devel and train, or "
                f"{LEAVE_ONE_OUT}"
            )
        if not is_number and self.group_by is None:
            raise ValueError(f"--folds: {LEAVE_ONE_OUT} needs --group_by, the fact whose values have a fold each")
        if self.fold is None:
            raise ValueError("--folds: needs --fold, the number of the fold that is test, from 0")
        if self.fold < 0 or (is_number and self.fold >= int(self.folds)):
            most = f" to {int(self.folds) - 1}" if is_number else " or more"
            raise ValueError(f"--fold: got {self.fold}; expected 0{most}")

    @property
    def num_folds(self):
        """`--folds` as a number; `None` for a fold for each group."""
        return None if self.folds == LEAVE_ONE_OUT else int(self.folds)


@dataclass
class ModelArguments:
    """What to train; `EmoShareConfig` documents the flags that are fields of it."""

    backbone: str = _flag(ACOUSTIC, "'acoustic' for no backbone, or the Hub id or folder of a speech encoder")
    backbone_revision: str | None = _flag(None, "its branch, tag or commit")
    backbone_layer: str = _flag("-1", "-1: last hidden state; k: hidden_states[k]; 'weighted': a learned sum of all")
    backbone_padding: Literal["30s", "clip"] | None = _flag(
        DEFAULTS["backbone_padding"],
        "for Whisper: whether it hears the clip padded with silence to 30 s, as in its training, or the clip alone, "
        "which is several times as fast; 30s if not given",
        is_config_field=True,
    )
    acoustic_features: Literal[ACOUSTIC_FEATURES] = _flag("mel", "frame features of --backbone acoustic")
    architecture: str = _head_flag("architecture", "the parts of a head")
    conv_channels: list[int] = _head_flag("conv_channels", "output channels of the convolutions")
    pool_size: int = _head_flag("pool_size", "frames per step after max-pooling")
    lstm_hidden_size: int = _head_flag("lstm_hidden_size", "width of the LSTM")
    lstm_num_layers: int = _head_flag("lstm_num_layers", "layers of the LSTM")
    ffn_sizes: list[int] | None = _head_flag("ffn_sizes", "hidden sizes of the FFN; the architecture's if not given")
    normalization: str = _head_flag("normalization", "LayerNorms ('sequence': those of the released network)")
    max_frames: int = _head_flag(
        "max_frames", "length to which normalization 'sequence' pads; 797 for acoustic features"
    )
    output_activation: str = _head_flag("output_activation", "last activation")
    separate_heads: bool = _head_flag("separate_heads", "one head per emotion, or one shared trunk with all outputs")
    loss: str = _head_flag("loss", "the loss that training minimises")
    dropout: float = _head_flag("dropout", "probability that training sets a value within a head to 0")
    chunk_length_s: float = _flag(8.0, "longest window in seconds; longer clips are cut")
    finetune_last_layers: int = _flag(
        0,
        "train the last N layers of the backbone, counted down from --backbone_layer, with the heads, on stored "
        "outputs of the layer below them; all emotions then keep the same epoch, as they share these layers",
    )
    finetune: Literal["none", "all"] = _flag(
        "none", "'all' trains the whole backbone with the heads, on waveforms; all emotions then keep the same epoch"
    )
    lora_rank: int = _flag(
        0,
        "train adapters of this rank (LoRA) on the attention of --finetune_last_layers instead of these layers; needs "
        "PEFT",
    )

    def __post_init__(self):
        if self.backbone_layer != "weighted" and not self.backbone_layer.removeprefix("-").isdigit():
            raise ValueError(f"--backbone_layer: got {self.backbone_layer!r}; expected an integer or 'weighted'")
        _require_positive(self, "pool_size", "lstm_hidden_size", "lstm_num_layers", "max_frames", "chunk_length_s")
        _require_fraction(self, "dropout")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name}: invalid choice: {getattr(self, name)!r}; expected {', '.join(allowed)}")
        of_backbone = (self.backbone_revision, self.backbone_padding)
        if self.is_acoustic and (self.backbone_layer != "-1" or of_backbone != (None, None)):
            raise ValueError(
                "--backbone_layer, --backbone_revision and --backbone_padding are for a backbone; got --backbone "
                "acoustic"
            )
        if not self.is_acoustic and self.acoustic_features != "mel":
            raise ValueError(f"--acoustic_features is for --backbone acoustic; got --backbone {self.backbone}")
        self._check_finetuning()

    def _check_finetuning(self):
        for name in ("finetune_last_layers", "lora_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name}: got {getattr(self, name)}; expected 0 or more")
        if self.lora_rank and not self.finetune_last_layers:
            raise ValueError("--lora_rank is for the layers of --finetune_last_layers, which was not given")
        if not self.tunes_backbone:
            return
        flag = "--finetune all" if self.finetune == "all" else "--finetune_last_layers"
        if self.is_acoustic:
            raise ValueError(f"{flag} is for a backbone; got --backbone acoustic")
        if not self.finetune_last_layers:
            return
        if self.finetune == "all":
            raise ValueError("--finetune all trains all layers; got --finetune_last_layers as well")
        if self.layer == "weighted":
            raise ValueError(
                "--finetune_last_layers counts down from one layer; got --backbone_layer weighted, a sum of all"
            )
        if 0 <= self.layer < self.finetune_last_layers:
            raise ValueError(
                f"--finetune_last_layers: got {self.finetune_last_layers}; expected at most {self.layer}, the layers "
                "up to --backbone_layer"
            )

    @property
    def tunes_backbone(self):
        """Whether the backbone or a part of it is trained with the heads."""
        return self.finetune == "all" or self.finetune_last_layers > 0

    @property
    def is_acoustic(self):
        """Whether the model has no backbone, and takes acoustic features."""
        return self.backbone == ACOUSTIC

    @property
    def layer(self):
        """`--backbone_layer` as `EmoShareConfig.backbone_layer`."""
        return self.backbone_layer if self.backbone_layer == "weighted" else int(self.backbone_layer)

    @property
    def backbone_fields(self):
        """The fields of `EmoShareConfig` about the layers of a backbone that are read or tuned, as a dict."""
        return {
            "backbone_layer": self.layer,
            "freeze_backbone": self.finetune != "all",
            "finetuned_layers": self.finetune_last_layers,
            "lora_rank": self.lora_rank,
        }

    @property
    def config_fields(self):
        """The fields of `EmoShareConfig` that flags of the same name give, as a dict."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if "is_config_field" in entry.metadata}


@dataclass
class RunArguments:
    """How to train, and what to write."""

    output_dir: str = _place("outputs/emoshare", "folder for the model, the results and the checkpoint")
    num_train_epochs: int = _flag(50, "largest number of passes over the training data", fixed_on_resume=False)
    per_device_train_batch_size: int = _flag(32, "clips per step on each device, on average: fewer if they are long")
    learning_rate: float = _flag(1e-4, "of Adam")
    finetune_learning_rate: float = _flag(
        1e-5, "of Adam, for the tuned part of the backbone; --lr_scheduler and --warmup_ratio hold for it, too"
    )
    gradient_accumulation_steps: int = _flag(1, "batches on each device whose mean gradient is used for one step")
    gradient_checkpointing: bool = _flag(
        False,
        "compute the activations of tuned layers twice instead of keeping them: less memory, the same results",
        changes_results=False,
        on_card=False,
    )
    label_weights: Literal["none", "smoothed"] = _flag(
        "none", "'smoothed' weighs a share by how rare it is: label distribution smoothing"
    )
    mixed_precision: Literal["auto", "bf16", "no"] = _flag(
        "auto", "'auto' trains the heads in bfloat16 if the device can, and in float32 otherwise"
    )
    early_stopping_patience: int = _flag(
        10, "epochs without a better devel score after which an emotion's head is done", fixed_on_resume=False
    )
    selection: str = _flag(
        "best_epoch",
        "which weights a head keeps: those of its best epoch on devel; those of the last epoch, without early "
        "stopping; or a running average, with early stopping on a smoothed devel score",
        choices=list(SELECTIONS),
    )
    weight_decay: float = _flag(0.0, "of AdamW, except for biases and LayerNorms; 0 for Adam")
    lr_scheduler: Literal["constant", "cosine"] = _flag(
        "constant", "'cosine' brings the learning rate to 0 over all epochs"
    )
    warmup_ratio: float = _flag(0.0, "fraction of all steps over which the learning rate grows from 0")
    max_grad_norm: float = _flag(0.0, "clips the gradient of a head to this norm; 0 for no limit")
    mixup: float = _flag(0.0, "ALPHA: mixes pairs of clips in a batch, by a draw from Beta(ALPHA, ALPHA); 0: none")
    time_mask: float = _flag(0.0, "masks up to this fraction of a clip's frames")
    feature_mask: float = _flag(0.0, "masks up to this fraction of a clip's features")
    time_stretch: float = _flag(0.0, "stretches or shortens a clip's frames in time by up to this fraction")
    listener_dropout: float = _flag(
        0.0, "leaves out each listener with this probability in each epoch; needs the number of listeners"
    )
    seed: int = _flag(0, "of the initial weights and the order of clips")
    head_seeds: list[int] | None = _flag(None, "of the initial weights, one for each emotion's head")
    restart_dead_heads: int = _flag(
        0, "re-initialise a head that predicts the same share for all devel clips, at most N times"
    )
    bootstrap: int = _flag(
        1000,
        "resamples for the confidence intervals of the final scores; 0 for none",
        fixed_on_resume=False,
        on_card=False,
    )
    resample: str | None = _flag(
        None,
        "for the confidence intervals, resample all clips with the same value of this fact together, usually speaker; "
        "single clips if not given",
        fixed_on_resume=False,
        on_card=False,
    )
    controls: bool = _place(False, "after training, run controls to compare the scores with")
    checkpoint_minutes: float = _place(5.0, "minutes between checkpoints, at least; 0 for one after each epoch")
    report_to: str = _place("none", "experiment tracker: none, tensorboard, wandb, ... as in accelerate")
    push_to_hub: bool = _place(False, "publish model, feature extractor, pipeline and card on the Hugging Face Hub")
    hub_model_id: str | None = _place(None, "the repository on the Hub: ORG/NAME")
    hub_private: bool = _place(False, "publish in a private repository; an existing one must be private")
    push_backbone: bool = _place(
        True, "save the backbone's weights with the model; if false, loading the model fetches the backbone"
    )
    resume_from_checkpoint: str | None = _flag(
        None,
        "resume from a checkpoint folder, or from the last one in OUTPUT_DIR if no folder follows",
        changes_results=False,
        on_card=False,
        nargs="?",
        const="last",
    )

    def __post_init__(self):
        _require_positive(
            self,
            "num_train_epochs",
            "per_device_train_batch_size",
            "learning_rate",
            "finetune_learning_rate",
            "gradient_accumulation_steps",
            "early_stopping_patience",
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
        for name in ("weight_decay", "max_grad_norm", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}: got {getattr(self, name)}; expected 0 or more")
        _require_fraction(self, "warmup_ratio", "time_mask", "feature_mask", "time_stretch", "listener_dropout")


@dataclass
class Arguments:
    """All arguments of a run."""

    data: DataArguments
    model: ModelArguments
    run: RunArguments

    def __post_init__(self):
        if self.run.push_to_hub and not self.run.push_backbone and Path(self.model.backbone).exists():
            raise ValueError(
                f"--push_backbone false: the backbone is the local folder {self.model.backbone}, which nobody else "
                "could fetch"
            )
        for name in ("head_seeds", "restart_dead_heads"):
            if getattr(self.run, name) and not self.model.separate_heads:
                raise ValueError(f"--{name} is for one head per emotion; got --separate_heads false")
        self._check_finetuning()

    def _check_finetuning(self):
        run = self.run
        if not self.model.tunes_backbone:
            for name in ("finetune_learning_rate", "gradient_checkpointing"):
                if getattr(run, name) != getattr(RunArguments, name):
                    raise ValueError(f"--{name} is for --finetune_last_layers or --finetune all; got neither")
            return
        if run.restart_dead_heads:
            raise ValueError(
                "--restart_dead_heads is for heads that train by themselves; with --finetune_last_layers or --finetune "
                "all they share layers, and their epoch"
            )
        if self.model.finetune != "all":
            return
        for name in ("mixup", "time_mask", "feature_mask", "time_stretch"):
            if getattr(run, name):
                raise ValueError(f"--{name} changes stored features; --finetune all trains on waveforms")
        if self.data.part is not None:
            raise ValueError("--part extracts features to a store; --finetune all trains on waveforms, and has none")
        if not run.push_backbone:
            raise ValueError("--push_backbone false: --finetune all trains the backbone, which must be saved too")

    @property
    def feature_cache_dir(self):
        """Folder of the feature stores."""
        return Path(self.data.feature_cache_dir or Path(self.run.output_dir) / "features")

    def values(self, kind):
        """The flags for which `kind`, such as `"changes_results"` or `"on_card"`, is true, as a flat dict."""
        groups = (self.data, self.model, self.run)
        chosen = {entry.name for group in groups for entry in fields(group) if entry.metadata[kind]}
        return {name: value for group in groups for name, value in asdict(group).items() if name in chosen}


def _require_positive(arguments, *names):
    for name in names:
        value = getattr(arguments, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name}: got {value}; expected a positive number")


def _require_fraction(arguments, *names):
    for name in names:
        value = getattr(arguments, name)
        if not 0 <= value < 1:
            raise ValueError(f"--{name}: got {value}; expected a number from 0 to less than 1")


class _Parser(argparse.ArgumentParser):
    """
    Makes flags and help from dataclasses as `transformers.HfArgumentParser` does, without importing Transformers.
    Raises ValueError for every error.
    """

    def __init__(self, name="train.py"):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog=name, allow_abbrev=False, formatter_class=formatter)
        self.usage = f"{name} [CONFIG.yaml] [--FLAG VALUE ...]"
        self.groups = (DataArguments, ModelArguments, RunArguments)
        self.types = {name: _type(hint) for group in self.groups for name, hint in get_type_hints(group).items()}
        for entry in (entry for group in self.groups for entry in fields(group)):
            self._add_flag(entry)

    def _add_flag(self, entry):
        of_flag = self.types[entry.name]
        default = entry.default_factory() if entry.default is MISSING else entry.default
        options = {name: value for name, value in entry.metadata.items() if name not in _PROPERTIES}
        if get_origin(of_flag) is Literal:
            options = {"choices": get_args(of_flag), **options}
        elif of_flag is bool:
            options = {"type": _is_yes, "nargs": "?", "const": True, **options}
        elif get_origin(of_flag) is list:
            options = {"type": get_args(of_flag)[0], "nargs": "+", **options}
        else:
            options = {"type": of_flag, **options}
        self.add_argument(*_spellings(entry.name), default=default, **options)
        if of_flag is bool and default:
            no, help = _spellings(f"no_{entry.name}"), entry.metadata["help"]
            self.add_argument(*no, dest=entry.name, action="store_false", default=False, help=help)

    def error(self, message):
        raise ValueError(message)

    def parse(self, flags):
        values = vars(self.parse_args(flags))
        groups = [group(**{entry.name: values[entry.name] for entry in fields(group)}) for group in self.groups]
        return Arguments(*groups)


def _type(hint):
    """The type of a flag's value, other than `None`."""
    types = [option for option in get_args(hint) if option is not NoneType]
    return types[0] if NoneType in get_args(hint) else hint


def _spellings(name):
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _is_yes(text):
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"got {text!r}; expected true or false")


def parse_arguments(argv, name="train.py"):
    """
    Args:
        argv: `[]` for the demo; flags; or the path of a YAML file (`flag: value`) followed by flags that override it.
        name: of the program, for messages.

    Returns:
        `Arguments`. Anything that is unknown, abbreviated or of a wrong type ends the program with a message that names
        it.
    """
    parser = _Parser(name)
    if not argv:
        argv = [str(DEFAULT_CONFIG)]
    try:
        if argv[0].endswith((".yaml", ".yml")):
            path = Path(argv[0])
            argv = _flags(read_yaml(path), path, parser) + argv[1:]
        return parser.parse(argv)
    except ValueError as error:
        return argparse.ArgumentParser.error(parser, str(error))


def arguments_of(entries, source):
    """
    Args:
        entries: dict of flags and values, as in a YAML file of `parse_arguments`.
        source: origin of the entries, for messages.

    Returns:
        `Arguments`.

    Raises:
        ValueError: if anything is unknown or of a wrong type; names it.
    """
    parser = _Parser()
    return parser.parse(_flags(entries, source, parser))


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which PyYAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"given more than once: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """
    Reads a YAML file of keys and values as a dict.

    Raises:
        ValueError: if there is no such file, or it holds anything else, or a key twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    with path.open(encoding="utf-8") as file:
        try:
            entries = yaml.load(file, Loader=_UniqueKeyLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected lines of the form 'key: value'")
    return entries


def _flags(entries, source, parser):
    """Converts the entries of a YAML file to command line flags, so that both are checked in the same way."""
    flags = []
    for name, value in entries.items():
        if name not in parser.types:
            close = difflib.get_close_matches(str(name), parser.types, n=1)
            raise ValueError(f"{source}: unknown key {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
        if value is None:
            continue  # as if the key were not there
        is_list = get_origin(parser.types[name]) is list
        if isinstance(value, dict) or (isinstance(value, list) and not is_list):
            raise ValueError(f"{source}: {name} is {value!r}; expected a single value")
        if parser.types[name] is str and isinstance(value, bool | float):
            expected = "'last', or the folder of a checkpoint" if name == "resume_from_checkpoint" else "text"
            raise ValueError(f"{source}: {name} is {value!r}; expected {expected}")
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(str(entry) for entry in values)]
    return flags
