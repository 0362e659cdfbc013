"""The loop that every trained step uses: restore, next batch, step, log, save, evaluate.

The device is not waited for within a step: metrics stay there, and the flag that says that a step was finite is read a
few steps late. Running the same command again continues from the last checkpoint, or returns the stored result.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Bool

from cast_jax.core import metrics as metric
from cast_jax.core.checkpoint import Checkpoints, TrainState
from cast_jax.core.config import check_ranges
from cast_jax.core.distributed import StopTogether, agreed, barrier, gather, is_first, patience
from cast_jax.core.errors import DataError, DivergedError, UserError
from cast_jax.core.files import read_json, write_json
from cast_jax.core.logging import MetricsWriter, read_metrics
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.profiling import ProfileConfig, ProfiledSteps
from cast_jax.core.progress import Progress, Stopwatch, clock
from cast_jax.core.runtime import StopSignals, device_memory_gib, host_memory_gib
from cast_jax.core.sharding import RULES, make_mesh, shard_batch
from cast_jax.core.step import Trainable, TrainStep, count_images
from cast_jax.data.prefetch import StatefulIterator

logger = logging.getLogger(__name__)
RUN_AHEAD = 2  # steps that may be queued on the device before the host waits for the oldest


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a step is trained.

    Attributes:
      steps: updates in all.
      seed: of every update's key, and of the initial parameters where none are given.
      accumulate: micro-batches that each device computes one after another, to save memory.
      ema_decay: keep an exponential moving average of the parameters, for ``evaluate_ema`` or for recipes that read
        ``frozen["ema"]``.
      ema_warmup: begin it as a mean of the run's parameters; else with those that the run starts from.
      evaluate_ema: evaluate, export and return the average instead of the parameters.
      log_every, save_every, eval_every: in steps; the last step does all three. ``eval_every=0``: only there.
      keep: newest checkpoints to keep, besides the best.
      best_metric: name in the evaluation's metrics, higher is better; None exports no "best".
      mesh, sharding_rules: see :mod:`cast_jax.core.sharding`.
      profile: updates to trace into ``profile/``.
    """

    steps: int
    seed: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    accumulate: int = 1
    ema_decay: float | None = None
    ema_warmup: bool = True
    evaluate_ema: bool = False
    log_every: int = 50
    save_every: int = 1000
    eval_every: int = 0
    keep: int = 2
    best_metric: str | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1})
    sharding_rules: tuple[tuple[str, Any], ...] = RULES
    tensorboard: bool = True
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check_ranges(self, steps="[1, inf)", log_every="[1, inf)", save_every="[1, inf)", eval_every="[0, inf)")
        check_ranges(self, keep="[1, inf)", ema_decay="[0, 1)", accumulate="[1, 65536]")
        if self.evaluate_ema and self.ema_decay is None:
            raise UserError("evaluate_ema asks for a moving average, but ema_decay is None")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished step leaves.

    Attributes:
      params: the final parameters (their average where ``evaluate_ema``), on the mesh.
      metrics: the last logged training metrics, and the last evaluation's as ``evaluation/*``.
      seconds: wall time over all restarts.
      images: seen over all restarts.
      images_per_second: of training alone, without compiling, saving and evaluating.
    """

    params: Any
    metrics: dict[str, float]
    seconds: float
    images: int
    images_per_second: float


def finished(folder: Path) -> dict[str, Any] | None:
    """The stored result of a step that ran to its end (``done.json``), or None. Cheap: reads no parameters."""
    path = Path(folder) / "done.json"
    return read_json(path, "delete it to end the step again, from its last checkpoint") if path.exists() else None


def make_step(recipe: Trainable, config: TrainConfig) -> TrainStep:
    """The update that :func:`train` makes."""
    return TrainStep(
        recipe,
        optimizer=config.optimizer,
        steps=config.steps,
        mesh=make_mesh(config.mesh),
        rules=config.sharding_rules,
        ema_decay=config.ema_decay,
        ema_warmup=config.ema_warmup,
        accumulate=config.accumulate,
        seed=config.seed,
    )


def train(
    recipe: Trainable,
    *,
    config: TrainConfig,
    folder: Path,
    loader: StatefulIterator,
    frozen: Mapping[str, Any] | None = None,
    init_params: Callable[[], Any] | Any | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    export: Callable[[Any, str], None] | None = None,
) -> TrainResult:
    """Trains ``recipe`` for ``config.steps`` updates, continuing from ``folder/checkpoints`` if there are any.

    Args:
      folder: the step's own folder; its name is the step's name in the log.
      loader: its position is saved and restored with the state.
      frozen: arrays that ``loss_fn`` reads but training never changes, such as a teacher; never saved.
      init_params: parameters to start from (or a function that loads them, called only when there is no checkpoint);
        None starts from ``recipe.init``.
      evaluate: parameters -> metrics.
      export: called with (parameters, "best") whenever ``config.best_metric`` improves, and (parameters, "last").
        Like ``evaluate`` it may not keep the parameters: the next step overwrites them.

    Raises:
      DivergedError: a loss or gradient became NaN or infinite. Nothing is saved from that step on.
      SystemExit: code 128 + signal after SIGTERM or SIGINT, once the current step is saved; of several processes,
        all stop after the same step if one of them gets a signal. Before the first update, when there is nothing to
        save, the signal ends the process at once.
      UserError: a configuration, checkpoint or initial parameters that do not fit.
    """
    folder = Path(folder)
    name, done, run = folder.name, agreed(finished(folder)), make_step(recipe, config)
    with (
        Checkpoints(folder / "checkpoints", keep=config.keep, best_metric=config.best_metric) as checkpoints,
        StopSignals() as stop,
        contextlib.ExitStack() as until_the_first_update,
    ):
        until_the_first_update.enter_context(stop.by_force(patience()))
        stop_together = StopTogether(RUN_AHEAD)
        if (found := max(checkpoints.latest() or 0, done["step"] if done else 0)) > config.steps or (
            done and done["step"] != config.steps
        ):
            raise UserError(f"{folder} was trained for {found} steps, but steps={config.steps}: use another workdir")
        restored = checkpoints.restore(run.like)
        if done is not None and restored is not None and int(restored.state.step) == config.steps:
            logger.info("%s: finished already, at step %d", name, done["step"])
            until_the_first_update.close()
            if export is not None:  # what it exported may be gone, or damaged
                export(_shown(restored.state, config), "last")
            _stop_if_any(stop)
            return _result(_shown(restored.state, config), done)
        if restored is not None:
            state, start, metadata = restored.state, int(restored.state.step), restored.metadata
            if restored.loader_state is not None:
                loader.set_state(restored.loader_state)
            logger.info("%s: continuing from step %d of %d", name, start, config.steps)
        else:
            state, start, metadata = run.initial_state(init_params() if callable(init_params) else init_params), 0, {}
            logger.info("%s: starting", name)
        del restored, init_params  # nothing may hold what the first, donating step overwrites
        frozen = run.place(frozen)
        images, watch = metadata.get("images", 0), Stopwatch(metadata.get("seconds"))
        pending = _Pending(name, checkpoints)
        writer = MetricsWriter(folder, step=start, tensorboard=config.tensorboard)
        record = _Record(name, config, writer, images, watch.read())
        judge = _Judge(name, config, checkpoints, writer, watch, stop, evaluate, export)

        with (
            Progress(name, config.steps, start=start) as progress,
            ProfiledSteps(config.profile, folder / "profile", run) as profile,
        ):
            judge(start, state)
            for step in range(start + 1, config.steps + 1):
                with watch.measure("wait"):
                    batch = shard_batch(_next(loader, name, step, stop), run.mesh)
                if step == start + 1:
                    logger.info("%s: %.2f MB an image to the devices", name, _bytes(batch) / count_images(batch) / 1e6)
                    with watch.measure("compile"):
                        run.compile(name, state, frozen, batch)
                    barrier()  # the first exchange of data between processes does not wait long for the slowest one
                    until_the_first_update.close()
                profile.before(state)
                with jax.profiler.StepTraceAnnotation(name, step_num=step):
                    state, metrics, finite = run(state, frozen, batch)
                profile.after(state)
                images += count_images(batch)
                pending.add(step, metrics, finite)
                record.add(metrics)
                progress.update(step)
                stopping, last = stop_together(step, stop.received), step == config.steps
                if step % config.log_every == 0 or last:
                    pending.settle()
                    progress.show(record.write(step, images, watch.read()))
                if step % config.save_every == 0 or judge.due(step) or last or stopping is not None:
                    pending.settle()
                    with watch.measure("save"):
                        writer.sync()
                        checkpoints.save(state, loader.get_state(), {"images": images, "seconds": watch.read()})
                if stopping is not None:
                    logger.warning("%s: saved step %d; run the same command again to continue", name, step)
                    raise SystemExit(128 + stopping)
                judge(step, state)
        writer.close()
        if export is not None:
            export(_shown(state, config), "last")
        evaluation = checkpoints.evaluations().get(config.steps, {})
    done = agreed(_finish(folder, config.steps, evaluation, images, watch.read()) if is_first() else None)
    logger.info("%s: finished, %s, %.1f images/s", name, clock(done["seconds"]), done["images_per_second"])
    _stop_if_any(stop)
    return _result(_shown(state, config), done)


def _stop_if_any(stop: StopSignals) -> None:
    """Ends all processes if one got a signal after its last update, where no loop reads it any more."""
    if received := [number for number in gather(stop.received) if number is not None]:
        raise SystemExit(128 + received[0])


class _Pending:
    """Steps whose finite flag has not been read yet. Reading the oldest also bounds how far the host runs ahead."""

    def __init__(self, name: str, checkpoints: Checkpoints) -> None:
        self.name, self.checkpoints = name, checkpoints
        self.steps: collections.deque[tuple[int, dict[str, metric.Pair], Bool[Array, ""]]] = collections.deque()

    def add(self, step: int, metrics: dict[str, metric.Pair], finite: Bool[Array, ""]) -> None:
        self.steps.append((step, metrics, finite))
        self.settle(RUN_AHEAD)

    def settle(self, left: int = 0) -> None:
        """Waits until at most ``left`` steps are not known to be finite; raises :class:`DivergedError`."""
        while len(self.steps) > left:
            step, metrics, finite = self.steps.popleft()
            if not finite:
                saved = self.checkpoints.latest()
                kept = "there is no checkpoint yet" if saved is None else f"the checkpoint of step {saved} is kept"
                terms = ", ".join(metric.non_finite(metrics))
                raise DivergedError(f"{self.name}: step {step} is not finite ({terms}); {kept}")


class _Record:
    """The metrics of the steps since the last line, and how fast they went."""

    def __init__(self, name: str, config: TrainConfig, writer: MetricsWriter, images: int, seconds: dict[str, float]):
        self.name, self.config, self.writer = name, config, writer
        self.totals: dict[str, metric.Pair] | None = None
        self.images, self.seconds = images, seconds

    def add(self, metrics: dict[str, metric.Pair]) -> None:
        self.totals = metrics if self.totals is None else _add(self.totals, metrics)

    def write(self, step: int, images: int, seconds: dict[str, float]) -> dict[str, float]:
        """Writes a line, and returns the few numbers for the progress bar."""
        assert self.totals is not None
        training = max(training_seconds(seconds) - training_seconds(self.seconds), 1e-9)
        waiting = seconds.get("wait", 0.0) - self.seconds.get("wait", 0.0)
        memory = {"memory/device_gib": device_memory_gib(), "memory/host_gib": host_memory_gib()}
        values = metric.reduce(self.totals) | {
            "speed/images_per_second": (images - self.images) / training,
            "speed/waiting_for_data": waiting / training,
            **{name: value for name, value in memory.items() if value is not None},
        }
        self.writer.write(step, values)
        logger.debug("%s step %d: %s", self.name, step, _numbers(values))
        self.totals, self.images, self.seconds = None, images, seconds
        return {"loss": values["loss/total"], "images/s": values["speed/images_per_second"]}


@dataclasses.dataclass
class _Judge:
    """Evaluates a saved step once, also over restarts, and exports it if it is the best."""

    name: str
    config: TrainConfig
    checkpoints: Checkpoints
    writer: MetricsWriter
    watch: Stopwatch
    stop: StopSignals
    evaluate: Callable[[Any], dict[str, float]] | None
    export: Callable[[Any, str], None] | None

    def due(self, step: int) -> bool:
        every = self.config.eval_every
        return self.evaluate is not None and (step == self.config.steps or bool(every and step and step % every == 0))

    def __call__(self, step: int, state: TrainState) -> None:
        past = self.checkpoints.evaluations()
        if self.evaluate is None or not self.due(step) or step in past:
            return
        _stop_if_any(self.stop)  # all together: one of several processes alone would leave the others waiting
        params, best = _shown(state, self.config), self.config.best_metric
        with self.watch.measure("evaluate"), self.stop.at_once():
            values = {name: float(value) for name, value in self.evaluate(params).items()}
            logger.info("%s step %d: %s", self.name, step, _numbers(values))
            self.writer.write(step, {f"evaluation/{name}": value for name, value in values.items()})
            # Exported and written before it is recorded: a run killed in between does all of it again.
            earlier = [old[best] for at, old in past.items() if at < step and best in old]
            if self.export is not None and best in values and values[best] > max(earlier, default=-float("inf")):
                self.export(params, "best")
            self.checkpoints.record_evaluation(step, values)


_add = jax.jit(metric.add)


def _bytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(batch))


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Of a :class:`Stopwatch` reading, what is neither compiling nor saving nor evaluating."""
    return seconds["total"] - sum(seconds.get(activity, 0.0) for activity in ("compile", "save", "evaluate"))


