"""The data pipeline against torch's DataLoader, and what it holds."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import status_kib

from cast_jax.data.pipeline import LoaderConfig, batch_bytes, make_loader
from cast_jax.data.scenes import write_scenes
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cached import Cached
from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.views import ViewConfig

LOADER = LoaderConfig(view=ViewConfig(image_size=(512, 1024), max_instances=100), batch_labelled=4)


def loader(repeats: int) -> list[dict[str, Any]]:
    """Images a second from files of 1024 x 2048 to batches of two views of 512 x 1024 with masks, two at a time.

    Ours by two threads, without and with ``data.cache``; torch's DataLoader by two processes. They take turns of 40
    images, after the batches that each had made ahead.
    """
    try:
        from benchmarks import torch_loader
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        sys.exit(
            f"error: {error.name} is not installed. Only this benchmark needs torchvision; so that it leaves the "
            "environment's torch alone, install it beside: pip install --no-deps --target FOLDER torchvision==0.28.0, "
            "and run this with PYTHONPATH=FOLDER"
        )
    ahead, batches = 6, 10
    with tempfile.TemporaryDirectory() as folder:
        source = _street_scenes(Path(folder), 8, (1024, 2048))
        theirs = torch_loader.batches(source, LOADER.view, LOADER.batch_labelled, workers=2)
        next(theirs)  # its processes are there before our threads
        streams: dict[str, Any] = {
            "cast_jax": make_loader(source, None, LOADER),
            "cast_jax, cache": make_loader(Cached(source, Path(folder) / "cache", LOADER.view), None, LOADER),
            "torch": theirs,
        }
        sizes = {name: batch_bytes(next(stream)) for name, stream in streams.items() if name != "torch"}
        sizes["torch"] = statistics.mean(torch_loader.batch_bytes(next(streams["torch"])) for _ in range(ahead))
        times: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(repeats):
            for name, stream in streams.items():
                _take(stream, ahead)
                start = time.perf_counter()
                _take(stream, batches)
                times[name].append(time.perf_counter() - start)
        for name in ("cast_jax", "cast_jax, cache"):
            streams[name].close()
        del streams, stream, theirs  # ends its processes
    ratios = {name: [torch / own for own, torch in zip(times[name], times["torch"], strict=True)] for name in times}
    return [
        {
            "loader": name,
            "images/s": round(batches * LOADER.batch_labelled / statistics.median(seconds), 1),
            "torch's time / its": round(statistics.median(ratios[name]), 2),
            "least": round(min(ratios[name]), 2),
            "most": round(max(ratios[name]), 2),
            "MB to the device an image": round(sizes[name] / 1e6, 1),
        }
        for name, seconds in times.items()
    ]


def loader_memory(repeats: int) -> list[dict[str, Any]]:
    """What this process holds while it streams 10,000 different records: the median over 20 batches (Linux only).

    The records are links to a few scenes, small ones and those of :func:`loader`. ``repeats`` plays no part.
    """
    rows = []
    for height, cached in ((128, False), (128, True), (1024, False), (1024, True)):
        with tempfile.TemporaryDirectory() as folder:
            source: Source = _street_scenes(Path(folder), 8, (height, 2 * height), records=10_000)
            view = dataclasses.replace(LOADER.view, image_size=(height // 2, height))
            if cached:
                source = Cached(source, Path(folder) / "cache", view)
            stream = make_loader(source, None, dataclasses.replace(LOADER, view=view))
            row: dict[str, Any] = {"images": f"{height} x {2 * height}", "cache": "yes" if cached else "no"}
            taken = 0
            for images in (100, 1_000, 10_000):
                _take(stream, images // LOADER.batch_labelled - taken - 20)
                held = []
                for _ in range(20):
                    _take(stream, 1)
                    held.append(status_kib("VmRSS") / 1024)
                taken = images // LOADER.batch_labelled
                row[f"MiB at {images} images"] = round(statistics.median(held))
                print(row, flush=True)
            stream.close()
            rows.append(row)
    return rows


def _street_scenes(root: Path, count: int, size: tuple[int, int], records: int = 0) -> Cityscapes:
    """Generated scenes of a (height, width); ``records`` images of a city of links to them instead, if given."""
    write_scenes(root, split_sizes={"train": count}, image_size=size, look="target")
    scenes = Cityscapes(root, "train")
    for number in range(records):
        record = scenes.record(number % count)
        assert record.annotation is not None
        for file in (record.path, record.annotation):
            suffix = file.name.removeprefix(str(record.image_id))
            link = file.parents[2] / "links" / "city" / f"city_{number:06d}_000000{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return Cityscapes(root, "links") if records else scenes


def _take(stream: Iterator[Any], batches: int) -> None:
    for _ in range(batches):
        next(stream)
