"""Deformable attention against PyTorch's: values and gradients, on padded maps of several sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import (
    MMGroundingDinoMultiscaleDeformableAttention,
)

from cast_jax.core import target
from cast_jax.models.teacher import chunks
from cast_jax.models.teacher.deformable_attention import DeformableAttention, levels_of, sample

SIZES = ((5, 7), (3, 4), (2, 2))
POSITIONS = sum(rows * columns for rows, columns in SIZES)
FEATURES, HEADS, POINTS, QUERIES = 16, 2, 3, 11
NAMES = {"offsets": "sampling_offsets", "weights": "attention_weights", "value": "value_proj", "out": "output_proj"}


def masks() -> list[np.ndarray]:
    """Padding at the bottom of the first image and at the right of the second."""
    made = [np.ones((2, *size), bool) for size in SIZES]
    for mask in made:
        mask[0, mask.shape[1] // 2 + 1 :] = False
        mask[1, :, mask.shape[2] // 2 + 1 :] = False
    return made


def theirs() -> torch.nn.Module:
    config = transformers.MMGroundingDinoConfig(d_model=FEATURES, num_feature_levels=len(SIZES))
    module = MMGroundingDinoMultiscaleDeformableAttention(config, HEADS, POINTS)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def parameters(module: torch.nn.Module, gradient: bool = False) -> dict:
    """Theirs, or their gradients, in our layout."""
    value = lambda parameter: (parameter.grad if gradient else parameter.detach()).numpy()
    return {
        ours: {"kernel": value(getattr(module, name).weight).T, "bias": value(getattr(module, name).bias)}
        for ours, name in NAMES.items()
    }


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "queries": random.normal(size=(2, QUERIES, FEATURES)).astype(np.float32),
        "maps": random.normal(size=(2, POSITIONS, FEATURES)).astype(np.float32),
        "points": random.uniform(-0.1, 1.1, size=(2, QUERIES, len(SIZES), 2)).astype(np.float32),
        "boxes": random.uniform(0.1, 0.9, size=(2, QUERIES, len(SIZES), 4)).astype(np.float32),
    }


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("references", "chunk"), [("points", 4), ("boxes", QUERIES)])
def test_values_and_gradients(given, references, chunk, backend, monkeypatch):
    """All queries at once, or in chunks of which the last is padded; reads of padding and beyond the maps are zero."""
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    monkeypatch.setattr(target, "backend", lambda: backend)
    module, levels = theirs(), levels_of([jnp.asarray(mask) for mask in masks()])
    ours = DeformableAttention(FEATURES, HEADS, len(SIZES), POINTS, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(ours)
    nnx.replace_by_pure_dict(state, parameters(module))
    arguments = {name: torch.tensor(given[name], requires_grad=True) for name in ("queries", "maps", references)}
    shapes = torch.tensor(SIZES)
    expected, _ = module(
        hidden_states=arguments["queries"],
        attention_mask=torch.from_numpy(np.concatenate([mask.reshape(2, -1) for mask in masks()], axis=1)),
        encoder_hidden_states=arguments["maps"],
        reference_points=arguments[references],
        spatial_shapes=shapes,
        spatial_shapes_list=list(SIZES),
        level_start_index=torch.cat([torch.zeros(1, dtype=torch.long), shapes.prod(1).cumsum(0)[:-1]]),
    )
    towards = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(towards)).sum().backward()

    def loss(params, queries, around, maps):
        result = nnx.merge(graph, params)(queries, around, maps, levels)
        return jnp.sum(result * towards), result

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, result = run(state, given["queries"], given[references], given["maps"])
    np.testing.assert_allclose(result, expected.detach(), atol=1e-5)
    for ours, name in zip(gradients[1:], ("queries", references, "maps"), strict=True):
        np.testing.assert_allclose(ours, arguments[name].grad, atol=1e-4, rtol=1e-4)
    found = nnx.to_pure_dict(gradients[0])
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    jax.tree.map(same, found, parameters(module, gradient=True))


def test_one_read_by_hand():
    """A quarter pixel right of and below the centre of (row 1, column 2), and half a pixel beyond row 1's first."""
    table = np.arange(12.0, dtype=np.float32).reshape(1, 12, 1, 1)  # 3 rows of 4
    locations = np.array([[(2.75 / 4, 1.75 / 3), (0.0, 1.5 / 3)]], np.float32).reshape(1, 2, 1, 1, 1, 2)
    read = sample(jnp.asarray(table), ((3, 4),), jnp.asarray(locations), jnp.ones((1, 2, 1, 1, 1)))
    np.testing.assert_allclose(read.ravel(), [0.75 * (0.75 * 6 + 0.25 * 7) + 0.25 * (0.75 * 10 + 0.25 * 11), 0.5 * 4])


def test_bfloat16_is_summed_in_float32():
    """Of 256 values of one, which a sum in bfloat16 would stop counting."""
    table = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
    summed = sample(table, ((2, 2),), jnp.full((1, 1, 1, 1, 257, 2), 0.5), jnp.ones((1, 1, 1, 1, 257)))
    assert summed.dtype == jnp.float32
    np.testing.assert_array_equal(summed, 257.0)


def test_untrained_heads_look_in_all_directions():
    ours = DeformableAttention(8, 4, 1, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    looks = np.asarray(ours.offsets.bias[...]).reshape(4, 2, 2)
    np.testing.assert_allclose(looks[:, 0], [(1, 0), (0, 1), (-1, 0), (0, -1)], atol=1e-6)
    np.testing.assert_allclose(looks[:, 1], 2 * looks[:, 0], atol=1e-6)


def test_levels_by_hand():
    """Where the valid part ends is one; padding lies beyond."""
    mask = jnp.array([[[True, True, False, False], [True, True, False, False]]])
    levels = levels_of([mask, jnp.ones((1, 1, 1), bool)])
    assert levels.sizes == ((2, 4), (1, 1))
    np.testing.assert_array_equal(levels.counts, [[[2, 2], [1, 1]]])
    np.testing.assert_array_equal(levels.ratios, [[[0.5, 1], [1, 1]]])
    centres = levels.centres()[0, jnp.array([0, 3, 5, 8])]
    np.testing.assert_allclose(centres, [(0.25, 0.25), (1.75, 0.25), (0.75, 0.75), (0.5, 0.5)])
