"""Positions of a map on devices that split parameters: what they are made of is exchanged, not the map."""

from __future__ import annotations

import os
import subprocess
import sys

EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from cast_jax.core import sharding
from cast_jax.core.compiled import collective_bytes
from cast_jax.core.geometry import pixel_centres
from cast_jax.core.rules import named_leaves
from cast_jax.models.dinov2 import DinoV2, DinoV2Config
from cast_jax.models.hiera import Hiera, HieraConfig
from cast_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig

sharding.SMALL = 1
mesh = sharding.make_mesh({"data": 1, "fsdp": 8})
dinov2 = DinoV2Config(embed_dim=16, depth=4, num_heads=2, patch_size=8, position_grid=8)
hiera = HieraConfig(embed_dim=16, num_heads=1, depths=(1, 1, 1, 1), global_blocks=(), position_size=(8, 8))
decoder = MaskDecoderConfig(hidden_dim=16, num_heads=2, num_layers=1)
rngs = nnx.Rngs(0)
for module, positions, names in (
    (DinoV2(dinov2, rngs=rngs), lambda m: m._patch_positions((16, 24)), ("position_embedding",)),
    (Hiera(hiera, rngs=rngs), lambda m: m._positions(16, 24), ("position", "window_position")),
    (
        MaskDecoder(decoder, 4, 3, dtype=jnp.float32, rngs=rngs),
        lambda m: m._encode(pixel_centres(16, 24), 16, 24),
        ("position_projection/kernel", "position_projection/bias"),
    ),
):
    graph, state = nnx.split(module)
    parameters = nnx.to_pure_dict(state)
    split = sharding.param_shardings(parameters, mesh)
    used = {name: leaf for name, leaf in named_leaves(parameters).items() if name in names}
    assert len(used) == len(names)
    assert any(named_leaves(split)[name].spec != PartitionSpec() for name in names)

    def make(parameters):
        nnx.replace_by_pure_dict(state, parameters)
        return positions(nnx.merge(graph, state))

    with jax.set_mesh(mesh):
        program = jax.jit(make, in_shardings=(split,), out_shardings=PartitionSpec()).lower(parameters).compile()
    sent = sum(collective_bytes(program).values())
    assert 0 < sent <= sum(leaf.nbytes for leaf in used.values()) < 16 * 24 * 16 * 4, (type(module), sent)
"""


def test_what_positions_are_made_of_is_gathered_not_the_map():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], check=True, env=environment)
