"""Publishes an emotion share corpus: Parquet shards with the audio inside, and a dataset card."""

from pathlib import Path
from string import Template

import datasets
from datasets.info import DatasetInfosDict
from filelock import FileLock
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from ..repository_emoshare import clear_errors_of_hub
from .corpora import CORPORA
from .emotion_share import prepare
from .published import CARD, CARD_KEY
from .whole_files import check_is_new, put_in_place, work_folder

TEMPLATE = Path(__file__).parent / "dataset_card.md"
SIZE_CATEGORIES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def push_dataset(builder, name):
    """
    Uploads a corpus in one commit, all or nothing, in place of what the repository's `data` held before.

    Args:
        builder: `EmotionShare`.
        name: the repository, `ORG/NAME`.

    Returns:
        URL of the commit.

    Raises:
        ValueError, FileNotFoundError: if anything is wrong with the corpus; names file, split and row.
        OSError: if the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    # The shards are as large as the corpus: the cache has room for them, but the temporary folder may not.
    place = cache / f"publishing-{name.replace('/', '--')}"
    with FileLock(f"{place}.lock"), work_folder(place):
        folder = place / "dataset"
        write_dataset(builder, folder, name)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
        with clear_errors_of_hub(name):
            there = api.list_repo_files(name, repo_type="dataset")
            surplus = [file for file in there if file.startswith("data/") and file not in files]
            operations += [CommitOperationDelete(file) for file in surplus]
            # Not `upload_folder`, which may make several commits, between which half a corpus could be loaded.
            commit = api.create_commit(name, operations, repo_type="dataset", commit_message="Emotion share corpus")
    return commit.commit_url


def write_dataset(builder, folder, name):
    """
    Writes a corpus as a folder that `datasets.load_dataset` reads: `README.md`, the card, and `data/SPLIT*.parquet`. If
    it fails, it leaves no folder.

    Args:
        builder: `EmotionShare`.
        folder (`Path`): a new or empty folder.
        name: name by which the card loads the dataset.

    Raises:
        FileExistsError: if the folder has something in it.
    """
    check_is_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(folder.with_name(f"{folder.name}.unfinished")) as unfinished:
        parquet, dataset = unfinished / "parquet", unfinished / "dataset"
        prepare(builder, parquet, file_format="parquet")
        (dataset / "data").mkdir(parents=True)
        for shard in parquet.glob("*.parquet"):
            shard.rename(dataset / "data" / shard.name.removeprefix(f"{builder.dataset_name}-"))
        builder.info.download_size = sum(shard.stat().st_size for shard in (dataset / "data").iterdir())
        dataset_card(builder.info, name, builder.tables.labels, builder.tables.facts).save(dataset / CARD)
        put_in_place(dataset, folder)


def dataset_card(info, name, labels, facts):
    """
    Args:
        info: `datasets.DatasetInfo` of a written corpus; its configuration has the name of the corpus.
        name: name by which the card loads the dataset.
        labels: label names.
        facts: names of the facts about clips.

    Returns:
        `huggingface_hub.DatasetCard`. Its metadata tell the Hub and `datasets` which file belongs to which split, and
        `load_corpus` which columns are labels and which are facts. The configuration has the corpus's name, so that the
        corpus is known when the dataset is loaded.
    """
    corpus = CORPORA[info.config_name]
    clips = sum(split.num_examples for split in info.splits.values())
    data_files = [{"split": split, "path": f"data/{split}*.parquet"} for split in info.splits]
    metadata = DatasetCardData(
        pretty_name=f"Emotion Share: {corpus.title}",
        license=corpus.licence,
        license_name=corpus.licence_name,
        task_categories=["audio-classification"],
        tags=corpus.tags,
        size_categories=[next((text for limit, text in SIZE_CATEGORIES.items() if clips < limit), "n>1M")],
        configs=[{"config_name": info.config_name, "data_files": data_files}],
        **{CARD_KEY: {"labels": list(labels), "facts": list(facts)}},
    )
    DatasetInfosDict({info.config_name: info}).to_dataset_card_data(metadata)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=corpus.title,
        name=name,
        labels=", ".join(labels),
        label_columns=_in_code(labels),
        facts=f"\n| {_in_code(facts)} | facts about the clip; null where they are not known |" if facts else "",
        splits="\n".join(f"| {split} | {part.num_examples:,} |" for split, part in info.splits.items()),
        source=corpus.source,
        citation=f"\n## Citation\n\n```bibtex\n{corpus.citation}```\n" if corpus.citation else "",
    )
    return DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _in_code(columns):
    return ", ".join(f"`{column}`" for column in columns).replace("|", r"\|")  # in a table
