"""Runs one configuration with several seeds and prints mean ± standard deviation of every step (the paper's protocol).

python scripts/run_seeds.py --config configs/demo.py:cast --workdir runs/seeds --seeds 0 1 2 [--parallel 2] [-- ...]

Each seed has its own folder ``<workdir>/seed<k>``; seeds that are finished are not run again. ``{seed}`` in what is
passed on becomes the seed (``--config.data.split=splits/all_5_percent_seed{seed}.json``). Writes
``<workdir>/seeds.json`` and ``seeds.txt``; with --parallel each seed's messages are in ``<workdir>/seed<k>.out``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

from cast_jax.core.files import atomic_write, write_json

METRICS = ("mask_ap", "mask_ap50")


def main() -> None:
    """Runs the seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configs/<name>.py:<step>[,key=value ...], without seed")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--parallel", type=int, default=1, help="seeds at a time; each gets its share of the GPUs and cores"
    )
    parser.add_argument("overrides", nargs="*", help="passed on, e.g. --config.data.root=PATH (after --)")
    options = parser.parse_args()
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds {options.seeds} names one twice")
    fixed = [text for text in options.overrides if text.startswith("--config.seed") and "{seed}" not in text]
    if ",seed=" in options.config or fixed:
        parser.error(f"{fixed[0] if fixed else '--config'} says seed=, which --seeds does")
    options.parallel = min(options.parallel, len(options.seeds))
    gpus = _gpus() if options.parallel > 1 else []
    if gpus and len(gpus) < options.parallel:
        parser.error(f"--parallel {options.parallel}: there are fewer GPUs ({len(gpus)}), each of which one run fills")
    share = 1 << (len(gpus) // options.parallel).bit_length() - 1 if gpus else 0  # a power of two divides batches
    options.slots = queue.SimpleQueue[tuple[list[int], list[str]]]()
    for slot in range(options.parallel):
        options.slots.put((_cores(slot, options.parallel), gpus[slot * share : (slot + 1) * share]))
    runs = _Runs()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runs.stop)
    with ThreadPoolExecutor(options.parallel) as pool:
        codes = list(pool.map(lambda seed: _run(seed, options, runs), options.seeds))
    if runs.stopped:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(128 + runs.stopped)
    if failed := [seed for seed, code in zip(options.seeds, codes, strict=True) if code]:
        logs = (
            ", ".join(str(_output(options, seed)) for seed in failed) if options.parallel > 1 else "what they say above"
        )
        sys.exit(f"error: seeds {failed} failed; see {logs}")
    summaries = [_summary(options, seed) for seed in options.seeds]
    if missing := [seed for seed, steps in zip(options.seeds, summaries, strict=True) if not steps]:
        sys.exit(f"error: seeds {missing} left no results: {options.config} trains nothing")
    table = aggregate(summaries)
    write_json(options.workdir / "seeds.json", {"seeds": options.seeds, "steps": table})
    text = format_table(table)
    atomic_write(options.workdir / "seeds.txt", text + "\n")
    print(text)


def aggregate(summaries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per step that all have: every seed's values, their mean and (sample) standard deviation; seconds as a mean."""
    table: dict[str, dict[str, Any]] = {}
    for step in (step for step in summaries[0] if all(step in summary for summary in summaries)):
        row: dict[str, Any] = {"seconds": statistics.fmean(summary[step]["seconds"] for summary in summaries)}
        for metric in METRICS:
            values = [summary[step][metric] for summary in summaries]
            row[metric] = {"values": values, "mean": None, "std": None}
            if None not in values:  # as on validation images without instances
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                row[metric] |= {"mean": statistics.fmean(values), "std": deviation}
        table[step] = row
    return table


def format_table(table: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the aggregate."""
    lines = ["| step | mask AP | AP50 | seconds |", "| --- | --- | --- | --- |"]
    for step, row in table.items():
        found = [(row[metric]["mean"], row[metric]["std"]) for metric in METRICS]
        cells = ["n/a" if mean is None else f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in found]
        lines.append(f"| {step} | {cells[0]} | {cells[1]} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def _folder(options: argparse.Namespace, seed: int) -> Path:
    return options.workdir / f"seed{seed}"


def _summary(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The results of a seed's steps; none where nothing was trained."""
    path = _folder(options, seed) / "summary.json"
    return json.loads(path.read_text())["steps"] if path.exists() else {}


def command_of(seed: int, options: argparse.Namespace) -> list[str]:
    """The run of one seed."""
    command = [sys.executable, "-m", "cast_jax.main", "--config", f"{options.config},seed={seed}"]
    overrides = [text.replace("{seed}", str(seed)) for text in options.overrides]
    return [*command, "--workdir", str(_folder(options, seed)), *overrides]


class _Runs:
    """The runs at work, to which a signal that would end this process is passed on: they save first."""

    def __init__(self) -> None:
        self.stopped, self._processes = 0, set[subprocess.Popen[bytes]]()

    def stop(self, number: int, _: object) -> None:
        """Handles a signal: no other run begins. A terminal's goes to all of its processes by itself."""
        self.stopped = number
        for process in tuple(self._processes) if number == signal.SIGTERM else ():
            process.send_signal(number)

    def __call__(self, command: list[str], **options: Any) -> int:
        """The exit code of a run."""
        if self.stopped:
            return 128 + self.stopped
        process = subprocess.Popen(command, **options)
        self._processes.add(process)
        if self.stopped == signal.SIGTERM:
            process.send_signal(self.stopped)
        try:
            return process.wait()
        finally:
            self._processes.remove(process)


def _run(seed: int, options: argparse.Namespace, runs: _Runs) -> int:
    command = command_of(seed, options)
    if options.parallel == 1:
        return runs(command)
    options.workdir.mkdir(parents=True, exist_ok=True)
    cores, gpus = slot = options.slots.get()
    try:
        with _output(options, seed).open("ab") as output:
            return runs(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
    finally:
        options.slots.put(slot)


def _output(options: argparse.Namespace, seed: int) -> Path:
    """What a seed says that runs beside others."""
    return options.workdir / f"seed{seed}.out"


def _cores(position: int, parallel: int) -> list[int]:
    """A share of this process's cores: XLA:CPU takes all it may use, and parallel seeds would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[position % parallel :: parallel] or cores


def _gpus() -> list[str]:
    """The names of this process's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES has them; none without its driver."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not any(map(util.find_spec, plugins)):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number in range(len(listed.splitlines()))]


if __name__ == "__main__":
    main()
