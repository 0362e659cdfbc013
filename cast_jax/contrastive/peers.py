"""The devices that contrast one batch together: what they tell each other, inside ``jax.shard_map``."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices along ``axes`` of a mesh; without axes, this device alone, and nothing here does anything."""

    axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return int(jax.lax.psum(1, self.axes)) if self.axes else 1

    @property
    def number(self) -> Array:
        """Which of them this one is."""
        return jax.lax.axis_index(self.axes) if self.axes else jnp.zeros((), jnp.int32)

    def sum(self, tree: Tree) -> Tree:
        """The sum over all peers."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def max(self, tree: Tree) -> Tree:
        """The maximum over all peers."""
        return jax.lax.pmax(tree, self.axes) if self.axes else tree

    def gather(self, tree: Tree, axis: int = 0) -> Tree:
        """All peers' arrays, in their order along ``axis``."""
        return jax.lax.all_gather(tree, self.axes, axis=axis, tiled=True) if self.axes else tree

    def sum_and_split(self, tree: Tree) -> Tree:
        """The peers' arrays added up, of which each peer keeps its part along the first axis."""
        return jax.lax.psum_scatter(tree, self.axes, tiled=True) if self.axes else tree


ALONE = Peers()
