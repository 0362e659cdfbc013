"""Groups of anchors, each of which is contrasted with one pool of proposals, and the turns that they take."""

from __future__ import annotations

import dataclasses
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


def groups_together(config: ContrastiveConfig, size: int, embedding: int) -> int:
    """How many groups of ``size`` take a turn: one on a CPU, whose caches hold it; elsewhere kernels must be long."""
    if target.backend() == "cpu":
        return 1
    return max(_TOGETHER // (2 * config.num_slots * max(size, embedding)), 1)


@dataclasses.dataclass(frozen=True)
class Turns:
    """How groups take turns: with ``pools`` pools at a time, and ``sharing`` groups of each, as one.

    A pool's groups together read it once, and add up to its gradient in one product.

    Attributes:
        groups: how many there are.
        columns: every so many-th group has the same pool.
    """

    groups: int
    columns: int
    pools: int = 1
    sharing: int = 1

    @classmethod
    def plan(cls, groups: int, pools: int, together: int) -> Turns:
        """For groups that have these pools by turns, of which at most ``together`` take a turn."""
        if together == 1:
            return cls(groups, groups)
        columns = min(groups, pools)
        sharing = _evenly(-(-groups // columns), together)
        return cls(groups, columns, _evenly(columns, max(together // sharing, 1)), sharing)

    @property
    def alone(self) -> bool:
        """Whether every group takes a turn of its own."""
        return self.columns == self.groups and self.pools == 1

    @property
    def _blocks(self) -> tuple[int, int, int, int]:
        """Blocks of rows, rows of one, blocks of columns, columns of one: of a table of groups by pools, padded."""
        rows = -(-self.groups // self.columns)
        return -(-rows // self.sharing), self.sharing, -(-self.columns // self.pools), self.pools

    def split(self, tree: Tree) -> Tree:
        """[groups, ...] as [turns, pools, sharing, ...], padded with groups of invalid anchors (zeros).

        Where groups are ``alone`` they stay as they are: axes of length one would be copies on a CPU.
        """
        rows, sharing, columns, pools = self._blocks

        def split(array: Array) -> Array:
            rest = array.shape[1:]
            table = _pad(array, rows * sharing * self.columns).reshape(rows * sharing, self.columns, *rest)
            table = _pad(table, columns * pools, axis=1).reshape(rows, sharing, columns, pools, *rest)
            return jnp.moveaxis(table, 1, 3).reshape(rows * columns, pools, sharing, *rest)

        return tree if self.alone else jax.tree.map(split, tree)

    def join(self, tree: Tree) -> Tree:
        """What ``split`` made, as it was."""
        rows, sharing, columns, pools = self._blocks

        def join(array: Array) -> Array:
            rest = array.shape[3:]
            table = jnp.moveaxis(array.reshape(rows, columns, pools, sharing, *rest), 3, 1)
            table = table.reshape(rows * sharing, columns * pools, *rest)[:, : self.columns]
            return table.reshape(rows * sharing * self.columns, *rest)[: self.groups]

        return tree if self.alone else jax.tree.map(join, tree)


def _evenly(count: int, most: int) -> int:
    """So many at a time, at most ``most``, that no more turns are needed and the last is as full as can be."""
    return -(-count // -(-count // most))


def _pad(array: Array, length: int, axis: int = 0) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)
