"""What all tests share: the CPU, one thread a library, and compiled programs that later runs find again."""

from __future__ import annotations

import os
import signal

# Before jax and torch are imported: some tests start several processes, and workers share the cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the time goes into compiling programs that run once: a third of it without the optimiser.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest

from cast_jax.core.runtime import default_cache_folder

_SETTINGS = {
    "jax_compilation_cache_dir": str(default_cache_folder() / "tests"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for _name, _value in _SETTINGS.items():
    jax.config.update(_name, _value)
    os.environ.setdefault(_name.upper(), str(_value))  # for the processes that tests start


@pytest.fixture
def interruptible():
    """SIGINT interrupts, which it does not in a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def toy_cache(tmp_path_factory):
    """A compilation cache for a file whose tests compile the same step, shared with the processes that it starts."""
    folder = tmp_path_factory.mktemp("cache")
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0}
    previous = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in previous.items():
        jax.config.update(name, value)
