"""Which clips run together: all once, in the order of their lengths, with little padding."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from emoshare.passes_emoshare import passes


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
