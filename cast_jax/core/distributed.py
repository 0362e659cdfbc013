"""Several processes as one run: how they find each other, agree on values, stop together and leave.

The processes share a workdir. What decides the way of a run is read by the first one and told to the others, through
the key-value store of jax's coordination service, which lives in the first process: no devices take part, so waiting
costs nothing and may last. With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the only way to the coordination service, orbax's too

from cast_jax.core.config import build, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.runtime import end

logger = logging.getLogger(__name__)
HEARTBEAT = 25  # seconds without a sign of life after which jax ends the processes that are left
LEAVING = 5  # seconds that a failing process waits for others that have found the same error
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; a process that waits for one that is gone is ended by the heartbeat
_numbers = itertools.count()  # all processes call the functions below in the same order


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other.

    Attributes:
      coordinator: "" for a run of one process; "host:port", where the first process listens; or "auto", which asks
        SLURM, Open MPI, Kubernetes or a TPU pod for everything.
      num_processes, process_id: beside an address, how many there are and which one this is, from 0.
      timeout: seconds to wait for the others at the start.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    timeout: int = 300

    def __post_init__(self) -> None:
        check_ranges(self, timeout="[1, 86400]")
        if self.coordinator in ("", "auto"):
            if (self.num_processes, self.process_id) != (0, -1):
                raise UserError(
                    f"coordinator is {self.coordinator!r}, beside which num_processes and process_id are not read; "
                    "give the address of process 0 as coordinator=HOST:PORT, or leave them out"
                )
        elif not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"coordinator is {self.coordinator!r}; it must be '', 'auto' or HOST:PORT of process 0")
        elif not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"process_id is {self.process_id} of num_processes {self.num_processes}; it must lie in "
                "[0, num_processes)"
            )


def initialize(config: Mapping[str, Any]) -> None:
    """Joins the processes of :class:`DistributedConfig`; call it once, before the first computation.

    If they do not all come in time, this process ends with a message and exit code 1.

    Raises:
      UserError: faulty settings, no cluster that "auto" knows, an address that cannot be listened on, or processes with
        unequal numbers of devices.
    """
    options = build(DistributedConfig, config, "config.distributed")
    if not options.coordinator:
        if jax.process_count() > 1:
            raise UserError("this is one of several processes of a TPU pod; set config.distributed.coordinator=auto")
        return
    known: dict[str, Any] = {"num_processes": options.num_processes, "process_id": options.process_id}
    known |= {"coordinator_address": options.coordinator, "cluster_detection_method": "deactivate"}
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is StopSignals' business
    # Where another process dies, jax says so and aborts; pages of stacks and a dump of memory would add nothing.
    faulthandler.disable()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        with _deadline(options):
            jax.distributed.initialize(
                **(known if options.coordinator != "auto" else _devices_of_this_process()),
                initialization_timeout=options.timeout + 60,  # it would end the process, without saying who is missing
                heartbeat_timeout_seconds=HEARTBEAT,
            )
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if options.coordinator == "auto":
            reason = f"no cluster of SLURM, Open MPI, Kubernetes or a TPU pod is known here ({reason}); give addresses"
        raise UserError(f"config.distributed.coordinator={options.coordinator}: {reason}") from error
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise UserError(f"the {jax.process_count()} processes have unequal numbers of devices; give each the same")


def _devices_of_this_process() -> dict[str, Any]:
    """Which of a machine's GPUs a process takes that SLURM or Open MPI started: all, if it is the machine's only one.

    By itself jax would give each process one GPU, and leave the others of the machine idle.
    """
    tasks, nodes = (os.environ.get(name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES"))
    alone = (bool(tasks) and tasks == nodes) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return {"local_device_ids": []} if alone else {}  # nothing named: everything is visible


@contextlib.contextmanager
def _deadline(options: DistributedConfig) -> Iterator[None]:
    """Ends the process if the block, which Python cannot interrupt, lasts longer than it may."""
    at = f"config.distributed.coordinator={options.coordinator}"
    who, count = options.process_id, options.num_processes
    if who > 0:
        missing = f"process {who} of {count} found no coordinator, or not all the others"
        hint = "; is process 0 running there, and can its port be reached from here?"
    else:
        missing = f"not all of the {count or 'cluster’s'} processes came"
        hint = "; start all of them with the same address, and process_id=0, 1, 2, …" if count else ""

    def expire() -> None:
        logger.error("error: %s: %s within %d s%s", at, missing, options.timeout, hint)
        end(1)

    timer = threading.Timer(options.timeout, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what a run leaves."""
    return not several() or jax.process_index() == 0


