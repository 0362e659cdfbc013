"""The pseudo-label store: what is kept, resuming after a stop, and everything that can be wrong with a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Category, Detections, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import read_json
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled
from cast_jax.data.sources.subset import Subset

_CATEGORIES = (Category(24, "person"), Category(33, "bicycle"))
_SIZE = (4, 6)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "abcde":
        Image.fromarray(np.zeros((*_SIZE, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return ImageFolder(tmp_path / "images")


def _mask(row):
    mask = np.zeros(_SIZE, bool)
    mask[row] = True
    return mask


def _found(*scores):
    """One detection a score; the i-th covers row i and is of class i % 2."""
    return Detections(
        labels=np.arange(len(scores), dtype=np.int32) % 2,
        scores=np.asarray(scores, np.float32),
        mask_quality=np.full(len(scores), 0.5, np.float32),
        rles=[encode_mask(_mask(i)) for i in range(len(scores))],
    )


def _writer(folder, images, **changes):
    options = {"categories": _CATEGORIES, "model_hash": "abc", "threshold": 0.3, "shard_size": 2} | changes
    return PseudoLabelWriter(folder, images, **options)


_PREDICTIONS = [_found(0.9, 0.5, 0.2), _found(), _found(0.3), _found(0.29999), _found(0.8, 0.7)]


def _complete(folder, images, **changes):
    writer = _writer(folder, images, **changes)
    for shard in writer.pending_shards():
        writer.write_shard(shard.number, [_PREDICTIONS[i] for i in shard.indices])
    return writer


def test_what_is_kept_and_how_a_line_reads(tmp_path, images):
    _complete(tmp_path / "store", images)
    lines = (tmp_path / "store" / "shard-00000.jsonl").read_text().splitlines()
    assert len(lines) == 2
    first = json.loads(lines[0])
    assert (first["image_id"], first["file_name"], first["height"], first["width"]) == ("a.png", "a.png", 4, 6)
    assert [instance["category_id"] for instance in first["instances"]] == [24, 33], "the dataset's own ids"
    assert first["instances"][1] == {
        "category_id": 33,
        "segmentation": encode_mask(_mask(1)),
        "score": 0.5,
        "mask_quality": 0.5,
    }


def test_the_threshold_is_inclusive_and_can_only_be_raised(tmp_path, images):
    _complete(tmp_path / "store", images)
    store = PseudoLabels.open(tmp_path / "store")
    counts = [len(PseudoLabelled(images, store, _CATEGORIES).instances(i)) for i in range(5)]
    assert counts == [2, 0, 1, 0, 2]
    raised = PseudoLabelled(images, store, _CATEGORIES, threshold=0.7)
    assert [len(raised.instances(i)) for i in range(5)] == [1, 0, 0, 0, 2]
    with pytest.raises(DataError, match=r"below 0\.3 were not kept"):
        PseudoLabelled(images, store, _CATEGORIES, threshold=0.2)


def test_of_two_instances_on_the_same_pixels_the_better_one_stays(tmp_path, images):
    found = _found(0.9, 0.8, 0.7)
    half = _mask(0) | _mask(1)  # IoU 0.5 with the first, whatever its class
    twice = dataclasses.replace(found, rles=[found.rles[0], encode_mask(half), encode_mask(half)])
    for max_iou, kept in ((1.0, [0.9, 0.8, 0.7]), (0.5, [0.9, 0.8]), (0.49, [0.9])):
        writer = _writer(tmp_path / str(max_iou), images, max_iou=max_iou)
        writer.write_shard(0, [twice, _found()])
        line = json.loads((tmp_path / str(max_iou) / "shard-00000.jsonl").read_text().splitlines()[0])
        assert [instance["score"] for instance in line["instances"]] == pytest.approx(kept)


def test_the_labels_come_back_as_instances(tmp_path, images):
    _complete(tmp_path / "store", images)
    store = pickle.loads(pickle.dumps(PseudoLabels.open(tmp_path / "store")))
    swapped = PseudoLabelled(images, store, _CATEGORIES[::-1])
    instances = swapped.instances(0)
    np.testing.assert_array_equal(instances.masks, [_mask(0), _mask(1)])
    assert instances.labels.tolist() == [1, 0], "positions in the categories that were asked for"
    np.testing.assert_array_equal(instances.scores, np.float32([0.9, 0.5]))
    assert not instances.ignore.any()
    empty = swapped.instances(1)
    assert (len(empty), empty.masks.shape) == (0, (0, 4, 6))
    assert swapped.image(0).shape == (4, 6, 3)
    assert swapped.categories == _CATEGORIES[::-1]


def test_a_part_of_the_pool_may_be_used(tmp_path, images):
    _complete(tmp_path / "store", images)
    part = PseudoLabelled(Subset(images, [4, 0]), PseudoLabels.open(tmp_path / "store"), _CATEGORIES)
    assert [part.record(i).image_id for i in range(len(part))] == ["e.png", "a.png"]
    assert part.instances(0).scores.tolist() == pytest.approx([0.8, 0.7])


def test_a_stopped_run_continues_at_the_missing_shards(tmp_path, images):
    writer = _writer(tmp_path / "store", images)
    shards = writer.pending_shards()
    assert [(shard.number, list(shard.indices)) for shard in shards] == [(0, [0, 1]), (1, [2, 3]), (2, [4])]
    writer.write_shard(1, [_PREDICTIONS[2], _PREDICTIONS[3]])
    written = (tmp_path / "store" / "shard-00001.jsonl").stat().st_mtime_ns
    with pytest.raises(
        DataError, match=r"2 of 3 shards are missing \(shard-00000.jsonl, shard-00002.jsonl\).*pseudo_label step"
    ):
        PseudoLabels.open(tmp_path / "store")
    with pytest.raises(DataError, match="shards are missing"):
        writer.finish()
    assert [shard.number for shard in _writer(tmp_path / "store", images).pending_shards()] == [0, 2]
    _complete(tmp_path / "store", images)
    assert (tmp_path / "store" / "shard-00001.jsonl").stat().st_mtime_ns == written
    assert _writer(tmp_path / "store", images).pending_shards() == []


def test_the_order_in_which_shards_are_written_leaves_no_trace(tmp_path, images):
    _complete(tmp_path / "a", images)
    writer = _writer(tmp_path / "b", images)
    for shard in reversed(writer.pending_shards()):
        writer.write_shard(shard.number, [_PREDICTIONS[i] for i in shard.indices])
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1]
    ids = [line["image_id"] for line in PseudoLabels.open(tmp_path / "b").lines()]
    assert ids == ["a.png", "b.png", "c.png", "d.png", "e.png"]


def test_statistics(tmp_path, images):
    statistics = _complete(tmp_path / "store", images).finish()
    assert statistics == read_json(tmp_path / "store" / "stats.json")
    assert (statistics["images"], statistics["empty_images"], statistics["instances"]) == (5, 2, 5)
    assert statistics["instances_per_class"] == {"person": 3, "bicycle": 2}
    histogram = statistics["score_histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == 21
    filled = {edge: count for edge, count in zip(histogram["edges"], histogram["counts"], strict=False) if count}
    # float32's 0.3, 0.7, 0.8 and 0.9 lie a hair beside the decimal ones, so the bins they fall in are theirs.
    expected = np.histogram(np.float32([0.9, 0.5, 0.3, 0.8, 0.7]).astype(float), bins=20, range=(0, 1))[0]
    assert list(histogram["counts"]) == expected.tolist()
    assert filled[0.5] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_hash": "xyz"}, "model_hash 'abc', not 'xyz'"),
        ({"threshold": 0.4}, r"threshold 0\.3, not 0\.4"),
        ({"shard_size": 3}, "shard_size 2, not 3"),
        ({"categories": _CATEGORIES[:1]}, "categories"),
    ],
)
def test_another_models_folder_is_refused(tmp_path, images, change, named):
    _complete(tmp_path / "store", images)
    with pytest.raises(DataError, match=rf"manifest\.json: has {named}"):
        _writer(tmp_path / "store", images, **change)


def test_another_pool_is_refused(tmp_path, images):
    _complete(tmp_path / "store", images)
    with pytest.raises(DataError, match="images_hash"):
        _writer(tmp_path / "store", Subset(images, [4, 3, 2, 1, 0]))
    with pytest.raises(DataError, match="images 5, not 4"):
        _writer(tmp_path / "store", Subset(images, [0, 1, 2, 3]))


def test_the_same_names_for_other_pictures_are_refused(tmp_path, images, caplog):
    make = lambda **pixels: PseudoLabelWriter(tmp_path / "store", images, _CATEGORIES, "abc", threshold=0.3, **pixels)
    make(pixels="one")
    make(pixels="one")
    with pytest.raises(DataError, match="the images show something else than when they were labelled; delete"):
        make(pixels="other")
    (tmp_path / "store" / "stats.json").write_text("{}")  # all of them are labelled
    make(pixels="other")
    assert "the images show something else" in caplog.text
    path = tmp_path / "store" / "manifest.json"
    earlier = {key: value for key, value in json.loads(path.read_text()).items() if key != "pixels_hash"}
    path.write_text(json.dumps(earlier))  # as they were written before pixels had a name
    make(pixels="other")


def test_detections_must_fit_their_shard_and_their_images(tmp_path, images):
    writer = _writer(tmp_path / "store", images)
    with pytest.raises(ValueError, match="shard 0 has 2 images, not 1"):
        writer.write_shard(0, [_found()])
    wrong = _found(0.9)
    wrong.rles[0] = encode_mask(np.ones((6, 4), bool))
    with pytest.raises(ValueError, match=r"a\.png: masks of size \[6, 4\]"):
        writer.write_shard(0, [wrong, _found()])
    assert not (tmp_path / "store" / "shard-00000.jsonl").exists()


def _damage(path, how):
    lines = path.read_text().splitlines()
    path.write_text(how(lines))


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda lines: lines[0] + "\n" + lines[1][:-9], "line 2: is not a pseudo-label"),
        (lambda lines: lines[0] + "\n", "has 1 images, not 2"),
        (lambda lines: (lines[0] + "\n") * 2, "'a.png' is labelled twice"),
        (
            lambda lines: "\n".join(lines).replace('"category_id": 33', '"category_id": 99'),
            r"unknown category ids \[99\]",
        ),
        (lambda lines: "[]\n" + lines[1], "line 1: is not a pseudo-label"),
        (lambda lines: '{"image_id": "a.png"}\n' + lines[1], "line 1: is not a pseudo-label"),
    ],
)
def test_a_damaged_shard_is_refused_with_a_way_out(tmp_path, images, how, problem):
    _complete(tmp_path / "store", images)
    _damage(tmp_path / "store" / "shard-00000.jsonl", how)
    with pytest.raises(DataError, match=rf"shard-00000\.jsonl.*{problem}.*run the pseudo_label step again"):
        PseudoLabels.open(tmp_path / "store")


def test_shards_that_changed_after_the_store_was_finished_are_refused(tmp_path, images):
    writer = _complete(tmp_path / "store", images)
    statistics = writer.finish()
    assert writer.finish() == statistics == read_json(tmp_path / "store" / "stats.json")
    shard = tmp_path / "store" / "shard-00000.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b'"category_id": 33', b'"category_id": 24', 1))
    for look in (PseudoLabels.open, lambda _: writer.finish()):
        with pytest.raises(DataError, match=r"its shards are damaged, or others than stats\.json was written for; del"):
            look(tmp_path / "store")
    # A shard that is made again may be another, and the statistics with it.
    shard.write_bytes(whole)
    shard.unlink()
    writer.write_shard(0, [_found(0.6), _found()])
    assert writer.finish()["instances"] < statistics["instances"]
    assert writer.finish()["content_hash"] == PseudoLabels.open(tmp_path / "store").content_hash


def test_no_store_at_all(tmp_path, images):
    with pytest.raises(DataError, match="run the pseudo_label step first"):
        PseudoLabels.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="shard_size 0"):
        _writer(tmp_path / "store", images, shard_size=0)


def test_images_without_labels_other_categories_and_other_sizes(tmp_path, images):
    _complete(tmp_path / "store", Subset(images, [0, 1, 2]))
    store = PseudoLabels.open(tmp_path / "store")
    assert "a.png" in store
    assert len(store) == 3
    with pytest.raises(DataError, match=r"of 2 of 5 images \(d.png, e.png\)"):
        PseudoLabelled(images, store, _CATEGORIES)
    with pytest.raises(DataError, match="no pseudo-labels for image 'z'"):
        store.read("z")
    first = Subset(images, [0])
    with pytest.raises(DataError, match=r"categories differ.*33 is 'bicycle', not 'bike'"):
        PseudoLabelled(first, store, (Category(24, "person"), Category(33, "bike")))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images.record(0).path)
    with pytest.raises(DataError, match=r"a\.png: is \(8, 8\).*\(4, 6\)"):
        PseudoLabelled(first, store, _CATEGORIES).instances(0)


def test_file_names_need_not_be_utf8(tmp_path):
    (tmp_path / "images").mkdir()
    for name in (b"caf\xe9.png", b"caf\xe8.png"):
        with open(os.fsencode(tmp_path / "images") + b"/" + name, "wb") as file:
            Image.fromarray(np.zeros((*_SIZE, 3), np.uint8)).save(file, "png")
    images = ImageFolder(tmp_path / "images")
    writer = _writer(tmp_path / "store", images)
    writer.write_shard(0, [_found(0.9), _found(0.9, 0.9)])
    assert writer.finish()["instances"] == 3
    labelled = PseudoLabelled(images, PseudoLabels.open(tmp_path / "store"), _CATEGORIES)
    assert [len(labelled.instances(index).labels) for index in range(2)] == [1, 2]


def test_the_same_mask_of_a_class_is_never_kept_twice(tmp_path, images):
    """Not even where overlapping instances are wanted."""
    detections = Detections(
        labels=np.array([0, 1, 0, 0], np.int32),
        scores=np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        mask_quality=np.ones(4, np.float32),
        rles=[encode_mask(_mask(row)) for row in (1, 1, 1, 2)],
    )
    writer = _writer(tmp_path / "store", Subset(images, [0]), max_iou=1.0)
    writer.write_shard(0, [detections])
    kept = PseudoLabels.open(tmp_path / "store").read("a.png")["instances"]
    assert [(round(k["score"], 1), k["category_id"]) for k in kept] == [(0.9, 24), (0.8, 33), (0.6, 24)]
