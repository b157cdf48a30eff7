"""Publishing a trained model on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

# What a model repository is made of. Predictions stay where they are: they name the clips of the corpus.
PUBLISHED = ("README.md", "*.json", "*.png", "*.py", "model*.safetensors")


def create_repository(run):
    """
    Makes the model's repository, if there is none: before anything is trained, so that a missing token or a wrong name
    costs no time. `huggingface_hub` says what is wrong.
    """
    HfApi().create_repo(run.hub_model_id, private=run.hub_private, exist_ok=True)


def publish(run):
    """Uploads the run's model in one commit, all or nothing; returns its address."""
    files = sorted({path for pattern in PUBLISHED for path in Path(run.output_dir).glob(pattern)})
    # Not `upload_folder`, which may make several commits: between them, half a model could be loaded.
    commit = HfApi().create_commit(
        run.hub_model_id,
        [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files],
        commit_message="EmoShare model",
    )
    return commit.commit_url
