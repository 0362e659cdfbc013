"""Batches for training and evaluation: read, cut into views, stacked, at the same place of the stream after a restart.

Training batches are random access: batch ``n`` is a function of (seed, n) alone, and each process of a run makes its
part of it. The state of a loader is therefore just the number of its next batch, whatever the number of threads, worker
processes or processes of the run.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import grain
import jax
import numpy as np
from absl import flags

from cast_jax.core.annotations import Instances
from cast_jax.core.config import check_ranges
from cast_jax.core.errors import DataError, UserError
from cast_jax.data.sources.base import Source
from cast_jax.data.views import VIEW_NAMES, Group, ViewConfig, eval_view, make_views

Batch = dict[str, Group]

# grain lets a dataset have up to sys.maxsize elements; this many batches outlast any run and stay exact in a float.
_ENDLESS = 2**48


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a training batch holds and how it is made.

    Attributes:
      view: the views' geometry, colours, size and number of instance slots.
      views: which views a group has: one or both of "weak" and "strong".
      batch_labelled, batch_unlabelled: images of each kind in a batch, over all processes.
      seed: of the order of the images and of all views.
      num_threads: threads that make batches (in each worker process, if there are any).
      num_workers: worker processes; 0 makes batches in this process. Worth it from about eight cores on.
      prefetch: batches made ahead of the one that is asked for (by each worker).
      process_index, process_count: which part of every batch this process of the run makes.
    """

    view: ViewConfig
    batch_labelled: int
    batch_unlabelled: int = 0
    views: tuple[str, ...] = VIEW_NAMES
    seed: int = 0
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 2
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, batch_labelled="[0, 65536]", batch_unlabelled="[0, 65536]", seed="[0, inf)")
        check_ranges(self, num_threads="[1, 1024]", num_workers="[0, 1024]", prefetch="[1, 1024]")
        if self.batch_labelled + self.batch_unlabelled == 0:
            raise UserError("batch_labelled and batch_unlabelled are both 0: a batch needs an image")
        if not self.views or not set(self.views) <= set(VIEW_NAMES):
            raise UserError(f"views is {self.views}; choose one or both of {VIEW_NAMES}")
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index {self.process_index} is not below process_count {self.process_count}")
        for name in ("batch_labelled", "batch_unlabelled"):
            if getattr(self, name) % self.process_count:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of the {self.process_count} processes"
                )


def make_loader(labelled: Source | None, unlabelled: Source | None, config: LoaderConfig) -> Loader:
    """An endless stream of (this process's part of) batches ``{"labelled": group, "unlabelled": group}`` of arrays.

    A group is :func:`cast_jax.data.views.make_views`'s with a leading batch axis; a kind with batch size 0 is absent.
    Each kind is shuffled anew in every epoch and every image is seen once per epoch, across all processes; a batch may
    reach into the next epoch, so a source may have fewer images than a batch. A source without categories has images
    without instances; one with categories (pseudo-labels) has its instances, whichever kind it is.

    Raises:
      DataError: a kind with a positive batch size has no source, or an empty one.
      UserError: see :class:`LoaderConfig`.
    """
    streams = {}
    seeds = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    kinds = (
        ("labelled", labelled, config.batch_labelled, seeds[0]),
        ("unlabelled", unlabelled, config.batch_unlabelled, seeds[1]),
    )
    for kind, source, count, seed in kinds:
        if count == 0:
            continue
        if source is None or len(source) == 0:
            raise DataError(f"there are no {kind} images, but data.batch_{kind} is {count}: add images or set it to 0")
        share = count // config.process_count
        # Random numbers belong to the place in the global stream. The rows of a batch are cut into one piece a process,
        # so that the batch that these make together does not depend on their number.
        places = range(config.process_index * share, (config.process_index + 1) * share)
        streams[kind] = _Stream(_stream(source, config, seed), count, places)
    return Loader(grain.MapDataset.range(_ENDLESS).map(_MakeBatch(streams)), config)


def _stream(source: Source, config: LoaderConfig, seed: int) -> grain.MapDataset:
    """The endless sequence of the groups of one kind, in random access."""
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    return indices.random_map(_MakeGroup(source, config.view, config.views))


class _Stream(NamedTuple):
    groups: grain.MapDataset
    batch: int
    places: range  # in a batch


@dataclasses.dataclass(frozen=True)
class _MakeGroup(grain.transforms.RandomMap):
    source: Source
    view: ViewConfig
    names: tuple[str, ...]

    def random_map(self, element: int, rng: np.random.Generator) -> Group:
        image = self.source.image(element)
        known = bool(self.source.categories)
        instances = self.source.instances(element) if known else Instances.empty(image.shape[0], image.shape[1])
        return make_views(image, instances, rng, self.view, self.names)


