"""The `datasets` builder for emotion share corpora."""

from dataclasses import replace
from hashlib import blake2b

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.utils.py_utils import classproperty

from .corpora import CORPORA
from .tables import AUDIO, FILENAME
from .whole_files import NotWrittenError

ROWS_PER_TABLE = 100  # in Parquet, the number of clips per row group, which are in memory at once


class EmotionShare(datasets.ArrowBasedBuilder):
    """
    Emotion share corpora. A row is a clip: `filename`, `audio` (`{"bytes": None, "path": ...}`, not decoded), one
    float64 column per label: the share of listeners in [0, 1], or null where it is not known; and one column per fact
    about the clips: float64 or text, null where it is not known.

    Args:
        config_name: a key of `CORPORA`.
        data_dir: the corpus's folder; not for `"synthetic"`, which makes its own.
        cache_dir: where Arrow files and the synthetic corpus are kept; the cache of `datasets` by default.
        synthetic: the `SyntheticCorpus` to make, for `"synthetic"`.

    Attributes:
        tables: `CorpusTables`.

    Raises:
        ValueError, FileNotFoundError: if anything is wrong with the tables of the corpus; names file and row. They are
            all checked here, before anything is built.
    """

    @classproperty
    @classmethod
    def BUILDER_CONFIGS(cls):  # noqa: N802
        """Read from `CORPORA` each time, so that a corpus is only added there."""
        return [datasets.BuilderConfig(name=name, description=CORPORA[name].description) for name in sorted(CORPORA)]

    @classproperty
    @classmethod
    def builder_configs(cls):
        """As in `datasets`, which would keep the first result."""
        return {config.name: config for config in cls.BUILDER_CONFIGS}

    def __init__(self, config_name="synthetic", data_dir=None, cache_dir=None, synthetic=None):
        if config_name not in CORPORA:
            raise ValueError(f"unknown corpus {config_name!r}; expected one of {', '.join(sorted(CORPORA))}")
        corpus = CORPORA[config_name]
        if corpus.needs_data_dir and data_dir is None:
            raise ValueError(f"data_dir: the corpus {config_name!r} needs a folder with {corpus.layout}")
        if not corpus.needs_data_dir and data_dir is not None:
            raise ValueError(f"data_dir: got {data_dir}, but {corpus.title} makes its own")
        if synthetic is not None:
            corpus = replace(corpus, loader=synthetic.load)
        self.tables = corpus.read(data_dir, cache_dir or datasets.config.HF_DATASETS_CACHE)
        super().__init__(
            config_name=config_name,
            data_dir=data_dir and str(data_dir),
            cache_dir=cache_dir and str(cache_dir),
            hash=self._fingerprint(),
        )

    def _fingerprint(self):
        """Changes with labels and facts, and with the path, size and time of any clip."""
        stats = [
            (str(path), stat.st_size, stat.st_mtime_ns)
            for table in self.tables.splits.values()
            for path in table.paths
            for stat in [path.stat()]
        ]
        tables = {split: (table.filenames, table.shares, table.facts) for split, table in self.tables.splits.items()}
        # `datasets.fingerprint.Hasher` would take ten times as long for so many small objects.
        return blake2b(repr((self.tables.labels, tables, stats)).encode(), digest_size=8).hexdigest()

    def _info(self):
        corpus = CORPORA[self.config.name]
        return datasets.DatasetInfo(
            description=corpus.description,
            citation=corpus.citation,
            features=datasets.Features(
                {
                    FILENAME: datasets.Value("string"),
                    AUDIO: datasets.Audio(decode=False),
                    **{label: datasets.Value("float64") for label in self.tables.labels},
                    **{fact: datasets.Value(self._type_of(fact)) for fact in self.tables.facts},
                }
            ),
        )

    def _type_of(self, fact):
        values = [value for table in self.tables.splits.values() for value in table.facts[fact] if value is not None]
        return "string" if any(isinstance(value, str) for value in values) else "float64"

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in self.tables.splits]

    def _generate_tables(self, split):
        table = self.tables.splits[split]
        for start in range(0, len(table.filenames), ROWS_PER_TABLE):
            rows = slice(start, start + ROWS_PER_TABLE)
            columns = {
                FILENAME: table.filenames[rows],
                # The row only holds the path of the clip.
                AUDIO: [{"bytes": None, "path": str(path)} for path in table.paths[rows]],
                **{
                    label: [shares[index] for shares in table.shares[rows]]
                    for index, label in enumerate(self.tables.labels)
                },
                **{fact: values[rows] for fact, values in table.facts.items()},
            }
            yield (0, start), pa.table(columns, schema=self.info.features.arrow_schema)


def prepare(builder, folder=None, **options):
    """
    `download_and_prepare` of a builder.

    Args:
        builder: `datasets.DatasetBuilder`.
        folder, options: its arguments.

    Raises:
        OSError: if a file cannot be read or written, for which `datasets` raises a general error.
    """
    try:
        builder.download_and_prepare(folder and str(folder), **options)
    except DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):  # a clip
            raise cause from error
        if isinstance(cause, OSError):
            raise NotWrittenError(cause.errno, f"{folder or builder.cache_dir} cannot be written: {cause}") from error
        raise


def load_emotion_share(name="synthetic", data_dir=None, cache_dir=None, synthetic=None):
    """
    Loads the clips of an emotion share corpus; see [`EmotionShare`] for the arguments, the columns and the errors, and
    `load_corpus` for a corpus that also knows which columns are labels.

    Returns:
        `datasets.DatasetDict` with the splits `train`, `devel` and, where there is one, `test`.
    """
    builder = EmotionShare(name, data_dir=data_dir, cache_dir=cache_dir, synthetic=synthetic)
    prepare(builder)
    return builder.as_dataset()
