"""What a compiled step costs: operations, memory, traffic, and from a trace the time of each part of the model.

Parts are ``jax.named_scope``s. Their names reach the compiled program's instructions, which a trace names.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from cast_jax.core.compiled import added_up, collective_bytes, cost_analysis, instructions, launches, memory_bytes
from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.files import write_json
from cast_jax.core.flops import matrix_flops
from cast_jax.core.runtime import as_size, memory_limit
from cast_jax.core.step import TrainStep
from cast_jax.core.target import GPUS
from cast_jax.core.traffic import traffic

logger = logging.getLogger(__name__)

SCOPES = ("encoder", "decoder", "mask_decoder", "criterion", "matching", "contrastive", "online_labels", "optimizer")
PHASES = ("forward", "backward", "recomputed")

# By the vendors' data sheets, a device: dense bfloat16 products with float32 sums, TFLOP/s, and its memory's TB/s.
PEAKS = {
    r"\bH200$": (989.0, GPUS["h200"].bandwidth),
    r"\bH100 PCIe$": (756.0, 2.0),
    r"\bH100 80GB HBM3$": (989.0, GPUS["h100"].bandwidth),
    r"\bA100-SXM4-80GB$": (312.0, GPUS["a100"].bandwidth),
    r"\bA100 80GB PCIe$": (312.0, 1.935),
    r"\bA100.*40GB$": (312.0, 1.555),
    r"\bL4$": (121.0, GPUS["l4"].bandwidth),
    r"\bRTX 4090$": (165.2, GPUS["rtx4090"].bandwidth),
    r"TPU v4$": (275.0, 1.228),
    r"TPU v5 lite|TPU v5e": (197.0, 0.819),
    r"TPU v5p?$": (459.0, 2.765),
    r"TPU v6 lite|TPU v6e": (918.0, 1.64),
}


def peaks(device_kind: str) -> tuple[float | None, float | None]:
    """What a device can do at most, FLOP/s in bfloat16 and bytes/s; None where it is not known (of a CPU it is not)."""
    known = (peaks for pattern, peaks in PEAKS.items() if re.search(pattern, device_kind))
    flops, transfer = next(known, (None, None))
    return flops and flops * 1e12, transfer and transfer * 1e12


def part_of(path: str) -> tuple[str, str]:
    """The innermost of ``SCOPES`` in an operation's name, or "other", and which of ``PHASES`` it belongs to.

    All that makes labels is theirs, the network that it looks through too.
    """
    steps = path.split("/")
    names = [re.sub(r"^(\w+\()*|\)*$", "", step) for step in steps if not step.startswith("jit(")]
    inside = (name for name in reversed(names) if name in SCOPES)
    scope = "online_labels" if "online_labels" in names else next(inside, "other")
    # The gradient of what was computed again has a name that is transposed twice.
    twice = any(re.match(r"(vmap\()*transpose\(transpose\(", step) for step in steps)
    again = steps.count("rematted_computation") > twice
    backward = any(re.match(r"(vmap\()*transpose\(", step) for step in steps)
    return scope, "recomputed" if again else "backward" if backward else "forward"


def by_part(amounts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Amounts by operation name, added up by scope and phase."""
    found: dict[str, dict[str, float]] = {}
    for path, amount in amounts.items():
        scope, phase = part_of(path)
        phases = found.setdefault(scope, dict.fromkeys(PHASES, 0.0))
        phases[phase] += amount
    return found


def by_scope(amounts: Mapping[str, int]) -> dict[str, int]:
    """The same by scope alone."""
    found: collections.Counter[str] = collections.Counter()
    for path, amount in amounts.items():
        found[part_of(path)[0]] += amount
    return dict(found)


