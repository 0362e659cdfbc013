"""What programs are compiled for: the devices that are here, or GPUs or a TPU slice that are not."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from cast_jax.core.errors import UserError


class Gpu(NamedTuple):
    """What XLA has to know of a kind of GPU, from its maker's tables."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    """At a time on a multiprocessor."""
    lanes: int
    """Of float32 on a multiprocessor."""
    shared: int
    """KiB of shared memory of a multiprocessor; a block may use all but one."""
    cache: int
    """MiB of the second level."""
    gigahertz: float
    bandwidth: float
    """TB/s of the memory."""
    memory: int
    """Bytes."""


GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 2048, 128, 228, 50, 1.98, 4.8, 151_397_597_184),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 128, 228, 50, 1.98, 3.352, 84_942_979_072),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 64, 164, 40, 1.41, 2.039, 85_100_068_864),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 128, 100, 72, 2.52, 1.008, 25_393_692_672),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 1536, 128, 100, 48, 2.04, 0.3, 23_580_639_232),
}
_TAKEN = 0.75  # the share of a GPU's memory that jax takes, unless it is told otherwise


class _Elsewhere(NamedTuple):
    devices: tuple[Any, ...] = ()
    memory: int | None = None


_HERE = _Elsewhere()
_ELSEWHERE: contextvars.ContextVar[_Elsewhere] = contextvars.ContextVar("elsewhere", default=_HERE)


def devices() -> Sequence[jax.Device]:
    """Those that a program is for, of all processes."""
    return _ELSEWHERE.get().devices or jax.devices()


def local_devices() -> Sequence[jax.Device]:
    """Those of this process; all that are not here."""
    return _ELSEWHERE.get().devices or jax.local_devices()


def backend() -> str:
    """Their kind: "cpu", "gpu" or "tpu"."""
    elsewhere = _ELSEWHERE.get().devices
    return elsewhere[0].platform if elsewhere else jax.default_backend()


def absent() -> bool:
    """Whether they are not here, so that programs can be compiled but not run."""
    return bool(_ELSEWHERE.get().devices)


def absent_memory() -> int | None:
    """Bytes that a program may use on each of the devices that are not here, where that is known."""
    return _ELSEWHERE.get().memory


@contextlib.contextmanager
def tpu_slice(name: str) -> Iterator[None]:
    """Within, programs are for a TPU slice such as "v5e:2x2": they can be compiled, not run.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(variable, value)  # or libtpu asks a cloud what machine this is
    try:
        described = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # of many kinds
        missing = not isinstance(error, jax.errors.JaxRuntimeError)
        hint = "install libtpu: pip install 'cast_jax[tpu]'" if missing else "name one such as v5e:2x2 or v4:2x2x1"
        raise UserError(f"cannot compile for the TPU slice {name!r} ({error}); {hint}") from error
    with _elsewhere(_Elsewhere(tuple(described))):
        yield


@contextlib.contextmanager
def gpus(name: str) -> Iterator[None]:
    """Within, programs are for a kind of GPU of :data:`GPUS`, or for several in one machine ("h100:8").

    They need not be here: programs can be compiled, not run. XLA knows the GPU by its description, and takes what it
    would otherwise try out (algorithms of products and convolutions) by default. To be entered before jax is first
    used, which it turns to the CPU and tells not to look for the driver, for the rest of the process.

    Raises:
      UserError: no such kind is known, or jax's CUDA libraries are not installed.
    """
    kind, _, count = name.partition(":")
    if kind not in GPUS or not (count or "1").isdecimal() or int(count or 1) < 1:
        raise UserError(f"cannot compile for the GPU {name!r}; known: {', '.join(GPUS)}, or several such as h100:8")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks for the driver
    jax.config.update("jax_platforms", "cpu")
    gpu = GPUS[kind]
    options = {"topology": f"1x1x{int(count or 1)}", "target_config": _described(gpu)}
    try:
        described = topologies.get_topology_desc(kind, platform="cuda", **options).devices
    except Exception as error:  # of many kinds
        missing = not isinstance(error, jax.errors.JaxRuntimeError)
        hint = "install jax's CUDA libraries: pip install 'cast_jax[cuda]'" if missing else "this jax cannot do it"
        raise UserError(f"cannot compile for the GPU {name!r} ({error}); {hint}") from error
    with _elsewhere(_Elsewhere(tuple(described), int(_TAKEN * gpu.memory))):
        yield


@contextlib.contextmanager
def _elsewhere(elsewhere: _Elsewhere) -> Iterator[None]:
    token = _ELSEWHERE.set(elsewhere)
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _use_cache(False)  # what cannot run here cannot be loaded from it
    try:
        yield
    finally:
        _use_cache(cached)
        _ELSEWHERE.reset(token)


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # or it goes by what was set when it was first asked


def _described(gpu: Gpu) -> str:
    """As text of the message that XLA's compiler reads, stream_executor.GpuTargetConfigProto."""
    major, minor = gpu.capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": (gpu.shared - 1) * 1024,
        "shared_memory_per_core": gpu.shared * 1024,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(gpu.bandwidth * 1e12),
        "l2_cache_size": gpu.cache * 2**20,
        "clock_rate_ghz": gpu.gigahertz,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    lines = "\n".join(f"{field}: {value}" for field, value in fields.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}"
    return f"""gpu_device_info {{ {lines}
{capability} }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""
