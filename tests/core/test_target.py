"""Programs can be compiled for devices that are not here."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from cast_jax.core import runtime, target
from cast_jax.core.errors import UserError
from cast_jax.core.sharding import make_mesh, on_one_cpu


def test_programs_are_for_the_devices_here():
    assert (list(target.devices()), target.backend()) == (jax.devices(), jax.default_backend())


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