@dataclasses.dataclass(frozen=True)
class _MakeBatch(grain.transforms.Map):
    streams: dict[str, _Stream]

    def map(self, element: int) -> Batch:
        return {
            kind: _stack([stream.groups[element * stream.batch + place] for place in stream.places])
            for kind, stream in self.streams.items()
        }


def _stack(items: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


class Loader(Iterator[Batch]):
    """Batches made ahead of their use; ``get_state``/``set_state`` name the next one.

    The state ``{"next_batch": n}`` is JSON. It counts batches: it means the same place for any number of threads,
    workers and processes, but not for other batch sizes.
    """

    def __init__(self, batches: grain.MapDataset, config: LoaderConfig):
        self._batches = batches
        self._config = config
        self._iterator: grain.DatasetIterator | None = None
        self._next = 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except BaseException as error:
            self.close()  # grain has passed the batch that failed; the next call must not skip it
            if isinstance(error, RuntimeError) and "Worker process" in str(error):
                raise DataError(
                    f"a worker process of the data loader died ({str(error).split('. ')[0]}); if memory was short, use "
                    "fewer workers (config.data.loader.num_workers); run the same command again to continue"
                ) from error
            raise
        self._next += 1
        # A worker's arrays live in shared memory that is freed with them: give out ordinary ones.
        return jax.tree.map(np.array, batch) if self._config.num_workers else batch

    def get_state(self) -> dict[str, int]:
        """The place after the last batch handed out, however many are made ahead."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the place that :meth:`get_state` named, forwards or backwards, without making what lies between."""
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends the threads and workers. The loader can still be used: they start again with the next batch."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> grain.DatasetIterator:
        cv2.setNumThreads(
            1
        )  # batches are made in parallel already; OpenCV's own threads would only wait for each other
        reading = grain.ReadOptions(num_threads=self._config.num_threads, prefetch_buffer_size=self._config.prefetch)
        dataset = self._batches[self._next :].to_iter_dataset(reading)
        if self._config.num_workers:
            if not flags.FLAGS.is_parsed():  # grain reads its flags when it starts workers; its defaults are fine
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self._config.num_workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
        return iter(dataset)


def _start_worker(worker_index: int, worker_count: int) -> None:
    """Called in a worker process: one that is orphaned would otherwise wait for ever.

    Signals that all processes of a run get, of a terminal or a batch system, are the main one's: it saves first.
    """
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def eval_batches(
    source: Source,
    image_size: tuple[int, int],
    batch_size: int,
    indices: Sequence[int] | None = None,
    num_threads: int = 4,
    batches: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order: ``image`` uint8 ``[B, H, W, 3]``, ``valid_box`` float32 ``[B, 4]``, ``index`` int32
    ``[B]`` and ``original_size`` int32 ``[B, 2]`` (height, width).

    The last batch is filled up with black images of ``index`` -1, valid box 0 and original size 0. Images are those of
    :func:`cast_jax.data.views.eval_view`; they are read by threads, at most one batch ahead.

    Args:
      indices: the images to take, all by default.
      batches: at least so many, the last ones of black images only: processes that compute together need equally many.
    """
    wanted = list(range(len(source))) if indices is None else [int(index) for index in indices]
    batches = max(batches, -(-len(wanted) // batch_size))
    wanted += [-1] * (batches * batch_size - len(wanted))
    padding = _eval_item(np.zeros((*image_size, 3), np.uint8), np.zeros(4, np.float32), -1, (0, 0))

    def read(index: int) -> dict[str, np.ndarray]:
        if index < 0:
            return padding
        image = source.image(index)
        canvas, box, _ = eval_view(image, image_size)
        return _eval_item(canvas, box, index, image.shape[:2])

    with ThreadPoolExecutor(num_threads, thread_name_prefix="eval-images") as pool:
        # executor.map would read the whole source at once.
        remaining = iter(wanted)
        pending = collections.deque(pool.submit(read, index) for index in itertools.islice(remaining, batch_size))
        try:
            while pending:
                items: list[dict[str, np.ndarray]] = []
                while pending and len(items) < batch_size:
                    items.append(pending.popleft().result())
                    pending.extend(pool.submit(read, index) for index in itertools.islice(remaining, 1))
                yield _stack(items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _eval_item(image: np.ndarray, box: np.ndarray, index: int, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        "image": image,
        "valid_box": box,
        "index": np.array(index, np.int32),
        "original_size": np.array(size, np.int32),
    }


def batch_bytes(batch: Batch) -> float:
    """Bytes that one image of a batch (all its views) costs on the way to the device, on average over the kinds."""
    images = sum(len(group["instances_cut"]) for group in batch.values())
    return sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / images
