from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from maps import MAP_SHAPES, make_map

from cast_jax.contrastive.samplers import prepare_proposals
from cast_jax.contrastive.scores import EXPECTED_ACCEPTANCE, SCORES, candidate_map, debias_score, envelope, spread

POWERS = {"d": 1.0, "d_squared": 2.0, "d_sqrt": 0.5}


def _offsets(g_hat):
    """The pixels of one image relative to their centre."""
    return g_hat - candidate_map(jnp.asarray(g_hat)[None], jnp.ones((1, len(g_hat)), bool)).centre


@pytest.mark.parametrize("shape", MAP_SHAPES)
@pytest.mark.parametrize("score", POWERS)
def test_scores_match_double_precision(shape, score):
    g_hat = make_map(shape)
    offsets = _offsets(g_hat)
    found = np.asarray(debias_score(score, offsets, offsets))
    unit = g_hat.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    distance = 1 - unit @ unit.T
    largest = max(distance.max(), 1e-12)
    tolerance = {"d": 2e-4, "d_squared": 4e-4, "d_sqrt": 3e-2}[score]
    expected = (np.maximum(distance, 0) / largest) ** POWERS[score]
    np.testing.assert_allclose(found / largest ** POWERS[score], expected, atol=tolerance)


def test_centring_keeps_near_uniform_maps_accurate():
    g_hat = make_map("near_uniform").astype(np.float64)
    exact = 0.5 * np.sum((g_hat[:, None] - g_hat[None]) ** 2, axis=-1)
    single = jnp.asarray(g_hat, jnp.float32)
    offsets = _offsets(single)
    centred = np.abs(debias_score("d", offsets, offsets) - exact).max()
    naive = np.abs((1 - single @ single.T) - exact).max()
    assert centred < 1e-9
    assert naive > 50 * centred


@pytest.mark.parametrize("shape", MAP_SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_envelopes_bound_the_scores_and_accept_as_promised(shape, score):
    g_hat = make_map(shape)
    offsets = _offsets(g_hat)
    values = debias_score(score, offsets, offsets)
    factors = envelope(score, spread(offsets), spread(offsets))
    bound = np.einsum("ja,jr->ar", *factors)
    assert np.all(values <= bound * (1 + 1e-4) + 1e-30)
    acceptance = np.asarray(values.sum(1) / bound.sum(1))
    if score == "d":
        np.testing.assert_allclose(acceptance, 0.5, rtol=1e-3)
    proven = {"uniform": 1.0, "d": 0.499, "d_sqrt": 1 / 3, "d_squared": 0.01}[score]
    assert acceptance.min() >= proven
    assert acceptance.min() >= EXPECTED_ACCEPTANCE[score] * (1 - 1e-3)  # what slots are planned with


def test_invalid_candidates_do_not_count():
    g_hat = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    candidates = candidate_map(g_hat[None], jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(candidates.centre, [0.5, 0.5])
    proposals = prepare_proposals(candidates, "d")
    np.testing.assert_array_equal(proposals.images[:, 0], [2.0, 1.0])  # two candidates; the sum of their spreads
    assert bool(jnp.all(jnp.isfinite(candidate_map(g_hat[None], jnp.zeros((1, 3), bool)).centre)))


def test_unknown_score_is_refused():
    one = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="d_squared, d_sqrt"):
        debias_score("cubed", one, one)
    with pytest.raises(ValueError, match="d_squared, d_sqrt"):
        envelope("cubed", one[0], one[0])


def test_scores_of_orthogonal_and_equal_vectors():
    g_hat = jnp.eye(3)[jnp.array([0, 0, 1])]
    offsets = _offsets(g_hat)
    expected = [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    score = jax.jit(debias_score, static_argnums=0)
    for kind in POWERS:
        np.testing.assert_allclose(score(kind, offsets, offsets), expected, atol=1e-3)
