"""Gradient accumulation: the same update as of the whole batch, the same micro-batches on any number of devices."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import DIMENSION, TRUTH, Regression, toy_config

from cast_jax.core import target
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.errors import UserError
from cast_jax.core.sharding import check_batch_size, make_mesh, micro_batches
from cast_jax.core.step import TrainStep, _compiler_options

EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from test_step import Regression, rows, updated
from cast_jax.core import sharding
from cast_jax.core.compiled import collective_bytes

mesh = sharding.make_mesh({"data": 8})
numbers = sharding.shard_batch({"x": np.arange(32)}, mesh)
split = jax.jit(lambda batch: sharding.micro_batches(batch, 2, mesh)).lower(numbers).compile()
assert split(numbers)["x"].tolist() == [list(range(0, 32, 2)), list(range(1, 32, 2))]
assert collective_bytes(split) == {}

class Looked(Regression):
    axes = []

    def loss_fn(self, *arguments):
        self.axes.append(sharding.batch_axes())
        return super().loss_fn(*arguments)

with jax.debug_nans(True):  # where an update is a call that may trace it again
    updated(rows(32), 1, mesh, Looked)
assert set(Looked.axes) == {sharding.AXES}

sharding.SMALL = 1
one = updated(rows(32), 2, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
for shape in ({"data": 8}, {"data": 2, "fsdp": 2}):
    mesh = sharding.make_mesh(shape, jax.devices()[: 8 if len(shape) == 1 else 4])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updated(rows(32), 2, mesh), one)
"""


def rows(count: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(count, DIMENSION)).astype(np.float32)
    return {"x": x, "y": x @ TRUTH + 0.5}


def updated(batch, accumulate: int, mesh, recipe=Regression):
    """Metrics and parameters after two updates."""
    step = TrainStep(recipe(), optimizer=toy_config(5).optimizer, steps=5, mesh=mesh, accumulate=accumulate)
    state = step.initial_state()
    step.compile("toy", state, {}, batch)
    for _ in range(2):
        state, metrics, _ = step(state, {}, batch)
    return jax.device_get((metrics, state.params))


class Noiseless(Regression):
    """Without random numbers, which belong to the micro-batch; with what a recipe may have beside the loss."""

    def loss_fn(self, params, frozen, batch, key):
        error = batch["x"] @ params["head"]["kernel"] + params["head"]["bias"] - batch["y"]
        metrics = {"loss/squared": (jnp.sum(error**2), len(error)), "share": (frozen.get("normalisers", 0.0), 1.0)}
        return jnp.mean(error**2), metrics, batch["x"][:, 0]

    def normalisers(self, batch):
        return jnp.sum(batch["x"])


def test_the_update_is_that_of_the_whole_batch():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    (whole, params), (parts, accumulated) = (updated(rows(12), count, mesh, Noiseless) for count in (1, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), accumulated, params)
    assert parts.pop("share") == (pytest.approx(rows(12)["x"].sum(), rel=1e-5), 3)  # a third for each of three
    assert whole.pop("share") == (0, 1)  # not needed
    np.testing.assert_allclose(parts["loss/squared"], whole["loss/squared"], rtol=1e-5)
    assert parts.keys() == whole.keys()
    for name, (total, count) in parts.items():
        assert total / count == pytest.approx(whole[name][0] / whole[name][1], rel=1e-5), name


def test_a_recipe_s_third_values_are_joined():
    seen = []

    class Seen(Noiseless):
        def init_bank(self):
            return jnp.zeros(())

        def update_bank(self, bank, third):
            seen.append(third.shape)
            return bank

    updated(rows(12), 3, make_mesh({"data": 1}, jax.devices()[:1]), Seen)
    assert seen == [(12,)]


class Remembering(Noiseless):
    """With a bank of what was seen last, and a look at it and at the moving average."""

    def loss_fn(self, params, frozen, batch, key):
        loss, metrics, seen = super().loss_fn(params, frozen, batch, key)
        seen_before = jnp.sum(frozen["bank"]) + jnp.sum(frozen["ema"]["head"]["kernel"])
        return loss * (1 + 0.1 * jnp.tanh(seen_before)), metrics, seen

    def init_bank(self):
        return jnp.zeros(3)

    def update_bank(self, bank, third):
        return bank + third[:3]


def small_step(recipe, **changes) -> TrainStep:
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return TrainStep(recipe(), optimizer=toy_config(3).optimizer, steps=3, mesh=mesh, **changes)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_is_the_same_as_one_program_and_as_two(accumulate, monkeypatch):
    found = []
    for backend, number in (("cpu", 2), ("gpu", 1)):
        step = small_step(Remembering, ema_decay=0.9, accumulate=accumulate)
        state = step.initial_state()
        with monkeypatch.context() as patched:
            patched.setattr(target, "backend", lambda backend=backend: backend)
            patched.setattr("cast_jax.core.step._compiler_options", dict)
            step.compile("toy", state, {}, rows(12))
        assert len(step.programs) == len(step.traced) == number
        for _ in range(3):
            state, metrics, finite = step(state, {}, rows(12))
        assert finite
        assert list(metrics) == sorted(metrics)
        found.append(jax.device_get((state, metrics)))
    jax.tree.map(lambda two, one: np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-8), *found)
    assert np.abs(found[0][0].bank).min() > 0


