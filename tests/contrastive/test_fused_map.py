from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.contrastive.fused_map import normalise, pseudo_probability

LOG = np.log


def test_two_queries_worked_by_hand():
    # One pixel, m = (3/4, 1/4); c_1 = (1/2, 1/2, 0), c_2 = (0, 1/5, 4/5) up to the softmax of logs.
    mask_logits = jnp.array([LOG(3.0), 0.0]).reshape(1, 2, 1, 1)
    class_logits = jnp.array([[[0.0, 0.0, -100.0], [-100.0, LOG(0.2), LOG(0.8)]]])
    g = pseudo_probability(mask_logits, class_logits)[0, 0, 0]
    expected_class = [0.75 * 0.5, 0.75 * 0.5 + 0.25 * 0.2, 0.25 * 0.8]
    np.testing.assert_allclose(g, [0.75, 0.25, *expected_class], rtol=1e-6)
    mask = pseudo_probability(mask_logits, class_logits, "mask")[0, 0, 0]
    np.testing.assert_allclose(mask, [0.75, 0.25, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    by_class = pseudo_probability(mask_logits, class_logits, "class")[0, 0, 0]
    np.testing.assert_allclose(by_class, [0.5, 0.5, *expected_class], rtol=1e-6)


def test_layout_precision_and_no_gradient():
    rng = np.random.default_rng(0)
    mask_logits = jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.bfloat16)
    class_logits = jnp.asarray(rng.standard_normal((2, 5, 7)), jnp.bfloat16)
    g = pseudo_probability(mask_logits, class_logits)
    assert g.shape == (2, 3, 4, 12)
    assert g.dtype == jnp.float32
    np.testing.assert_allclose(g[..., :5].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(g[..., 5:].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(g[1, 2, 3, :5], jax.nn.softmax(mask_logits[1, :, 2, 3].astype(jnp.float32)), rtol=1e-6)
    gradient = jax.grad(lambda logits: jnp.sum(pseudo_probability(logits, class_logits) ** 2))(mask_logits)
    assert not np.any(np.asarray(gradient, np.float32))


def test_uniform_map_is_empty_and_unknown_maps_are_refused():
    assert pseudo_probability(jnp.zeros((1, 5, 3, 4)), jnp.zeros((1, 5, 7)), "uniform").shape == (1, 3, 4, 0)
    with pytest.raises(ValueError, match="fusion, mask, class, uniform"):
        pseudo_probability(jnp.zeros((1, 5, 3, 4)), jnp.zeros((1, 5, 7)), "fused")


def test_normalise_and_zero_vectors():
    np.testing.assert_allclose(normalise(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    value, gradient = jax.value_and_grad(lambda v: jnp.sum(normalise(v)))(jnp.zeros(3))
    assert value == 0
    assert np.all(np.isfinite(gradient))
