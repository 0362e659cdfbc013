"""Draws negatives for anchors: K candidates each, with replacement, with probability proportional to the debias score.

Two kinds of sampler, all of them exact:

- row samplers look at every candidate of an anchor: ``categorical`` (the reference) and ``inverse_cdf``;
- ``mixture_proposals`` shares a pool of proposals between anchors and never compares an anchor with all candidates. The
  anchors that it leaves short (for ``d`` less than one in a million, by plan) are handed to ``inverse_cdf``. Acceptance
  does not depend on which candidate is proposed where, so drawing a short row afresh leaves its distribution as it is.

Candidates are pixels of images, which may lie on several devices (``peers``). Every draw first chooses an image by the
images' masses, then a pixel of it, both from random numbers that all devices share: the device that holds the image
answers, and it does not matter how many devices there are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.cumulative import Cumulative, cumulate, first_above, pick, running_sum
from cast_jax.contrastive.peers import ALONE, Peers
from cast_jax.contrastive.scores import EXPECTED_ACCEPTANCE, CandidateMap, debias_score, envelope, spread
from cast_jax.core.selection import running_count, take

SAMPLERS = ("mixture_proposals", "inverse_cdf", "categorical")


class Drawn(NamedTuple):
    """Candidates of this device, numbered image by image; ``mine`` says which it holds (others may be anything)."""

    place: Int[Array, "*draws"]
    mine: Bool[Array, "*draws"]


def _on_this_device(image: Int[Array, "*draws"], images: int, peers: Peers) -> tuple[Array, Array]:
    """Images numbered over all devices as numbers on this one, in range, and whether they are here."""
    if not peers.axes:
        return image, jnp.ones(image.shape, bool)
    local = image - peers.number * images
    return jnp.clip(local, 0, images - 1), (local >= 0) & (local < images)


def draw_rows(
    sampler: str,
    keys: PRNGKeyArray,
    anchors: Float[Array, "rows dim"],
    own: Int[Array, "rows"],
    candidates: CandidateMap,
    positions: Int[Array, "images pixels"],
    *,
    score: str,
    num_negatives: int,
    peers: Peers = ALONE,
) -> tuple[Drawn, Bool[Array, "rows"]]:
    """K draws for each row from the scores of all its candidates; all peers must ask for the same rows.

    ``categorical`` is the reference: ``jax.random.categorical`` over log masses of images and log scores of pixels.
    ``inverse_cdf`` inverts cumulative sums.

    Args:
        keys: one a row.
        anchors: unit pseudo-probability vectors.
        own: each anchor's position, which it never draws; -1 if it is not among the candidates.
        positions: of the candidates, unique over all devices.

    Returns:
        The draws, [rows, K], and whether the row has any candidate of positive score to draw.
    """
    images, pixels = positions.shape
    flat = candidates.g_hat.reshape(images * pixels, -1) - candidates.centre
    weights = debias_score(score, anchors - candidates.centre, flat).reshape(-1, images, pixels)
    allowed = candidates.valid & (positions != own[:, None, None])
    weights = jnp.where(allowed, weights, 0.0)
    masses = peers.gather(jnp.sum(weights, axis=-1), axis=1)

    def by_categorical(key, weights, masses):
        image_key, pixel_key = jax.random.split(key)
        drawable = jnp.any(masses > 0)
        logits = jnp.where(drawable, jnp.log(masses), 0.0)
        image, mine = _on_this_device(jax.random.categorical(image_key, logits, shape=(num_negatives,)), images, peers)
        logits = jnp.where(jnp.any(weights > 0, axis=-1, keepdims=True), jnp.log(weights), 0.0)
        pixel = jax.random.categorical(pixel_key, take(logits, image)).astype(jnp.int32)
        return Drawn(image * pixels + pixel, mine), drawable

    def by_inversion(key, weights, masses):
        uniform = jax.random.uniform(key, (3, num_negatives))
        running = running_sum(masses)
        image, mine = _on_this_device(first_above(running[None], uniform[0]), images, peers)
        return Drawn(image * pixels + pick(cumulate(weights), uniform[1:], image), mine), jnp.any(masses > 0)

    if sampler == "categorical":
        return jax.lax.map(lambda row: by_categorical(*row), (keys, weights, masses))
    return jax.vmap(by_inversion)(keys, weights, masses)


def number_of_slots(num_negatives: int, score: str) -> int:
    """Slots after which fewer than K acceptances are five standard deviations away (K = 256, ``d``: 640)."""
    q = EXPECTED_ACCEPTANCE[score]
    # The positive root of  M q - 5 √(M q (1 - q)) = K  in √M, rounded up to whole vectors.
    half_slope = 2.5 * math.sqrt(q * (1 - q))
    root = (half_slope + math.sqrt(half_slope**2 + q * num_negatives)) / q
    return -(-math.ceil(root**2) // 32) * 32


class Proposals(NamedTuple):
    """What pools are drawn from: for each term of the envelope a distribution over pixels, and one over images."""

    pixels: Cumulative
    images: Float[Array, "terms images"]
    """Running sums of the masses of all devices' images."""


