"""`emoshare merge`."""

from pathlib import Path

from ..dataset_script.whole_files import check_is_new, writing
from .loading import load_pipeline


def run(arguments):
    """`emoshare merge`: merges the adapters of a model into its layers, so that it does not need PEFT."""
    output_dir = Path(arguments.output_dir)
    check_is_new(output_dir)
    emotion_share = load_pipeline(arguments, dtype="float32")
    config = emotion_share.model.config
    if not config.lora_rank:
        raise ValueError(f"--model: {arguments.model} has no adapters")
    emotion_share.model.merge_adapters()
    with writing(output_dir):
        emotion_share.save_pretrained(output_dir, include_backbone=config.include_backbone)
    print(f"Model without adapters: {output_dir}")
    return 0
