"""Scaled dot-product attention with one dispatch point per backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys heads dim"],
    value: Float[Array, "batch keys heads dim"],
    mask: Bool[Array, "batch #heads queries keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(query keyᵀ / √dim) value, the softmax in float32. ``mask`` is True where a query may look.

    A query that may look nowhere is the caller's to avoid.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)
