import numpy as np
import pytest
from scipy.stats import spearmanr

from emoshare import EMOTIONS
from emoshare.dataset_script.synthetic import SyntheticCorpus, synthesize


def test_the_corpus_follows_from_its_seed():
    first, again = SyntheticCorpus(devel=5).utterances("devel"), SyntheticCorpus(devel=5).utterances("devel")
    np.testing.assert_array_equal(synthesize(first[2]), synthesize(again[2]))
    np.testing.assert_array_equal(first[2].shares, again[2].shares)
    other = SyntheticCorpus(devel=5, seed=1).utterances("devel")
    assert not np.array_equal(first[2].shares, other[2].shares)


def test_utterances_last_1_to_8_seconds():
    utterances = SyntheticCorpus().utterances("train")
    seconds = np.array([utterance.seconds for utterance in utterances])
    assert seconds.min() >= 1
    assert seconds.max() <= 8
    assert seconds.std() > 0.5
    assert len(synthesize(utterances[0])) == round(seconds[0] * 16000)


def test_waveforms_are_audible_and_not_clipped():
    for utterance in SyntheticCorpus(devel=20).utterances("devel"):
        waveform = synthesize(utterance)
        assert np.isfinite(waveform).all()
        assert 0.01 < np.sqrt(np.mean(waveform**2)) < 0.3
        assert np.abs(waveform).max() < 1


def test_speakers_are_disjoint_between_splits():
    corpus = SyntheticCorpus()
    pitches = {split: {u.speaker.pitch for u in corpus.utterances(split)} for split in ("train", "devel", "test")}
    assert len(pitches["train"]) == corpus.train_speakers
    assert len(pitches["devel"]) == corpus.other_speakers
    assert not pitches["train"] & pitches["devel"]
    assert not pitches["devel"] & pitches["test"]
    assert len({u.speaker.language for u in corpus.utterances("train")}) > 1


def test_most_shares_are_low():
    shares = np.array([utterance.shares for utterance in SyntheticCorpus().utterances("train")])
    assert shares.shape[1] == len(EMOTIONS)
    assert (np.median(shares, axis=0) < 0.15).all()
    assert (shares.max(axis=0) > 0.7).all()
    assert ((shares >= 0) & (shares <= 1)).all()


def test_the_noise_ceiling_is_what_knowing_the_probabilities_gives():
    corpus = SyntheticCorpus(devel=400)
    utterances = corpus.utterances("devel")
    rhos = [spearmanr([u.probabilities[e] for u in utterances], [u.shares[e] for u in utterances])[0] for e in range(9)]
    assert corpus.noise_ceiling("devel") == pytest.approx(np.mean(rhos))
    assert 0.6 < corpus.noise_ceiling("devel") < 0.95


def test_a_corpus_that_is_there_needs_no_lock(tmp_path):
    """A read-only cache has no lock."""
    corpus = SyntheticCorpus(train=1, devel=1, test=1)
    folder = corpus.build(tmp_path)
    lock = folder.with_name(f"{folder.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # so that it cannot be taken
    assert corpus.build(tmp_path) == folder


def test_affect_is_heard():
    """A faster, more active speaker has more syllables: more rises of the loudness per second."""
    utterance = SyntheticCorpus(train=1).utterances("train")[0]
    utterance.seconds = 6.0
    modulation = []
    for activation in (-1.5, 1.5):
        utterance.affect = np.array([activation, 0, 0, 0])
        envelope = np.abs(synthesize(utterance))[: 6 * 16000].reshape(-1, 160).mean(axis=1)
        spectrum = np.abs(np.fft.rfft(envelope - envelope.mean())) ** 2
        hertz = np.fft.rfftfreq(len(envelope), 0.01)
        band = (hertz > 1) & (hertz < 15)
        modulation.append(np.sum(hertz[band] * spectrum[band]) / np.sum(spectrum[band]))
    assert modulation[1] > 1.15 * modulation[0]
