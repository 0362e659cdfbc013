"""The loader's batches are those of the interface, in a known order, and the same after a restart."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError, UserError
from cast_jax.data.pipeline import LoaderConfig, batch_bytes, eval_batches, make_loader
from cast_jax.data.sources.base import ImageRecord
from cast_jax.data.views import ViewConfig, eval_view

PLAIN_VIEW = ViewConfig(
    image_size=(16, 16),
    max_instances=2,
    min_area=1,
    scale=(1.0, 1.0),
    crop_area=(1.0, 1.0),
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)
VARIED_VIEW = ViewConfig(image_size=(16, 24), max_instances=3, min_area=1)


class Memory:
    """Images of one colour, the image's index plus one; one instance each, if there are categories."""

    def __init__(self, count: int, labelled: bool = True, broken: int | None = None):
        self.categories = (Category(7, "square"),) if labelled else ()
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> ImageRecord:
        return ImageRecord(index, Path(f"{index}.png"), f"{index}.png")

    def image(self, index: int) -> np.ndarray:
        if index == self.broken:
            raise DataError(f"{index}.png: cannot be read")
        return np.full((20, 20, 3), index + 1, np.uint8)

    def instances(self, index: int) -> Instances:
        if not self.categories:
            raise DataError("this source is unlabelled")
        mask = np.zeros((1, 20, 20), bool)
        mask[0, 2:12, 4:16] = True
        return Instances(mask, np.zeros(1, np.int32), np.zeros((20, 20), bool), np.ones(1, np.float32))


def config(**changes) -> LoaderConfig:
    return LoaderConfig(**{"view": PLAIN_VIEW, "batch_labelled": 2, "num_threads": 1, **changes})


def take(loader, count: int) -> list:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def indices(batches: list, kind: str = "labelled") -> list[int]:
    return [int(image.max()) - 1 for batch in batches for image in batch[kind]["weak"]["image"]]


def assert_same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_batches_are_as_the_interface_says():
    loader = make_loader(
        Memory(5), Memory(9, labelled=False), config(view=VARIED_VIEW, batch_labelled=2, batch_unlabelled=3)
    )
    (batch,) = take(loader, 1)
    assert set(batch) == {"labelled", "unlabelled"}
    for kind, count in (("labelled", 2), ("unlabelled", 3)):
        view = {
            "image": ("uint8", (count, 16, 24, 3)),
            "valid_box": ("float32", (count, 4)),
            "masks": ("uint8", (count, 3, 16, 3)),
            "labels": ("int32", (count, 3)),
            "instance_valid": ("bool", (count, 3)),
            "scores": ("float32", (count, 3)),
            "ignore": ("uint8", (count, 16, 3)),
        }
        assert jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.shape), batch[kind]) == {
            "weak": view,
            "strong": view,
            "strong_to_weak": ("float32", (count, 2, 3)),
            "instances_cut": ("int32", (count,)),
        }
    assert batch["labelled"]["weak"]["instance_valid"][:, 0].all()
    assert not batch["unlabelled"]["weak"]["instance_valid"].any()


def test_kinds_and_views_that_are_not_wanted_are_absent():
    (batch,) = take(make_loader(Memory(3), None, config(views=("strong",))), 1)
    assert set(batch) == {"labelled"}
    assert set(batch["labelled"]) == {"strong", "instances_cut"}
    (batch,) = take(make_loader(None, Memory(3), config(batch_labelled=0, batch_unlabelled=1)), 1)
    assert set(batch) == {"unlabelled"}
    assert batch["unlabelled"]["weak"]["instance_valid"][0, 0]  # pseudo-labelled: it has categories