def prepare_proposals(candidates: CandidateMap, score: str, peers: Peers = ALONE) -> Proposals:
    """Prepares the proposals of one set of candidates, to be used by every pool."""
    images, pixels = candidates.valid.shape
    weights = spread(candidates.g_hat - candidates.centre).reshape(-1)
    factors = envelope(score, jnp.zeros((1,), weights.dtype), weights).candidate_factors
    factors = factors.reshape(-1, images, pixels)
    cumulative = cumulate(jnp.where(candidates.valid, factors, 0.0))
    return Proposals(cumulative, running_sum(peers.gather(cumulative.total, axis=1)))


def draw_pool(
    uniform: Float[Array, "terms 3 slots"], proposals: Proposals, pixels_per_image: int, peers: Peers = ALONE
) -> Drawn:
    """One pool of proposals, [terms, slots]: for each slot and term one candidate in proportion to the term."""
    images = proposals.pixels.blocks.shape[1]

    def one_term(uniform, cumulative, running):
        image, mine = _on_this_device(first_above(running[None], uniform[0]), images, peers)
        return Drawn(image * pixels_per_image + pick(cumulative, uniform[1:], image), mine)

    return jax.vmap(one_term)(uniform, proposals.pixels, proposals.images)


class SharedDraws(NamedTuple):
    """Negatives of a group of anchors as a mask over a pool that they share, [terms, slots] in a row.

    A candidate that stands in several slots of the pool was drawn as many times.
    """

    taken: Bool[Array, "anchors terms*slots"]
    accepted: Int[Array, "anchors"]
    """How many slots each anchor accepted. Below K the row is short: draw it anew with a row sampler."""


def mixture_proposals(
    coins: Float[Array, "anchors 1 slots"],
    anchors: Float[Array, "anchors dim"],
    own: Int[Array, "anchors"],
    pool: Float[Array, "terms*slots dim"],
    pool_positions: Int[Array, "terms*slots"],
    masses: Float[Array, "terms"],
    *,
    score: str,
    num_negatives: int,
) -> SharedDraws:
    """Rejection sampling from proposals that several anchors share.

    The envelope of the score is a mixture ``Σ_j α_j(p) β_j(r)``. A slot of the pool holds one candidate for each term,
    drawn with probability proportional to ``β_j``. For each slot, each anchor chooses a term with probability
    proportional to ``α_j(p) Σ_r β_j(r)`` and accepts its candidate with probability score / envelope. One uniform
    number decides both: term ``j`` owns an interval of [0, 1), whose accepted share lies at its start.
    The first K accepted slots are K independent draws from exactly the anchor's own distribution.

    Args:
        coins: uniform numbers in [0, 1).
        anchors: pseudo-probability vectors relative to the candidates' centre, like the ``pool``'s.
        own: each anchor's position, which it never draws; -1 if it is not among the candidates.
        masses: ``Σ_r β_j(r)`` of each term.
    """
    num_anchors, num_terms = anchors.shape[0], masses.shape[0]
    slots = pool.shape[0] // num_terms
    factors = envelope(score, spread(anchors), spread(pool))
    terms = zip(factors.anchor_factors, factors.candidate_factors, strict=True)
    bound = sum(jnp.outer(of_anchors, of_candidates) for of_anchors, of_candidates in terms)
    ratio = debias_score(score, anchors, pool) / jnp.where(bound > 0, bound, jnp.inf)
    ratio = jnp.where(pool_positions[None, :] == own[:, None], 0.0, ratio).reshape(num_anchors, num_terms, slots)

    mass = (factors.anchor_factors * masses[:, None]).T
    total = jnp.sum(mass, axis=-1, keepdims=True)
    share = (mass / jnp.where(total > 0, total, jnp.inf))[:, :, None]
    start = jnp.cumsum(share, axis=1) - share
    hit = (coins >= start) & (coins < start + share * ratio)

    rank = running_count(jnp.any(hit, axis=1))
    taken = hit & (rank <= num_negatives)[:, None, :]
    return SharedDraws(taken.reshape(num_anchors, -1), rank[:, -1])
