"""Hiera by itself; parity with PyTorch is in tests/convert/test_hiera.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cast_jax.core.errors import UserError
from cast_jax.models.functional import Functional
from cast_jax.models.hiera import Hiera, HieraConfig, largest
from cast_jax.models.layers import REMAT

CONFIG = HieraConfig(
    embed_dim=8, depths=(1, 1, 3, 1), window_sizes=(4, 2, 4, 2), global_blocks=(4,), position_size=(3, 2)
)
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


def network(dtype=jnp.float32, **changes) -> Functional:
    config = dataclasses.replace(CONFIG, **changes)
    return Functional(lambda rngs: Hiera(config, dtype=dtype, rngs=rngs))


class Intermediates(nnx.Module):
    """Returns every block's result."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = Hiera(CONFIG, rngs=rngs)

    def __call__(self, images, *, rngs: nnx.Rngs | None = None):
        return self.encoder.intermediates(images, rngs=rngs)


def random_params(model: Functional):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, leaf.dtype), model.abstract())


def gradient_and_maps(model: Functional, params, layers: tuple[int, ...] = (0, 1, 2, 3)):
    def loss(params):
        maps = model.apply(params, IMAGES, layers=layers)
        return sum(jnp.sum(level.astype(jnp.float32) ** 3) for level in maps), maps

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_maps_and_their_gradients_in_bfloat16():
    model = network(jnp.bfloat16)
    params = random_params(model)
    gradient, maps = gradient_and_maps(model, params)
    assert [level.shape for level in maps] == [(2, 16, 24, 8), (2, 8, 12, 16), (2, 4, 6, 32), (2, 2, 3, 64)]
    assert {level.dtype for level in maps} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert all(np.any(leaf) and np.all(np.isfinite(leaf)) for leaf in map(np.asarray, jax.tree.leaves(gradient)))


def test_rematerialisation_changes_nothing():
    models = [network(remat=remat, depths=(1, 1, 1, 1), global_blocks=()) for remat in REMAT]
    plain, *others = (gradient_and_maps(model, random_params(model), layers=(1,)) for model in models)
    for again in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, again)


def test_maps_are_normalised_for_the_student_only():
    params = random_params(network())
    models = [network(normalised_maps=wanted) for wanted in (True, False)]
    normalised, sums = (jax.jit(model.apply, static_argnames="layers")(params, IMAGES, layers=(1,)) for model in models)
    np.testing.assert_allclose(normalised[0].mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalised[0].std(axis=-1), 1.0, atol=1e-3)
    expected = (sums[0] - sums[0].mean(-1, keepdims=True)) / sums[0].std(-1, keepdims=True)
    np.testing.assert_allclose(normalised[0], expected, atol=1e-3)
    assert np.abs(sums[0].mean(axis=-1)).max() > 0.1


def test_only_global_blocks_see_the_whole_map():
    """A pixel's change stays in its windows of 16 x 16 pixels until the fifth block, which sees all."""
    model = Functional(lambda rngs: Intermediates(rngs))
    changed = IMAGES.copy()
    changed[:, 2, 2] += 10.0
    params = random_params(model)
    first, second = (jax.jit(model.apply)(params, images) for images in (IMAGES, changed))
    reached = {name: np.any(first[name] != second[name], axis=(0, 3)) for name in first}
    assert reached["blocks/0"][:4, :4].all()
    assert reached["blocks/0"].sum() == 16
    assert not reached["blocks/3"].all()
    assert reached["blocks/4"].all()


def test_drop_path_needs_a_key():
    model = network(drop_path=0.5)
    params = random_params(model)
    run = jax.jit(lambda params, key: model.apply(params, IMAGES, layers=(3,), key=key)[0])
    still, dropped, again, other = (run(params, key) for key in (None, *map(jax.random.key, (1, 1, 2))))
    np.testing.assert_array_equal(dropped, again)
    assert jnp.any(still != dropped)
    assert jnp.any(dropped != other)


def test_largest_by_hand():
    maps = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    np.testing.assert_array_equal(largest(maps)[0, :, :, 0], [[5, 7]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2, 2, 6)}, "depths must have four values"),
        ({"num_heads": 3}, "num_heads 3 must divide embed_dim 8"),
        ({"window_sizes": (5, 4, 14, 7)}, "the first must divide 8"),
        ({"window_sizes": (8, 4, 7, 7)}, "must be even, to be halved"),
        ({"global_blocks": (2, 4)}, r"must not have \[2\]: they halve the map"),
        ({"global_blocks": (6,)}, "global_blocks is"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_what_it_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_image_sides_are_multiples_of_32():
    model = network()
    with pytest.raises(ValueError, match="must be multiples of the patch size 32, got 48x64"):
        model.apply(model.abstract(), np.zeros((1, 48, 64, 3), np.float32))
