"""
The corpora, by name. Only this module knows what cards, reports, help texts and checks say about a corpus.

To add a corpus, write a module with its loader, which finds its clips, shares and facts, and add an entry to `CORPORA`.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..fields_emoshare import EMOTIONS
from . import crema_d, emodb
from .labels import load_folder
from .tables import CorpusTables


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """
    What is known about a corpus.

    Args:
        title: a short name for headings, figures and sentences.
        description: a sentence that says what it is, for model cards.
        licence: the Hub's identifier of the data's licence: `apache-2.0`, `other`, ...
        licence_note: a sentence about the licence, for the cards of models that were trained on the corpus.
        source: where the data come from and what may be done with them, for the dataset card. Markdown.
        loader: `loader(info, data_dir, cache_dir) -> CorpusTables`, with this object and two `Path`s (`data_dir` is
            `None` for a corpus without `layout`). It raises ValueError or FileNotFoundError, naming file and row, if
            anything is wrong with the corpus.
        layout: the files that `data_dir` must have; `None` for a generated corpus.
        labels: label names, in their order; `None` to take those of its files.
        test_is_optional: whether the test split may be missing.
        split_sizes: clips per split of the complete corpus, if results are only comparable on that.
        licence_name: name of the licence, if `licence` is `other`.
        citation: BibTeX.
        caution: what must be said next to any score on the corpus. Plain text.
        is_named: whether this is one particular corpus; `False` for a layout of any corpus, about which nothing is
            known.
        is_synthetic: whether the voices are not those of people.
        is_redistributable: `False` if copies must not be passed on.
        is_papers: whether the paper's results are on this corpus, and may be shown next to ours.
        noise_ceiling: function from a split's name to the best mean Spearman's ρ that a model can be expected to reach.
    """

    title: str
    description: str
    licence: str
    licence_note: str
    source: str
    loader: Callable[..., CorpusTables]
    layout: str | None = None
    labels: tuple[str, ...] | None = None
    test_is_optional: bool = False
    split_sizes: Mapping[str, int] | None = None
    licence_name: str | None = None
    citation: str = ""
    caution: str = ""
    is_named: bool = True
    is_synthetic: bool = False
    is_redistributable: bool = True
    is_papers: bool = False
    noise_ceiling: Callable[[str], float] | None = None

    @property
    def tags(self):
        """Tags on the Hub, for the dataset card and the cards of models that were trained on the corpus."""
        return ["emotion-share", "speech", "emotion", "regression", *(["synthetic"] if self.is_synthetic else [])]

    @property
    def needs_data_dir(self):
        return self.layout is not None

    def read(self, data_dir, cache_dir):
        """
        Reads the corpus and checks its tables.

        Args:
            data_dir: folder of the corpus, if it needs one.
            cache_dir: folder where a generated corpus is kept.

        Returns:
            `CorpusTables`.

        Raises:
            ValueError, FileNotFoundError: if anything is wrong with the corpus; names file and row.
        """
        if self.needs_data_dir:
            data_dir = Path(data_dir).expanduser().resolve()
        tables = self.loader(self, data_dir, Path(cache_dir).expanduser().resolve())
        self.warn_of_other_sizes({split: len(table.filenames) for split, table in tables.splits.items()})
        return tables

    def warn_of_other_sizes(self, sizes):
        """Warns if these are not the sizes of the splits of the complete corpus."""
        if self.split_sizes is not None and sizes != self.split_sizes:
            warnings.warn(
                f"the splits have {sizes} clips; {self.title} has {self.split_sizes}: results are not comparable with "
                "published ones",
                stacklevel=2,
            )


COMPARE_LAYOUT = "wav/*.wav and lab/*.csv"


def _load_synthetic(info, data_dir, cache_dir):
    from .synthetic import SyntheticCorpus  # which imports SciPy

    return SyntheticCorpus().load(info, data_dir, cache_dir)


def _noise_ceiling_of_synthetic(split):
    from .synthetic import SyntheticCorpus

    return SyntheticCorpus().noise_ceiling(split)


CORPORA = {
    "synthetic": CorpusInfo(
        title="the synthetic corpus",
        description="The **synthetic corpus** that comes with the code: voices made of pulses and filters, and "
        "simulated listeners.",
        licence="apache-2.0",
        licence_note="The data: made by the code, and under its licence.",
        source="Voices made of pulses and filters, and simulated listeners who vote; made by "
        "`emoshare.dataset_script`. **They show that software works, and say nothing about people, voices or "
        "emotions**; a score on them says nothing about a score on real speech.",
        loader=_load_synthetic,
        labels=EMOTIONS,
        caution="The corpus is synthetic: voices made of pulses and filters, and simulated listeners. These numbers "
        "show that the software works. They say nothing about people, nor about which features or architecture are "
        "better on speech.",
        is_synthetic=True,
        noise_ceiling=_noise_ceiling_of_synthetic,
    ),
    "compare2023": CorpusInfo(
        title="ComParE 2023",
        description="The Emotion Share corpus of the ComParE 2023 challenge (a part of HUME-Prosody).",
        licence="other",
        licence_name="compare-2023-end-user-licence",
        licence_note="The data: given to participants of the challenge under an agreement of its own, which does not "
        "let it be passed on; ask its owners which uses of a model that was trained on it they allow.",
        source="The data of the ComParE 2023 Emotion Share sub-challenge (Schuller et al., arXiv:2304.14882; collected "
        "by Hume AI). Its organisers give it to researchers under an end-user licence. **It may not be "
        "redistributed**: keep this repository private, and within what that licence allows.",
        citation="""\
