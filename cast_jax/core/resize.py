"""Resizing of maps by interpolation matrices, with PyTorch's conventions, so that ported weights see the same numbers.

``jax.image.resize`` has neither ``align_corners=True`` nor PyTorch's bicubic kernel (a = -0.75 without antialiasing).
Both axes are separable and linear, so a resize is two small matrix products and its gradient two more, never a scatter.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Method = Literal["bilinear", "bicubic"]


def resize(
    features: Float[Array, "batch height width channels"],
    size: tuple[int, int],
    *,
    method: Method = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
) -> Float[Array, "batch new_height new_width channels"]:
    """Resizes maps to ``size`` = (height, width); equals ``torch.nn.functional.interpolate(size=size)``."""
    if features.shape[1:3] == tuple(size):
        return features
    rows, columns = (
        interpolation_matrix(old, new, method=method, align_corners=align_corners, antialias=antialias)
        for old, new in zip(features.shape[1:3], size, strict=True)
    )
    return apply_matrices(features, rows, columns)


def apply_matrices(
    features: Float[Array, "batch height width channels"],
    rows: Float[np.ndarray, "new_height height"],
    columns: Float[np.ndarray, "new_width width"],
) -> Float[Array, "batch new_height new_width channels"]:
    """Multiplies the two spatial axes of maps by matrices; keeps the maps' dtype, and of float32 every bit."""
    dtype, highest = features.dtype, jax.lax.Precision.HIGHEST
    matrices = jnp.asarray(rows, dtype), jnp.asarray(columns, dtype)
    return jnp.einsum("Yy,byxc,Xx->bYXc", matrices[0], features, matrices[1], precision=highest)


def interpolation_matrix(
    source: int,
    target: int,
    *,
    method: Method = "bilinear",
    align_corners: bool = False,
    antialias: bool = False,
    scale: float | None = None,
) -> Float[np.ndarray, "target source"]:
    """The matrix that resamples ``source`` values at ``target`` positions; each row sums to one.

    ``scale`` is the magnification that maps positions, ``target / source`` if None: PyTorch's ``scale_factor``.
    Positions outside repeat the border value, except with ``antialias``, where the kernel is cut and renormalised.
    """
    if antialias and align_corners:
        raise ValueError("antialias and align_corners cannot be combined: torch has no such resize")
    index = np.arange(target, dtype=np.float64)
    if align_corners:
        position = index * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        position = (index + 0.5) / (scale or target / source) - 0.5
    if antialias:
        return _antialiased(position, source, max(1 / (scale or target / source), 1.0), method)
    if method == "bilinear":
        position = np.clip(position, 0, source - 1)
    first = np.floor(position).astype(np.int64)
    taps = np.arange(-1, 3) if method == "bicubic" else np.arange(2)
    neighbours = first[:, None] + taps
    weights = _kernel(position[:, None] - neighbours, method, a=-0.75)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], np.clip(neighbours, 0, source - 1)), weights)
    return matrix.astype(np.float32)


def _antialiased(position: np.ndarray, source: int, stretch: float, method: Method) -> np.ndarray:
    """Weights of a kernel widened by ``stretch``, as Pillow and ``torch(antialias=True)`` do; there a = -0.5."""
    weights = _kernel((position[:, None] - np.arange(source)) / stretch, method, a=-0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _kernel(distance: np.ndarray, method: Method, a: float) -> np.ndarray:
    """The triangle kernel, or Keys' cubic convolution kernel with parameter ``a``."""
    x = np.abs(distance)
    if method == "bilinear":
        return np.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
