"""Groups of anchors, each of which is contrasted with one pool of proposals, and the turns that they take."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.core import target

Tree = TypeVar("Tree")

_TOGETHER = 2**23  # about how many numbers an array of a turn has on an accelerator: 32 MiB in float32


def number_of_groups(config: ContrastiveConfig, anchors: int) -> int:
    """How many groups of nearly ``config.group_size`` the anchors of an image make."""
    return -(-anchors // min(config.group_size, anchors))


def group_numbers(config: ContrastiveConfig, image: Int[Array, "images"], anchors: int) -> Int[Array, "groups"]:
    """The groups' numbers in the batch of all devices, as ``in_groups`` orders them, by those of the images."""
    groups = number_of_groups(config, anchors)
    return (image[:, None] * groups + jnp.arange(groups)).reshape(-1)


def in_groups(config: ContrastiveConfig, arrays: Tree) -> Tree:
    """[images, anchors, ...] as [images * groups, size, ...], padded with invalid anchors (zeros).

    A group takes every ``groups``-th anchor: neighbours, which lie on the same instance, do not share a pool. With
    groups of neighbours the gradient's noise would be twice as large.
    """
    images, anchors = jax.tree.leaves(arrays)[0].shape[:2]
    groups = number_of_groups(config, anchors)
    size = -(-anchors // groups)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, groups * size - anchors)] + [(0, 0)] * (array.ndim - 2))
        by_group = jnp.swapaxes(padded.reshape(images, size, groups, *array.shape[2:]), 1, 2)
        return by_group.reshape(images * groups, size, *array.shape[2:])

    return jax.tree.map(split, arrays)


def out_of_groups(arrays: Tree, shape: tuple[int, ...]) -> Tree:
    """What ``in_groups`` made of arrays of this shape, [images, anchors, ...], as it was."""
    images, anchors = shape

    def join(array: Array) -> Array:
        by_image = array.reshape(images, -1, *array.shape[1:])
        return jnp.swapaxes(by_image, 1, 2).reshape(images, -1, *array.shape[2:])[:, :anchors]

    return jax.tree.map(join, arrays)


def groups_together(config: ContrastiveConfig, groups: int, size: int, embedding: int) -> int:
    """How many groups of ``size`` take a turn: one on a CPU, whose caches hold it; elsewhere kernels must be long."""
    if target.backend() == "cpu":
        return 1
    most = max(_TOGETHER // (2 * config.num_slots * max(size, embedding)), 1)
    return -(-groups // -(-groups // most))


def in_turns(groups: Tree, together: int) -> Tree:
    """[groups, ...] as [turns, together, ...], padded with groups of invalid anchors (zeros); as they are if alone."""

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, -len(array) % together)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, together, *array.shape[1:])

    return groups if together == 1 else jax.tree.map(split, groups)


def out_of_turns(turns: Tree, together: int, groups: int) -> Tree:
    """What ``in_turns`` made of so many groups, [groups, ...], as it was."""
    join = lambda array: array.reshape(-1, *array.shape[2:])[:groups]
    return turns if together == 1 else jax.tree.map(join, turns)
