"""Attention within square windows of a map: what Swin and Hiera share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_windows(
    maps: Float[Array, "batch rows columns channels"], window: int
) -> Float[Array, "batch windows positions channels"]:
    """Cuts maps into windows, row by row; padded with zeros at the bottom and right to whole ones."""
    maps = jnp.pad(maps, ((0, 0), (0, -maps.shape[1] % window), (0, -maps.shape[2] % window), (0, 0)))
    batch, rows, columns, channels = maps.shape
    cut = maps.reshape(batch, rows // window, window, columns // window, window, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window**2, channels)


def from_windows(
    windows: Float[Array, "batch windows positions channels"], rows: int, columns: int
) -> Float[Array, "batch rows columns channels"]:
    """Inverse of :func:`to_windows`: the maps without their padding."""
    batch, _, positions, channels = windows.shape
    window = round(positions**0.5)
    down, across = -(-rows // window), -(-columns // window)
    cut = windows.reshape(batch, down, across, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, down * window, across * window, channels)[:, :rows, :columns]


def attend_within(
    query: Float[Array, "batch windows queries channels"],
    key: Float[Array, "batch windows keys channels"],
    value: Float[Array, "batch windows keys channels"],
    num_heads: int,
    added: Float[Array, "#windows #heads queries keys"] | None = None,
) -> Float[Array, "batch windows queries channels"]:
    """Multi-head attention in each window; ``added`` to the scaled logits. Softmax in float32."""

    def split(values: Array) -> Array:
        return values.reshape(*values.shape[:3], num_heads, -1)

    logits = jnp.einsum("bwqhd,bwkhd->bwhqk", split(query), split(key), preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] // num_heads) ** -0.5
    weights = jax.nn.softmax(logits if added is None else logits + added, axis=-1).astype(value.dtype)
    return jnp.einsum("bwhqk,bwkhd->bwqhd", weights, split(value)).reshape(query.shape)
