"""Dropout, drop path, dense layers, activations, norms, layer scale and rematerialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cast_jax.models.layers import LayerNorm, LayerScale, Linear, drop_path, dropout, gelu, rematerialise


def test_dropout_keeps_the_mean_and_the_zeros_at_the_rate():
    dropped = dropout(jnp.ones((200, 100)), 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose((dropped == 0).mean(), 0.25, atol=0.02)


def test_drop_path_drops_whole_samples():
    dropped = np.asarray(drop_path(jnp.ones((400, 3, 2)), 0.4, jax.random.key(0)))
    np.testing.assert_array_equal(dropped, np.broadcast_to(dropped[:, :1, :1], dropped.shape))
    np.testing.assert_allclose((dropped[:, 0, 0] == 0).mean(), 0.4, atol=0.08)
    assert dropped.max() == np.float32(1 / 0.6)


@pytest.mark.parametrize("regulariser", [dropout, drop_path])
def test_without_a_key_or_a_rate_nothing_is_dropped(regulariser):
    values = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(regulariser(values, 0.5, None), values)
    np.testing.assert_array_equal(regulariser(values, 0.0, jax.random.key(0)), values)


def test_layer_scale_multiplies_channels():
    scale = LayerScale(3, init=0.5)
    scale.gamma[...] *= jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(scale(jnp.ones((2, 3))), [[0.5, 1.0, 1.5]] * 2)
    assert LayerScale(3, init=1.0, dtype=jnp.bfloat16)(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_dense_layers_are_torchs(backend, shape, monkeypatch):
    """Values and gradients for any number of axes."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=shape).astype(np.float32), rng.normal(size=(*shape[:-1], 7)).astype(np.float32)
    layer = Linear(6, 7, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    result, pull = jax.vjp(lambda state, values: nnx.merge(graph, state)(values), state, jnp.asarray(values))
    to_state, to_values = pull(jnp.asarray(weights))

    kernel, bias = torch.tensor(np.asarray(layer.kernel[...]).T), torch.tensor(np.asarray(layer.bias[...]))
    inputs = [torch.from_numpy(values).requires_grad_(), kernel.requires_grad_(), bias.requires_grad_()]
    expected = torch.nn.functional.linear(*inputs)
    np.testing.assert_allclose(result, expected.detach(), atol=1e-5)
    expected = torch.autograd.grad(expected, inputs, torch.from_numpy(weights))
    for mine, other in zip((to_values, to_state["kernel"][...].T, to_state["bias"][...]), expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_gelu_is_torchs_and_keeps_its_input_alone():
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32) * 3
    result, pull = jax.vjp(gelu, jnp.asarray(values))
    assert sum(np.size(kept) for kept in jax.tree.leaves(pull)) == values.size
    source = torch.from_numpy(values).requires_grad_()
    expected = torch.nn.functional.gelu(source)
    expected.sum().backward()
    np.testing.assert_allclose(result, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones((4, 6)))[0], source.grad, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_layer_norm_is_torchs(backend, monkeypatch):
    """Values and gradients, of rows far from zero too."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    values = (3 * rng.normal(size=(2, 5, 24)) + 20 * rng.normal(size=(2, 5, 1))).astype(np.float32)
    scale, bias, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((24,), (24,), values.shape))
    norm = LayerNorm(24, epsilon=1e-5, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(norm)

    def ours(values, scale, bias):
        return nnx.merge(graph, nnx.State({"scale": nnx.Param(scale), "bias": nnx.Param(bias)}))(values)

    result, pull = jax.vjp(ours, values, scale, bias)
    inputs = [torch.from_numpy(array).requires_grad_() for array in (values, scale, bias)]
    expected = torch.nn.functional.layer_norm(inputs[0], (24,), *inputs[1:], eps=1e-5)
    np.testing.assert_allclose(result, expected.detach(), atol=1e-5)
    expected = torch.autograd.grad(expected, inputs, torch.from_numpy(weights))
    for mine, other in zip(pull(jnp.asarray(weights)), expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_layer_norm_keeps_half_precision():
    norm = LayerNorm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    values = jax.random.normal(jax.random.key(0), (3, 8), jnp.bfloat16)
    assert norm(values).dtype == jnp.bfloat16
    exact = LayerNorm(8, rngs=nnx.Rngs(0))(values.astype(jnp.float32))
    np.testing.assert_allclose(norm(values).astype(jnp.float32), exact, atol=2e-2)


def test_rematerialised_blocks_of_several_arrays():
    """Values and gradients of the block itself, also towards parameters and arrays beside booleans."""

    class Block(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, features, key):
            values, extra = features
            return jnp.tanh(self.linear(values)) + extra["added"], jnp.where(extra["mask"], values, 0.0)

    graph, state = nnx.split(Block())
    values, added = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    mask = jnp.arange(6).reshape(2, 3) % 2 == 0

    def loss(again: bool):
        def compute(state, values, added):
            block = nnx.merge(graph, state)
            features = (values, {"added": added, "mask": mask})
            first, second = rematerialise(Block.__call__, block, features, None) if again else block(features, None)
            return jnp.sum(first**2) + jnp.sum(second**3)

        return jax.jit(jax.value_and_grad(compute, argnums=(0, 1, 2)))(state, values, added)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loss(again=True), loss(again=False))
