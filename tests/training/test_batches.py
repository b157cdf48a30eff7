import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoshare.training.batches import FeatureLoader, LengthBatchSampler, batches_by_length


def process(index=0, processes=1):
    return SimpleNamespace(process_index=index, num_processes=processes)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    budget=st.integers(1, 3000),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_every_clip_is_in_one_batch_and_no_batch_is_over_its_budget(lengths, budget, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    batches = batches_by_length(np.array(lengths), budget, rng)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@settings(max_examples=50, deadline=None)
@given(clips=st.integers(1, 50), processes=st.integers(1, 4), seed=st.one_of(st.none(), st.integers(0, 9)))
def test_processes_share_the_batches(clips, processes, seed):
    lengths = np.random.default_rng(clips).integers(50, 400, size=clips)
    samplers = [LengthBatchSampler(lengths, 4, process(index, processes), seed) for index in range(processes)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in batches]
    taken = [index for own in batches for batch in own for index in batch]
    assert set(taken) == set(range(clips))
    if seed is None:
        assert len(taken) == clips  # no duplicates: every clip is predicted once
    else:
        assert len({len(own) for own in batches}) == 1  # processes wait for each other in every step


def test_batches_are_shuffled_from_epoch_to_epoch_and_alike_on_all_processes():
    lengths = np.random.default_rng(0).integers(50, 400, size=200)
    first, second = (LengthBatchSampler(lengths, 8, process(), seed=3) for _ in range(2))

    def epoch(sampler, number):
        sampler.set_epoch(number)
        return [tuple(batch) for batch in sampler]

    assert epoch(first, 0) == epoch(second, 0)
    one, two = epoch(first, 1), epoch(first, 2)
    assert one != two
    assert len(set(map(frozenset, one)) & set(map(frozenset, two))) < len(one) / 4  # other clips in its batch
    mean_lengths = [lengths[list(batch)].mean() for batch in one]
    assert abs(np.corrcoef(mean_lengths, np.arange(len(one)))[0, 1]) < 0.5  # not short clips first


@pytest.mark.parametrize("clips_per_batch", [8, 32, 128])
def test_hardly_anything_is_padding(clips_per_batch):
    """Lengths of speech from 1 to 8 s, mean 4 s."""
    lengths = np.clip(np.random.default_rng(0).gamma(6, 33, size=5000), 50, 398).astype(int)
    sampler = LengthBatchSampler(lengths, clips_per_batch, process(), seed=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in sampler)
    assert sampler.padding == pytest.approx(1 - lengths.sum() / padded)
    assert 0 < sampler.padding < 0.05
    assert np.mean([len(batch) for batch in sampler]) == pytest.approx(clips_per_batch, rel=0.15)


def test_clips_of_one_length_make_random_batches_of_one_size():
    """The paper's recipe: everything is padded to the same length."""
    sampler = LengthBatchSampler(np.full(64, 398), 8, process(), seed=0)
    batches = list(sampler)
    assert {len(batch) for batch in batches} == {8}
    assert sampler.padding == 0
    assert any(np.ptp(batch) > 40 for batch in batches)


@pytest.mark.parametrize("seed", [None, 3])
def test_an_accelerator_gets_the_same_batches_which_threads_read_ahead(seed):
    """The meta device stands for one, as it keeps nothing but shapes."""
    frames = np.random.default_rng(0).integers(50, 400, size=40)

    class Store:
        reading_threads = 2

        num_frames, clip_of_window, weights = frames, np.arange(40), np.ones(40)
        shares = np.zeros((40, 2))

        def __init__(self):
            self.read = []

        def __getitem__(self, window):
            return window

        def collate(self, windows):
            self.read.append(windows)
            return {"window": torch.tensor(windows), "weights": torch.ones(len(windows))}

    stores, sizes = {"cpu": Store(), "meta": Store()}, {}
    for device, store in stores.items():
        accelerator = SimpleNamespace(**vars(process()), device=torch.device(device))
        loader = FeatureLoader(store, SimpleNamespace(normalization="frame"), 4, accelerator, seed)
        sizes[device] = [len(batch["window"]) for batch in loader]
    assert sizes["cpu"] == sizes["meta"] == [len(batch) for batch in loader.sampler.all_batches]
    assert sorted(stores["meta"].read) == sorted(stores["cpu"].read)
