"""Positions of a map on several devices: what they are made of is exchanged, and its gradient, not the map."""

from __future__ import annotations

import os
import subprocess
import sys

EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import numpy as np
from flax import nnx
from cast_jax.core import sharding
from cast_jax.core.compiled import collective_bytes
from cast_jax.core.geometry import pixel_centres
from cast_jax.core.rules import named_leaves
from cast_jax.models.dinov2 import DinoV2, DinoV2Config
from cast_jax.models.hiera import Hiera, HieraConfig
from cast_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig

sharding.SMALL = 1
dinov2 = DinoV2Config(embed_dim=16, depth=4, num_heads=2, patch_size=8, position_grid=8)
hiera = HieraConfig(embed_dim=16, num_heads=1, depths=(1, 1, 1, 1), global_blocks=(), position_size=(8, 8))
decoder = MaskDecoderConfig(hidden_dim=16, num_heads=2, num_layers=1)
embedding = lambda module, images: module.intermediates(images)["embedding"]
rngs, size = nnx.Rngs(0), (16, 24)
images = jax.random.normal(jax.random.key(0), (16, 8 * size[0], 8 * size[1], 3))
values = jax.random.normal(jax.random.key(1), (16, size[0] * size[1], 16))
for module, call, given, names in (
    (DinoV2(dinov2, rngs=rngs), DinoV2._embed, images, ("position_embedding",)),
    (Hiera(hiera, rngs=rngs), embedding, images[:, ::2, ::2], ("position", "window_position")),
    (
        MaskDecoder(decoder, 4, 3, dtype=jnp.float32, rngs=rngs),
        lambda m, x: m._located([x], [pixel_centres(*size)], *size)[0],
        values,
        ("position_projection/kernel", "position_projection/bias"),
    ),
):
    graph, state = nnx.split(module)
    parameters = nnx.to_pure_dict(state)
    used = {name: leaf for name, leaf in named_leaves(parameters).items() if name in names}
    assert len(used) == len(names)

    def loss(learned, given):
        nnx.replace_by_pure_dict(state, parameters)
        module = nnx.merge(graph, state)
        for name, value in learned.items():
            owner, _, last = name.rpartition("/")
            getattr(getattr(module, owner) if owner else module, last)[...] = value
        return jnp.sum(jnp.sin(call(module, given)))

    graded = jax.value_and_grad(loss)
    alone = jax.jit(graded)(used, given)
    for shape in ({"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8}):
        mesh = sharding.make_mesh(shape)
        split = sharding.param_shardings(used, mesh)
        with jax.set_mesh(mesh):
            placed = jax.device_put(used, split), jax.device_put(given, sharding.batch_sharding(mesh))
            program = jax.jit(graded, out_shardings=(None, split)).lower(*placed).compile()
        sent = sum(collective_bytes(program).values())
        for one, other in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
        size_of = sum(leaf.nbytes for leaf in used.values())
        assert size_of <= sent <= 2 * size_of + 256 < size[0] * size[1] * 16 * 4, (type(module), sent, size_of)
"""


def test_parameters_are_exchanged_and_not_what_they_make_of_a_map():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], check=True, env=environment)
