"""What the training loop costs beside the update itself, and what devices send each other in an update."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from cast_jax.core import sharding
from cast_jax.core.annotations import Category
from cast_jax.core.compiled import added_up, collective_bytes
from cast_jax.core.logging import read_metrics
from cast_jax.core.rules import named_leaves
from cast_jax.core.sharding import batch_sharding, make_mesh, shard_batch
from cast_jax.core.step import TrainStep
from cast_jax.data.pipeline import make_loader
from cast_jax.data.prefetch import Prefetcher
from cast_jax.data.sources.stand_in import StandIn
from cast_jax.pipeline import Pipeline
from cast_jax.trainer import RUN_AHEAD, TrainConfig, make_step, train

LINE = 5  # updates a line of the metrics
UPDATES = 3 * LINE + 1


def loop(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds an update of the demo's ``distill`` at 128 x 256, two labelled and two pseudo-labelled images.

    The bare compiled update on one batch; the loop of a run (its log, metrics, progress) on that batch; the same with
    the run's loader. They take turns of three lines of the metrics, of which the first does not count. Both the time
    that passes and the processor's, which other work on the machine does not change. Last the loop alone, with an
    update that returns at once, and the call of the update (of its own thread's processor).
    """
    with tempfile.TemporaryDirectory() as folder:
        pipeline, recipe, config = _demo(Path(folder))
        loader_config = pipeline.config.loader_config("distill")
        labelled = pipeline.datasets.labelled  # in the place of pseudo-labels, too

        def loader() -> Prefetcher:
            to_devices = functools.partial(shard_batch, mesh=pipeline.mesh)
            return Prefetcher(make_loader(labelled, labelled, loader_config), to_devices)

        with loader() as stream:
            batch = next(stream)
        step = make_step(recipe, config)
        state = step.initial_state()
        step.compile("bare", state, {}, batch)
        clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bare", "loop", "loop and loader")}
        waiting: list[float] = []
        for turn in range(repeats):
            state, seconds = _bare(step, state, batch)
            clocks["bare"] += seconds
            clocks["loop"] += _run(recipe, config, Path(folder) / f"loop-{turn}", _Same(batch))
            with loader() as stream:
                run = Path(folder) / f"loader-{turn}"
                clocks["loop and loader"] += _run(recipe, config, run, stream)
            waiting += [line["speed/waiting_for_data"] for line in read_metrics(run / "metrics.jsonl")[1:]]
            print(clocks, waiting, flush=True)
        with _at_once(step, state, batch):
            clocks["loop alone"] = _run(recipe, config, Path(folder) / "host", _Same(batch))
        clocks["call of the update"] = _calls(step, state, batch)
    medians = {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in clocks.items()}
    return [_row(name, medians, waiting) for name in medians]


def _row(name: str, medians: dict[str, tuple[float, ...]], waiting: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"update": name}
    whole = name.startswith("loop") and name != "loop alone"
    for kind, value, bare in zip(("ms", "processor's ms"), medians[name], medians["bare"], strict=True):
        row[kind] = round(1e3 * value, 1 if value > 0.1 else 2)
        row[f"of the bare, % ({kind})"] = round(100 * (value / bare - whole), 2) if name != "bare" else ""
    row["waiting for data, %"] = round(100 * statistics.median(waiting), 1) if "loader" in name else ""
    return row


def _demo(folder: Path) -> tuple[Pipeline, Any, TrainConfig]:
    from configs import demo

    config = demo.get_config("distill").to_dict()
    config["data"] |= {"image_size": (128, 256), "generated": {**config["data"]["generated"], "train": 40, "val": 2}}
    config["data"]["generated"]["source"] = 2
    pipeline = Pipeline(config, folder / "run")
    train_config = pipeline.config.train_config("distill")
    changes: dict[str, Any] = {"steps": UPDATES, "log_every": LINE, "save_every": 10**6}
    changes["optimizer"] = dataclasses.replace(train_config.optimizer, warmup_steps=0)
    return (
        pipeline,
        pipeline.config.recipe("distill", pipeline.categories),
        dataclasses.replace(train_config, **changes),
    )


class _Same:
    """A loader of one batch, which is on the devices."""

    def __init__(self, batch: Any):
        self.batch = batch

    def __next__(self) -> Any:
        return self.batch

    def get_state(self) -> None:
        return None

    def set_state(self, state: Any) -> None:
        pass


