"""Windows of a map and attention within them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.models.windows import attend_within, from_windows, to_windows


def test_windows_by_hand():
    maps = np.random.default_rng(2).normal(size=(2, 4, 6, 3)).astype(np.float32)
    windows = to_windows(maps, 2)
    assert windows.shape == (2, 6, 4, 3)
    np.testing.assert_array_equal(windows[1, 4], maps[1, 2:4, 2:4].reshape(4, 3))  # row by row


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_windows_are_padded_with_zeros_and_cut_again(size):
    maps = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)
    windows = to_windows(maps, 3)
    assert windows.shape == (2, -(-size[0] // 3) * -(-size[1] // 3), 9, 3)
    np.testing.assert_allclose(jnp.sum(windows), maps.sum(), rtol=1e-5)
    np.testing.assert_array_equal(from_windows(windows, *size), maps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_that_of_jax_in_each_window(dtype):
    query, key, value = (jax.random.normal(jax.random.key(n), (2, 3, 4 + n, 8), dtype) for n in (0, 1, 1))
    added = jax.random.normal(jax.random.key(3), (3, 2, 4, 5))
    heads = lambda values: values.reshape(6, -1, 2, 4)
    expected = jax.nn.dot_product_attention(heads(query), heads(key), heads(value), jnp.tile(added, (2, 1, 1, 1)))
    found = attend_within(query, key, value, 2, added)
    assert found.dtype == dtype
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        found.astype(np.float32), expected.reshape(2, 3, 4, 8).astype(np.float32), atol=tolerance
    )
