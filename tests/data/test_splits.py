"""Splits are seeded, nested for one seed, and read from files that say what they are."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cast_jax.core.errors import DataError
from cast_jax.data.splits import (
    Split,
    read_split,
    share_of,
    some_of_each_class,
    split_indices,
    stratified,
    write_split,
)


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


def test_shares_are_the_literature_s():
    assert [share_of(2975, percent) for percent in (5, 10, 20, 30)] == [149, 298, 595, 893]
    assert share_of(118_287, 0.5) == 591


# 40 images: class 0 in every one, class 1 in a half, class 2 in four, class 3 in one.
_CLASSES = [
    sorted({0, *([1] if i % 2 else []), *([2] if i % 10 == 3 else []), *([3] if i == 7 else [])}) for i in range(40)
]


@given(seed=st.integers(0, 2**32 - 1))
@example(seed=1_641_516_704)
def test_each_class_gets_its_images_and_more_of_them_keep_these(seed):
    one, two, three = (some_of_each_class(_CLASSES, count, seed) for count in (1, 2, 3))
    assert set(one) < set(two) < set(three)
    # The rare ones come first: class 3 has its only image, and each image stands for one class.
    assert (len(one), len(two), len(three)) == (4, 7, 10)
    assert 7 in one
    assert sum(2 in _CLASSES[i] for i in three) >= 3
    assert three == sorted(set(three)) == some_of_each_class(_CLASSES, 3, seed)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(8, 40))
def test_a_stratified_subset_keeps_the_shares(seed, size):
    include = some_of_each_class(_CLASSES, 1, seed)
    for given_images in ([], include):
        subset = stratified(_CLASSES, size, seed, given_images)
        assert len(set(subset)) == size
        assert set(given_images) <= set(subset)
        for label, whole in ((1, 20), (2, 4)):
            found = sum(label in _CLASSES[i] for i in subset)
            forced = sum(label in _CLASSES[i] for i in given_images)  # which may be more than the share by themselves
            assert abs(found - whole * size / 40) <= 2 + forced, (label, found)


def test_ade20k_s_sizes():
    """20,210 images with a long tail of classes: ten of each of the 100 labelled, 2,537 of the rest unlabelled."""
    rng = np.random.default_rng(0)
    frequency = 0.5 / np.arange(1, 101)  # the rarest class is in about a hundred images
    classes = [np.flatnonzero(present).tolist() for present in rng.random((20_210, 100)) < frequency]
    labelled = some_of_each_class(classes, 10, 0)
    subset = stratified(classes, 3_537, 0, labelled)
    assert (len(set(labelled)), len(set(subset) - set(labelled))) == (1_000, 2_537)
    assert set(labelled) <= set(subset)
    counts = lambda images: np.bincount([label for i in images for label in classes[i]], minlength=100)
    assert counts(labelled).min() >= 10
    # The subset keeps the shares, but for classes of which ten labelled images are more than that already.
    expected = counts(range(20_210)) * 3_537 / 20_210
    common = expected > 50
    np.testing.assert_allclose(counts(subset)[common], expected[common], rtol=0.1)
    assert set(some_of_each_class(classes, 5, 0)) < set(labelled)


@pytest.mark.parametrize("size", [1, 41])
def test_impossible_subsets(size):
    with pytest.raises(ValueError, match=f"cannot choose {size} of 40"):
        stratified(_CLASSES, size, 0, [1, 2])


def test_split_files(tmp_path):
    path, split = tmp_path / "splits" / "a.json", Split(("a", 3), ("b",))
    write_split(path, split, {"seed": 1})
    assert read_split(path) == split
    assert json.loads(path.read_text())["seed"] == 1
    (tmp_path / "list.txt").write_text("# comment\na\n\nb\n")
    assert read_split(tmp_path / "list.txt") == Split(("a", "b"), None)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as a split file"),
        ("[]", "is not a split file"),
        ('{"format": "cast_jax split", "version": 2, "labelled": ["a"]}', '"version": 1'),
        ('{START, "labelled": []}', "labelled must be a list"),
        ('{START, "labelled": ["a"], "unlabelled": [1.5]}', "unlabelled must be a list"),
        ('{START, "labelled": ["a"], "unlabelled": ["a"]}', "listed twice: a"),
    ],
)
def test_faulty_split_files_are_named(content, problem, tmp_path):
    path = tmp_path / "faulty.json"
    path.write_text(content.replace("START", '"format": "cast_jax split", "version": 1'))
    with pytest.raises(DataError, match=rf"faulty\.json.*{problem}"):
        read_split(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "missing.json")
