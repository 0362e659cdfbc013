"""Small pieces that several networks share: stochastic regularisers, rematerialisation, layer scale."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.sharding import on_one_cpu


def dropout(values: Float[Array, "*shape"], rate: float, key: Array | None) -> Float[Array, "*shape"]:
    """Zeroes entries with probability ``rate`` and rescales the rest; without a key (evaluation) the identity."""
    if key is None or rate == 0.0:
        return values
    keep = jax.random.bernoulli(key, 1.0 - rate, values.shape)
    return jnp.where(keep, values / (1.0 - rate), 0.0)


def drop_path(
    values: Float[Array, "batch *shape"], rate: float | Float[Array, ""], key: Array | None
) -> Float[Array, "batch *shape"]:
    """Drops whole samples of a residual branch (Huang et al., 2016); without a key the identity."""
    if key is None or (not isinstance(rate, jax.Array) and rate == 0.0):
        return values
    share = 1.0 - rate
    keep = jax.random.bernoulli(key, share, (values.shape[0],) + (1,) * (values.ndim - 1))
    return jnp.where(keep, values / jnp.asarray(share, values.dtype), 0.0)


REMAT = ("none", "elementwise", "blocks")
"""What an encoder computes again in the gradient instead of keeping it: nothing; activations and norms, which takes
next to no time (Swin, Hiera: of the feed-forward half of blocks); or whole blocks, of which only the inputs are kept.
The gradient is the same."""


def rematerialise(run: Callable[..., Any], block: nnx.Module, features: Any, *keys: Any, when: bool = True) -> Any:
    """``run(block, features, *keys)``; with ``when`` the gradient computes it again, and only ``features`` are kept.

    ``features`` and the result are arrays or trees of them. ``jax.checkpoint`` alone lets a compiler compute all blocks
    again at once, since nothing says that they have to wait: XLA:CPU does, and saves no memory. Here the block's input
    waits for the gradient of its result.
    """
    if not when:
        return run(block, features, *keys)
    graph, parameters = nnx.split(block)
    # Keys are arguments too: what a function of its own gradient closes over is lost within a loop.
    again = lambda parameters, given: run(nnx.merge(graph, parameters), given[0], *given[1])
    return _run_again(again, parameters, (features, keys))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_again(run: Callable[..., Any], parameters: Any, features: Any) -> Any:
    return run(parameters, features)


def _keep_input(run: Callable[..., Any], parameters: Any, features: Any) -> tuple[Any, tuple[Any, Any]]:
    return run(parameters, features), (parameters, features)


def _gradient(run: Callable[..., Any], kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    parameters, features = kept
    nothing = 0.0 * jax.tree.leaves(gradient)[0].reshape(-1)[0]  # no compiler may drop it: infinity times zero is not 0

    def wait(leaf: Array) -> Array:
        return (leaf + nothing).astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    with jax.named_scope("rematted_computation"):  # as jax.checkpoint calls it; profiles tell it by this name
        pullback = jax.vjp(run, parameters, jax.tree.map(wait, features))[1]
    return pullback(gradient)


_run_again.defvjp(_keep_input, _gradient)


class LayerScale(nnx.Module):
    """A learned gain per channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, features: int, *, init: float, dtype=jnp.float32, param_dtype=jnp.float32):
        self.gamma = nnx.Param(jnp.full((features,), init, param_dtype))
        self.dtype = dtype

    def __call__(self, values: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return values * self.gamma[...].astype(self.dtype)


@jax.checkpoint
def gelu(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU (Hendrycks & Gimpel, 2016), for whose gradient only ``values`` are kept, as in PyTorch."""
    return jax.nn.gelu(values, approximate=False)


class Linear(nnx.Linear):
    """A dense layer. On a CPU rows lie along one axis: XLA would turn inputs around for the gradient of the kernel."""

    def __call__(self, inputs: Float[Array, "*batch features"], out_sharding: Any = None) -> Float[Array, "*batch _"]:
        if inputs.ndim <= 2 or not on_one_cpu():
            return super().__call__(inputs, out_sharding)
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], -1)

    def product(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch _"]:
        """The same without the bias."""
        inputs, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        rows = inputs.reshape(-1, inputs.shape[-1]) if on_one_cpu() else inputs
        return (rows @ kernel).reshape(*inputs.shape[:-1], -1)

    def add_bias(self, products: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """What :meth:`product` leaves out."""
        assert self.bias is not None
        return products + self.bias[...].astype(products.dtype)


class LayerNorm(nnx.LayerNorm):
    """Layer norm (Ba et al., 2016), the variance from centred values, as in PyTorch.

    On a CPU its gradient is our own: XLA's takes four times as long.
    """

    def __init__(self, features: int, **options: Any):
        super().__init__(features, use_fast_variance=False, **options)

    def __call__(
        self, x: Float[Array, "*batch features"], *, mask: Array | None = None
    ) -> Float[Array, "*batch features"]:
        scale, bias = self.scale, self.bias
        if mask is not None or scale is None or bias is None or not on_one_cpu():
            return super().__call__(x, mask=mask)
        arrays = (array.astype(jnp.float32) for array in (x, scale[...], bias[...]))
        return _layer_norm(self.epsilon, *arrays).astype(self.dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(epsilon: float, values: Array, scale: Array, bias: Array) -> Array:
    return _normalise(epsilon, values, scale, bias)[0]


def _normalise(epsilon: float, values: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    mean = _row_mean(values)
    inverse = jax.lax.rsqrt(_row_mean((values - mean) ** 2) + epsilon)
    return (values - mean) * inverse * scale + bias, (values, mean, inverse, scale)


def _through_norm(epsilon: float, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    values, mean, inverse, scale = kept
    normed, inner = (values - mean) * inverse, gradient * scale
    to_values = inverse * (inner - _row_mean(inner) - normed * _row_mean(inner * normed))
    rows = range(gradient.ndim - 1)
    return to_values, jnp.sum(gradient * normed, axis=rows), jnp.sum(gradient, axis=rows)


_layer_norm.defvjp(_normalise, _through_norm)


def _row_mean(values: Array) -> Array:
    return jnp.mean(values, axis=-1, keepdims=True)
