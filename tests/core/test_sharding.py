"""Specs and messages here; the same training on one device and on eight, in a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cast_jax.core import sharding
from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves

EIGHT_DEVICES = """
import dataclasses, sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from toy_training import ToyLoader, Regression, run_toy, toy_config, digest
from cast_jax.core.checkpoint import Checkpoints
from cast_jax.core.sharding import make_mesh, batch_sharding
from cast_jax.core.rules import named_leaves
from cast_jax.core.step import TrainStep

class Wide(Regression):
    def init(self, key):
        return super().init(key) | {"wide": {"kernel": jax.numpy.ones((16, 2048))}}
    def loss_fn(self, params, frozen, batch, key):
        loss, metrics = super().loss_fn(params, frozen, batch, key)
        return loss + 1e-3 * (params["wide"]["kernel"] ** 2).sum(), metrics

folder = Path(sys.argv[1])
assert jax.device_count() == 8
split = run_toy(folder / "split", 12, mesh={"data": 2, "fsdp": 4})
restored = run_toy(folder / "split", 12, mesh={"data": 8, "fsdp": 1})
assert digest(split.params) == digest(restored.params), "restored on another mesh"
config = toy_config(3)
step = TrainStep(Wide(), optimizer=config.optimizer, steps=3, mesh=make_mesh({"data": 2, "fsdp": 4}), ema_decay=0.9)
specs = {name: leaf.sharding.spec for name, leaf in named_leaves(step.like).items()}
wide = {name: spec for name, spec in specs.items() if name.endswith("wide/kernel")}
assert len(wide) == 4, wide  # the parameter, two moments, the average
assert all(tuple(spec) == (None, "fsdp") for spec in wide.values()), wide
state = step.initial_state()
assert state.params["wide"]["kernel"].addressable_shards[0].data.shape == (16, 512)
assert step.place({"teacher": np.ones((4096, 8), np.float32)})["teacher"].addressable_shards[0].data.shape == (1024, 8)

def on(shape, devices):
    mesh = make_mesh(shape, jax.devices()[:devices])
    return TrainStep(Wide(), optimizer=config.optimizer, steps=3, mesh=mesh, ema_decay=0.9).like

# What lies split over four devices, then whole on one, then split over two, and on eight again is the same.
state = dataclasses.replace(state, opt_state=jax.tree.map(lambda leaf: leaf + 3, state.opt_state))
for number, (shape, devices) in enumerate([({"data": 1}, 1), ({"data": 1, "fsdp": 2}, 2), ({"data": 8}, 8)]):
    like = on(shape, devices)
    with Checkpoints(folder / f"moved-{number}") as checkpoints:
        checkpoints.save(state, None, {})
        moved = checkpoints.restore(like).state
    assert all(leaf.sharding == wanted.sharding for leaf, wanted in zip(*map(jax.tree.leaves, (moved, like))))
    assert len(moved.params["wide"]["kernel"].sharding.device_set) == devices
    assert digest(moved) == digest(state), shape
    state = moved
