"""What makes a folder a complete model repository: its modules and its card, and how it is published."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging

logger = logging.get_logger(__name__)

# What the config.json of a model repository names, and the modules that these classes live in.
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
RUNTIME = "emoshare_runtime.py"  # which an ONNX export needs, and no other module imports
# Arguments of `from_pretrained` that say how to reach the Hub.
ACCESS = ("token", "cache_dir", "local_files_only", "force_download")
_access = {}  # how each repository was reached when something was loaded from it; kept in memory alone

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

    The installed package has all of them next to this file. Remote code has only those that its entry module imports;
    the rest is fetched from the repository that the config was loaded from, at the same commit.

    Args:
        folder (`Path`): made if it does not exist.
        name_or_path: repository or folder that the config was loaded from, if any.

    Returns:
        `set[str]`: names of the modules that are in the folder now.
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
        if target.exists():  # a model that is being saved has already written its own modules
            present.add(name)
            waiting += [f"{module}.py" for module in get_relative_imports(target)]
        else:
            logger.warning(f"{folder} is saved without {name}, which could not be fetched from {name_or_path!r}")
    return present


def remember_access(name_or_path, arguments):
    """Keeps how a repository is reached, so that saving a model from it can fetch its other files in the same way."""
    _access[str(name_or_path)] = {name: arguments[name] for name in (*ACCESS, "revision") if name in arguments}


def copy_card(folder, name_or_path):
    """Copies the model card, if the model was loaded from a repository that has one, and `folder` has none yet."""
    for name in CARD_FILES:
        source, target = fetch_file(name, name_or_path), Path(folder) / name
        if source is not None and not target.exists():
            shutil.copyfile(source, target)


def fetch_file(name, name_or_path):
    """
    A file of the repository or folder that a model was loaded from, in the same revision; remote code takes it from its
    own commit.

    Returns:
        Its path, or `None` if there is none.
    """
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        local = Path(name_or_path) / name
        return local if local.is_file() else None
    # Transformers keeps a Hub repository's modules in a folder named after their commit.
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
    Makes a repository on the Hub, if there is none. Called before long work, so that a missing token or a wrong name
    costs no time; `huggingface_hub` says what is wrong.

    Args:
        repo_id: `ORG/NAME`.
        private: whether it is to be private; `None` if that does not matter, and then a new one is what the
            organisation's settings say.
        token, repo_type: as in `huggingface_hub`.

    Returns:
        Its full name.

    Raises:
        ValueError: if there is such a repository already, and it is public where it should be private, or the reverse.
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
    Uploads a model repository in one commit, all or nothing. `upload_folder` may make several commits, and between them
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
    """While the Hub is asked for something: a connection that fails is an OSError, as what the Hub refuses is."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:
        is_connection = isinstance(error, HTTPError) and not isinstance(error, OSError)
        is_upload = isinstance(error.__cause__, HTTPError)  # a RuntimeError that names the file
        if not is_connection and not is_upload:
            raise
        raise OSError(f"{repo_id}: the Hub cannot be reached ({error.__cause__ or error})") from error


class PushToHub:
    """For classes that Transformers can push: where `private` is given, an existing repository must be what it says."""

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
        """As in Transformers; what is pushed as `push_to_hub` does, with the same errors."""
        if push_to_hub and kwargs.get("private") is not None:
            repo_id = kwargs.get("repo_id") or Path(save_directory).name
            create_repository(repo_id, kwargs["private"], kwargs.get("token"))
        with clear_errors_of_hub(save_directory):
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)


def module_file(class_reference):
    """`"module.Class"` -> `"module.py"`."""
    return class_reference.split(".")[0] + ".py"


def is_remote_code():
    """Whether this module runs as remote code, and not as a part of the installed package."""
    return __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
