"""The process around a run: compilation cache, precision, memory, signals."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from cast_jax.core import target
from cast_jax.core.errors import UserError

logger = logging.getLogger(__name__)
GIB = 2**30
CGROUP_LIMITS = tuple(map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")))
_TWICE = 0.5  # seconds within which a signal may come once more by another way
_STOPPING = "%s: stopping; run the same command again to continue"
SETTINGS = {"compilation_cache": None, "debug_nans": False, "fused_attention": True, "xla_flags": ""}
_applied = dict(SETTINGS)


def setup(config: Mapping[str, Any] | None = None) -> None:
    """Applies process-wide jax settings; call once, before the first computation.

    ``config`` may set ``compilation_cache`` (a folder; None: under the XDG cache; "": off), ``debug_nans`` (stop at
    the operation that makes a NaN; slow), ``fused_attention`` (False: never cuDNN's kernel, should it refuse) and
    ``xla_flags`` (added to the environment's XLA_FLAGS). Unknown keys raise :class:`UserError`.
    """
    config = dict(config or {})
    if unknown := set(config) - set(SETTINGS):
        raise UserError(f"runtime: unknown settings {sorted(unknown)}; known: {', '.join(SETTINGS)}")
    settings = SETTINGS | config
    if settings["xla_flags"]:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {settings['xla_flags']}".strip()
    folder = settings["compilation_cache"]
    folder = str(default_cache_folder()) if folder is None else folder
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"config.runtime.compilation_cache: {folder} cannot be made ({error.strerror}); "
                "name another folder, or '' for none"
            ) from error
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax.config.update("jax_debug_nans", bool(settings["debug_nans"]))
    _applied.update(settings)


def fused_attention() -> bool:
    """Whether attention may be a library's fused kernel."""
    return bool(_applied["fused_attention"])


def end(code: int) -> NoReturn:
    """Ends this process at once, once what was logged and printed is out.

    Python's own clean-up may crash in threads of XLA that still work.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cast_jax/xla-<machine>``.

    One folder a kind of processor: XLA:CPU stores machine code, which another processor may not run.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return root / "cast_jax" / f"xla-{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def platform_notes() -> list[str]:
    """What a person should know about this machine before a long run."""
    notes = []
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        notes.append("an NVIDIA GPU is here but jax runs on the CPU: pip install -e '.[cuda]'")
    return notes


def compute_dtype(backend: str | None = None) -> Any:
    """bfloat16 on gpu and tpu, float32 on cpu (where XLA has no fast bfloat16 path). Parameters stay float32."""
    return jnp.float32 if (backend or target.backend()) == "cpu" else jnp.bfloat16


def host_memory_gib() -> float | None:
    """Resident memory of this process now, GiB; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return kibibytes[0] * 1024 / GIB if kibibytes else None


def device_memory_gib() -> float | None:
    """The most memory in use so far on the fullest local device, GiB; None on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [values["peak_bytes_in_use"] for values in stats if values and "peak_bytes_in_use" in values]
    return max(peaks) / GIB if peaks else None


def as_size(size: float) -> str:
    """Bytes for a person: "11.2 GiB", or "3.4 MiB" below a tenth of one."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"


def memory_limit() -> int | None:
    """Bytes that a program may use on each local device; of a CPU's devices, their share of the machine's memory.

    None where nobody says.
    """
    if target.absent():
        return target.absent_memory()
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [int(text) for file in CGROUP_LIMITS if file.exists() and (text := file.read_text().strip()).isdecimal()]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits) // len(jax.local_devices()) if limits else None


class StopSignals:
    """Turns SIGTERM and SIGINT into a request that a loop reads, so that it can save first; a context manager.

    A second signal acts at once, as it would without this class; but not within half a second, since a process may get
    it from its parent and as one of a group. Signals that are ignored (SIGINT of a shell's background job) stay so.
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = self._by_force = False
        self._patience = 0.0
        self._previous: dict[int, Any] = {}
        self._wakeup: int | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            self._wakeup = signal.set_wakeup_fd(-1)  # of a ``by_force`` around this
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal exits directly: for long work after which nothing new would have to be saved."""
        self._at_once = True
        try:
            self.exit_if_received()
            yield
        finally:
            self._at_once = False

    @contextlib.contextmanager
    def by_force(self, patience: float = 0.0) -> Iterator[None]:
        """Within, a signal ends the process even inside a call that Python cannot interrupt, such as compiling.

        Nothing is cleaned up: for work that a kill cannot harm. Another ``StopSignals`` within acts in its place.

        Args:
          patience: seconds until the end, see :func:`cast_jax.core.distributed.patience`.
        """
        self.exit_if_received()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)

        def wait() -> None:
            while number := os.read(reading, 1):
                if number[0] in self._previous:
                    time.sleep(0.2)  # where Python can be interrupted, its handler ends the process
                    self._end(number[0])

        self._by_force, self._patience = True, patience
        thread = threading.Thread(target=wait, name="signals", daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            self._by_force = False
            signal.set_wakeup_fd(previous)
            os.close(writing)
            thread.join()
            os.close(reading)

    def exit_if_received(self) -> None:
        """Raises ``SystemExit(128 + signal)`` if a signal came."""
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._by_force:
            self._end(number)
        if self.received is not None:
            return
        self.received = number
        said = _STOPPING if self._at_once else "%s: saving after the current step, then stopping"
        logger.warning(said, signal.Signals(number).name)
        time.sleep(_TWICE)
        self._restore()  # only now: it must act even within a call that Python cannot interrupt
        if self._at_once:
            self.exit_if_received()

    def _end(self, number: int) -> NoReturn:
        logger.warning(_STOPPING, signal.Signals(number).name)
        time.sleep(self._patience)
        end(128 + number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
            self._wakeup = None