def test_both_programs_compile_at_the_same_time_and_the_first_tells_the_memory(monkeypatch):
    together, reported, resting = threading.Barrier(2, timeout=60), [], []

    def compile_(lowered, options=None):
        if threading.current_thread() is threading.main_thread():
            resting.append(not gc.isenabled())
        together.wait()
        return lowered

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    monkeypatch.setattr("cast_jax.core.step.memory_bytes", lambda program: reported.append(program))
    step = small_step(Regression)
    step.compile("toy", step.like, {}, rows(8))
    assert reported == [step.programs[0]]
    assert resting == [False]


def test_the_first_program_is_given_the_moments_too():
    step = small_step(Regression)
    step.compile("toy", step.like, {}, rows(8))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((step.like, rows(8))))
    assert step.programs[0].memory_analysis().argument_size_in_bytes >= held
    assert memory_bytes(step.programs[1]) < memory_bytes(step.programs[0])


def test_a_loss_that_is_not_finite_is_told_where_gradients_are():
    class Infinite(Noiseless):
        def loss_fn(self, *arguments):
            loss, *rest = super().loss_fn(*arguments)
            return loss + jnp.inf, *rest

    step = small_step(Infinite)
    state = step.initial_state()
    step.compile("toy", state, {}, rows(8))
    _, metrics, finite = step(state, {}, rows(8))
    assert np.isfinite(metrics["optimizer/gradient_norm"][0])
    assert not finite


def test_a_bank_needs_both_of_its_methods():
    class Half(Regression):
        def init_bank(self):
            return jnp.zeros(3)

    with pytest.raises(TypeError, match="Half must have both init_bank and update_bank, or neither"):
        small_step(Half)


def test_a_bank_keeps_its_shape():
    class Growing(Remembering):
        def update_bank(self, bank, third):
            return jnp.concatenate([bank, third])

    step = small_step(Growing, ema_decay=0.9)
    with pytest.raises(TypeError, match=r"Growing\.update_bank was given float32\[3\], but returned float32\[11\]"):
        step.compile("toy", step.like, {}, rows(8))


def test_the_garbage_collector_rests_while_tracing():
    seen = []

    class Watching(Regression):
        def loss_fn(self, *arguments):
            seen.append(gc.isenabled())
            return super().loss_fn(*arguments)

    updated(rows(8), 1, make_mesh({"data": 1}), Watching)
    assert set(seen) == {False}
    assert gc.isenabled()


def test_on_a_cpu_xla_does_less_unless_told_otherwise(monkeypatch):
    less = {"xla_backend_optimization_level": 1, "xla_disable_hlo_passes": "tree_reduction_rewriter"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_xnnpack=true")
    assert _compiler_options() == less
    with monkeypatch.context() as patched:
        seen = []
        patched.setattr(jax.stages.Lowered, "compile", lambda self, options=None: seen.append(options))
        patched.setattr("cast_jax.core.step.memory_bytes", lambda program: None)
        step = small_step(Regression)
        step.compile("toy", step.like, {}, rows(8))
        assert seen == [less, less]
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_disable_hlo_passes=dce")
    assert _compiler_options() == {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(target, "backend", lambda: "gpu")
    assert _compiler_options() == {}


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("of", [jnp.abs, jnp.exp, lambda values: jnp.where(values > 0, values, 0.0)])
def test_long_sums_stay_exact_on_a_cpu_where_they_are_not_split(axis, of):
    """Added up one after another in float32, 2 million numbers would be wrong by 3e-4."""
    values = np.random.default_rng(0).standard_normal((1_500, 1_400)).astype(np.float32)
    total = jax.jit(lambda values: jnp.sum(of(values), axis=axis)).lower(values).compile(_compiler_options())(values)
    exact = np.sum(np.asarray(of(values), np.float64), axis=axis)
    np.testing.assert_allclose(total, exact, rtol=2e-6)


def test_micro_batches_take_turns():
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    batch = {"x": jnp.arange(6), "y": jnp.arange(12).reshape(6, 2)}
    parts = jax.jit(lambda batch: micro_batches(batch, 3, mesh))(batch)
    assert parts["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert parts["y"][1].tolist() == [[2, 3], [8, 9]]
    with pytest.raises(UserError, match=r"batch of 6 .* 1 devices and there into 4 micro-batches"):
        micro_batches(batch, 4, mesh)


def test_a_batch_that_cannot_be_split_names_the_sizes_that_can():
    message = r"8 cannot be split over 2 devices and there into 3 micro-batches \(train\.accumulate\); .* 6 or 12"
    with pytest.raises(UserError, match=message):
        check_batch_size(8, 2, 3)
    check_batch_size(12, 2, 3)


def test_eight_devices_accumulate_like_one():
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], check=True, env=environment)
