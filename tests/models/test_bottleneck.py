"""The bottleneck ResNet by itself; parity with PyTorch is in tests/convert/test_resnet.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cast_jax.core.errors import UserError
from cast_jax.models.bottleneck import BottleneckResNet, BottleneckResNetConfig
from cast_jax.models.functional import Functional

CONFIG = BottleneckResNetConfig(width=4, depths=(1, 2, 1, 1))


def test_maps_and_their_gradients_in_bfloat16():
    model = Functional(lambda rngs: BottleneckResNet(CONFIG, dtype=jnp.bfloat16, rngs=rngs))
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 64, 96, 3))

    @jax.jit
    def loss(params):
        maps = model.apply(params, images)
        return sum(jnp.sum(level.astype(jnp.float32) ** 2) for level in maps), maps

    gradient, maps = jax.grad(loss, has_aux=True)(params)
    assert [level.shape for level in maps] == [(2, 16, 24, 16), (2, 8, 12, 32), (2, 4, 6, 64), (2, 2, 3, 128)]
    assert {level.dtype for level in maps} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert all(jnp.any(leaf != 0) and jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_maps_come_in_the_order_asked_for():
    model = nnx.eval_shape(lambda: BottleneckResNet(CONFIG, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    last, first = nnx.eval_shape(lambda model, images: model(images, layers=(3, 0)), model, images)
    assert (last.shape[-1], first.shape[-1]) == (128, 16)


def test_what_it_refuses():
    with pytest.raises(UserError, match="depths must have four values"):
        BottleneckResNetConfig(depths=(1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="width is 0"):
        BottleneckResNetConfig(width=0)
