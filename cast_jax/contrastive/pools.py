"""Pools of proposals that groups of anchors share, and the candidates that stand in them.

Where candidates are spread over devices, the pools are what these exchange: at most ``config.max_pools`` of them, and
later the pools' gradients. Neither grows with the pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.cumulative import total_of
from cast_jax.contrastive.peers import Peers
from cast_jax.contrastive.samplers import Drawn, draw_pool, prepare_proposals
from cast_jax.contrastive.scores import CandidateMap
from cast_jax.core import target
from cast_jax.core.selection import take

_POOLS = 64  # that an accelerator draws at a time


class Known(NamedTuple):
    """What is known of candidates: of those on this device, or of those that stand in a pool."""

    g_hat: Float[Array, "*places dim"]
    z: Float[Array, "*places embedding"]
    regions: Int[Array, "*places"]
    position: Int[Array, "*places"]


def flatten(array):
    """The first two axes as one; of a uniform map's vectors, which have no channels, too."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def read_candidates(tree, drawn: Drawn):
    """The values of the candidates that this device holds, zeros for the others'."""

    def read(array):
        values = take(flatten(array), drawn.place)
        return jnp.where(jnp.expand_dims(drawn.mine, tuple(range(drawn.mine.ndim, values.ndim))), values, 0)

    return jax.tree.map(read, tree)


def add_to_candidates(array, drawn: Drawn, values):
    """Adds values to the candidates that this device holds."""
    flat = flatten(array)
    place = jnp.where(drawn.mine, drawn.place, len(flat)).astype(jnp.uint32)
    return flat.at[place].add(values, mode="drop").reshape(array.shape)


class Pools(NamedTuple):
    """Pools of proposals, each [terms, slots] in a row, and the masses of the terms."""

    drawn: Drawn
    """Where their candidates lie, if they lie on this device: [pools, terms*slots]."""
    exchanged: Known | None
    """The candidates themselves, if they come from several devices; else they are read when their turn comes."""
    masses: Float[Array, "terms"]

    @property
    def number(self) -> int:
        """How many there are."""
        return self.drawn.place.shape[0]

    def read(self, which: Int[Array, ""], known: Known) -> Known:
        """The candidates of one pool; ``known`` of this device's."""
        if self.exchanged is not None:
            return _one(self.exchanged, which)
        return read_candidates(known, _one(self.drawn, which))

    def add(self, which: Int[Array, ""], values: Array, total: Array) -> Array:
        """Adds values of one pool's candidates to a total of all pools', or of all candidates."""
        if self.exchanged is not None:
            return total.at[which].add(values)
        return add_to_candidates(total, _one(self.drawn, which), values)


def make_pools(
    config: ContrastiveConfig, peers: Peers, key: PRNGKeyArray, number: int, candidates: CandidateMap, known: Known
) -> Pools:
    """Draws ``number`` pools of all peers' candidates; ``known`` of this device's."""
    proposals = prepare_proposals(candidates, config.sampling_score, peers)
    terms = proposals.images.shape[0]

    def one(uniform: Float[Array, "terms 3 slots"]) -> tuple[Drawn, Known | None]:
        drawn = draw_pool(uniform, proposals, candidates.valid.shape[1], peers)
        drawn = jax.tree.map(jnp.ravel, drawn)
        return drawn, read_candidates(known, drawn) if peers.axes else None

    uniform = jax.random.uniform(key, (number, terms, 3, config.num_slots))
    drawn, mine = jax.lax.map(one, uniform, batch_size=None if target.backend() == "cpu" else min(number, _POOLS))
    return Pools(drawn, peers.sum(mine), total_of(proposals.images))


def _one(tree, which):
    return jax.tree.map(lambda array: array[which], tree)
