"""Time and memory of calls."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

clock = time.perf_counter  # or time.process_time, which other processes on the same core do not disturb


def run(compiled, *arguments) -> None:
    jax.block_until_ready(compiled(*arguments))


def medians(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turn, after one call that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not timed."""
    return medians({"": run}, repeats)[""]


def peak_mib(call: Callable[[], Any]) -> int:
    """How far one call raises the process's peak memory above what it held before (Linux only)."""
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    before = status_kib("VmRSS")
    call()
    return round((status_kib("VmHWM") - before) / 1024)


def status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def temporary_mib(compiled: Any) -> float:
    """Memory that a compiled function needs beside its arguments and results."""
    return round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
