"""Process-wide settings, and signals that wait for a good moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core import runtime
from cast_jax.core.errors import UserError


def test_setup_places_the_cache_and_rejects_unknown_settings(tmp_path):
    previous = jax.config.jax_compilation_cache_dir
    try:
        runtime.setup({"compilation_cache": str(tmp_path / "cache")})
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
        assert (tmp_path / "cache").is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", previous)
    with pytest.raises(UserError, match=r"unknown settings \['cache'\]; known: compilation_cache, debug_nans"):
        runtime.setup({"cache": "x"})


def test_xla_flags_are_added_to_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    previous = jax.config.jax_compilation_cache_dir
    try:
        runtime.setup({"compilation_cache": "", "xla_flags": "--xla_b=2"})
        assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"
    finally:
        jax.config.update("jax_compilation_cache_dir", previous)


def test_fused_attention_can_be_turned_off():
    previous = jax.config.jax_compilation_cache_dir
    try:
        for allowed in (False, True):
            runtime.setup({"compilation_cache": "", "fused_attention": allowed})
            assert runtime.fused_attention() == allowed
    finally:
        jax.config.update("jax_compilation_cache_dir", previous)


def test_programs_are_kept_by_default_under_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.default_cache_folder().parent == tmp_path / "cast_jax"
    previous = jax.config.jax_compilation_cache_dir
    try:
        runtime.setup({"compilation_cache": None})
        assert jax.config.jax_compilation_cache_dir == str(runtime.default_cache_folder())
    finally:
        jax.config.update("jax_compilation_cache_dir", previous)


def test_precision_and_memory():
    assert runtime.compute_dtype("cpu") == jnp.float32
    assert runtime.compute_dtype("gpu") == runtime.compute_dtype("tpu") == jnp.bfloat16
    assert 0.01 < runtime.host_memory_gib() < 1000


@pytest.mark.usefixtures("interruptible")
def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with runtime.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("interruptible")
def test_a_signal_waits_unless_told_otherwise_and_the_second_acts_at_once():
    previous = signal.getsignal(signal.SIGINT)
    with runtime.StopSignals() as stop:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()  # the same wish, which comes twice
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is previous
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous
    with runtime.StopSignals() as stop, pytest.raises(SystemExit) as stopped, stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


IN_A_LONG_CALL = """
import hashlib, logging
from cast_jax.core.runtime import StopSignals
logging.basicConfig()
with StopSignals() as stop, stop.by_force():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as long as compiling can be; Python's handlers wait for it
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_by_force_a_signal_ends_a_call_that_python_cannot_interrupt(number):
    command = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler){IN_A_LONG_CALL}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"{number.name}: stopping; run the same command again to continue" in said


INSIDE_ANOTHER = """
import os, signal
from cast_jax.core.runtime import StopSignals
with StopSignals() as outer, outer.by_force():
    with StopSignals() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        assert inner.received == signal.SIGTERM
        print("saved", flush=True)
    print("next", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""


def test_within_work_that_ends_by_force_other_work_may_save_first():
    process = subprocess.run([sys.executable, "-c", INSIDE_ANOTHER], capture_output=True, text=True, timeout=60)
    assert (process.stdout.split(), process.returncode) == (["saved", "next"], 143)
    assert process.stderr.count("SIGTERM: stopping") == 1


def test_by_force_changes_nothing_where_no_signal_comes():
    with runtime.StopSignals() as stop:
        with stop.by_force():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(SystemExit), stop.by_force():
            raise AssertionError("not reached")


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"compilation_cache: .*file/cache cannot be made"):
        runtime.setup({"compilation_cache": str(tmp_path / "file" / "cache")})


def test_the_memory_of_a_device(tmp_path, monkeypatch):
    """A CPU's is the machine's, or what the container may use of it."""
    machine = runtime.memory_limit()
    assert 2**28 < machine < 2**44
    monkeypatch.setattr(runtime, "CGROUP_LIMITS", (tmp_path / "max", tmp_path / "limit", tmp_path / "none"))
    (tmp_path / "max").write_text("max\n")
    assert runtime.memory_limit() == machine
    (tmp_path / "limit").write_text("123456\n")
    assert runtime.memory_limit() == 123456
