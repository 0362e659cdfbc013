"""Saving and restoring a training run: the one module around orbax.

A checkpoint holds the state's arrays, the data loader's position and a small metadata record. Orbax writes into a
temporary folder and renames it, so a killed run leaves a whole checkpoint or none. Restoring always names the target
shardings, so a run saved on eight GPUs opens on one CPU. Of the arrays' bytes orbax checks none (a disk may lose some
in a power cut, or later): the record holds their sum.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Int

from cast_jax.core.distributed import agreed, barrier, gather, is_first
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json, write_json
from cast_jax.core.rules import named_leaves, nearest

logger = logging.getLogger(__name__)
EVALUATIONS = "evaluations.json"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: the trained network.
      opt_state: of the optimiser.
      ema: moving average of ``params``, or None.
      bank: a recipe's own arrays (memory bank of past embeddings), or None.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema: Any = None
    bank: Any = None


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the state on its shardings, the loader's position (None if unknown), metadata."""

    state: TrainState
    loader_state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one trained step; a context manager that finishes pending writes on exit.

    Args:
      folder: holds one subfolder a step, and ``evaluations.json``.
      keep: how many of the newest to keep; the best by ``best_metric`` is kept besides.
      best_metric: name in the metrics given to :meth:`record_evaluation`, higher is better; None keeps no best.
    """

    def __init__(self, folder: Path, *, keep: int = 2, best_metric: str | None = None) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}: at least one checkpoint must be kept")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.best_metric = best_metric
        # Orbax reports each file at INFO; the root handlers of a user's program need not hear it.
        logging.getLogger("absl").setLevel(max(logging.WARNING, logging.getLogger("absl").level))
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Each process reads alone, so that one that cannot does not leave the others waiting for it.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None,
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process_{jax.process_index()}",
        )
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(multiprocessing_options=alone), record=ocp.JsonCheckpointHandler()
        )
        self._reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        path = self.folder / EVALUATIONS
        hint = "delete it to go on without the evaluations so far"
        stored = agreed(read_json(path, hint) if path.exists() else {})
        self._evaluations: dict[int, dict[str, float]] = {int(step): metrics for step, metrics in stored.items()}

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(prune=kind is None)

    def close(self, *, prune: bool = True) -> None:
        """Finishes pending writes. Only all processes together may ``prune``, so not one that fails alone."""
        with self._writing():
            self._manager.wait_until_finished()
            if prune:
                self._prune()
            self._manager.close()
            self._reader.close()

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The saved step with the highest ``best_metric`` (the earliest of equals), or None."""
        if self.best_metric is None:
            return None
        scored = {step: metrics.get(self.best_metric, math.nan) for step, metrics in self.evaluations().items()}
        known = [step for step in self.steps() if math.isfinite(scored.get(step, math.nan))]
        return max(known, key=lambda step: (scored[step], -step), default=None)

    def evaluations(self) -> dict[int, dict[str, float]]:
        """The recorded metrics by step."""
        return dict(self._evaluations)

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Stores the evaluation of ``step``."""
        if self.best_metric is not None and self.best_metric not in metrics:
            raise UserError(f"best_metric {self.best_metric!r} is not evaluated; {nearest(self.best_metric, metrics)}")
        self._write_evaluations(self._evaluations | {step: metrics})

    def save(self, state: TrainState, loader_state: Any, metadata: dict[str, Any]) -> None:
        """Saves ``state`` under its step unless it is there, and removes what need not be kept.

        ``loader_state`` is bytes or a JSON value, the same in all processes. Returns once ``state`` may be donated:
        orbax then holds host copies, or on a CPU views, which jax does not let a donating step overwrite. The writing
        goes on in the background. Old checkpoints go when the next save begins, so that there is a whole one at any
        time.
        """
        step = int(state.step)
        if step in self.steps():
            return
        record = {"metadata": metadata, "loader": _to_json(loader_state), "shapes": _shapes(state), "sum": _sum(state)}
        record["checksum"] = _checksum(record)
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        with self._writing():
            self._manager.wait_until_finished()
            self._prune()
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        ``like`` gives shapes, dtypes and shardings (arrays or ``ShapeDtypeStruct``). A checkpoint that cannot be read
        is set aside with a warning and the one before is tried; evaluations of later steps are forgotten. Raises
        :class:`UserError` if none can be read, or if the parameters are those of another configuration.
        """
        self._manager.wait_until_finished()
        unreadable: list[int] = []
        for step in reversed(agreed(self.steps())):
            restored, total, reason = self._try_to_read(step, like)
            reasons = list(filter(None, gather(reason)))
            # Summing up takes all processes, which have all read it here.
            if restored is not None and not reasons and total is not None and _sum(restored.state) != total:
                reasons = ["its arrays are not those that were saved"]
            if reasons:
                logger.warning("checkpoint %d in %s cannot be read (%s)", step, self.folder, reasons[0])
                unreadable.append(step)
                restored = None  # there may not be room for two
                continue
            if unreadable:
                logger.warning("continuing from checkpoint %d instead", step)
                self._set_aside(unreadable)
            self._write_evaluations({at: metrics for at, metrics in self._evaluations.items() if at <= step})
            return restored
        if unreadable:
            raise UserError(
                f"no checkpoint in {self.folder} can be read (see the warnings above); if memory was not short, delete "
                "that folder to start this step anew"
            )
        self._write_evaluations({})
        return None

    def _try_to_read(self, step: int, like: TrainState) -> tuple[Restored | None, int | None, str]:
        """The checkpoint and the sum of its arrays when it was saved, or why it cannot be read."""
        try:
            return *self._read(step, like), ""
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many types for a damaged file
            return None, None, str(error).strip().split("\n")[0][:200] or type(error).__name__

    def _read(self, step: int, like: TrainState) -> tuple[Restored, int | None]:
        folder = self.folder / str(step)
        record = self._reader.restore(folder, ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if "checksum" in record and record.pop("checksum") != _checksum(record):
            raise OSError("its record is not the one that was saved")
        _check_shapes(record["shapes"], _shapes(like), folder)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self._reader.restore(folder, arguments)["state"]
        return Restored(state, _from_json(record["loader"]), record["metadata"]), record.get("sum")

    def _write_evaluations(self, evaluations: dict[int, dict[str, float]]) -> None:
        if evaluations != self._evaluations and is_first():
            write_json(self.folder / EVALUATIONS, {str(step): metrics for step, metrics in evaluations.items()})
        self._evaluations = evaluations

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk is an ``OSError``, whatever orbax and tensorstore make of it."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or os.strerror(errno.ENOSPC) in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from error
            raise

    def _prune(self) -> None:
        steps = self.steps()
        for old in steps[: -self.keep]:
            if old != self.best():
                self._manager.delete(old)

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if is_first() else ():
            target = self.folder / f"unreadable-{step}"
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        barrier()
        self._manager.reload()


def _shapes(state: TrainState) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(state).items()}


