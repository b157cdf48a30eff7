"""Loads a published emotion share corpus, and checks it as strictly as one in a local folder."""

from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import _CACHED_NO_EXIST, DatasetCard, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..repository_emoshare import clear_errors_of_hub
from .corpora import CORPORA, corpus_named
from .emotion_share import prepare
from .facts import LISTENERS, check_listeners
from .streamed import streamed
from .tables import AUDIO, FILENAME, SPLITS, Problems, check_label_names

CARD = "README.md"
CARD_KEY = "emoshare"  # in the card's metadata: {"labels": [...], "facts": [...]}, names of columns
NUMBERS = ("float", "int", "uint")
TEXTS = ("string", "large_string")


def load_published(name, cache_dir=None, streaming=False):
    """
    Args:
        name: a dataset on the Hugging Face Hub (`ORG/NAME`) or a folder, written by `python -m emoshare.dataset_script`
            or by anybody else. It has the splits `train`, `devel` and perhaps `test` (others are ignored), the columns
            `filename` and `audio`, one column of numbers per label, and columns of facts. The metadata of its card may
            tell labels from facts: `emoshare: {labels: [...], facts: [...]}`; otherwise every other column is a label.
        cache_dir: where Arrow files are kept; the cache of `datasets` by default.
        streaming: whether the audio stays in its Parquet files: see `streamed`.

    Returns:
        `datasets.DatasetDict` with these splits, audio not decoded; the label names; the names of the facts.

    Raises:
        ValueError: if anything is wrong with the dataset; says what came, and what was expected.
        DatasetNotFoundError: if there is no such dataset, or no access to it.
        OSError: if the Hub cannot be reached.
    """
    with clear_errors_of_hub(name):
        builder = datasets.load_dataset_builder(name, cache_dir=cache_dir and str(cache_dir))
        if not streaming:
            prepare(builder)
        metadata = _card_metadata(name, builder.hash)
        published = streamed(builder, name) if streaming else builder.as_dataset()
    splits = datasets.DatasetDict({split: published[split] for split in SPLITS if split in published})
    if not {"train", "devel"} <= set(splits):
        raise ValueError(f"{name}: got the splits {list(published)}; expected train, devel and, if there is one, test")
    # `datasets` ensures that all splits have the same columns.
    info = splits["train"].info
    labels, facts = _checked_columns(name, info.features, metadata)
    corpus = CORPORA[corpus_named(info.config_name)]
    if corpus.labels is not None and labels != list(corpus.labels):
        raise ValueError(
            f"{name}: got the labels {labels}; its configuration is {info.config_name}: expected {corpus.labels}"
        )
    _check_rows(name, splits, labels, facts)
    corpus.warn_of_other_sizes({split: len(clips) for split, clips in splits.items()})
    return splits.cast_column(AUDIO, datasets.Audio(decode=False)), labels, facts


def _card_metadata(name, revision):
    """The columns' metadata in the card of this revision; `None` if there is none, or no card."""
    if Path(name).is_dir():
        path = Path(name) / CARD
        if not path.is_file():
            return None
    else:
        try:
            path = hf_hub_download(name, CARD, repo_type="dataset", revision=revision)
        except EntryNotFoundError as error:
            # Offline, the card may exist but be out of reach, unless the cache knows that there is none.
            cached = try_to_load_from_cache(name, CARD, repo_type="dataset", revision=revision)
            if isinstance(error, LocalEntryNotFoundError) and cached is not _CACHED_NO_EXIST:
                raise
            return None
    return DatasetCard.load(path, ignore_metadata_errors=True).data.get(CARD_KEY)


def _checked_columns(name, features, metadata):
    """Returns labels and facts. Wrong columns make every row meaningless, so they raise at once."""
    kinds = {
        column: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for column, feature in features.items()
    }
    others = [column for column in kinds if column not in (FILENAME, AUDIO)]
    labels, facts = others, []
    if metadata is not None:
        labels, facts = _told_apart(name, metadata, others)
    is_right = kinds.get(FILENAME) in TEXTS and kinds.get(AUDIO) == "Audio" and labels
    is_right = is_right and all(kinds[label].startswith(NUMBERS) for label in labels)
    if not is_right or not all(kinds[fact].startswith((*NUMBERS, *TEXTS)) for fact in facts):
        raise ValueError(
            f"{name}: got the columns {kinds}; expected 'filename' (string), 'audio' (Audio), a column of numbers for "
            "each label, and nothing else but facts (numbers or strings) that the card's metadata name: "
            f"{CARD_KEY}: {{labels: [...], facts: [...]}}"
        )
    check_label_names(name, labels)
    return labels, facts


def _told_apart(name, metadata, columns):
    """Labels and facts according to the card's metadata, which must name each column once."""
    place = f"{name}, {CARD}: {CARD_KEY}"
    if not isinstance(metadata, dict) or set(metadata) != {"labels", "facts"}:
        raise ValueError(f"{place} is {metadata!r}; expected {{labels: [...], facts: [...]}}")
    for kind, names in metadata.items():
        if not isinstance(names, list) or not all(isinstance(column, str) for column in names):
            raise ValueError(f"{place}: {kind} is {names!r}; expected a list of column names")
    named = metadata["labels"] + metadata["facts"]
    if sorted(named) != sorted(columns):
        raise ValueError(
            f"{place} names the columns {named}; expected each column but 'filename' and 'audio' once: {columns}"
        )
    return metadata["labels"], metadata["facts"]


def _check_rows(name, splits, labels, facts):
    problems, first_seen = Problems(name), {}
    for split, clips in splits.items():
        for row, filename in enumerate(clips[FILENAME][:]):
            place = f"{split}, row {row}"
            if not filename:
                problems.add(split, row, f"filename is {filename!r}; expected text")
            elif (first := first_seen.setdefault(filename, place)) != place:
                problems.add(split, row, f"{filename} is listed again; first in {first}")
        for label in labels:
            shares = np.array(clips[label][:], dtype=np.float64)  # null becomes NaN
            is_right = (shares >= 0) & (shares <= 1)
            if split == "test":
                is_right |= np.isnan(shares)
            for row in np.flatnonzero(~is_right):
                problems.add(split, row, f"{label} is {shares[row]:g}; expected a number in [0, 1]")
        if LISTENERS in facts:
            for row, value in enumerate(clips[LISTENERS][:]):
                check_listeners(value, split, row, problems)
    problems.raise_if_any()
