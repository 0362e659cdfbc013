"""Maps of unit pseudo-probability vectors of very different shapes, on which every sampler must be exact."""

from __future__ import annotations

import numpy as np

MAP_SHAPES = ("skewed", "single", "two_level", "near_uniform", "diffuse")


def make_map(shape: str, pixels: int = 64, dim: int = 7, seed: int = 0) -> np.ndarray:
    """float32 [pixels, dim] of unit norm. The last pixels belong to the small instances."""
    rng = np.random.default_rng(seed)
    if shape == "skewed":  # 95 % of the pixels on one instance, with a little noise
        instance = np.zeros(pixels, int)
        small = max(3, 3 * pixels // 64)
        instance[-small:] = 1 + np.arange(small) % 3
        logits = 8.0 * np.eye(dim)[instance] + 0.3 * rng.standard_normal((pixels, dim))
    elif shape == "single":  # all pixels on one instance
        logits = 8.0 * np.eye(dim)[0] + 0.3 * rng.standard_normal((pixels, dim))
    elif shape == "two_level":  # two exact values
        logits = 2.0 * np.eye(dim)[(np.arange(pixels) % 3 == 2).astype(int)]
    elif shape == "near_uniform":  # a fresh model
        logits = 1e-3 * rng.standard_normal((pixels, dim))
    else:
        logits = 3.0 * rng.standard_normal((pixels, dim))
    g = np.exp(logits)
    g /= g.sum(-1, keepdims=True)
    return (g / np.linalg.norm(g, axis=-1, keepdims=True)).astype(np.float32)