np.savez(folder / "split.npz", **named_leaves(split.params))
"""


def mesh_of(data: int, fsdp: int):
    """An abstract mesh: specs can be resolved for device counts that are not here."""
    return jax.sharding.AbstractMesh((data, fsdp), sharding.AXES)


def test_one_axis_takes_the_remaining_devices():
    devices = jax.devices()[:1] * 8

    def sizes(shape):
        return dict(sharding.make_mesh(shape, devices).shape)

    assert sizes(None) == {"data": 8, "fsdp": 1}
    assert sizes({"fsdp": 4}) == {"data": 2, "fsdp": 4}
    assert sizes({"data": 1, "fsdp": -1}) == {"data": 1, "fsdp": 8}


@pytest.mark.parametrize("shape", [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"data": 2, "fsdp": 2}, {"data": 0}])
def test_a_mesh_that_does_not_fit_raises(shape):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(shape, jax.devices()[:1] * 8)


def test_an_unknown_axis_raises():
    with pytest.raises(UserError, match=r"unknown axes \['model'\]; known: data, fsdp"):
        sharding.make_mesh({"model": 2})


def specs(params, rules, fsdp=4):
    found = sharding.param_shardings(params, mesh_of(2, fsdp), rules)
    return {name: tuple(leaf.spec) for name, leaf in named_leaves(found).items()}


def test_automatic_specs_split_the_largest_dimension_that_can_be():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    params = {"a": shape(256, 1022), "b": shape(128, 512), "small": shape(64, 64), "odd": shape(1023, 1023)}
    assert specs(params, sharding.RULES) == {"a": ("fsdp",), "b": (None, "fsdp"), "small": (), "odd": ()}
    assert specs(params, sharding.RULES, fsdp=1) == dict.fromkeys(params, ())


def test_a_stack_is_split_within_its_layers():
    shapes = {"large": (128, 512), "tall": (4096, 6), "small": (128, 64), "odd": (1023, 1023)}
    stack = {name: jax.ShapeDtypeStruct((8, *shape), jnp.float32) for name, shape in shapes.items()}
    assert specs({"blocks": {"each": stack}}, sharding.RULES) == {
        "blocks/each/large": (None, None, "fsdp"),
        "blocks/each/tall": (None, "fsdp"),
        "blocks/each/small": (),
        "blocks/each/odd": (),
    }
    rules = (("blocks/./large", ("fsdp",)), (".*", ()))
    assert specs({"blocks": {"each": stack}}, rules)["blocks/each/large"] == (None, "fsdp")
    with pytest.raises(UserError, match="the layers of blocks/each/large are one array and must be split alike"):
        specs({"blocks": {"each": stack}}, (("blocks/0/large", ("fsdp",)), (".*", ())))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("a", ("fsdp",)),), "no rule matches b"),
        ((("a", ("fsdp", None, None)), (".*", ())), r"a has shape \(6, 4\).*more dimensions"),
        ((("a", ("fsdp",)), (".*", ())), r"4 devices do not divide dimension 6 of \(6, 4\)"),
        ((("a", ("tensor",)), (".*", ())), r"unknown axes \['tensor'\]"),
        ((("a", "split"), (".*", ())), "'split' for a; write a tuple"),
        ((("c", ()), (".*", ())), "rule 'c' matches no parameter"),
    ],
)
def test_faulty_rules_raise(rules, message):
    params = {"a": jnp.zeros((6, 4)), "b": jnp.zeros(3)}
    with pytest.raises(UserError, match=message):
        specs(params, rules)


def test_explicit_rules_and_what_mirrors_them():
    params = {"a": {"kernel": jnp.zeros((8, 4))}, "kernel": jnp.zeros((8, 4))}
    mesh = mesh_of(2, 4)
    shardings = sharding.param_shardings(params, mesh, (("a/kernel", (("data", "fsdp"), None)), (".*", ())))
    tree = {"count": jnp.zeros(()), "mu": {"a/kernel": jnp.zeros((8, 4)), "kernel": jnp.zeros((8, 4))}}
    found = sharding.like_params(tree, params, shardings, mesh)
    assert found["mu"]["a/kernel"].spec == PartitionSpec(("data", "fsdp"), None)
    assert found["mu"]["kernel"].spec == found["count"].spec == PartitionSpec()


@pytest.mark.parametrize("sizes", [(2, 4, 2, 4), (1, 1, 1, 1), (3,), (2, 2, 1)])
def test_some_of_the_joined_batches_are_these_joined(sizes):
    """Those that lie side by side, those that do not, and those whose turns are others than all batches'."""
    batches = [10 * number + np.arange(size) for number, size in enumerate(sizes)]
    joined = sharding.join_batches(batches)
    for own, part in zip(batches, sharding.split_batches(joined, sizes), strict=True):
        np.testing.assert_array_equal(part, own)
    numbers = range(len(sizes))
    for which in (chosen for count in range(1, len(sizes) + 1) for chosen in itertools.combinations(numbers, count)):
        taken = sharding.take_batches(joined, sizes, which)
        np.testing.assert_array_equal(taken, sharding.join_batches([batches[number] for number in which]))
    assert sharding.take_batches(joined, sizes, list(numbers)) is joined


def test_a_batch_that_cannot_be_split_names_the_sizes_that_can():
    with pytest.raises(UserError, match=r"batch of 10 cannot be split over 8 devices; .* 8 or 16"):
        sharding.check_batch_size(10, 8)
    with pytest.raises(UserError, match=r"that can: 8\. Or hide"):
        sharding.check_batch_size(3, 8)
    sharding.check_batch_size(16, 8)


def test_batches_on_the_mesh_pass_through_and_parameters_are_copied():
    mesh = sharding.make_mesh({"data": -1}, jax.devices()[:1])
    batch = sharding.shard_batch({"x": np.arange(4.0)}, mesh)
    assert sharding.shard_batch(batch, mesh)["x"] is batch["x"]
    params = {"w": jnp.arange(4.0)}
    copied = sharding.shard_params(params, sharding.param_shardings(params, mesh))
    assert copied["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


def test_eight_devices_train_like_one(tmp_path):
    tests = Path(__file__).parents[1]
    from_tests = os.environ | {
        "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
    }
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES, str(tmp_path)], check=True, env=from_tests)
    sys.path.insert(0, str(tests))
    from toy_training import run_toy

    single = run_toy(tmp_path / "single", 12, mesh={"data": -1}).params
    with np.load(tmp_path / "split.npz") as split:
        for name, leaf in named_leaves(single).items():
            np.testing.assert_allclose(split[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