def operation_seconds(trace: Path, programs: Iterable[Any]) -> dict[str, float]:
    """Seconds of compiled programs' operations, by operation name, on average over this machine's devices.

    Of several traces in the folder ``trace`` the last one counts.

    Raises:
      UserError: the trace has none of them.
    """
    names = dict(map(instructions, programs))
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    devices: set[str] = set()
    files = sorted(Path(trace).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for file in files[-1:]:
        for device, module, instruction, duration in _events(ProfileData.from_file(str(file)), names):
            name = names[module].get(instruction, "")
            if name is not None:  # loops, whose bodies' operations are there too
                devices.add(device)
                seconds[name] += duration * 1e-9
    if not seconds:
        raise UserError(f"{trace}: no operation of {', '.join(names)} was traced")
    return {name: value / len(devices) for name, value in seconds.items()}


def _events(data: ProfileData, modules: Collection[str]) -> Iterator[tuple[str, str, str, float]]:
    """(device, module, instruction, nanoseconds) of everything that ran for ``modules``.

    Accelerators have planes of their own; of a TPU's lines one holds the operations, and another the programs that they
    belong to. On a CPU the host's threads run them, and what one thread begins another may end: an event called
    "end: ..." then tells when.
    """
    planes = list(data.planes)
    if own := [plane for plane in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", plane.name)]:
        planes = own
    for plane in planes:
        lines = list(plane.lines)
        programs = sorted(
            (event.start_ns, event.name) for line in lines if line.name == "XLA Modules" for event in line.events
        )
        lines = [line for line in lines if line.name == "XLA Ops"] or lines
        begun: dict[int, tuple[str, str, str, float, float]] = {}
        ended: dict[int, float] = {}
        for line in lines:
            for event in line.events:
                known = dict(event.stats)
                if event.name.startswith("end: "):
                    ended[known.get("_c", -1)] = event.start_ns
                    continue
                instruction = known.get("hlo_op") or (event.name if line.name == "XLA Ops" else None)
                module = (known.get("hlo_module") or _running(programs, event.start_ns)).partition("(")[0]
                if instruction is None or module not in modules:
                    continue
                device = f"{plane.name} {known.get('device_ordinal', 0)}"
                instruction = instruction.partition(" = ")[0].removeprefix("%")
                if plane.name.startswith("/device:") or "_p" not in known:
                    yield device, module, instruction, event.duration_ns
                else:
                    begun[known["_p"]] = device, module, instruction, event.start_ns, event.duration_ns
        for number, (device, module, instruction, start, duration) in begun.items():
            yield device, module, instruction, max(ended.get(number, start) - start, duration)


def _running(programs: list[tuple[float, str]], time: float) -> str:
    """The program, of such that ran one after another since the times beside their names, which ran at a time."""
    position = bisect.bisect_right(programs, time, key=lambda program: program[0])
    return programs[position - 1][1] if position else ""


@contextlib.contextmanager
def tracing(folder: Path) -> Iterator[None]:
    """Writes what runs (and ends) inside as a trace for TensorBoard's profile plugin and Perfetto.

    Python's own functions are left out: they would be most of it.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def report(step: TrainStep, *, peak: float | None = None) -> dict[str, Any]:
    """What is known of a compiled step before it runs: operations, memory and traffic.

    ``flops`` are the model's matrix products and convolutions on all devices, forward and backward, without what is
    computed again to save memory (``recomputed_flops``). ``peak`` is a device's FLOP/s, by default by its name.
    ``seconds_at_peak`` is what operations, and what reading and writing, would take by themselves at a device's peaks:
    no bound, as traffic is counted by sizes, and loops of unknown length once. (Such are the criterion's, over what
    there is of instances.)
    """
    device, memory = step.mesh.devices.flat[0], step.programs[0].memory_analysis()
    flops = by_part(added_up(lambda traced: matrix_flops(traced.jaxpr.jaxpr), step.traced))
    known_peak, transfer = peaks(device.device_kind)
    peak = peak or known_peak
    again = sum(phases["recomputed"] for phases in flops.values())
    all_flops = sum(sum(phases.values()) for phases in flops.values())
    moved = by_scope(added_up(traffic, step.programs))
    return {
        "device": device.device_kind,
        "devices": step.mesh.size,
        "peak_flops": peak,
        "peak_bytes_per_second": transfer,
        "flops": all_flops - again,
        "recomputed_flops": again,
        "flops_by_part": flops,
        "xla": added_up(cost_analysis, step.programs),
        "traffic": moved,
        "seconds_at_peak": {
            "operations": peak and all_flops / step.mesh.size / peak,
            "traffic": transfer and sum(moved.values()) / transfer,
        },
        "memory": {
            "arguments": memory and memory.argument_size_in_bytes,
            "results": memory and memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory and memory.temp_size_in_bytes,
            "total": memory_bytes(step.programs[0]),
            "limit": memory_limit(),
        },
        "collectives": added_up(collective_bytes, step.programs),
        "launches": by_scope(added_up(launches, step.programs)) if device.platform == "gpu" else None,
    }


def measured(
    report: Mapping[str, Any], seconds: float, trace: Path, steps: int, programs: Iterable[Any]
) -> dict[str, Any]:
    """A report with what was measured: ``seconds`` a step, and the parts' times in a ``trace`` of some ``steps``."""
    rate = report["flops"] / seconds
    peak = report["peak_flops"]
    times = by_part({name: value / steps for name, value in operation_seconds(trace, programs).items()})
    return {
        **report,
        "seconds": seconds,
        "flops_per_second": rate,
        "mfu": rate / (peak * report["devices"]) if peak else None,
        "seconds_by_part": times,
    }


def as_text(report: Mapping[str, Any]) -> str:
    """A report for a person."""
    memory, xla = report["memory"], report["xla"]
    size = lambda value: "?" if value is None else as_size(value)
    sent = ", ".join(f"{name} {as_size(value)}" for name, value in report["collectives"].items())
    lines = [
        f"devices     {report['devices']} x {report['device']}",
        f"operations  {_giga(report['flops'])} GFLOP and {_giga(report['recomputed_flops'])} computed again (matrix "
        "products and convolutions, all devices; loops of unknown length once)",
        f"memory      {size(memory['total'])} of {size(memory['limit'])} a device: {size(memory['arguments'])} of "
        f"arguments, {size(memory['results'])} of results, {size(memory['temporaries'])} of temporaries",
        f"exchanged   {sent or 'nothing'} (a device)",
        "moved       " + _parts(report["traffic"], as_size, "read and written (a device)"),
    ]
    if xla:
        lines.append(
            f"XLA says    {_giga(xla.get('flops', 0))} GFLOP, {size(xla.get('bytes'))} read and written (a device; "
            "bodies of loops once)"
        )
    if report["launches"]:
        lines.append("launched    " + _parts(report["launches"], "{:,}".format, "kernels"))
    times = {what: f"{1e3 * value:.1f} ms" for what, value in report["seconds_at_peak"].items() if value is not None}
    if times:
        lines.append("at peaks    " + ", ".join(f"{what} {value}" for what, value in times.items()))
    if "seconds" in report:
        share = "no peak known" if report["mfu"] is None else f"{100 * report['mfu']:.1f} % of the peak (MFU)"
        speed = _giga(report["flops_per_second"])
        lines.append(f"step        {1e3 * report['seconds']:.1f} ms, {speed} GFLOP/s, {share}")
    return "\n".join([*lines, "", *_table(report)])


def _parts(amounts: Mapping[str, int], shown: Callable[[int], str], unit: str) -> str:
    """Their sum, and each part's, the largest first."""
    most = sorted(amounts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {shown(amount)}" for name, amount in most)
    return f"{shown(sum(amounts.values()))} {unit}, loops of unknown length once: {parts}"


def _giga(amount: float) -> str:
    return f"{amount / 1e9:,.0f}" if amount >= 1e11 else f"{amount / 1e9:.3g}"


def _table(report: Mapping[str, Any]) -> list[str]:
    """The parts, longest first. Operations' times may add up to more than the step's: on a CPU several run at once."""
    flops, times = report["flops_by_part"], report.get("seconds_by_part")
    amounts, unit = (flops, "GFLOP") if times is None else (times, "ms")
    header = ["part", *(f"{phase} {unit}" for phase in PHASES), "share", *(["GFLOP", "GFLOP/s"] if times else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    whole = sum(sum(phases.values()) for phases in amounts.values())
    for name, phases in sorted(amounts.items(), key=lambda row: -sum(row[1].values())):
        total = sum(phases.values())
        cells = [_giga(phases[phase]) if times is None else f"{1e3 * phases[phase]:.1f}" for phase in PHASES]
        cells.append(f"{100 * total / whole:.1f} %")
        if times is not None:
            work = sum(flops.get(name, {}).values())
            cells += [_giga(work), _giga(work / total) if work and total else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which updates of a run are traced: ``steps`` of them (0 for none), after the first ``start`` of this process."""

    start: int = 10
    steps: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, start="[0, inf)", steps="[0, 1000]")  # a trace of more would be unreadable


class ProfiledSteps:
    """Traces some updates of a run into ``folder`` and reports on them; a context manager around the loop."""

    def __init__(self, config: ProfileConfig, folder: Path, step: TrainStep):
        # Of several processes one is enough, and each has a part of the devices.
        self.config = config if jax.process_index() == 0 else ProfileConfig()
        self.folder, self.step = folder, step
        self._count = 0
        self._trace = contextlib.ExitStack()
        self._begin = 0.0

    def __enter__(self) -> ProfiledSteps:
        return self

    def __exit__(self, *_: object) -> None:
        if self.config.steps and self._count < self.config.start + self.config.steps:
            logger.warning("profile: the run ended after %d updates, before all were traced", self._count)
        self._trace.close()

    def before(self, state: Any) -> None:
        """Begins, if the next update is the first to be traced. ``state`` is waited for."""
        if self.config.steps and self._count == self.config.start:
            jax.block_until_ready(state)
            self._trace.enter_context(tracing(self.folder))
            self._begin = time.monotonic()
        self._count += 1

    def after(self, state: Any) -> None:
        """Ends, if the update that made ``state`` was the last to be traced."""
        steps = self.config.steps
        if not steps or self._count != self.config.start + steps:
            return
        jax.block_until_ready(state)
        seconds = (time.monotonic() - self._begin) / steps
        self._trace.close()
        found = report(self.step)
        try:
            found = measured(found, seconds, self.folder, steps, self.step.programs)
        except UserError as error:  # no reason to end a run
            logger.warning("profile: %s", error)
        write_json(self.folder / "report.json", found)
        logger.info("profile of %d updates, in %s\n%s", steps, self.folder, as_text(found))
