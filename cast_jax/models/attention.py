"""Scaled dot-product attention with one dispatch point per backend."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cast_jax.core import target
from cast_jax.core.runtime import fused_attention
from cast_jax.core.sharding import on_one_cpu

MASKED = -1e4  # the logit of what a query may not see: small enough, and not so small that log(keys) drowns in it


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys heads dim"],
    value: Float[Array, "batch keys heads dim"],
    mask: Bool[Array, "batch #heads queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(query keyᵀ / √dim) value, the softmax in float32; ``mask`` is True where a query may look.

    CPU: one head at a time, recomputed in the gradient. Elsewhere ``jax.nn.dot_product_attention``, with cuDNN's fused
    kernel where it applies. Queries that may look nowhere get an arbitrary finite result.
    """
    if on_one_cpu():
        return _attend_head_by_head(query, key, value, mask)
    if _fits_cudnn(query):
        return _attend_fused(query, key, value, mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def _fits_cudnn(query: Array) -> bool:
    """Whether cuDNN's fused attention takes such queries, half precision, narrow heads, Ampere or later, and may."""
    capability = getattr(target.local_devices()[0], "compute_capability", "")
    ampere = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8.0
    half, dim = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    return fused_attention() and ampere and half and dim % 8 == 0 and dim <= 128


def _attend_fused(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """cuDNN's attention. jax's gradient of it refuses odd numbers of queries or keys: they get one more, not seen."""
    queries, keys = query.shape[1], key.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    lengths = None
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
    elif keys % 2:
        lengths = jnp.full(len(key), keys, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        even(query), even(key), even(value), mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    if mask is not None:  # of a query that may look nowhere cuDNN would pass gradients on
        mixed = jnp.where(jnp.swapaxes(jnp.any(mask, axis=-1, keepdims=True), 1, 2), mixed, 0)
    return mixed[:, :queries]


def _attend_head_by_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Attention for CPUs: a loop over (batch, head) whose logits stay in the cache, forward and backward.

    XLA's batched products walk logits of the whole batch through memory several times: 1.1 to 4 times slower here.
    """
    batch, queries, heads, dim = query.shape

    def flatten(values: Array) -> Array:
        return values.astype(jnp.float32).transpose(0, 2, 1, 3).reshape(batch * heads, -1, dim)

    masks = None if mask is None else jnp.reshape(mask, (-1, *mask.shape[2:]))
    attended = _attend_heads(flatten(query) * dim**-0.5, flatten(key), flatten(value), masks)
    return attended.reshape(batch, heads, queries, dim).transpose(0, 2, 1, 3).astype(query.dtype)


@jax.custom_vjp
def _attend_heads(query: Array, key: Array, value: Array, masks: Array | None) -> Array:
    """Attention of [heads, tokens, dim] arrays; consecutive heads may share one of the ``masks``."""
    return _forward(query, key, value, masks)[0]


def _forward(query: Array, key: Array, value: Array, masks: Array | None):
    def head(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        i, q, k, v = inputs
        logits = _logits(q, k, _mask_of_head(masks, i, len(query)))
        largest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=-1, keepdims=True)
        return weights @ v / total, largest + jnp.log(total)

    attended, log_total = jax.lax.map(head, (jnp.arange(len(query)), query, key, value))
    return attended, (query, key, value, masks, attended, log_total)


def _backward(residuals: tuple[Any, ...], gradient: Array):
    query, key, value, masks, attended, log_total = residuals

    def head(inputs: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        # Keys by queries: of the products with the weights and with their gradient, which XLA:CPU computes at half the
        # speed where it has to transpose, only the last one does.
        i, q, k, v, log_sum, along, to_out = inputs
        mask = _mask_of_head(masks, i, len(query))
        with jax.named_scope("rematted_computation"):  # as jax.checkpoint calls what is computed again
            logits = _logits(k, q, None if mask is None else mask.T)
        weights = jnp.exp(logits - log_sum)
        to_logits = weights * (v @ to_out.T - along)
        if mask is not None:  # matters for queries that may look nowhere: their weights are uniform, not zero
            to_logits = jnp.where(mask.T, to_logits, 0.0)
        return (k.T @ to_logits).T, to_logits @ q, weights @ to_out

    along = (gradient * attended).sum(axis=-1)[:, None]
    heads = (jnp.arange(len(query)), query, key, value, log_total.swapaxes(1, 2), along, gradient)
    return (*jax.lax.map(head, heads), None)


_attend_heads.defvjp(_forward, _backward)


def _logits(rows: Array, columns: Array, mask: Array | None) -> Array:
    logits = rows @ columns.T
    return logits if mask is None else jnp.where(mask, logits, MASKED)


def _mask_of_head(masks: Array | None, head: Array, heads: int) -> Array | None:
    if masks is None:
        return None
    return jax.lax.dynamic_index_in_dim(masks, head * len(masks) // heads, keepdims=False)
