"""Splits are seeded, and nested for one seed."""

from __future__ import annotations

import itertools

import pytest

from cast_jax.data.splits import split_indices


def test_a_partition():
    for labelled in (1, 3, 10):
        chosen, rest = split_indices(10, labelled, 0)
        assert len(chosen) == labelled
        assert sorted(chosen + rest) == list(range(10))
        assert chosen == sorted(chosen)
        assert rest == sorted(rest)


def test_larger_shares_contain_smaller_ones():
    shares = [set(split_indices(100, labelled, 3)[0]) for labelled in (5, 10, 50, 100)]
    assert all(small < large for small, large in itertools.pairwise(shares))


def test_the_seed_decides():
    assert split_indices(100, 10, 0) == split_indices(100, 10, 0)
    assert split_indices(100, 10, 0) != split_indices(100, 10, 1)
    # Cityscapes' 10 % of seed 0: a change here would change which images a published run has seen.
    assert split_indices(2975, 298, 0)[0][:5] == [4, 13, 46, 49, 59]


@pytest.mark.parametrize("labelled", [0, -1, 11])
def test_impossible_shares(labelled):
    with pytest.raises(ValueError, match=f"cannot label {labelled} of 10 images"):
        split_indices(10, labelled, 0)
