"""Makes a folder a complete model repository, with modules and card, and publishes it."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

logger = logging.get_logger(__name__)

# The classes that config.json of a model repository names, with their modules.
AUTO_MAP = {
    "AutoConfig": "configuration_emoshare.EmoShareConfig",
    "AutoModel": "modeling_emoshare.EmoShareModel",
    "AutoModelForAudioClassification": "modeling_emoshare.EmoShareModel",
}
CUSTOM_PIPELINES = {
    "emotion-share": {
        "impl": "pipeline_emoshare.EmotionSharePipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "audio",
    }
}
# The modules that config.json and preprocessor_config.json name, and the one that Inference Endpoints look for;
# `copy_modules` adds those that they import.
ENTRY_MODULES = (
    "handler.py",
    "configuration_emoshare.py",
    "modeling_emoshare.py",
    "feature_extraction_emoshare.py",
    "pipeline_emoshare.py",
)
RUNTIME = "emoshare_runtime.py"  # needed by ONNX exports, and imported by no other module
# Arguments of `from_pretrained` that say how to reach the Hub.
ACCESS = ("token", "cache_dir", "local_files_only", "force_download")
_access = {}  # by repository, the arguments with which something was loaded from it; kept in memory only

CARD_FILES = ("README.md", "shares_devel.png", "calibration_devel.png")  # the model card, and the figures in it
# What is published of a model's folder, besides its modules. Nothing else is: predictions name the clips of the corpus,
# results by group name its speakers, and people keep files of their own there.
PUBLISHED = (
    *CARD_FILES,
    "config.json",
    "preprocessor_config.json",
    "eval_results.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def copy_modules(folder, name_or_path):
    """
    Copies the modules of a model repository to a folder.

    The installed package has all modules next to this file. Remote code has only those that its entry module imports;
    the others are fetched from the repository that the config was loaded from, at the same commit.

    Args:
        folder (`Path`): created if it does not exist.
        name_or_path: repository or folder that the config was loaded from, if any.

    Returns:
        `set[str]`: names of the modules that the folder now has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present, waiting = set(), [*ENTRY_MODULES, RUNTIME]
    while waiting:
        name = waiting.pop()
        if name in present:
            continue
        source = Path(__file__).with_name(name)
        if not source.is_file():
            source = fetch_file(name, name_or_path)
        target = folder / name
        if source is not None and not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
        if target.exists():  # also modules that saving the model has written
            present.add(name)
            waiting += [f"{module}.py" for module in get_relative_imports(target)]
        else:
            logger.warning(f"{folder} is saved without {name}, which could not be fetched from {name_or_path!r}")
    return present


def remember_access(name_or_path, arguments):
    """Remembers how a repository was reached, so that saving a model from it can fetch its other files likewise."""
    _access[str(name_or_path)] = {name: arguments[name] for name in (*ACCESS, "revision") if name in arguments}


def copy_card(folder, name_or_path):
    """Copies the model card and its figures from the repository that has them; files in `folder` are kept."""
    for name in CARD_FILES:
        source, target = fetch_file(name, name_or_path), Path(folder) / name
        if source is not None and not target.exists():
            shutil.copyfile(source, target)


def fetch_file(name, name_or_path):
    """
    Fetches a file of the repository or folder that a model was loaded from, at the same revision; remote code uses its
    own commit.

    Returns:
        Path of the local copy, or `None` if there is no such file.
    """
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        local = Path(name_or_path) / name
        return local if local.is_file() else None
    # Transformers keeps the modules of a Hub repository in a folder named after their commit.
    commit = {"revision": Path(__file__).parent.name} if is_remote_code() else {}
    try:
        return hf_hub_download(name_or_path, name, **{**_access.get(str(name_or_path), {}), **commit})
    except (OSError, HFValidationError) as error:
        is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not is_missing:
            logger.warning(f"{name} could not be fetched from {name_or_path!r}: {error}")
        return None


def create_repository(repo_id, private=None, token=None, repo_type="model"):
    """
    Creates a repository on the Hub, unless it exists. It is called before long work, so that a missing token or a wrong
    name costs no time; `huggingface_hub` says what is wrong.

    Args:
        repo_id: `ORG/NAME`.
        private: whether it must be private. With `None`, an existing repository may be either, and a new one follows
            the organisation's settings.
        token, repo_type: as in `huggingface_hub`.

    Returns:
        Its full name.

    Raises:
        ValueError: if the repository exists and is public where it should be private, or the reverse.
        OSError: if the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=token)
    with clear_errors_of_hub(repo_id):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        is_private = api.repo_info(repo_id, repo_type=repo_type).private if private is not None else None
    if is_private != private:
        found, expected = ("private" if value else "public" for value in (is_private, private))
        raise ValueError(
            f"{repo_id}: the repository exists and is {found}; expected a {expected} one. Its settings on the Hub can "
            "change that"
        )
    return repo_id


def publish_folder(folder, repo_id, commit_message, token=None, revision=None, create_pr=False):
    """
    Uploads a model repository in one commit, all or nothing. `upload_folder` may make several commits, between which
    half a model could be loaded.

    Args:
        folder: the model repository. Its modules and the files of `PUBLISHED` are uploaded.
        repo_id: `ORG/NAME`, which must exist.
        commit_message, token, revision, create_pr: as in `huggingface_hub`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    folder = Path(folder)
    modules = [folder / name for name in copy_modules(folder, folder)]
    files = sorted([*modules, *(path for pattern in PUBLISHED for path in folder.glob(pattern))])
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    with clear_errors_of_hub(repo_id):
        return HfApi(token=token).create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )


@contextmanager
def clear_errors_of_hub(repo_id):
    """Turns connection failures into OSError, as the Hub's refusals are."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:
        is_connection = isinstance(error, HTTPError) and not isinstance(error, OSError)
        is_upload = isinstance(error.__cause__, HTTPError)  # a RuntimeError that names the file
        if not is_connection and not is_upload:
            raise
        raise OSError(f"{repo_id}: the Hub cannot be reached ({error.__cause__ or error})") from error


class PushToHub:
    """Mixin for classes that Transformers can push: if `private` is given, an existing repository must match it."""

    def push_to_hub(self, repo_id, private=None, token=None, **kwargs):
        """
        As in Transformers.

        Raises:
            ValueError: if the repository exists and is public where it should be private, or the reverse.
            OSError: if the Hub refuses, or cannot be reached.
        """
        if private is not None:
            create_repository(repo_id, private, token)
        with clear_errors_of_hub(repo_id):
            return super().push_to_hub(repo_id, private=private, token=token, **kwargs)

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """As in Transformers; pushing checks `private` and raises errors as `push_to_hub` does."""
        if push_to_hub and kwargs.get("private") is not None:
            repo_id = kwargs.get("repo_id") or Path(save_directory).name
            create_repository(repo_id, kwargs["private"], kwargs.get("token"))
        with clear_errors_of_hub(save_directory):
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)


def module_file(class_reference):
    """`"module.Class"` -> `"module.py"`."""
    return class_reference.split(".")[0] + ".py"


def is_remote_code():
    """Whether this module runs as remote code rather than as a part of the installed package."""
    return __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
