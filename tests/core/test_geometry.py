"""Sampling equals PyTorch's, packing is undone, and positions are (y, x) with centres at +0.5."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cast_jax.core.annotations import pack_masks
from cast_jax.core.geometry import (
    apply_affine,
    bilinear_sample,
    inside_box,
    mask_boxes,
    pixel_centres,
    sample_each,
    scale_positions,
    unpack_masks,
)


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (4, 1)])
def test_bilinear_sampling_is_grid_sample(size):
    """Values and gradients, inside, on the border and far outside."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(*size, 3)).astype(np.float32)
    positions = rng.uniform(-3, 10, (40, 2)).astype(np.float32)
    positions[:4] = [[0.5, 0.5], [0, 0], [size[0], size[1]], [size[0] - 0.5, 0.5]]
    weights = rng.normal(size=(40, 3)).astype(np.float32)

    source = torch.tensor(features, requires_grad=True)
    places = torch.tensor(positions, requires_grad=True)
    grid = (2 * places / torch.tensor(size) - 1)[:, [1, 0]]
    sampled = torch.nn.functional.grid_sample(
        source.permute(2, 0, 1)[None], grid[None, None], padding_mode="border", align_corners=False
    )[0, :, 0].T
    (sampled * torch.tensor(weights)).sum().backward()

    value = jax.jit(lambda features: bilinear_sample(features, positions))
    np.testing.assert_allclose(value(features), sampled.detach(), rtol=1e-4, atol=1e-5)
    total = lambda features, positions: jnp.sum(bilinear_sample(features, positions) * weights)
    to_features, to_positions = jax.jit(jax.grad(total, argnums=(0, 1)))(features, positions)
    assert source.grad is not None
    assert places.grad is not None
    np.testing.assert_allclose(to_features, source.grad, rtol=1e-4, atol=1e-5)
    assert np.any(to_positions[4:])
    np.testing.assert_allclose(to_positions[4:], places.grad[4:], rtol=1e-4, atol=1e-5)  # the first four lie on edges


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (4, 1), (1, 1)])
def test_each_map_is_read_at_its_own_positions(size):
    """As one map is at a time, with the gradient; flags count as numbers."""
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(3, *size)).astype(np.float32)
    y, x, weights = rng.uniform(-2, 9, (3, 3, 40)).astype(np.float32)
    alone = lambda one, y, x: bilinear_sample(one[..., None], jnp.stack([y, x], axis=-1))[:, 0]
    np.testing.assert_allclose(sample_each(maps, y, x), jax.vmap(alone)(maps, y, x), rtol=1e-6)
    np.testing.assert_array_equal(sample_each(maps > 0, y, x), sample_each((maps > 0).astype(np.float32), y, x))
    gradient = lambda read: jax.grad(lambda *given: jnp.sum(read(*given) * weights), (0, 1, 2))(maps, y, x)
    for found, expected in zip(gradient(sample_each), gradient(jax.vmap(alone)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 20])
def test_packing_is_undone(width):
    masks = np.random.default_rng(width).random((2, 3, 4, width)) < 0.5
    packed = pack_masks(masks)
    assert packed.shape == (2, 3, 4, -(-width // 8))
    np.testing.assert_array_equal(unpack_masks(jnp.asarray(packed), width), masks)


def test_the_first_pixel_is_the_lowest_bit():
    assert pack_masks(np.array([[True, True, False, False, False, False, False, False, True]])).tolist() == [[3, 1]]


def test_centres_affine_boxes_and_scales():
    assert pixel_centres(2, 3).tolist() == [[0.5, 0.5], [0.5, 1.5], [0.5, 2.5], [1.5, 0.5], [1.5, 1.5], [1.5, 2.5]]
    # y' = 2 y + 1, x' = y - x.
    matrix = jnp.array([[2.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
    assert apply_affine(matrix, jnp.array([[3.0, 5.0], [0.0, 0.0]])).tolist() == [[7.0, -2.0], [1.0, 0.0]]
    corners = jnp.array([[1.0, 2.0], [2.9, 4.9], [3.0, 3.0], [2.0, 5.0], [0.9, 3.0]])
    assert inside_box(jnp.array([1.0, 2.0, 3.0, 5.0]), corners).tolist() == [True, True, False, False, False]
    assert scale_positions(jnp.array([[1.0, 4.0]]), (2, 8), (6, 4)).tolist() == [[3.0, 2.0]]


def test_boxes_around_masks():
    masks = np.zeros((2, 2, 8, 10), bool)
    masks[0, 0, 2:5, 3:4] = masks[0, 1, 7, 9] = True
    masks[1, 0, 0, 0] = masks[1, 0, 3, 8] = True  # in two pieces
    expected = [[[0.3, 0.25, 0.4, 0.625], [0.9, 0.875, 1, 1]], [[0, 0, 0.9, 0.5], [0, 0, 0, 0]]]
    np.testing.assert_allclose(mask_boxes(jnp.asarray(masks)), expected, rtol=1e-6)