@inproceedings{schuller2023compare,
  title = {The {ACM} Multimedia 2023 Computational Paralinguistics Challenge: Emotion Share & Requests},
  author = {Schuller, Bj{\\"o}rn W. and Batliner, Anton and Amiriparian, Shahin and others},
  year = {2023},
  note = {arXiv:2304.14882},
}
""",
        loader=load_folder,
        layout=COMPARE_LAYOUT,
        labels=EMOTIONS,
        split_sizes={"train": 31745, "devel": 9925, "test": 10143},
        is_redistributable=False,
        is_papers=True,
    ),
    "crema_d": CorpusInfo(
        title="CREMA-D",
        description="CREMA-D: acted English speech of 91 actors, and the votes of listeners who heard the voice alone.",
        licence="odbl",
        licence_note="The data: CREMA-D, under the Open Database License; its contents under the Database Contents "
        "License.",
        source="CREMA-D (Cao et al., 2014), from https://github.com/CheyneyComputerScience/CREMA-D: 91 actors, 12 "
        "sentences, six emotions. The database is under the Open Database License, its contents under the Database "
        "Contents License. The shares are the votes of listeners who heard the voice alone: each chose one of six "
        "emotions, so the shares of a clip sum to 1; a clip has 4 to 12 votes, 9.2 on average. `emotion` and `level` "
        "are what the actor was asked for, not what anybody heard. The splits, by actors, are EmoShare's. Four clips "
        "are left out, whose audio is broken or was broken when listeners heard it.",
        citation="""\
@article{cao2014cremad,
  title = {{CREMA-D}: Crowd-sourced Emotional Multimodal Actors Dataset},
  author = {Cao, Houwei and Cooper, David G. and Keutmann, Michael K. and Gur, Ruben C. and Nenkova, Ani and
            Verma, Ragini},
  journal = {IEEE Transactions on Affective Computing},
  volume = {5},
  number = {4},
  pages = {377--390},
  year = {2014},
  doi = {10.1109/TAFFC.2014.2336244},
}
""",
        caution="The speech is acted: 12 sentences, spoken in emotions that were asked for. Each listener chose one of "
        "six emotions, so the shares of a clip sum to 1. They are of 4 to 12 listeners, 9.2 on average, and a panel "
        "this small scatters: no model can reach a ρ of 1.",
        loader=crema_d.load_crema_d,
        layout=crema_d.LAYOUT,
        labels=tuple(crema_d.LABELS.values()),
        split_sizes={"train": 4339, "devel": 1547, "test": 1552},
    ),
    "emodb": CorpusInfo(
        title="Emo-DB",
        description="Emo-DB, the Berlin Database of Emotional Speech: acted German speech of ten actors, and how many "
        "of 20 listeners recognised the emotion that was meant.",
        licence="cc0-1.0",
        licence_note="The data: Emo-DB, under CC0 1.0 according to audEERING's packaging of it.",
        source="Emo-DB, the Berlin Database of Emotional Speech (Burkhardt et al., 2005): ten actors, ten sentences, "
        "seven emotions. Under CC0 1.0 according to audEERING's packaging of it. Each clip was heard by 20 listeners "
        "(sentence b03: 21), and only recordings that at least 80 % of them recognised were published. **Only the "
        "share of the emotion that was meant is measured.** What the other listeners heard was not published: their "
        "share is spread evenly over the other six emotions. `emotion` is the one that was meant, `naturalness` the "
        "fraction of listeners who found the clip natural. The splits, by actors, are EmoShare's.",
        citation="""\
@inproceedings{burkhardt2005database,
  title = {A Database of {German} Emotional Speech},
  author = {Burkhardt, Felix and Paeschke, Astrid and Rolfes, Miriam and Sendlmeier, Walter F. and Weiss, Benjamin},
  booktitle = {Interspeech},
  pages = {1517--1520},
  year = {2005},
  doi = {10.21437/Interspeech.2005-446},
}
""",
        caution="The speech is acted, and only recordings that at least 80 % of the listeners recognised were "
        "published. What the others heard was not: their share is spread evenly over the other six emotions. So a "
        "score says mostly how well the emotion that was meant can be distinguished from the others.",
        loader=emodb.load_emodb,
        layout=emodb.LAYOUT,
        labels=tuple(emodb.LABELS.values()),
        split_sizes={"train": 309, "devel": 99, "test": 127},
    ),
    "csv": CorpusInfo(
        title="a corpus of one's own",
        description="A corpus in a local folder.",
        licence="unknown",
        licence_note="The data: whoever trained this model knows its licence.",
        source="Whoever published this corpus knows where its clips and shares come from, and what may be done with "
        "them. This is the place to say so.",
        loader=load_folder,
        layout=COMPARE_LAYOUT,
        test_is_optional=True,
        is_named=False,
    ),
}


def corpus_named(name):
    """The key of `CORPORA` for a published dataset whose configuration has this name: the name, or `"csv"`."""
    return name if name in CORPORA else "csv"


def is_published(dataset):
    """Whether a dataset is on the Hub or in a folder of Parquet files, rather than one of `CORPORA`."""
    return dataset not in CORPORA
