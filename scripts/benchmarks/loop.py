"""What the training loop costs beside the update itself, and what devices send each other in an update."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from cast_jax.core.annotations import Category
from cast_jax.core.compiled import collective_bytes
from cast_jax.core.logging import read_metrics
from cast_jax.core.rules import named_leaves
from cast_jax.core.sharding import batch_sharding, make_mesh, shard_batch
from cast_jax.core.step import TrainStep, count_images
from cast_jax.data.pipeline import make_loader
from cast_jax.data.prefetch import Prefetcher
from cast_jax.data.sources.stand_in import StandIn
from cast_jax.pipeline import Pipeline
from cast_jax.trainer import TrainConfig, make_step, train

LINE = 10  # updates a line of the metrics


def loop(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds an update of the demo's ``distill`` at 128 x 256, two labelled and two pseudo-labelled images.

    The bare compiled update on one batch; the loop of a run (its log, metrics, progress) on that batch; the same with
    the run's loader. They take turns of three lines of ten updates, of which the first does not count. Last the loop
    alone: with an update that returns at once.
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
        times: dict[str, list[float]] = {name: [] for name in ("bare", "loop", "loop and loader")}
        waiting = []
        for turn in range(repeats):
            state, seconds = _bare(step, state, batch)
            times["bare"] += seconds
            times["loop"] += [line["seconds"] for line in _run(recipe, config, Path(folder) / f"a{turn}", _Same(batch))]
            with loader() as stream:
                lines = _run(recipe, config, Path(folder) / f"b{turn}", stream)
            times["loop and loader"] += [line["seconds"] for line in lines]
            waiting += [line["speed/waiting_for_data"] for line in lines]
            print(times, waiting, flush=True)
        with _at_once(step, state, batch):
            host = [line["seconds"] for line in _run(recipe, config, Path(folder) / "host", _Same(batch))]
        dispatch = _dispatch(step, state, batch)
    bare = statistics.median(times["bare"])
    rows = [
        {
            "update": name,
            "ms": round(1e3 * statistics.median(seconds), 1),
            "over the bare one, %": round(100 * (statistics.median(seconds) / bare - 1), 1),
            "waiting for data, %": round(100 * statistics.median(waiting), 1) if "loader" in name else "",
        }
        for name, seconds in times.items()
    ]
    for name, value in (("loop alone", statistics.median(host)), ("call of the update", dispatch)):
        share = round(100 * value / bare, 2)
        rows.append(
            {"update": name, "ms": round(1e3 * value, 2), "over the bare one, %": share, "waiting for data, %": ""}
        )
    return rows


def _demo(folder: Path) -> tuple[Pipeline, Any, TrainConfig]:
    from configs import demo

    config = demo.get_config("distill").to_dict()
    config["data"] |= {"image_size": (128, 256), "generated": {**config["data"]["generated"], "train": 40, "val": 2}}
    config["data"]["generated"]["source"] = 2
    pipeline = Pipeline(config, folder / "run")
    train_config = pipeline.config.train_config("distill")
    changes = {"steps": 3 * LINE, "log_every": LINE, "save_every": 10**6}
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


def _run(recipe: Any, config: TrainConfig, folder: Path, loader: Any) -> list[dict[str, float]]:
    """The lines of the metrics of a short run, but for the first, with the seconds of an update."""
    train(recipe, config=config, folder=folder, loader=loader)
    images = count_images(loader.batch if isinstance(loader, _Same) else next(loader))
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss/total" in line]
    return [line | {"seconds": images / line["speed/images_per_second"]} for line in lines[1:]]


def _bare(step: TrainStep, state: Any, batch: Any) -> tuple[Any, list[float]]:
    """The state after three lines' updates, and the mean seconds of the last two lines'; one update is queued ahead."""
    seconds = []
    for _ in range(3):
        begin, waiting = time.perf_counter(), None
        for _ in range(LINE):
            state, _, finite = step(state, {}, batch)
            jax.block_until_ready(waiting)
            waiting = finite
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - begin) / LINE)
    return state, seconds[1:]


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


def _dispatch(step: TrainStep, state: Any, batch: Any) -> float:
    """Seconds until the call of an idle device's update returns (which is before it has ended)."""
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        state, _, finite = step(state, {}, batch)
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(finite)
    return statistics.median(seconds)


def exchanged(repeats: int) -> list[dict[str, Any]]:
    """KiB that each of eight devices receives in an update of the demo's ``distill``, by the compiled program.

    Of eight labelled and eight pseudo-labelled images of two sizes, with 64 queries of either; operations inside loops
    count once. The parameters' own size, and that of the images in both views, stand beside. ``repeats`` plays no part.
    """
    jax.config.update("jax_num_cpu_devices", 8)
    from configs import demo

    rows = []
    for mesh in ({"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8}):
        for size in ((64, 128), (128, 256)):
            config = demo.get_config("distill").to_dict()
            config["data"]["image_size"] = size
            config["model"]["student"]["mask_decoder"] = {"query_stride": 0, "num_queries": 64}  # no grid
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
            sharding = batch_sharding(make_mesh(mesh))
            batch = jax.tree.map(
                lambda x, sharding=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
            )
            step.compile("distill", step.like, {}, batch)
            sent = collective_bytes(step.program)
            parameters = sum(4 * leaf.size for leaf in named_leaves(step.like.params).values())
            images = sum(4 * leaf.size for name, leaf in named_leaves(batch).items() if name.endswith("/image"))
            row = {"mesh": f"{mesh['data']} x {mesh['fsdp']}", "images": f"{size[0]} x {size[1]}"}
            row |= {name: round(sent.get(name, 0) / 1024) for name in ("all-reduce", "all-gather", "all-to-all")}
            others = sum(size for name, size in sent.items() if name not in row)
            row |= {"others": round(others / 1024), "together": round(sum(sent.values()) / 1024)}
            rows.append(row | {"parameters": round(parameters / 1024), "images in float32": round(images / 1024)})
            print(rows[-1], flush=True)
    return rows
