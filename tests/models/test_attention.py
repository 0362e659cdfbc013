"""Attention equals torch's on every path, in values and gradients."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cast_jax.core import target
from cast_jax.models import attention
from cast_jax.models.attention import attend

RANDOM = np.random.default_rng(0)
QUERY, GRADIENT = (RANDOM.normal(size=(2, 5, 3, 4)).astype(np.float32) for _ in range(2))
KEY, VALUE = (RANDOM.normal(size=(2, 7, 3, 4)).astype(np.float32) for _ in range(2))


def make_mask(heads: int | None) -> np.ndarray | None:
    if heads is None:
        return None
    mask = RANDOM.random(size=(2, heads, 5, 7)) < 0.5
    mask[..., 0] = True  # every query may look somewhere
    return mask


def torch_attention(mask: np.ndarray | None) -> list[np.ndarray]:
    """The result and the gradients with respect to query, key and value."""
    inputs = [torch.from_numpy(values).transpose(1, 2).requires_grad_() for values in (QUERY, KEY, VALUE)]
    keep = None if mask is None else torch.from_numpy(mask)
    result = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=keep)
    gradients = torch.autograd.grad(result, inputs, torch.from_numpy(GRADIENT).transpose(1, 2))
    return [values.detach().transpose(1, 2).numpy() for values in (result, *gradients)]


@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_equals_torch(backend, heads, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mask = make_mask(heads)

    @jax.jit
    def ours(query, key, value):
        result, pull = jax.vjp(lambda *inputs: attend(*inputs, mask), query, key, value)
        return result, *pull(GRADIENT)

    for mine, expected in zip(ours(QUERY, KEY, VALUE), torch_attention(mask), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-6)


@pytest.mark.parametrize("heads", [None, 1, 3])
def test_the_fused_kernel_is_given_even_numbers_of_queries_and_keys(heads, monkeypatch):
    computed = jax.nn.dot_product_attention

    def fused(query, key, value, *, implementation, **options):  # what jax's own checks ask for, computed without cuDNN
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == key.shape[1] % 2 == value.shape[1] % 2 == 0
        return computed(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    monkeypatch.setattr(attention, "_fits_cudnn", lambda query: True)
    mask = make_mask(heads)
    result, pull = jax.vjp(lambda *inputs: attend(*inputs, mask), QUERY, KEY, VALUE)
    for mine, expected in zip((result, *pull(GRADIENT)), torch_attention(mask), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "fits"),
    [
        ("9.0", jnp.bfloat16, 64, True),
        ("8.0", jnp.float16, 48, True),
        ("7.5", jnp.bfloat16, 64, False),
        ("9.0", jnp.float32, 64, False),
        ("9.0", jnp.bfloat16, 60, False),
        ("9.0", jnp.bfloat16, 256, False),
        ("gfx942", jnp.bfloat16, 64, False),
    ],
)
def test_where_the_fused_kernel_applies(capability, dtype, dim, fits, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(target, "local_devices", lambda: [device])
    assert attention._fits_cudnn(jnp.zeros((1, 2, 1, dim), dtype)) == fits
    monkeypatch.setattr(attention, "fused_attention", lambda: False)
    assert not attention._fits_cudnn(jnp.zeros((1, 2, 1, dim), dtype))


@pytest.mark.parametrize("fused", [False, True])
def test_a_query_that_may_look_nowhere_stays_finite_and_teaches_nothing(fused, monkeypatch):
    computed = jax.nn.dot_product_attention

    def added(query, key, value, *, mask, **_):  # as jax tells cuDNN of a mask
        return computed(query, key, value, jnp.where(mask, 0.0, -(2.0**41)))

    if fused:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax.nn, "dot_product_attention", added)
        monkeypatch.setattr(attention, "_fits_cudnn", lambda query: True)
    mask = np.ones((2, 1, 5, 7), bool)
    mask[0, 0, 3] = False
    result, pull = jax.vjp(lambda query, key: attend(query, key, VALUE, mask), QUERY, KEY)
    to_query, to_key = pull(GRADIENT)
    assert np.isfinite(result).all()
    assert np.isfinite(to_key).all()
    np.testing.assert_array_equal(to_query[0, 3], 0)
    assert np.abs(to_query[0, 2]).max() > 0


def test_half_precision_keeps_its_dtype_and_a_float32_softmax():
    query, key, value = (jnp.asarray(values, jnp.bfloat16) for values in (QUERY, KEY, VALUE))
    result = attend(query, key, value)
    assert result.dtype == jnp.bfloat16
    exact = attend(*(values.astype(jnp.float32) for values in (query, key, value)))
    np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=1e-2)


def test_large_logits_do_not_overflow():
    result, gradient = jax.value_and_grad(lambda query: attend(query, KEY, VALUE).sum())(QUERY * 1e4)
    assert np.isfinite(result)
    assert np.isfinite(gradient).all()