class _Clocked:
    """A loader that notes when it is asked."""

    def __init__(self, loader: Any):
        self.loader, self.asked = loader, list[tuple[float, float]]()
        self.get_state, self.set_state = loader.get_state, loader.set_state

    def __next__(self) -> Any:
        self.asked.append(_clocks())
        return next(self.loader)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _each(clocks: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of readings after every update, the mean seconds of an update in every line but the first."""
    marks = clocks[LINE::LINE]
    return [((b[0] - a[0]) / LINE, (b[1] - a[1]) / LINE) for a, b in itertools.pairwise(marks)]


def _run(recipe: Any, config: TrainConfig, folder: Path, loader: Any) -> list[tuple[float, float]]:
    """Seconds of an update, by both clocks, in the lines of a short run."""
    clocked = _Clocked(loader)
    train(recipe, config=config, folder=folder, loader=clocked)
    return _each(clocked.asked)


def _bare(step: TrainStep, state: Any, batch: Any) -> tuple[Any, list[tuple[float, float]]]:
    """The state after as many updates, and their seconds; as in a run, some are queued ahead."""
    asked, waiting = [], collections.deque[Any]()
    for _ in range(UPDATES):
        asked.append(_clocks())
        state, _, finite = step(state, {}, batch)
        waiting.append(finite)
        if len(waiting) > RUN_AHEAD:
            jax.block_until_ready(waiting.popleft())
    jax.block_until_ready(state)
    return state, _each(asked)


@contextlib.contextmanager
def _at_once(step: TrainStep, state: Any, batch: Any) -> Iterator[None]:
    """Within, updates and their compilation take no time: they give what is there already."""
    _, metrics, finite = step(jax.tree.map(lambda leaf: leaf.copy(), state), {}, batch)
    jax.block_until_ready(finite)
    with (
        mock.patch.object(TrainStep, "compile", return_value=None),
        mock.patch.object(TrainStep, "__call__", lambda self, state, frozen, batch: (state, metrics, finite)),
    ):
        yield


def _calls(step: TrainStep, state: Any, batch: Any) -> list[tuple[float, float]]:
    """Seconds until the call of an update returns, by the clock and of its thread's processor.

    None is waited for: a thread that comes back from waiting competes with the update that it has just started.
    """
    found = []
    for _ in range(UPDATES):
        begin = time.perf_counter(), time.thread_time()
        state, _, finite = step(state, {}, batch)
        found.append((time.perf_counter() - begin[0], time.thread_time() - begin[1]))
    jax.block_until_ready((state, finite))
    return found


def exchanged(repeats: int) -> list[dict[str, Any]]:
    """KiB that each of eight devices receives in an update of the demo's ``distill,smoke``, by the compiled program.

    Of eight labelled and eight pseudo-labelled images of two sizes, with 64 queries of either; with fsdp every array
    that can be is split. The parameters' own size, and that of the images in both
    views, stand beside. ``repeats`` plays no part.
    """
    jax.config.update("jax_num_cpu_devices", 8)
    sharding.SMALL = 1  # arrays of so small a model would not be split
    from configs import demo

    rows = []
    for mesh in ({"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8}):
        for size in ((64, 128), (128, 256)):
            config = demo.get_config("distill,smoke").to_dict()
            config["data"]["image_size"] = size
            config["model"]["student"]["mask_decoder"] |= {"query_stride": 0, "num_queries": 64}  # no grid of them
            config["steps"]["distill"]["data"] |= {"batch_labelled": 8, "batch_unlabelled": 8}
            run = Pipeline(config, Path()).config
            categories = tuple(Category(number, f"class {number}") for number in range(8))
            source = StandIn(categories, size, run.data.max_instances)
            stream = make_loader(source, source, run.loader_config("distill"))
            batch = next(stream)
            stream.close()
            step = make_step(
                run.recipe("distill", categories), dataclasses.replace(run.train_config("distill"), mesh=mesh)
            )
            split = batch_sharding(make_mesh(mesh))
            batch = jax.tree.map(lambda x, split=split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)
            step.compile("distill", step.like, {}, batch)
            sent = added_up(collective_bytes, step.programs)
            parameters = sum(4 * leaf.size for leaf in named_leaves(step.like.params).values())
            images = sum(4 * leaf.size for name, leaf in named_leaves(batch).items() if name.endswith("/image"))
            row: dict[str, Any] = {"mesh": f"{mesh['data']} x {mesh['fsdp']}", "images": f"{size[0]} x {size[1]}"}
            row |= {name: round(sent.get(name, 0) / 1024) for name in ("all-reduce", "all-gather", "all-to-all")}
            others = sum(size for name, size in sent.items() if name not in row)
            row |= {"others": round(others / 1024), "together": round(sum(sent.values()) / 1024)}
            rows.append(row | {"parameters": round(parameters / 1024), "images in float32": round(images / 1024)})
            print(rows[-1], flush=True)
    return rows