def patience() -> float:
    """Seconds for which a process that got a signal waits for others that got it, too.

    The first one does: it serves the others, who without it would be aborted, with stacks, instead of ended.
    """
    return 2.0 if several() and is_first() else 0.0


def barrier() -> None:
    """Waits until all processes are here."""
    if several():
        _client().wait_at_barrier(f"cast_jax/barrier/{next(_numbers)}", FOREVER)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block alone, then all the others: for files that are made where they are missing."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of processes."""
    if not several():
        return [value]
    folder = f"cast_jax/gather/{next(_numbers)}"
    own = f"{folder}/{jax.process_index():06d}"
    _client().key_value_set(own, json.dumps(value))
    barrier()
    values = sorted(_client().key_value_dir_get(folder))
    barrier()
    _client().key_value_delete(own)
    return [json.loads(text) for _, text in values]


def agreed(value: Any) -> Any:
    """The first process's JSON value, whatever the others found: for what is read from a file that may be new."""
    if not several():
        return value
    key = f"cast_jax/agreed/{next(_numbers)}"
    if is_first():
        _client().key_value_set(key, json.dumps(value))
    text = _client().blocking_key_value_get(key, FOREVER)
    barrier()
    if is_first():
        _client().key_value_delete(key)
    return json.loads(text)


def require_same(what: str, value: Any) -> None:
    """Raises :class:`UserError` in every process unless all of them have the same JSON value."""
    values = gather(hashlib.sha256(json.dumps(value).encode()).hexdigest()) if several() else [None]
    if different := [number for number, other in enumerate(values) if other != values[0]]:
        listed = ", ".join(map(str, different[:10]))
        raise UserError(f"{what} must be the same in all processes, but differs between process 0 and {listed}")


class StopTogether:
    """Lets the processes of a loop stop after the same step when one of them is asked to.

    Args:
      ahead: by how many steps one process can be ahead of another.
    """

    def __init__(self, ahead: int) -> None:
        self._folder, self._ahead, self._announced = f"cast_jax/stop/{next(_numbers)}", ahead, False

    def __call__(self, step: int, received: int | None) -> int | None:
        """The signal to stop for after ``step``, or None. ``received`` is what this process got so far."""
        if not several():
            return received
        if received is not None and not self._announced:
            self._announced = True
            key = f"{self._folder}/{jax.process_index():06d}"
            _client().key_value_set(key, json.dumps([step + self._ahead + 1, received]))
        announced = [json.loads(text) for _, text in _client().key_value_dir_get(self._folder)]
        at, number = min(announced, default=(step + 1, None))
        return number if step >= at else None


def leave(code: int) -> NoReturn:
    """Ends this process by :func:`cast_jax.core.runtime.end`; Python's clean-up would wait for the other processes.

    A process that fails waits a moment for others with the same error; those elsewhere are ended by the heartbeat.
    Where all leave they disconnect first: without the first process, which serves them, the others would be aborted.
    """
    if several():
        with contextlib.suppress(Exception):
            _client().wait_at_barrier("cast_jax/leaving", LEAVING * 1000)
            jax_distributed.shutdown()
    end(code)


def _client() -> Any:
    return jax_distributed.global_state.client
