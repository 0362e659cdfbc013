"""Brings the next batches to the device while the step runs, without losing the exact place in the stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class StatefulIterator(Protocol):
    """An iterator whose place can be saved: a :class:`cast_jax.data.pipeline.Loader`, or grain's own."""

    def __next__(self) -> Any:
        """The next batch, host or device arrays, always of the same shapes."""
        ...

    def get_state(self) -> Any:
        """The place after the last batch handed out: bytes or a JSON value, the same in all processes."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a place."""
        ...


class Prefetcher(Iterator[Any]):
    """Runs an iterator and ``place`` in a thread of its own, at most ``depth`` batches ahead.

    Every queued batch carries the iterator's state after it, so :meth:`get_state` belongs to the last batch that was
    handed out, not to the last one that was fetched. An exception of the iterator or of ``place`` is raised by
    ``next`` when its turn comes, and by every ``next`` after that.
    """

    def __init__(self, iterator: StatefulIterator, place: Callable[[Any], Any] = lambda batch: batch, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._iterator = iterator
        self._place = place
        self._depth = depth
        self._state = iterator.get_state()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __next__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._start()
        batch, state, failure = self._ready.get()
        self._room.release()
        if failure is not None:
            self._failure = failure
            raise failure
        self._state = state
        return batch

    def get_state(self) -> Any:
        """The place after the last batch handed out."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Drops what was fetched ahead and goes to a place that :meth:`get_state` named."""
        self._stop()
        self._failure = None
        self._iterator.set_state(state)
        self._state = state

    def close(self) -> None:
        """Ends the thread and closes the iterator, if that can be closed. Batches fetched ahead are dropped."""
        self._stop()
        if self._failure is None:
            self._failure = RuntimeError("the prefetcher is closed")
        if (close := getattr(self._iterator, "close", None)) is not None:
            close()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        self._ready: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(self._depth)  # for batches fetched but not handed out
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fetch, name="prefetch", daemon=True)
        self._thread.start()

    def _fetch(self) -> None:
        while True:
            self._room.acquire()
            if self._stopping.is_set():
                return
            try:
                batch = self._place(next(self._iterator))
                state = self._iterator.get_state()
            except BaseException as failure:
                self._ready.put((None, None, failure))
                return
            self._ready.put((batch, state, None))

    def _stop(self) -> None:
        if self._thread is not None:
            self._stopping.set()
            self._room.release()
            self._thread.join()
            self._thread = None
