"""The debias score between pixels, and envelopes of it from which candidates can be proposed without a matrix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cast_jax.contrastive.peers import ALONE, Peers

SCORES = ("d", "d_squared", "d_sqrt", "uniform")


class CandidateMap(NamedTuple):
    """The candidates' unit pseudo-probability vectors, and the mean of the valid ones.

    Near initialisation all vectors almost coincide, and ``1 - <ĝ_p, ĝ_r>`` would be a difference of two numbers near 1:
    relative to their centre, the same score has an absolute error of 7e-8 times the map's *spread* instead of 9e-6.
    Vectors are centred where they are used: most are never drawn.
    """

    centre: Float[Array, "dim"]
    g_hat: Float[Array, "images pixels dim"]
    """Zero where a candidate is not valid."""
    valid: Bool[Array, "images pixels"]


def candidate_map(
    g_hat: Float[Array, "images pixels dim"], valid: Bool[Array, "images pixels"], peers: Peers = ALONE
) -> CandidateMap:
    """Finds the mean of all peers' valid candidates; the others' vectors are to be zero."""
    # Image by image first: the sum must not depend on which device holds which images.
    centre = jnp.sum(peers.gather(jnp.sum(g_hat, axis=1)), axis=0) / jnp.maximum(peers.sum(jnp.sum(valid)), 1)
    return CandidateMap(centre, g_hat, valid)


def debias_score(
    kind: str,
    anchors: Float[Array, "anchors dim"],
    candidates: Float[Array, "candidates dim"],
) -> Float[Array, "anchors candidates"]:
    """``d(p, r) = 1 - <ĝ_p, ĝ_r> = ½‖ĝ_p - ĝ_r‖²``, its square or its root, from vectors relative to a common centre.

    ``kind`` is ``"d"`` (the paper's), ``"d_squared"``, ``"d_sqrt"`` or ``"uniform"`` (1 everywhere). At least float32.
    """
    if kind == "uniform":
        return jnp.ones((anchors.shape[0], candidates.shape[0]), jnp.float32)
    anchor_spread = jnp.sum(jnp.square(anchors), axis=-1)
    spread = jnp.sum(jnp.square(candidates), axis=-1)
    product = jnp.matmul(anchors, candidates.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.maximum(0.5 * (anchor_spread[:, None] + spread[None, :]) - product, 0.0)
    if kind == "d":
        return distance
    if kind == "d_squared":
        return jnp.square(distance)
    if kind == "d_sqrt":
        return jnp.sqrt(distance)
    raise ValueError(f"unknown score {kind!r}; known: {', '.join(SCORES)}")


class Envelope(NamedTuple):
    """A bound ``score(p, r) ≤ Σ_j anchor_factors[j, p] · candidate_factors[j, r]``: a mixture of separable terms."""

    anchor_factors: Float[Array, "terms anchors"]
    candidate_factors: Float[Array, "terms candidates"]


def spread(offsets: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Squared distance from the centre: ``a_p = ‖ĝ_p - μ‖²`` of anchors, ``b_r`` of candidates."""
    return jnp.sum(jnp.square(offsets), axis=-1)


def envelope(kind: str, anchor_spread: Float[Array, "anchors"], spread: Float[Array, "candidates"]) -> Envelope:
    """The envelope of a score, from ``a_p`` and ``b_r``, the squared distances of anchor and candidate from the centre.

    With ``x`` and ``y`` the vectors relative to the centre, so that the mean of ``y`` is 0:

    - ``d = ½‖x - y‖² ≤ a + b``. Since ``E‖x - y‖² = a + E b``, **exactly half** of the proposals are accepted, for
      every anchor on every map.
    - ``d² ≤ (a + b)² = a² + 2a·b + b²``: about a quarter are accepted. At least 1 %, by Minkowski: with ``s = ‖x‖`` and
      ``T = E[‖y‖⁴]^¼``, ``E d² ≥ ¼ max(s, T - s)⁴`` and ``E (a + b)² ≤ (s² + T²)²``.
    - ``√d = ‖x - y‖/√2 ≤ (√a + √b)/√2`` by the triangle inequality: one half to nearly all are accepted on usual maps,
      and never less than a third, since ``E‖x - y‖ ≥ max(s, E‖y‖ - s)``.
    - the uniform score is its own envelope.
    """
    one_a, one_b = jnp.ones_like(anchor_spread), jnp.ones_like(spread)
    if kind == "uniform":
        factors = [(one_a, one_b)]
    elif kind == "d":
        factors = [(anchor_spread, one_b), (one_a, spread)]
    elif kind == "d_squared":
        factors = [(jnp.square(anchor_spread), one_b), (2 * anchor_spread, spread), (one_a, jnp.square(spread))]
    elif kind == "d_sqrt":
        half = 0.5**0.5
        factors = [(half * jnp.sqrt(anchor_spread), one_b), (half * one_a, jnp.sqrt(spread))]
    else:
        raise ValueError(f"unknown score {kind!r}; known: {', '.join(SCORES)}")
    of_anchors, of_candidates = zip(*factors, strict=True)
    return Envelope(jnp.stack(of_anchors), jnp.stack(of_candidates))


EXPECTED_ACCEPTANCE = {"d": 0.5, "d_squared": 0.15, "d_sqrt": 1 / 3, "uniform": 0.95}
"""What the number of slots is planned with: rather too low than too high, since a short row costs a pass over all.

For ``d_sqrt`` what is proven; for ``d_squared`` what maps of one instance, or of 95 % background, still accept.
"""
