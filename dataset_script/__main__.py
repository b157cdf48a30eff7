"""
Publishes an emotion share corpus as Parquet files that hold the audio, with a dataset card.

On the Hugging Face Hub, in a private repository:
    python -m emoshare.dataset_script --config compare2023 --data_dir DIR --push_to_hub ORG/NAME
In a folder:
    python -m emoshare.dataset_script --config csv --data_dir DIR --output_dir FOLDER
"""

import argparse
import sys
import warnings
from pathlib import Path

from .corpora import CORPORA


def main(argv):
    arguments = _parse(argv)

    # Imported after the arguments have been checked, because this takes seconds.
    from ..audio_emoshare import SAMPLING_RATE
    from ..repository_emoshare import create_repository
    from .audio import check_audio
    from .corpus import built
    from .emotion_share import EmotionShare
    from .publishing import push_dataset, write_dataset

    corpus = CORPORA[arguments.config]
    if arguments.public and not corpus.is_redistributable:
        warnings.warn(
            f"--public: the data of {corpus.title} may not be redistributed; publish only what its owners let you "
            "publish",
            stacklevel=2,
        )
    builder = EmotionShare(arguments.config, data_dir=arguments.data_dir)
    source = arguments.data_dir or arguments.config
    check_audio(built(builder), builder.tables.splits, source, SAMPLING_RATE, min_samples=1)
    if arguments.push_to_hub:
        name = create_repository(arguments.push_to_hub, private=not arguments.public, repo_type="dataset")
        print(f"Published: {push_dataset(builder, name)}")
    else:
        folder = Path(arguments.output_dir).expanduser().resolve()
        write_dataset(builder, folder, folder.name)
        print(f"Written: {folder}")


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m emoshare.dataset_script",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, choices=list(CORPORA), help="the corpus")
    layouts = [f"{info.layout} for {name}" for name, info in CORPORA.items() if info.needs_data_dir]
    parser.add_argument("--data_dir", help=f"its folder: with {'; '.join(layouts)}")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--push_to_hub", metavar="ORG/NAME", help="publish it in this dataset repository on the Hub")
    target.add_argument("--output_dir", help="write it to this folder, which must be new or empty")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    arguments = parser.parse_args(argv)
    if arguments.public and not arguments.push_to_hub:
        parser.error("--public is for --push_to_hub, which was not given")
    return arguments


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:  # something is wrong with the corpus, the disk or the Hub
        print(f"python -m emoshare.dataset_script: error: {error}", file=sys.stderr)
        sys.exit(2)
