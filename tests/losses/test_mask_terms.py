"""Masks of matched queries in blocks of slots, against all of them formed at once and differentiated by JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.losses import mask_terms
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.mask_terms import MaskTargets, matched_mask_terms, number_of_blocks

LAYERS, SLOTS, SIDE, CHANNELS = 2, 5, 8, 4
VALID = np.array([[True, False, False, False, True], [False] * 5, [True] * 5, [False, False, True, False, False]])
CONFIGS = [CriterionConfig(num_points=None), CriterionConfig(num_points=12)]
Terms = tuple[jax.Array, jax.Array]


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch):
    """Three blocks of an image: the last has one slot of padding."""
    monkeypatch.setattr(mask_terms, "_SLOTS", 2)


def given(config, dtype=jnp.float32) -> tuple:
    """Keys, embeddings, features and targets of four images: one without an instance, two with holes between some."""
    keys = jax.random.split(jax.random.key(0), 5)
    images = len(VALID)
    masks = jax.random.bernoulli(keys[0], 0.3, (images, SLOTS, 2 * SIDE, 2 * SIDE))
    ignore = jax.random.bernoulli(keys[1], 0.1, (images, 2 * SIDE, 2 * SIDE))
    soft = lambda maps: maps.reshape(*maps.shape[:-2], SIDE, 2, SIDE, 2).astype(jnp.float32).mean((-3, -1))
    return (
        jax.random.split(keys[2], (images, LAYERS, number_of_blocks(SLOTS))),
        jax.random.normal(keys[3], (images, LAYERS, SLOTS, CHANNELS), dtype),
        jax.random.normal(keys[4], (images, SIDE, SIDE, CHANNELS), dtype),
        MaskTargets(masks, ignore) if config.num_points else MaskTargets(soft(masks), soft(ignore)),
    )


def at_once(config, keys, embeddings, features, targets: MaskTargets) -> Terms:
    """Block by block in Python, padding and all."""
    pad = lambda array: jnp.pad(array, [(0, 0), (0, 1), *[(0, 0)] * (array.ndim - 2)])
    logits = jnp.einsum("blid,bhwd->blihw", embeddings, features, preferred_element_type=jnp.float32)
    found = []
    for image, layer, block in np.ndindex(keys.shape):
        part = slice(2 * block, 2 * block + 2)
        of_block = MaskTargets(
            pad(targets.masks)[image, part],
            targets.ignore[image],
        )
        masks = pad(logits[:, layer])[image, part]
        found.append(mask_terms.mask_terms(keys[image, layer, block], masks, of_block, config))
    return jax.tree.map(lambda *blocks: jnp.stack(blocks).reshape(*keys.shape[:2], -1)[..., :SLOTS], *found)


def graded(terms, keys, embeddings, features, targets: MaskTargets):
    """Terms where there are instances, and gradients of a sum of them that weighs each differently."""
    weights = jnp.arange(1.0, 1.0 + VALID.size * LAYERS).reshape(len(VALID), LAYERS, SLOTS)

    def total(embeddings, features):
        found = [jnp.where(VALID[:, None], term, 0.0) for term in terms(keys, embeddings, features, targets)]
        return jnp.sum(weights * (found[0] + 2.0 * found[1])), found

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(embeddings, features)


def ours(config, keys, embeddings, features, targets: MaskTargets) -> Terms:
    return matched_mask_terms(keys, embeddings, features, jnp.asarray(VALID), targets, config)


def both(config, dtype=jnp.float32) -> tuple:
    """What :func:`graded` finds of blocks, and of all at once."""
    run = lambda terms: jax.jit(functools.partial(graded, functools.partial(terms, config)))(*given(config, dtype))
    return run(ours), run(at_once)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("config", CONFIGS, ids=["pixels", "points"])
def test_blocks_are_what_all_at_once_are(config, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-5), *both(config))


def test_gradients_of_bfloat16_features_are_those_of_all_at_once():
    (_, found), (_, expected) = both(CONFIGS[0], jnp.bfloat16)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype == jnp.bfloat16
        one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
        assert np.abs(one - two).max() < 2.0**-7 * np.abs(two).max()


def test_gradients_of_bfloat16_features_add_up_in_float32(monkeypatch):
    """Of 600 equal instances: a sum in bfloat16 no longer grows from 256 of them on."""
    monkeypatch.setattr(mask_terms, "_SLOTS", 1)

    def gradient(slots: int) -> jax.Array:
        ones = lambda *shape, dtype=jnp.float32: jnp.ones(shape, dtype)
        targets = MaskTargets(ones(1, slots, 4, 4), 0 * ones(1, 4, 4))
        keys = jax.random.split(jax.random.key(0), (1, 1, slots))
        embeddings, valid = ones(1, 1, slots, 2, dtype=jnp.bfloat16), ones(1, slots) > 0
        total = lambda features: jnp.sum(matched_mask_terms(keys, embeddings, features, valid, targets, CONFIGS[0])[0])
        return jax.jit(jax.grad(total))(ones(1, 4, 4, 2, dtype=jnp.bfloat16)).astype(jnp.float32)

    np.testing.assert_allclose(gradient(600), 600 * gradient(1), rtol=2.0**-7)


def test_images_without_instances_are_not_looked_at():
    keys, embeddings, features, targets = given(CONFIGS[1])
    run = jax.jit(functools.partial(graded, functools.partial(ours, CONFIGS[1])))
    (total, _), gradients = run(keys, embeddings, features.at[1].set(jnp.nan), targets)
    assert np.isfinite(total)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1][1].any()


def test_what_diverges_where_there_is_an_instance_is_seen():
    keys, embeddings, features, targets = given(CONFIGS[1])
    bce, dice = jax.jit(functools.partial(ours, CONFIGS[1]))(keys, embeddings, features.at[3].set(jnp.nan), targets)
    assert np.isnan(bce[3, :, 2]).all()
    assert np.isnan(dice[3, :, 2]).all()
    assert np.isfinite(bce[2]).all()
