"""Convolutions equal torch's, and the CPU's own kernel gradient equals automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cast_jax.models import convolution
from cast_jax.models.convolution import Conv3x3, PatchEmbedding, PatchExpansion, convolve3x3

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def run_torch(layer: torch.nn.Module, maps: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return layer(torch.from_numpy(maps).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [(6, 5), (1, 1), (2, 9)])
def test_cpu_gradients_equal_automatic_differentiation(size, monkeypatch):
    features, kernel = normal(3, *size, 4), normal(3, 3, 4, 5)
    gradient = normal(3, *size, 5)
    monkeypatch.setattr(convolution, "_SMALL", 0)
    ours, calls = convolution._kernel_gradient, []
    monkeypatch.setattr(convolution, "_kernel_gradient", lambda *maps: calls.append(maps) or ours(*maps))

    def differentiate(backend: str):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        result, pull = jax.vjp(convolve3x3, features, kernel)
        return result, *pull(gradient)

    for mine, expected in zip(differentiate("cpu"), differentiate("gpu"), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("small", [0, 1024])
def test_cpu_kernel_gradient_in_half_precision_adds_up_in_float32(small, monkeypatch):
    monkeypatch.setattr(convolution, "_SMALL", small)
    features, gradient = (
        jnp.asarray(normal(2, 16, 16, 3), jnp.bfloat16),
        jnp.asarray(normal(2, 16, 16, 3), jnp.bfloat16),
    )
    kernel = jnp.asarray(normal(3, 3, 3, 3), jnp.bfloat16)
    ours = jax.vjp(convolve3x3, features, kernel)[1](gradient)[1]
    wide = [values.astype(jnp.float32) for values in (features, kernel, gradient)]
    exact = jax.vjp(convolve3x3, *wide[:2])[1](wide[2])[1]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_conv3x3_equals_torch(stride, size):
    theirs = torch.nn.Conv2d(4, 6, 3, stride=stride, padding=1)
    ours = Conv3x3(4, 6, stride=stride, rngs=nnx.Rngs(0))
    ours.kernel[...] = jnp.asarray(theirs.weight.detach().permute(2, 3, 1, 0).numpy())
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    maps = normal(2, *size, 4)
    np.testing.assert_allclose(ours(maps), run_torch(theirs, maps), atol=2e-6)


def test_conv3x3_without_bias_has_only_a_kernel():
    assert len(jax.tree.leaves(nnx.state(Conv3x3(4, 6, use_bias=False, rngs=nnx.Rngs(0)), nnx.Param))) == 1


def test_patch_embedding_equals_torch():
    theirs = torch.nn.Conv2d(3, 7, 4, stride=4)
    ours = PatchEmbedding(3, 7, 4, rngs=nnx.Rngs(0))
    ours.kernel[...] = jnp.asarray(theirs.weight.detach().permute(2, 3, 1, 0).numpy())
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    maps = normal(2, 8, 12, 3)
    np.testing.assert_allclose(ours(maps), run_torch(theirs, maps), atol=2e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_patch_expansion_equals_torch(factor):
    theirs = torch.nn.ConvTranspose2d(5, 3, factor, stride=factor)
    ours = PatchExpansion(5, 3, factor, rngs=nnx.Rngs(0))
    ours.kernel[...] = jnp.asarray(theirs.weight.detach().permute(2, 3, 0, 1).numpy())
    ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    maps = normal(2, 3, 4, 5)
    np.testing.assert_allclose(ours(maps), run_torch(theirs, maps), atol=2e-6)
