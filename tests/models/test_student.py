"""The student's output for images of any size, and the projection head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, drawn

from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter
from cast_jax.models.student import ProjectionHead


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (40, 16)])
def test_masks_and_features_at_four_times_the_patch_grid(size):
    model = build_segmenter(TINY, "abc", size)
    prediction = jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
    rows, columns = size[0] // 2, size[1] // 2  # patches of 8 pixels, times 4
    queries = max(round(rows / 6), 1) * max(round(columns / 6), 1)
    assert prediction.mask_logits.shape == (2, queries, rows, columns)
    assert prediction.class_logits.shape == (2, queries, 3 + 1)
    assert prediction.pixel_features.shape == (2, rows, columns, 8)
    assert [leaf.shape for leaf in prediction.layers] == [
        (2, 2, queries, 8 + 4),
        (2, rows, columns, 8 + 4),
        (2, 2, queries, 3 + 1),
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(prediction)} == {jnp.dtype("float32")}


def test_half_precision_computes_and_float32_leaves():
    model = build_segmenter(TINY, "abc", (32, 48), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract())} == {jnp.dtype("float32")}
    prediction = jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(prediction)} == {jnp.dtype("float32")}


def test_embeddings_have_unit_length():
    head = Functional(lambda rngs: ProjectionHead(5, 4, rngs=rngs))
    params = drawn(head.abstract())
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 5)), jnp.float32)
    apply = jax.jit(head.apply)
    embedding = apply(params, features)
    np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=-1), 1.0, rtol=1e-5)
    hidden = np.maximum(np.asarray(features) @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    raw = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(embedding, raw / np.linalg.norm(raw, axis=-1, keepdims=True), rtol=1e-4, atol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, params)
    gradient = jax.jit(jax.grad(lambda features: jnp.sum(head.apply(zero, features))))(features)
    assert np.isfinite(gradient).all()  # a feature without direction has no slope rather than NaN
