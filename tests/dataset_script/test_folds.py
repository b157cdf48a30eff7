"""A corpus divided into folds: which clips are in which fold, and clips keep their facts."""

import numpy as np
import pytest
from datasets import Audio, Dataset, DatasetDict

from emoshare.dataset_script import CORPORA, Corpus
from emoshare.dataset_script.audio import clips_fingerprint
from emoshare.dataset_script.folds import divide, fold_of, num_unknown

LABELS = ["joy", "awe"]
SIZES = {"train": 40, "devel": 12, "test": 20}


def corpus_with(speakers=None, unknown_test_shares=(), **facts):
    """A corpus of 72 clips; `speakers` and further facts hold a value for each, split after split."""
    facts = facts if speakers is None else {"speaker": speakers, **facts}
    rng, splits, start = np.random.default_rng(0), {}, 0
    for split, size in SIZES.items():
        columns = {
            "filename": [f"{split}_{number}.wav" for number in range(size)],
            "audio": [{"bytes": f"{split} {number}".encode(), "path": None} for number in range(size)],
        }
        for label in LABELS:
            shares = rng.random(size).round(2).tolist()
            hidden = unknown_test_shares if split == "test" and label == "awe" else ()
            columns[label] = [None if number in hidden else share for number, share in enumerate(shares)]
        columns |= {fact: list(values[start : start + size]) for fact, values in facts.items()}
        splits[split] = Dataset.from_dict(columns).cast_column("audio", Audio(decode=False))
        start += size
    return Corpus("csv", DatasetDict(splits), LABELS, list(facts))


def uneven_speakers(number=9):
    """The speaker of each clip: some speak often, some once, and none is in one split alone."""
    rng = np.random.default_rng(1)
    speakers = [*range(number), *rng.choice(number, sum(SIZES.values()) - number, p=np.arange(1, number + 1) / 45)]
    return [f"s{speaker:02d}" for speaker in rng.permutation(speakers)]


def of_all(corpus, column):
    return [value for clips in corpus.splits.values() for value in clips[column][:]]


@pytest.mark.parametrize("num_folds", [3, 5, None])
def test_each_clip_is_tested_once_by_a_model_that_knows_no_clip_of_its_speaker(num_folds):
    corpus = corpus_with(uneven_speakers())
    folds = [fold_of(corpus, fold, num_folds, "speaker") for fold in range(num_folds or 9)]
    tested = [filename for fold in folds for filename in fold.splits["test"]["filename"]]
    assert sorted(tested) == sorted(of_all(corpus, "filename"))
    for number, fold in enumerate(folds):
        assert list(fold.splits) == ["train", "devel", "test"]
        assert sorted(of_all(fold, "filename")) == sorted(tested)
        speakers = [set(clips["speaker"]) for clips in fold.splits.values()]
        assert sum(map(len, speakers)) == 9  # none is in two splits
        next_fold = folds[(number + 1) % len(folds)]
        assert fold.splits["devel"]["filename"][:] == next_fold.splits["test"]["filename"][:]


def test_one_speaker_is_left_out_at_a_time_in_the_order_of_their_names():
    corpus = corpus_with(uneven_speakers())
    tested = [set(fold_of(corpus, fold, None, "speaker").splits["test"]["speaker"]) for fold in range(9)]
    assert tested == [{f"s{speaker:02d}"} for speaker in range(9)]


def test_numbers_are_groups_in_their_order():
    corpus = corpus_with([float(number % 11) for number in range(72)])
    assert [fold_of(corpus, fold, None, "speaker").metadata["test"]["speaker"][0] for fold in (2, 10)] == [2.0, 10.0]


def test_folds_have_about_as_many_clips():
    """No group is split, so the largest group limits how equal the folds can be."""
    speakers = uneven_speakers()
    sizes = [len(clips) for clips in divide(corpus_with(speakers), 4, "speaker")]
    assert sum(sizes) == 72
    assert max(sizes) - min(sizes) <= 2
    assert {len(clips) for clips in divide(corpus_with(), 5)} == {14, 15}


def test_a_seed_always_gives_the_same_folds():
    corpus = corpus_with([f"s{number % 12}" for number in range(72)])

    def folds(seed):
        return [clips.tolist() for clips in divide(corpus, 4, "speaker", seed)]

    assert folds(0) == folds(0)
    assert folds(0) != folds(1)
    assert folds(0)[0] == sorted(folds(0)[0])


