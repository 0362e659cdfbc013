"""The same loss, gradients and draws on one device and on eight, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EIGHT_DEVICES = """
import sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import PartitionSpec as P
from cast_jax.contrastive import contrast
from cast_jax.contrastive.bank import Bank
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.contrast import Anchors, CandidatePixels, draw_negatives
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.contrastive.peers import ALONE, Peers
from cast_jax.core.sharding import AXES, make_mesh
from maps import make_map

BATCH, PIXELS = 16, 40
SPLIT = P(AXES)
rng = np.random.default_rng(0)
z = rng.standard_normal((2, BATCH, PIXELS, 6)).astype(np.float32)
inputs = {
    "g": np.stack([make_map("diffuse", PIXELS, seed=image) for image in range(BATCH)]),
    "valid": rng.random((BATCH, PIXELS)) < 0.8,
    "instance_ids": rng.integers(-1, 3, (BATCH, PIXELS)).astype(np.int32),
}
past = np.stack([make_map("diffuse", PIXELS, seed=9)])[0]
bank = Bank(jnp.asarray(z[0, 0]), jnp.asarray(past), jnp.arange(PIXELS) < 30, jnp.zeros((), jnp.int32))


def graded(peers, options, key, z_weak, z_strong, inputs):
    config = ContrastiveConfig(num_negatives=16, **options)

    def mean(z_weak, z_strong):
        loss, count, metrics = contrastive_loss(
            key, config, z_weak=z_weak, z_strong=z_strong, peers=peers,
            bank=bank if config.scope == "bank" else None, **inputs
        )
        return loss / count, {name: total for name, (total, _) in metrics.items()}

    if peers is ALONE:
        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(z_weak, z_strong)

    def apart(key, z_weak, z_strong, inputs):
        def local(key, z_weak, z_strong, inputs):
            return contrastive_loss(
                key, config, z_weak=z_weak, z_strong=z_strong, peers=peers,
                bank=bank if config.scope == "bank" else None, **inputs
            )
        return jax.shard_map(
            local, in_specs=(P(), SPLIT, SPLIT, SPLIT), out_specs=P(), check_vma=False
        )(key, z_weak, z_strong, inputs)

    def mean_apart(z_weak, z_strong):
        loss, count, metrics = apart(key, z_weak, z_strong, inputs)
        return loss / count, {name: total for name, (total, _) in metrics.items()}

    return jax.value_and_grad(mean_apart, argnums=(0, 1), has_aux=True)(z_weak, z_strong)


mesh, apart = make_mesh({"data": 4, "fsdp": 2}), contrast.groups_together
for options in (
    {"group_size": 11, "symmetric": True},
    {"group_size": 7, "max_pools": 5, "num_anchors": 13, "slots": 32},  # most rows are short
    {"scope": "image", "group_size": 16},
    {"scope": "bank", "group_size": 16},
    {"sampler": "categorical", "num_anchors": 5},
):
    one = jax.jit(partial(graded, ALONE, options))(jax.random.key(3), *z, inputs)
    with jax.set_mesh(mesh):
        eight = jax.jit(partial(graded, Peers(AXES), options))(jax.random.key(3), *z, inputs)
        contrast.groups_together = lambda *_: 3  # as on accelerators
        together = jax.jit(partial(graded, Peers(AXES), options))(jax.random.key(3), *z, inputs)
        contrast.groups_together = apart
    for a, b in zip(jax.tree.leaves((one, one)), jax.tree.leaves((eight, together)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7, err_msg=str(options))
    assert np.isfinite(one[0][0]) and one[0][0] > 0
    print(options, float(one[0][0]))

# The exact distribution, of draws made by eight devices together.
g_hat = make_map("skewed", BATCH * 4).reshape(BATCH, 4, -1)
position = np.arange(BATCH * 4).reshape(BATCH, 4)
yes = np.ones((BATCH, 4), bool)


def draw(keys, g_hat, position, yes, image):
    pixels = CandidatePixels(g_hat, yes, position, position)
    anchors = Anchors(g_hat[:, :1], position[:, :1], yes[:, :1], position[:, :1], yes[:, :1], image)
    config = ContrastiveConfig(num_negatives=64)
    return jax.lax.map(lambda key: draw_negatives(key, config, anchors, pixels, Peers(AXES))[0], keys)


with jax.set_mesh(mesh):
    together = jax.shard_map(
        draw, in_specs=(P(), *[SPLIT] * 4), out_specs=P(None, AXES), check_vma=False
    )
    drawn = jax.jit(together)(jax.random.split(jax.random.key(1), 64), g_hat, position, yes, np.arange(BATCH))
np.save(sys.argv[1], np.asarray(drawn)[:, :, 0])
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """int [keys, anchors, K]: one anchor in each of sixteen images, two on each device."""
    file = tmp_path_factory.mktemp("eight") / "drawn.npy"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]), "NPROC": "32"}
    command = [sys.executable, "-c", EIGHT_DEVICES, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return np.load(file)


def test_eight_devices_together_follow_the_stated_distribution(drawn):
    """That their loss and gradients equal one device's is asserted in the process itself."""
    from maps import make_map
    from test_samplers import SIGNIFICANCE, p_values

    g_hat = make_map("skewed", 64).astype(np.float64)
    anchors = np.arange(0, 64, 4)
    weights = 0.5 * np.sum((g_hat[anchors][:, None] - g_hat[None]) ** 2, axis=-1)
    weights[np.arange(16), anchors] = 0
    found = p_values(drawn, weights / weights.sum(-1, keepdims=True))
    assert found.min() > SIGNIFICANCE / 16
