"""Resizes equal PyTorch's, to the last few bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cast_jax.core.decoded import mask_logits
from cast_jax.core.resize import apply_matrices, interpolation_matrix, resize

MAPS = np.random.default_rng(0).normal(size=(2, 7, 5, 3)).astype(np.float32)
SIZES = [(7, 5), (14, 10), (9, 13), (3, 4), (1, 2)]


def torch_interpolate(maps: np.ndarray, **options) -> np.ndarray:
    result = torch.nn.functional.interpolate(torch.from_numpy(maps).permute(0, 3, 1, 2), **options)
    return result.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "bilinear"},
        {"method": "bilinear", "align_corners": True},
        {"method": "bilinear", "antialias": True},
        {"method": "bicubic"},
        {"method": "bicubic", "align_corners": True},
        {"method": "bicubic", "antialias": True},
    ],
)
def test_resize_equals_torch(size, options):
    theirs = {"align_corners": False} | options
    expected = torch_interpolate(MAPS, size=size, mode=theirs.pop("method"), **theirs)
    np.testing.assert_allclose(resize(MAPS, size, **options), expected, atol=3e-6)


@pytest.mark.parametrize(("rows", "columns"), [(9, 4), (5, 16), (37, 38)])
def test_scale_factor_maps_positions_as_torch_does(rows, columns):
    side, offset = 37, 0.1
    maps = np.random.default_rng(1).normal(size=(1, side, side, 2)).astype(np.float32)
    factors = tuple((n + offset) / side for n in (rows, columns))
    expected = torch_interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
    matrices = [
        interpolation_matrix(side, n, method="bicubic", scale=f) for n, f in zip((rows, columns), factors, strict=True)
    ]
    np.testing.assert_allclose(apply_matrices(maps, *matrices), expected, atol=3e-5)
    by_size = [interpolation_matrix(side, n, method="bicubic") for n in (rows, columns)]
    assert np.abs(apply_matrices(maps, *by_size) - expected).max() > 1e-2  # the offset matters


def test_bilinear_matrix_by_hand():
    np.testing.assert_allclose(interpolation_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], atol=1e-7)
    np.testing.assert_allclose(
        interpolation_matrix(2, 4, align_corners=True), [[1, 0], [2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 1]], atol=1e-7
    )


@pytest.mark.parametrize("size", [(12, 11), (4, 5)])
@pytest.mark.parametrize(
    "options", [{"method": "bilinear", "align_corners": True}, {"method": "bilinear"}, {"method": "bicubic"}]
)
def test_gradient_equals_torch(size, options):
    theirs = torch.from_numpy(MAPS).permute(0, 3, 1, 2).requires_grad_()
    changed = {"align_corners": False} | options
    output = torch.nn.functional.interpolate(theirs, size=size, mode=changed.pop("method"), **changed)
    (output**3).sum().backward()
    ours = jax.grad(lambda maps: (resize(maps, size, **options) ** 3).sum())(MAPS)
    np.testing.assert_allclose(ours, theirs.grad.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_keeps_the_dtype_and_refuses_what_torch_cannot_do():
    assert resize(jax.numpy.asarray(MAPS, "bfloat16"), (9, 9)).dtype == "bfloat16"
    with pytest.raises(ValueError, match="antialias and align_corners"):
        interpolation_matrix(4, 8, antialias=True, align_corners=True)


def test_accelerators_are_told_to_keep_every_bit():
    """They lose some of float32 factors elsewhere, which a CPU does not show."""
    maps, queries = jnp.ones((1, 6, 8, 4)), jnp.ones((1, 3, 4))
    for program in (
        jax.make_jaxpr(lambda maps: resize(maps, (3, 4), antialias=True))(maps),
        jax.make_jaxpr(lambda queries, maps: mask_logits("bqd,bhwd->bqhw", queries, maps))(queries, maps),
    ):
        products = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
        assert products
        assert all(set(product.params["precision"]) == {jax.lax.Precision.HIGHEST} for product in products)