def _sum(state: TrainState) -> int:
    """The sum of all elements' bits modulo 2^64, the same however the arrays are spread over devices.

    Any one damaged element changes it. All processes must ask; some tenths of a second a GB.
    """
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.replica_id == 0]
    return sum(gather(sum(_sum_bits(np.asarray(shard.data)) for shard in shards))) % 2**64


def _sum_bits(array: np.ndarray) -> int:
    return int(array.reshape(-1).view(f"u{array.dtype.itemsize}").sum(dtype=np.uint64))


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _check_shapes(saved: dict[str, str], wanted: dict[str, str], path: Path) -> None:
    """Raises :class:`UserError` listing every difference between a checkpoint's arrays and this run's."""
    faults = [f"{name}: saved but not in this model" for name in saved if name not in wanted]
    faults += [f"{name}: in this model but not saved" for name in wanted if name not in saved]
    faults += [
        f"{name}: saved {shape}, now {wanted[name]}"
        for name, shape in saved.items()
        if wanted.get(name, shape) != shape
    ]
    if faults:
        shown = "\n  ".join(faults[:20]) + (f"\n  and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise UserError(
            f"{path} was saved with another configuration, or by an earlier version; use another workdir, or what it "
            f"was made with:\n  {shown}"
        )


def _to_json(loader_state: Any) -> Any:
    encoded = isinstance(loader_state, bytes)
    return {"base64": base64.b64encode(loader_state).decode()} if encoded else loader_state


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) and set(value) == {"base64"} else value
