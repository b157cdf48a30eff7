"""Publishing a trained model on the Hugging Face Hub."""

from huggingface_hub import HfApi

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
    commit = HfApi().upload_folder(
        repo_id=run.hub_model_id,
        folder_path=run.output_dir,
        allow_patterns=PUBLISHED,
        ignore_patterns=["*/*"],
        commit_message="EmoShare model",
    )
    return commit.commit_url
