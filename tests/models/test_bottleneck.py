"""The bottleneck ResNet by itself; parity with PyTorch is in tests/convert/test_resnet.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import drawn

from cast_jax.core.errors import UserError
from cast_jax.models.bottleneck import BottleneckResNet, BottleneckResNetConfig
from cast_jax.models.functional import Functional
from cast_jax.models.resnet import ResNet, ResNetConfig

CONFIG = BottleneckResNetConfig(width=4, depths=(1, 2, 1, 1))
RESNET = ResNetConfig(widths=(4, 4, 8, 8), depths=(1, 1, 1, 1), groups=2)


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


@pytest.mark.parametrize(("network", "config"), [(BottleneckResNet, CONFIG), (ResNet, RESNET)])
def test_rematerialisation_changes_nothing(network, config):
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))

    def gradient(remat: str):
        model = Functional(lambda rngs: network(dataclasses.replace(config, remat=remat), rngs=rngs))
        loss = lambda params: jnp.sum(model.apply(params, images, layers=(0,))[0] ** 2)
        return jax.jit(jax.value_and_grad(loss))(drawn(model.abstract()))

    plain, again = gradient("none"), gradient("blocks")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


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
    for config in (BottleneckResNetConfig, ResNetConfig):
        with pytest.raises(UserError, match="remat 'mlp' is unknown; known: none, blocks"):
            config(remat="mlp")