def test_every_epoch_has_every_image_once_in_another_order():
    order = indices(take(make_loader(Memory(6), None, config()), 9))
    epochs = [tuple(order[start : start + 6]) for start in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4, 5]] * 3
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sources_smaller_than_a_batch_work(count):
    batches = take(make_loader(Memory(count), None, config(view=VARIED_VIEW, batch_labelled=4)), 3)
    repeats = collections.Counter(indices(take(make_loader(Memory(count), None, config(batch_labelled=4)), 3)))
    assert repeats == {index: 12 // count for index in range(count)}
    maps = {matrix.tobytes() for batch in batches for matrix in batch["labelled"]["strong_to_weak"]}
    assert len(maps) == 12  # the same image, but never the same view


def test_the_seed_is_all_that_chance_depends_on():
    def run(**changes):
        changes = {"view": VARIED_VIEW, "batch_unlabelled": 1, **changes}
        return take(make_loader(Memory(5), Memory(5), config(**changes)), 4)

    expected = run()
    assert_same(expected, run(num_threads=3, prefetch=5))
    assert not np.array_equal(expected[0]["labelled"]["strong_to_weak"], run(seed=1)[0]["labelled"]["strong_to_weak"])


def test_labelled_and_unlabelled_images_meet_different_chances():
    loader = make_loader(Memory(5), Memory(5), config(view=VARIED_VIEW, batch_unlabelled=2))
    for batch in take(loader, 3):
        labelled, unlabelled = (batch[kind]["strong_to_weak"] for kind in ("labelled", "unlabelled"))
        assert (labelled != unlabelled).any(axis=(1, 2)).all()


def test_processes_share_every_batch_out():
    one = take(make_loader(Memory(5), None, config(view=VARIED_VIEW, batch_labelled=4)), 4)
    shared = config(view=VARIED_VIEW, batch_labelled=4, process_count=2)
    two = [take(make_loader(Memory(5), None, dataclasses.replace(shared, process_index=index)), 4) for index in (0, 1)]
    for parts, whole in zip(zip(*two, strict=True), one, strict=True):
        assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), whole)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 4)])
def test_a_restored_loader_gives_the_same_batches(threads, prefetch):
    def fresh():
        settings = config(view=VARIED_VIEW, batch_unlabelled=1, num_threads=threads, prefetch=prefetch)
        return make_loader(Memory(5), Memory(4, labelled=False), settings)

    loader = fresh()
    states, batches = [], []
    for _ in range(6):
        states.append(loader.get_state())
        batches.append(next(loader))
    for step in (0, 1, 5, 3):
        restored = fresh()
        restored.set_state(states[step])
        assert restored.get_state() == states[step]
        assert_same(take(restored, 6 - step), batches[step:])
    loader.set_state(states[2])
    assert_same(take(loader, 2), batches[2:4])


def test_worker_processes_change_nothing():
    def loader(workers):
        return make_loader(Memory(5), None, config(view=VARIED_VIEW, num_workers=workers))

    expected = take(loader(0), 5)
    working = loader(2)
    working.set_state({"next_batch": 1})
    assert_same(take(working, 4), expected[1:])
    assert working.get_state() == {"next_batch": 5}


def test_a_batch_that_fails_names_the_file_and_is_not_skipped():
    source = Memory(4, broken=None)
    order = indices(take(make_loader(source, None, config(batch_labelled=1, prefetch=3)), 4))
    source.broken = order[2]
    loader = make_loader(source, None, config(batch_labelled=1, prefetch=3))
    assert indices([next(loader), next(loader)]) == order[:2]
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{order[2]}\.png: cannot be read"):
            next(loader)
    source.broken = None
    assert indices(take(loader, 2)) == order[2:]


def test_missing_images_are_refused_before_the_first_batch():
    with pytest.raises(DataError, match=r"no labelled images.*data\.batch_labelled is 2"):
        make_loader(Memory(0), None, config())
    with pytest.raises(DataError, match=r"no unlabelled images.*data\.batch_unlabelled is 3"):
        make_loader(Memory(2), None, config(batch_unlabelled=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_labelled": 0}, "both 0"),
        ({"batch_unlabelled": -1}, r"^batch_unlabelled is -1"),
        ({"num_threads": 0}, r"^num_threads"),
        ({"batch_labelled": 10**9}, r"^batch_labelled is 1000000000; it must lie in \[0, 65536\]"),
        ({"prefetch": 0}, r"^prefetch"),
        ({"views": ("medium",)}, r"^views"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"batch_labelled": 3, "process_count": 2}, r"^batch_labelled is 3; it must be a multiple of the 2 processes"),
    ],
)
def test_wrong_numbers_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_batch_bytes_by_hand():
    (batch,) = take(make_loader(Memory(3), Memory(3), config(batch_labelled=1, batch_unlabelled=2)), 1)
    # A view: image 768, box 16, masks 2·16·2, labels 8, valid 2, scores 8, ignore 16·2. Then the map 24, the count 4.
    assert batch_bytes(batch) == 2 * (768 + 16 + 64 + 8 + 2 + 8 + 32) + 24 + 4


