"""The `datasets` builder for emotion share corpora, and the one call that loads them."""

import warnings
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher

from ..configuration_emoshare import EMOTIONS
from .labels import FILENAME, read_labels
from .synthetic import SyntheticCorpus

COMPARE2023_SPLIT_SIZES = {"train": 31745, "devel": 9925, "test": 10143}
ROWS_PER_TABLE = 100  # in Parquet the clips of a row group, which are in memory at once

CITATION = """\
@inproceedings{schuller2023compare,
  title = {The {ACM} Multimedia 2023 Computational Paralinguistics Challenge: Emotion Share & Requests},
  author = {Schuller, Bj{\\"o}rn W. and Batliner, Anton and Amiriparian, Shahin and others},
  year = {2023},
  note = {arXiv:2304.14882},
}
"""


class EmotionShare(datasets.ArrowBasedBuilder):
    """
    Emotion share corpora. A row is a clip: `filename`, `audio` (`{"bytes": None, "path": ...}`, not decoded) and one
    float64 column per label: the share of listeners in [0, 1], or null where it is not known.

    Args:
        config_name: `"compare2023"` (the ComParE 2023 Emotion Share sub-challenge), `"csv"` (the same layout with any
            label columns, `test.csv` optional) or `"synthetic"` (the embedded corpus).
        data_dir: folder with `wav/*.wav` and `lab/{train,devel,test}.csv`; not for `"synthetic"`.
        cache_dir: where Arrow files and the synthetic corpus are kept; the cache of `datasets` by default.
        synthetic: the `SyntheticCorpus` to make, for `"synthetic"`.

    Raises:
        ValueError, FileNotFoundError: naming file and row, if anything is wrong with the corpus. Everything is checked
            here, before anything is built.
    """

    BUILDER_CONFIGS = [
        datasets.BuilderConfig(name="compare2023", description="ComParE 2023, Emotion Share sub-challenge"),
        datasets.BuilderConfig(name="csv", description="the ComParE 2023 layout with labels of one's own"),
        datasets.BuilderConfig(name="synthetic", description="synthetic voices and listeners"),
    ]

    def __init__(self, config_name="synthetic", data_dir=None, cache_dir=None, synthetic=None):
        names = [config.name for config in self.BUILDER_CONFIGS]
        if config_name not in names:
            raise ValueError(f"unknown corpus {config_name!r}; expected one of {', '.join(names)}")
        if config_name == "synthetic":
            if data_dir is not None:
                raise ValueError(f"data_dir: got {data_dir}, but the synthetic corpus makes its own")
            data_dir = (synthetic or SyntheticCorpus()).build(cache_dir or datasets.config.HF_DATASETS_CACHE)
        elif data_dir is None:
            raise ValueError(f"data_dir: the corpus {config_name!r} needs a folder with wav/*.wav and lab/*.csv")
        self._data_dir = Path(data_dir).expanduser().resolve()
        self._labels, self._tables = read_labels(
            self._data_dir,
            expected_labels=None if config_name == "csv" else EMOTIONS,
            test_is_optional=config_name == "csv",
        )
        if config_name == "compare2023":
            warn_of_other_sizes({split: len(table.filenames) for split, table in self._tables.items()})
        super().__init__(
            config_name=config_name,
            data_dir=str(self._data_dir),
            cache_dir=cache_dir and str(cache_dir),
            hash=self._fingerprint(),
        )

    def _fingerprint(self):
        """Changes with the labels, and with the name, size and time of any clip."""
        stats = [
            (name, stat.st_size, stat.st_mtime_ns)
            for table in self._tables.values()
            for name in table.filenames
            for stat in [self._clip(name).stat()]
        ]
        return Hasher.hash((self._labels, self._tables, stats))

    def _clip(self, filename):
        return self._data_dir / "wav" / filename

    def _info(self):
        return datasets.DatasetInfo(
            description=self.config.description,
            citation=CITATION if self.config.name == "compare2023" else "",
            features=datasets.Features(
                {
                    FILENAME: datasets.Value("string"),
                    "audio": datasets.Audio(decode=False),
                    **{label: datasets.Value("float64") for label in self._labels},
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in self._tables]

    def _generate_tables(self, split):
        table = self._tables[split]
        for start in range(0, len(table.filenames), ROWS_PER_TABLE):
            filenames = table.filenames[start : start + ROWS_PER_TABLE]
            shares = table.shares[start : start + ROWS_PER_TABLE]
            columns = {
                FILENAME: filenames,
                # The clip stays where it is: the row holds its path.
                "audio": [{"bytes": None, "path": str(self._clip(name))} for name in filenames],
            }
            for index, label in enumerate(self._labels):
                columns[label] = [clip[index] for clip in shares]
            yield (0, start), pa.table(columns, schema=self.info.features.arrow_schema)


def load_emotion_share(name="synthetic", data_dir=None, cache_dir=None, synthetic=None):
    """
    Loads an emotion share corpus; see [`EmotionShare`] for the arguments, the columns and the errors.

    Returns:
        `datasets.DatasetDict` with the splits `train`, `devel` and, where there is one, `test`.
    """
    builder = EmotionShare(name, data_dir=data_dir, cache_dir=cache_dir, synthetic=synthetic)
    builder.download_and_prepare()
    return builder.as_dataset()


def warn_of_other_sizes(sizes):
    """Warns where the clips per split are not as many as those of the ComParE 2023 challenge."""
    if sizes != COMPARE2023_SPLIT_SIZES:
        warnings.warn(
            f"the splits have {sizes} clips; the challenge's have {COMPARE2023_SPLIT_SIZES}: results are not "
            "comparable with published ones",
            stacklevel=4,
        )
