"""Which clips run together: all once, in the order of their lengths, with little padding."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoshare.passes_emoshare import in_passes, passes


@given(
    lengths=st.lists(st.integers(1, 500), max_size=40),
    most=st.integers(1, 9),
    padding=st.sampled_from([0.0, 0.05, 0.25]),
)
def test_every_clip_runs_once_and_no_pass_is_too_large_or_too_empty(lengths, most, padding):
    found = passes(lengths, most, padding)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    in_order = [lengths[index] for index in itertools.chain(*found)]
    assert in_order == sorted(lengths)
    for own in found:
        held = len(own) * lengths[own[-1]]
        assert len(own) <= most
        assert sum(lengths[index] for index in own) >= (1 - padding) * held - 1e-6


def test_a_pass_ends_only_where_it_must():
    assert passes([10, 10, 10, 10], 3, 0.0) == [[0, 1, 2], [3]]
    assert passes([100, 10, 96, 98], 8, 0.05) == [[1], [2, 3, 0]]
    assert passes([], 8, 0.05) == []


@pytest.mark.parametrize(
    ("dtype", "shapes"), [(torch.float32, [(1, 3), (1, 8), (2, 10)]), (torch.bfloat16, [(1, 3), (3, 10)])]
)
def test_a_batch_runs_in_passes_each_as_long_as_its_longest_clip(dtype, shapes):
    lengths = torch.tensor([10, 3, 8, 10])
    inputs = torch.arange(40).view(4, 10).to(dtype)
    seen = []

    def run(inputs, lengths):
        seen.append(tuple(inputs.shape))
        assert int(lengths.max()) == inputs.shape[1]
        return {"twice": 2 * inputs[..., None], -1: inputs[..., None]}

    states = in_passes(run, inputs, lengths, lengths)
    assert seen == shapes
    for name, factor in (("twice", 2), (-1, 1)):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(states[name][row, :length, 0], factor * inputs[row, :length])
    seen.clear()
    in_passes(run, inputs[:1], lengths[:1], lengths[:1])
    assert seen == [(1, 10)]
