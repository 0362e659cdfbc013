"""Draws negatives for anchors: K candidates each, with replacement, with probability proportional to the debias score.

Two kinds of sampler, all of them exact:

- row samplers look at every candidate of an anchor: ``categorical`` (the reference) and ``inverse_cdf``;
- ``mixture_proposals`` shares a pool of proposals between the anchors of a group and never compares an anchor with all
  candidates. The anchors that it leaves short (for ``d`` less than one in a million, by plan) are handed to
  ``inverse_cdf``. Acceptance does not depend on which candidate is proposed where, so drawing a short row afresh leaves
  its distribution as it is.

Candidates are arrays and may come from anywhere: this batch, one image, a memory bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.cumulative import Cumulative, cumulate, pick
from cast_jax.contrastive.scores import EXPECTED_ACCEPTANCE, CandidateMap, debias_score, envelope

SAMPLERS = ("mixture_proposals", "inverse_cdf", "categorical")

RowSampler = Callable[..., tuple[Int[Array, "anchors negatives"], Bool[Array, "anchors"]]]


def _scores(
    score: str, anchors: Float[Array, "anchors dim"], own: Int[Array, "anchors"], candidates: CandidateMap
) -> Float[Array, "anchors candidates"]:
    """Scores of all candidates; 0 for those that must not be drawn (invalid ones and the anchor's own pixel)."""
    allowed = candidates.valid[None, :] & (jnp.arange(candidates.valid.shape[0])[None, :] != own[:, None])
    return jnp.where(allowed, debias_score(score, anchors - candidates.centre, candidates.offsets), 0.0)


def categorical(
    key: PRNGKeyArray,
    anchors: Float[Array, "anchors dim"],
    own: Int[Array, "anchors"],
    candidates: CandidateMap,
    *,
    score: str,
    num_negatives: int,
) -> tuple[Int[Array, "anchors negatives"], Bool[Array, "anchors"]]:
    """The reference: ``jax.random.categorical`` over the log score, one anchor at a time.

    Args:
        anchors: unit pseudo-probability vectors.
        own: each anchor's position among the candidates, which it never draws; -1 if it is not one of them.

    Returns:
        Positions among the candidates, and whether the anchor has any candidate of positive score to draw.
    """

    def one(key, weights):
        return jax.random.categorical(key, jnp.log(weights), shape=(num_negatives,)).astype(jnp.int32)

    weights = _scores(score, anchors, own, candidates)
    drawable = jnp.any(weights > 0, axis=-1)
    weights = jnp.where(drawable[:, None], weights, 1.0)
    keys = jax.random.split(key, anchors.shape[0])
    return jax.lax.map(lambda row: one(*row), (keys, weights)), drawable


def inverse_cdf(
    key: PRNGKeyArray,
    anchors: Float[Array, "anchors dim"],
    own: Int[Array, "anchors"],
    candidates: CandidateMap,
    *,
    score: str,
    num_negatives: int,
) -> tuple[Int[Array, "anchors negatives"], Bool[Array, "anchors"]]:
    """Inverts the cumulative sum of each anchor's scores; arguments and results as of ``categorical``."""
    cumulative = cumulate(_scores(score, anchors, own, candidates))
    uniform = jax.random.uniform(key, (anchors.shape[0], 2, num_negatives))
    return jax.vmap(pick)(cumulative, uniform), cumulative.total > 0


ROW_SAMPLERS: dict[str, RowSampler] = {"inverse_cdf": inverse_cdf, "categorical": categorical}


def number_of_slots(num_negatives: int, score: str) -> int:
    """Slots after which fewer than K acceptances are five standard deviations away (K = 256, ``d``: 640)."""
    q = EXPECTED_ACCEPTANCE[score]
    # The positive root of  M q - 5 √(M q (1 - q)) = K  in √M, rounded up to whole vectors.
    half_slope = 2.5 * math.sqrt(q * (1 - q))
    root = (half_slope + math.sqrt(half_slope**2 + q * num_negatives)) / q
    return -(-math.ceil(root**2) // 32) * 32


class Proposals(NamedTuple):
    """What a pool of proposals is drawn from: one prepared distribution for each term of the envelope."""

    candidates: CandidateMap
    terms: Cumulative


def prepare_proposals(candidates: CandidateMap, score: str) -> Proposals:
    """Prepares the proposals of one set of candidates, to be used by every group of anchors."""
    factors = envelope(score, jnp.zeros((1,), candidates.spread.dtype), candidates.spread).candidate_factors
    return Proposals(candidates, cumulate(jnp.where(candidates.valid, factors, 0.0)))


class SharedDraws(NamedTuple):
    """Negatives of a group of anchors as a mask over a pool that they share.

    A candidate that stands in several slots of the pool was drawn as many times.
    """

    pool: Int[Array, "slots"]
    taken: Bool[Array, "anchors slots"]
    accepted: Int[Array, "anchors"]
    """How many slots each anchor accepted. Below K the row is short: draw it anew with a row sampler."""


def _running_count(flags: Bool[Array, "rows n"]) -> Int[Array, "rows n"]:
    """Cumulative sum of flags along rows whose length divides by 32, by counting the bits of packed words."""
    rows, n = flags.shape
    position = jnp.arange(32, dtype=jnp.uint32)
    bits = flags.reshape(rows, n // 32, 32).astype(jnp.uint32) << position
    words = jnp.sum(bits, axis=-1, dtype=jnp.uint32)
    earlier = jnp.triu(jnp.ones((n // 32, n // 32), jnp.float32), 1)
    before = jax.lax.population_count(words).astype(jnp.float32) @ earlier  # at most 32 each: exact at any precision
    inside = jax.lax.population_count(words[..., None] & ((jnp.uint32(2) << position) - 1))
    return (before[..., None].astype(jnp.int32) + inside.astype(jnp.int32)).reshape(rows, n)


def mixture_proposals(
    key: PRNGKeyArray,
    anchors: Float[Array, "anchors dim"],
    own: Int[Array, "anchors"],
    proposals: Proposals,
    *,
    score: str,
    num_negatives: int,
    slots: int,
) -> SharedDraws:
    """Rejection sampling from proposals that a group of anchors shares.

    The envelope of the score is a mixture ``Σ_j α_j(p) β_j(r)``. A slot of the pool holds one candidate for each term,
    drawn with probability proportional to ``β_j``. For each slot, each anchor chooses a term with probability
    proportional to ``α_j(p) Σ_r β_j(r)`` and accepts its candidate with probability score / envelope. One uniform
    number decides both: term ``j`` owns an interval of [0, 1), whose accepted share lies at its start.
    The first K accepted slots are K independent draws from exactly the anchor's own distribution.

    Args:
        anchors: unit pseudo-probability vectors.
        own: each anchor's position among the candidates, which it never draws; -1 if it is not one of them.
        slots: length of the pool, a multiple of 32.
    """
    candidates, terms = proposals
    num_terms, num_anchors = terms.blocks.shape[0], anchors.shape[0]
    uniform = jax.random.uniform(key, (2 * num_terms + num_anchors, slots))
    pool = jax.vmap(pick)(terms, uniform[: 2 * num_terms].reshape(num_terms, 2, slots)).ravel()

    offsets = anchors - candidates.centre
    factors = envelope(score, jnp.sum(jnp.square(offsets), axis=-1), candidates.spread[pool])
    bound = jnp.sum(factors.anchor_factors[:, :, None] * factors.candidate_factors[:, None, :], axis=0)
    ratio = debias_score(score, offsets, candidates.offsets[pool]) / jnp.where(bound > 0, bound, jnp.inf)
    ratio = jnp.where(pool[None, :] == own[:, None], 0.0, ratio).reshape(num_anchors, num_terms, slots)

    mass = (factors.anchor_factors * terms.total[:, None]).T
    total = jnp.sum(mass, axis=-1, keepdims=True)
    share = (mass / jnp.where(total > 0, total, jnp.inf))[:, :, None]
    start = jnp.cumsum(share, axis=1) - share
    coin = uniform[2 * num_terms :, None, :]
    hit = (coin >= start) & (coin < start + share * ratio)

    rank = _running_count(jnp.any(hit, axis=1))
    taken = hit & (rank <= num_negatives)[:, None, :]
    return SharedDraws(pool, taken.reshape(num_anchors, -1), rank[:, -1])
