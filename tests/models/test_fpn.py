"""The feature pyramid against PyTorch's operations, on a pyramid and on a plain ViT's maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from cast_jax.core.errors import UserError
from cast_jax.models.fpn import SCALES, Fpn, FpnConfig

WIDTHS = (3, 5, 4, 6)


def maps(pyramid: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(int(6 * scale), int(4 * scale)) if pyramid else (6, 4) for scale in SCALES]
    return [rng.normal(size=(2, *size, width)).astype(np.float32) for size, width in zip(sizes, WIDTHS, strict=True)]


def fpn(**changes) -> Fpn:
    model = Fpn(WIDTHS, FpnConfig(features=8), rngs=nnx.Rngs(0), **changes)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    nnx.update(model, jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), nnx.state(model, nnx.Param)))
    return model


def by_torch(model: Fpn, levels: list[np.ndarray]) -> list[np.ndarray]:
    """Lateral 1x1 convolutions, bilinear resizes, sums from the top down, 3x3 convolutions."""
    weight = lambda layer: (torch.tensor(np.asarray(layer.kernel[...])), torch.tensor(np.asarray(layer.bias[...])))
    resize = lambda x, size: torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    results: list[np.ndarray] = []
    running = None
    for n in (3, 2, 1, 0):
        size = (int(6 * SCALES[n]), int(4 * SCALES[n]))
        features = torch.from_numpy(levels[n]).permute(0, 3, 1, 2)
        kernel, bias = weight(model.lateral[n])
        # In the textbook's order: the projection after the resize.
        lateral = torch.nn.functional.conv2d(resize(features, size), kernel.T[:, :, None, None], bias)
        running = lateral if running is None else lateral + resize(running, size)
        kernel, bias = weight(model.smooth[n])
        smooth = torch.nn.functional.conv2d(running, kernel.permute(3, 2, 0, 1), bias, padding=1)
        results.append(smooth.permute(0, 2, 3, 1).numpy())
    return results


@pytest.mark.parametrize("pyramid", [True, False])
def test_equals_torch(pyramid):
    model, levels = fpn(), maps(pyramid)
    with jax.default_matmul_precision("highest"):
        finest, coarser = model([jnp.asarray(level) for level in levels])
    assert finest.shape == (2, 24, 16, 8)
    for ours, theirs in zip([*coarser, finest], by_torch(model, levels), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5 * max(1, theirs.std()))


def test_bfloat16():
    finest, coarser = fpn(dtype=jnp.bfloat16)([jnp.asarray(level, jnp.bfloat16) for level in maps(True)])
    assert {level.dtype for level in (finest, *coarser)} == {jnp.dtype(jnp.bfloat16)}


def test_what_it_refuses():
    with pytest.raises(UserError, match=r"features is 0; it must lie in \[1, 65536\]"):
        FpnConfig(features=0)
    with pytest.raises(ValueError, match="fuses 4 encoder maps, got 3"):
        fpn()(maps(True)[:3])
