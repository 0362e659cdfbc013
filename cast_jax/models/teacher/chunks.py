"""Work on the many positions of an image, some at a time, so that memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

CHUNK = 8192  # positions of an image at a time


def in_chunks(run: Callable[..., Any], *values: Array) -> Any:
    """``run(*values)`` on at most ``CHUNK`` positions, the second axis, at a time; computed again in the gradient.

    The results (an array or a tree) are joined along that axis. The last chunk is padded with zeros, so results of
    each position have a few too many at the end: the caller cuts them off.
    """
    batch, count = values[0].shape[:2]
    chunks = math.ceil(count / CHUNK)
    if chunks == 1:
        return run(*values)
    length = math.ceil(count / chunks)

    def split(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, chunks * length - count), *((0, 0),) * (array.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, chunks, length, *array.shape[2:]), 1, 0)

    def join(array: Array) -> Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, -1, *array.shape[3:])

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda chunk: run(*chunk)), tuple(map(split, values))))
