"""What makes a folder a complete model repository: its modules and its card, and how it is published."""

import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file, logging

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
# The modules that config.json and preprocessor_config.json name; `copy_modules` adds those that they import.
ENTRY_MODULES = (
    "configuration_emoshare.py",
    "modeling_emoshare.py",
    "feature_extraction_emoshare.py",
    "pipeline_emoshare.py",
)
CARD_FILES = ("README.md", "shares_devel.png")  # the model card, and the figure in it
# The files of a model repository on the Hub. Predictions are not part of it: they name the clips of the corpus.
PUBLISHED = ("README.md", "*.json", "*.png", "*.py", "model*.safetensors")


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
    present, waiting = set(), list(ENTRY_MODULES)
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
            logger.warning(f"{folder} is saved without {name}, which {name_or_path!r} no longer has")
    return present


def copy_card(folder, name_or_path):
    """Copies the model card, if the model was loaded from a repository that has one, and `folder` has none yet."""
    for name in CARD_FILES:
        source, target = fetch_file(name, name_or_path), Path(folder) / name
        if source is not None and not target.exists():
            shutil.copyfile(source, target)


def fetch_file(name, name_or_path):
    """
    A file of the repository or folder that a model was loaded from; remote code takes it from its own commit.

    Returns:
        Its path, or `None` if there is none.
    """
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        local = Path(name_or_path) / name
        return local if local.is_file() else None
    # Transformers keeps a Hub repository's modules in a folder named after their commit.
    commit = Path(__file__).parent.name if is_remote_code() else None
    try:
        return cached_file(name_or_path, name, revision=commit)
    except OSError as error:
        logger.info(f"{name} was not found in {name_or_path!r}: {error}")
        return None


def publish_folder(folder, repo_id, commit_message, token=None, revision=None, create_pr=False):
    """
    Uploads a model repository in one commit, all or nothing. `upload_folder` may make several commits, and between them
    half a model could be loaded.

    Args:
        folder: the model repository; files in it that match none of `PUBLISHED` are not uploaded.
        repo_id: `ORG/NAME`, which must exist.
        commit_message, token, revision, create_pr: as in `huggingface_hub`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    files = sorted({path for pattern in PUBLISHED for path in Path(folder).glob(pattern)})
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    return HfApi(token=token).create_commit(
        repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
    )


def module_file(class_reference):
    """`"module.Class"` -> `"module.py"`."""
    return class_reference.split(".")[0] + ".py"


def is_remote_code():
    """Whether this module runs as remote code, and not as a part of the installed package."""
    return __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