def test_eval_batches_pass_once_in_order_and_fill_the_last():
    batches = list(eval_batches(Memory(5), (8, 12), batch_size=2))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, -1]]
    image, box, _ = eval_view(Memory(5).image(3), (8, 12))
    np.testing.assert_array_equal(batches[1]["image"][1], image)
    np.testing.assert_array_equal(batches[1]["valid_box"][1], box)
    np.testing.assert_array_equal(batches[1]["original_size"], [[20, 20], [20, 20]])
    assert not batches[2]["image"][1].any()
    np.testing.assert_array_equal(batches[2]["valid_box"], [[0, 0, 8, 8], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batches[2]["original_size"], [[20, 20], [0, 0]])
    assert {name: str(leaf.dtype) for name, leaf in batches[2].items()} == {
        "image": "uint8",
        "valid_box": "float32",
        "index": "int32",
        "original_size": "int32",
    }


def test_eval_batches_as_many_as_another_process_has():
    batches = list(eval_batches(Memory(5), (8, 8), 2, indices=[1], batches=3))
    assert [batch["index"].tolist() for batch in batches] == [[1, -1], [-1, -1], [-1, -1]]
    assert not batches[2]["image"].any()


def test_eval_batches_of_some_images_and_of_none():
    assert [batch["index"].tolist() for batch in eval_batches(Memory(5), (8, 8), 3, indices=[4, 0])] == [[4, 0, -1]]
    assert list(eval_batches(Memory(0), (8, 8), 3)) == []


def test_eval_batches_read_one_batch_ahead_and_stop_when_left():
    read = []

    class Counting(Memory):
        def image(self, index):
            read.append(index)
            return super().image(index)

    batches = eval_batches(Counting(100), (8, 8), batch_size=3, num_threads=2)
    next(batches)
    batches.close()
    assert len(read) <= 6
    assert not any(thread.name.startswith("eval-images") for thread in threading.enumerate())


def test_eval_batches_name_the_file_that_fails():
    with pytest.raises(DataError, match=r"1\.png"):
        list(eval_batches(Memory(3, broken=1), (8, 8), 2))


def test_a_worker_that_dies_is_said_to_within_seconds_and_the_batch_is_made_again():
    loader = make_loader(Memory(5), None, config(view=VARIED_VIEW, num_workers=2))
    expected = take(make_loader(Memory(5), None, config(view=VARIED_VIEW)), 40)
    next(loader)
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"worker process .* died .*exit code -9.*num_workers"):
        list(itertools.islice(loader, 40))
    assert time.monotonic() - begin < 30
    place = loader.get_state()["next_batch"]
    assert_same(take(loader, 2), expected[place : place + 2])


def test_workers_outlive_the_signals_that_a_run_saves_at():
    loader = make_loader(Memory(5), None, config(view=VARIED_VIEW, num_workers=2))
    expected = take(make_loader(Memory(5), None, config(view=VARIED_VIEW)), 30)
    assert_same(take(loader, 1), expected[:1])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert_same(take(loader, 29), expected[1:])
    loader.close()
    assert not multiprocessing.active_children()


ORPHAN = """
import os, signal, sys, time
sys.path[:0] = sys.argv[1:]
from test_pipeline import Memory, config, make_loader
if __name__ == "__main__":
    loader = make_loader(Memory(5), None, config(num_workers=1))
    next(loader)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    here = Path(__file__).parent
    command = [sys.executable, str(tmp_path / "orphan.py"), str(here), str(here.parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path)
    process.communicate(timeout=100)  # workers inherit the pipe: it is closed when the last one has ended
    assert process.returncode == -signal.SIGKILL