def _shown(state: TrainState, config: TrainConfig) -> Any:
    return state.ema if config.evaluate_ema else state.params


def _next(loader: StatefulIterator, name: str, step: int, stop: StopSignals) -> Any:
    try:
        return next(loader)  # type: ignore[call-overload]
    except DataError:
        if stop.received is not None:  # it ended a worker process that had only begun
            raise SystemExit(128 + stop.received) from None
        raise
    except StopIteration as end:
        raise DataError(f"{name}: the data ended before step {step}; the loader must repeat without end") from end


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _finish(folder: Path, step: int, evaluation: dict[str, float], images: int, seconds: dict[str, float]) -> dict:
    """Writes ``done.json``, the last thing a step does."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss/total" in line]
    logged = lines[-1] if lines else {}
    metrics = {name: value for name, value in logged.items() if name != "step"}
    done = {
        "step": step,
        "metrics": metrics | {f"evaluation/{name}": value for name, value in evaluation.items()},
        "seconds": seconds["total"],
        "images": images,
        "images_per_second": images / max(training_seconds(seconds), 1e-9),
    }
    write_json(folder / "done.json", done)
    return done


def _result(params: Any, done: dict[str, Any]) -> TrainResult:
    return TrainResult(params, done["metrics"], done["seconds"], done["images"], done["images_per_second"])
