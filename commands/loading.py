"""Loads the model that a command was given."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline

from ..feature_extraction_emoshare import EmoShareFeatureExtractor
from ..training.precision import set_precision_of_evaluation

HUB_ID = re.compile(r"[\w.-]*\w[\w.-]*(/[\w.-]+)?")


def load_pipeline(arguments, dtype="auto"):
    model, feature_extractor = load_model(arguments, dtype)
    with errors_of_loading(arguments):
        # Without an accelerator, Transformers takes any number for the CPU, and PyTorch refuses it.
        device = torch.device(arguments.device) if isinstance(arguments.device, int) else arguments.device
        emotion_share = pipeline(
            "emotion-share",
            model=model,
            feature_extractor=feature_extractor,
            device=device,
            batch_size=arguments.batch_size,
        )
        set_precision_of_evaluation(emotion_share.model)
    return emotion_share


def load_model(arguments, dtype):
    """Loads with the installed classes, which `import emoshare` has registered; the repository's code does not run."""
    _check_model_folder(arguments)
    source = {"revision": arguments.revision, "trust_remote_code": False}
    with errors_of_loading(arguments):
        model_type = AutoConfig.from_pretrained(arguments.model, **source).model_type
        if model_type != "emoshare":
            raise ValueError(f"its model_type is {model_type!r}; expected 'emoshare'")
        feature_extractor = AutoFeatureExtractor.from_pretrained(arguments.model, **source)
        if not isinstance(feature_extractor, EmoShareFeatureExtractor):
            raise ValueError(f"its feature extractor is {type(feature_extractor).__name__}, and not EmoShare's")
        return AutoModel.from_pretrained(arguments.model, dtype=dtype, **source), feature_extractor


@contextmanager
def errors_of_loading(arguments):
    try:
        yield
    # RuntimeError: there is no such device, or no memory left on it. AssertionError: torch was built without CUDA.
    # ImportError: the model has adapters, and PEFT is not installed.
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        if os.path.isdir(arguments.model):
            raise ValueError(f"cannot load {arguments.model}: {' '.join(str(error).split())}") from error
        first = str(error).partition("\n")[0]  # further lines are advice of the Hub's client
        where = "there is no such folder here, and from the Hub: " if isinstance(error, OSError) else ""
        raise ValueError(f"cannot load {arguments.model}: {where}{first}") from error


def _check_model_folder(arguments):
    """Raises a ValueError if a folder is incomplete or a path mistyped, before the Hub is asked."""
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
        raise ValueError(
            f"{arguments.model_argument}: got {arguments.model!r}; expected a folder, or a Hub id ORG/NAME"
        )