def test_test_clips_without_all_shares_are_in_no_fold():
    corpus = corpus_with(uneven_speakers(), unknown_test_shares=(3, 7))
    fold = fold_of(corpus, 0, 4, "speaker")
    assert set(of_all(corpus, "filename")) - set(of_all(fold, "filename")) == {"test_3.wav", "test_7.wav"}
    assert num_unknown(corpus) == 2
    assert not any(np.isnan(fold.shares(split)).any() for split in fold.splits)


def test_what_is_known_about_a_clip_goes_with_it():
    corpus = corpus_with(uneven_speakers(), listeners=[float(number) for number in range(1, 73)])
    corpus = Corpus("csv", corpus.splits, LABELS, corpus.facts, {"train": list(range(2, 42))})
    fold = fold_of(corpus, 1, 4, "speaker")
    assert (fold.labels, fold.facts) == (LABELS, ["speaker", "listeners"])
    own = dict(zip(of_all(corpus, "filename"), np.concatenate([corpus.shares(s) for s in SIZES]), strict=True))
    listeners = dict(zip(of_all(corpus, "filename"), range(1, 73), strict=True))
    for split, clips in fold.splits.items():
        np.testing.assert_array_equal(fold.shares(split), [own[filename] for filename in clips["filename"]])
        assert fold.metadata[split]["speaker"] == clips["speaker"][:]
        assert fold.listeners(split).tolist() == [listeners[filename] for filename in clips["filename"]]
        for index, filename in enumerate(clips["filename"]):
            of_whole, number = filename.removesuffix(".wav").split("_")
            assert fold.audio(split)[index]["bytes"] == f"{of_whole} {number}".encode()
            is_in_file = of_whole == "train"
            expected = ("lab/train.csv", int(number) + 2) if is_in_file else (of_whole, int(number))
            assert fold.place(split, index) == expected


def test_the_fingerprints_are_those_of_the_clips_of_the_fold():
    fold = fold_of(corpus_with(uneven_speakers()), 1, 4, "speaker")
    for split, parts in fold.fingerprints().items():
        assert parts["clips"] == clips_fingerprint(fold.splits[split])
        alone = Corpus("csv", DatasetDict({split: fold.splits[split]}), LABELS)
        assert alone.fingerprints() == {split: parts}


def test_what_holds_for_its_own_splits_alone_is_not_said_of_a_fold():
    corpus = corpus_with()
    for name in ("compare2023", "synthetic"):
        of_folds = fold_of(Corpus(name, corpus.splits, LABELS), 0, 3).info
        assert of_folds.title == CORPORA[name].title
        assert (of_folds.is_papers, of_folds.split_sizes, of_folds.noise_ceiling) == (False, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, "sex"), r"^group_by: got 'sex'; expected a fact of the corpus: speaker, age$"),
        ((0, 11, "speaker"), r"^folds: got 9 values of 'speaker'; expected at least 11, one for each fold$"),
        ((0, None, "age"), r"^folds: got 2 values of 'age'; expected at least 3, one for each fold$"),
        ((4, 4, "speaker"), r"^fold: got 4; expected 0 to 3, as there are 4 folds$"),
        ((0, 73, None), r"^folds: got 72 clips whose shares are known; expected at least 73, one for each fold$"),
    ],
)
def test_folds_that_there_cannot_be_are_named(arguments, message):
    corpus = corpus_with(uneven_speakers(), age=[20.0] * 71 + [30.0])
    with pytest.raises(ValueError, match=message):
        fold_of(corpus, *arguments)


def test_a_corpus_without_facts_has_no_groups():
    with pytest.raises(ValueError, match="group_by: got 'speaker', but the corpus has no facts about its clips"):
        divide(corpus_with(), 3, "speaker")


def test_clips_of_which_the_group_is_not_known_are_listed():
    speakers = uneven_speakers()
    speakers[2] = speakers[41] = None
    message = (
        r"^group_by speaker: 2 problem\(s\)\n  train, row 2: train_2.wav: its speaker is not known\n  devel, row 1: "
    )
    with pytest.raises(ValueError, match=message):
        divide(corpus_with(speakers), 3, "speaker")
    # A clip that is in no fold may have any speaker.
    speakers = uneven_speakers()
    speakers[52] = None
    assert len(divide(corpus_with(speakers, unknown_test_shares=[0]), 3, "speaker")) == 3
