"""Fetching ahead must not change what is handed out, nor the place that is saved."""

from __future__ import annotations

import functools
import threading
import time

import jax
import numpy as np
import pytest

from cast_jax.core.sharding import make_mesh, shard_batch
from cast_jax.data.prefetch import Prefetcher


class Counter:
    """Hands out 0, 1, 2, ...; its state is the next number."""

    def __init__(self, end: int | None = None, pause: float = 0.0, broken: int | None = None):
        self.next, self.end, self.pause, self.broken, self.closed = 0, end, pause, broken, False

    def __next__(self) -> int:
        time.sleep(self.pause)
        if self.next == self.end:
            raise StopIteration
        if self.next == self.broken:
            raise ValueError(f"{self.next} is broken")
        self.next += 1
        return self.next - 1

    def get_state(self) -> int:
        return self.next

    def set_state(self, state: int) -> None:
        self.next = state

    def close(self) -> None:
        self.closed = True


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_state_is_that_of_the_last_batch_handed_out():
    counter = Counter()
    with Prefetcher(counter, depth=3) as batches:
        assert batches.get_state() == 0
        assert [next(batches), next(batches)] == [0, 1]
        wait_until(lambda: counter.next == 5)  # two handed out, three ahead
        time.sleep(0.02)
        assert counter.next == 5  # and no more
        assert batches.get_state() == 2
        batches.set_state(batches.get_state())
        assert [next(batches), next(batches)] == [2, 3]
        batches.set_state(0)
        assert next(batches) == 0
    assert not prefetch_threads()
    assert counter.closed


def test_nothing_is_fetched_before_it_is_needed():
    counter = Counter()
    batches = Prefetcher(counter)
    batches.set_state(7)
    assert not prefetch_threads()
    assert next(batches) == 7
    batches.close()


def test_exceptions_come_in_their_turn_and_stay():
    with Prefetcher(Counter(broken=2), depth=4) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="2 is broken"):
                next(batches)
        assert batches.get_state() == 2
        batches.set_state(0)
        assert next(batches) == 0


def test_exceptions_of_the_transfer_reach_the_consumer():
    def fail(batch):
        raise MemoryError("the device is full")

    with Prefetcher(Counter(), fail) as batches, pytest.raises(MemoryError, match="full"):
        next(batches)


def test_a_finite_iterator_ends():
    with Prefetcher(Counter(end=3)) as batches:
        assert list(batches) == [0, 1, 2]
        assert list(batches) == []


def test_a_closed_prefetcher_says_so():
    batches = Prefetcher(Counter())
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    assert not prefetch_threads()


def test_depth_is_checked():
    with pytest.raises(ValueError, match="depth"):
        Prefetcher(Counter(), depth=0)


def test_batches_are_placed_on_the_devices_ahead():
    class Arrays(Counter):
        def __next__(self):
            number = super().__next__()
            return {"image": np.full((2 * jax.device_count(), 3), number, np.uint8), "valid": {"x": np.ones(8) > 0}}

    mesh = make_mesh()
    with Prefetcher(Arrays(), functools.partial(shard_batch, mesh=mesh)) as batches:
        for number in range(3):
            batch = next(batches)
            assert shard_batch(batch, make_mesh()) is batch  # as the training loop finds it
            assert batch["image"].dtype == np.uint8
            assert batch["image"].addressable_shards[0].data.shape == (2, 3)
            np.testing.assert_array_equal(batch["image"], np.full((2 * jax.device_count(), 3), number))
            assert batch["valid"]["x"].dtype == bool
