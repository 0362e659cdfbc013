"""Programs can be compiled for devices that are not here."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from cast_jax.core import runtime, target
from cast_jax.core.errors import UserError
from cast_jax.core.sharding import make_mesh, on_one_cpu


def test_programs_are_for_the_devices_here():
    assert (list(target.devices()), target.backend()) == (jax.devices(), jax.default_backend())
    assert list(target.local_devices()) == jax.local_devices()


def test_within_a_slice_they_are_for_its_devices(monkeypatch):
    class Device:
        platform, process_index = "tpu", 0

    devices = [Device() for _ in range(4)]
    monkeypatch.setattr(topologies, "get_topology_desc", lambda name, platform: types.SimpleNamespace(devices=devices))
    with target.tpu_slice("v5e:2x2"):
        assert (list(target.devices()), target.backend()) == (devices, "tpu")
        assert runtime.compute_dtype() == jnp.bfloat16
        assert not on_one_cpu()
        assert runtime.memory_limit() is None
        assert make_mesh({"fsdp": 2}).shape == {"data": 2, "fsdp": 2}
    assert target.backend() == jax.default_backend()
    assert runtime.memory_limit() is not None


def test_programs_for_elsewhere_are_not_cached(tmp_path, monkeypatch):
    """Whether or not something was compiled before."""
    device = types.SimpleNamespace(platform="tpu", process_index=0)
    monkeypatch.setattr(topologies, "get_topology_desc", lambda name, platform: types.SimpleNamespace(devices=[device]))
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}

    def cached(number: float) -> int:
        jax.block_until_ready(jax.jit(lambda x: x * number)(1.0))
        return len(list(tmp_path.iterdir()))

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        here = cached(2.0)
        with target.tpu_slice("v5e:1x1"):
            assert cached(3.0) == here > 0
        assert cached(5.0) > here
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("error", "hint"),
    [(AttributeError("no libtpu"), "install libtpu"), (jax.errors.JaxRuntimeError("invalid"), "name one such as")],
)
def test_what_is_missing_is_named(monkeypatch, error, hint):
    def fail(name, platform):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=f"TPU slice 'v9'.*{hint}"), target.tpu_slice("v9"):
        raise AssertionError("not reached")


def test_within_gpus_they_are_for_gpus_of_that_kind(monkeypatch):
    class Device:
        platform, process_index = "gpu", 0

    asked = {}

    def described(name, platform, **options):
        asked.update(options, name=name, platform=platform)
        return types.SimpleNamespace(devices=[Device() for _ in range(8)])

    monkeypatch.setattr(topologies, "get_topology_desc", described)
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.update({name: value}))
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # and back
    with target.gpus("h100:8"):
        assert target.backend() == "gpu"
        assert target.absent()
        assert len(target.local_devices()) == 8
        assert make_mesh({"fsdp": 2}).shape == {"data": 4, "fsdp": 2}
        assert runtime.memory_limit() == pytest.approx(0.75 * 84.94e9, rel=1e-3)
    assert not target.absent()
    assert (asked["platform"], asked["topology"], asked["jax_platforms"]) == ("cuda", "1x1x8", "cpu")
    assert "core_count: 132" in asked["target_config"]


@pytest.mark.parametrize("name", ["h300", "h100:0", "h100:x", "8"])
def test_gpus_that_nobody_knows_are_refused(name):
    with pytest.raises(UserError, match=f"GPU '{name}'; known: h200, h100, .* such as h100:8"), target.gpus(name):
        raise AssertionError("not reached")


def test_gpus_without_their_compiler_name_what_to_install(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # and back
    with pytest.raises(UserError, match=r"not implemented for cuda.*cast_jax\[cuda\]"), target.gpus("l4"):
        raise AssertionError("not reached")
