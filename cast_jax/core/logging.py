"""What a run leaves to read: log.txt, metrics.jsonl, TensorBoard events, environment.json."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar
from tqdm import tqdm

from cast_jax.core.distributed import is_first
from cast_jax.core.files import atomic_write

PACKAGES = ("cast_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pycocotools")


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(path: Path | None = None, *, level: int = logging.INFO) -> logging.Logger:
    """Sends the package's log to the console, from ``level`` on, and appends all of it to ``path`` with times.

    Processes other than the first stay silent below WARNING. Calling again replaces the previous set-up.
    """
    logger = logging.getLogger("cast_jax")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG if is_first() else logging.WARNING)
    logger.propagate = False
    of_jax = logging.getLogger("jax")
    if of_jax.level == logging.NOTSET:  # else somebody wants to see it (JAX_LOGGING_LEVEL)
        of_jax.setLevel(logging.WARNING)  # absl, which reads a script's flags, shows all that is logged
    console = _ConsoleHandler(level)
    console.setFormatter(logging.Formatter("%(message)s" if is_first() else f"[{jax.process_index()}] %(message)s"))
    logger.addHandler(console)
    if path is not None and is_first():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)
    return logger


class MetricsWriter:
    """Appends one line a logged step to ``folder/metrics.jsonl``, and the same values to TensorBoard.

    Args:
      folder: the trained step's folder.
      step: the step that the run continues from. Lines beyond it, and a line cut in half, are removed, so that a
        resumed run lists no step twice.
      tensorboard: write event files.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = True) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._events: EventsWriter | None = None
        self._file = None
        self._present: set[tuple[int, frozenset[str]]] = set()
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        self._present = {(line["step"], frozenset(line) - {"step"}) for line in lines}
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            earlier = any(Path(folder).glob("events.out.tfevents.*"))
            self._events = EventsWriter(str(Path(folder) / "events"), f".{os.getpid()}")
            if step or earlier:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._add_event(step + 1, session_log=start)  # TensorBoard forgets earlier events from here on

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends ``values`` (name -> number) of ``step``, unless an earlier run wrote the same names for that step."""
        if self._file is None or (step, frozenset(values)) in self._present:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._add_event(step, summary=scalar(name, value))
            self._events.flush()

    def _add_event(self, step: int, **content: Any) -> None:
        assert self._events is not None
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, after which the next event waits for ever.
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def sync(self) -> None:
        """Waits until the lines are on the disk: a checkpoint that survives a power cut must find those before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; none if there is no file.

    A last line cut in half by a kill is left out, and with a warning any other that cannot be read.
    """
    path = Path(path)
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            logging.getLogger(__name__).warning("%s: line %d is damaged and left out", path, number)
    return lines


def environment() -> dict[str, Any]:
    """Versions and machine, for ``environment.json``: enough to say where a figure was measured."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
