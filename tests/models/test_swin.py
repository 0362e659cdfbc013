"""The Swin Transformer by itself; parity with PyTorch is in tests/convert/test_swin.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cast_jax.core.errors import UserError
from cast_jax.models.functional import Functional
from cast_jax.models.layers import REMAT
from cast_jax.models.swin import Swin, SwinConfig, moved_regions, offsets, swin_b, swin_l

CONFIG = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=3)
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


def network(dtype=jnp.float32, **changes) -> Functional:
    config = dataclasses.replace(CONFIG, **changes)
    return Functional(lambda rngs: Swin(config, dtype=dtype, rngs=rngs))


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
    models = [network(remat=remat, depths=(2, 1, 1, 1)) for remat in REMAT]
    plain, *others = (gradient_and_maps(model, random_params(model), layers=(0,)) for model in models)
    for again in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, again)


def test_maps_without_a_learned_norm_are_normalised():
    model = network(learned_norms=(3,))
    params = random_params(model)
    assert params["output_norms"].keys() == {"3"}
    first, *_ = jax.jit(lambda params: model.apply(params, IMAGES, layers=(0, 3)))(params)
    np.testing.assert_allclose(first.mean(axis=-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(first.std(axis=-1), 1.0, atol=1e-3)


def test_drop_path_needs_a_key():
    model = network(drop_path=0.5)
    params = random_params(model)
    run = jax.jit(lambda params, key: model.apply(params, IMAGES, layers=(3,), key=key)[0])
    still, dropped, again, other = (run(params, key) for key in (None, *map(jax.random.key, (1, 1, 2))))
    np.testing.assert_array_equal(dropped, again)
    assert jnp.any(still != dropped)
    assert jnp.any(dropped != other)


def test_deep_stages_train_in_bfloat16():
    """Two turns of a loop and a block that is left, with drop path."""
    model = network(jnp.bfloat16, depths=(5, 1, 1, 1), drop_path=0.5, remat="blocks")
    params = random_params(model)

    def loss(params):
        (level,) = model.apply(params, IMAGES, layers=(0,), key=jax.random.key(0))
        return jnp.sum(level.astype(jnp.float32) ** 3), level

    gradient, level = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert level.dtype == jnp.bfloat16
    moved = np.abs(gradient["stages"]["0"]["each"]["fc1"]["kernel"]).max(axis=(1, 2))
    assert (moved > 0).all()
    assert np.isfinite(moved).all()


def test_drop_path_grows_from_block_to_block(monkeypatch):
    """Branches stand for their rates here: each block adds its own twice."""
    monkeypatch.setattr("cast_jax.models.swin.drop_path", lambda values, rate, key: jnp.zeros_like(values) + rate)
    model = network(depths=(5, 2, 1, 1), drop_path=0.4)
    graph, state = nnx.split(nnx.merge(model.graphdef, model._to_state(random_params(model))))
    found = jax.jit(lambda state: nnx.merge(graph, state).intermediates(IMAGES))(state)
    results = [found["embedding"], *(found[f"blocks/{number}"] for number in range(9))]
    same = [number for number in range(9) if results[number].shape == results[number + 1].shape]
    assert same == [0, 1, 2, 3, 4, 6]  # the others start from a merged map
    added = [float(jnp.mean(results[number + 1] - results[number])) / 2 for number in same]
    np.testing.assert_allclose(added, 0.4 * np.array(same) / 8, atol=1e-5)


def test_regions_by_hand():
    """A map of 4 x 4 rolled by one: its last row and column came from the other side."""
    np.testing.assert_array_equal(
        moved_regions(4, 4, window=2, shift=1), [[0, 0, 0, 0], [1, 2, 1, 2], [3, 3, 6, 6], [4, 5, 7, 8]]
    )


def test_offsets_by_hand():
    """Windows of 2 x 2; row 4 of the table is for a position itself, row 0 for a key diagonally below."""
    np.testing.assert_array_equal(offsets(2), [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])


def test_sizes_by_name():
    assert (swin_b().window_size, swin_b(window_size=12).window_size, swin_l().window_size) == (7, 12, 12)
    assert swin_l(remat="elementwise").map_widths == (192, 384, 768, 1536)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2, 2, 6)}, "depths must have four values"),
        ({"num_heads": (3, 6, 12, 25)}, r"num_heads \(3, 6, 12, 25\) must divide the stages' channels"),
        ({"window_size": 0}, "window_size is 0"),
        ({"learned_norms": (1, 4)}, "learned_norms is"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_what_it_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        SwinConfig(**changes)


def test_image_sides_are_multiples_of_32():
    model = network()
    with pytest.raises(ValueError, match="must be multiples of the patch size 32, got 48x64"):
        model.apply(model.abstract(), np.zeros((1, 48, 64, 3), np.float32))
