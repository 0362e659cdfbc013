"""The DPT neck equals Depth Anything's in Hugging Face, values and gradients, on re-randomised weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from published import copy_weights, pairs
from transformers import DepthAnythingConfig
from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingNeck

from cast_jax.models.dpt import Dpt, DptConfig

WIDTHS = (6, 8, 10, 12)


def reference() -> torch.nn.Module:
    config = DepthAnythingConfig(reassemble_hidden_size=16, neck_hidden_sizes=WIDTHS, fusion_hidden_size=8)
    neck = DepthAnythingNeck(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in neck.parameters():
            parameter.normal_(std=0.2)
    return neck


def small(dtype=jnp.float32, **changes) -> Dpt:
    """A neck with random weights, drawn by numpy: compiling the initialisers would take longer than the test."""
    config = DptConfig(features=8, out_channels=WIDTHS, **changes)
    model = nnx.eval_shape(lambda: Dpt(16, config, dtype=dtype, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.1, leaf.dtype)
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def run(model: Dpt, maps):
    """One compilation instead of one an operation."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, maps: nnx.merge(graph, state)(maps))(state, maps)


def encoder_maps(rows: int, columns: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.normal(size=(2, rows, columns, 16)).astype(np.float32) for _ in range(4)]


def as_tokens(maps: list[np.ndarray]) -> list[torch.Tensor]:
    """Hugging Face's layout: tokens after a class token that the neck throws away."""
    return [torch.from_numpy(np.pad(level.reshape(2, -1, 16), ((0, 0), (1, 0), (0, 0)))) for level in maps]


@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_equals_hugging_face(grid):
    theirs, ours = reference(), small(finest_scale=8)
    copy_weights(theirs, ours, "decoder", "neck.")
    maps = encoder_maps(*grid)
    with torch.no_grad():
        expected = [level.permute(0, 2, 3, 1).numpy() for level in theirs(as_tokens(maps), *grid)]
    finest, coarser = run(ours, maps)
    assert finest.shape == (2, 8 * grid[0], 8 * grid[1], 8)
    assert [level.shape[1] for level in coarser] == [grid[0], 2 * grid[0], 4 * grid[0]]
    for mine, other in zip([*coarser, finest], expected, strict=True):
        assert other.std() > 0.1
        np.testing.assert_allclose(mine, other, atol=5e-4)


def test_gradients_equal_hugging_face():
    theirs, ours = reference(), small(finest_scale=8)
    copy_weights(theirs, ours, "decoder", "neck.")
    maps = encoder_maps(3, 4)
    weights = np.random.default_rng(2).normal(size=(2, 24, 32, 8)).astype(np.float32) / 100
    output = theirs(as_tokens(maps), 3, 4)[-1].permute(0, 2, 3, 1)
    (output * torch.from_numpy(weights)).sum().backward()
    graph, state = nnx.split(ours)
    grads = nnx.merge(graph, jax.jit(jax.grad(lambda s: (nnx.merge(graph, s)(maps)[0] * weights).sum()))(state))
    compared = 0
    for _, mine, (other,), layout in pairs(grads, theirs, "decoder", "neck."):
        if other.grad is None:  # the idle unit of the coarsest fusion block
            np.testing.assert_array_equal(mine[...], 0)
            continue
        expected = layout([other.grad])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(mine[...] / scale, expected / scale, atol=1e-4)
        compared += 1
    assert compared == len(list(theirs.parameters())) - 4


def test_finest_scale_four_leaves_out_the_last_upsampling():
    maps = encoder_maps(2, 3)
    full, half = small(finest_scale=8), small(finest_scale=4)
    (fine, coarser), (finest, same) = run(full, maps), run(half, maps)
    assert finest.shape == (2, 8, 12, 8)
    np.testing.assert_array_equal(coarser[-1], same[-1])
    np.testing.assert_allclose(
        fine[:, [0, 0, -1, -1], [0, -1, 0, -1]], finest[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-5
    )


def test_parameter_count_of_the_small_neck():
    model = nnx.eval_shape(lambda: Dpt(384, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 2_700_768


def test_bfloat16():
    model = small(jnp.bfloat16)
    finest, coarser = run(model, [jnp.asarray(level, jnp.bfloat16) for level in encoder_maps(2, 2)])
    assert {level.dtype for level in (finest, *coarser)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(finest.astype(jnp.float32), run(small(), encoder_maps(2, 2))[0], atol=0.15)


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="finest_scale 2 is unknown; known: 4, 8"):
        DptConfig(finest_scale=2)
    with pytest.raises(ValueError, match="four widths"):
        DptConfig(out_channels=(1, 2, 3))
    with pytest.raises(ValueError, match="four encoder maps, got 3"):
        small()(encoder_maps(2, 2)[:3])
