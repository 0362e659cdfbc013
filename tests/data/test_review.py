"""Pseudo-labels out to a COCO JSON, corrected, and back."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cast_jax.core.annotations import Category, Detections, decode_mask, encode_mask
from cast_jax.core.errors import DataError, UserError
from cast_jax.core.files import read_json, write_json
from cast_jax.data.pseudo_labels import PseudoLabels, PseudoLabelWriter
from cast_jax.data.review import export_labels, finish_import, import_labels
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.pseudo_labelled import PseudoLabelled

CATEGORIES = (Category(24, "person"), Category(33, "bicycle"))
SIZE = (40, 50)


def disc(y, x, radius):
    return cv2.circle(np.zeros(SIZE, np.uint8), (x, y), radius, 1, -1).astype(bool)


RING = disc(20, 20, 12) & ~disc(20, 20, 8)


@pytest.fixture
def store(tmp_path):
    """Three images in two shards: a disc and a ring, nothing, a disc."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    writer = PseudoLabelWriter(
        tmp_path / "store", ImageFolder(tmp_path / "images"), CATEGORIES, "abc", threshold=0.3, shard_size=2
    )
    first = found([disc(10, 38, 8), RING], [0, 1], [0.9, 0.5])
    writer.write_shard(0, [first, found([], [], [])])
    writer.write_shard(1, [found([disc(20, 20, 9)], [1], [0.7])])
    writer.finish()
    return tmp_path / "store"


def found(masks, labels, scores):
    count = len(labels)
    return Detections(
        np.array(labels, np.int32),
        np.array(scores, np.float32),
        np.full(count, 0.25, np.float32),
        [encode_mask(mask) for mask in masks],
    )


def lines(folder):
    return list(PseudoLabels.open(folder).lines())


def test_a_round_trip_changes_nothing_but_the_hash(store, tmp_path):
    before, known = lines(store), PseudoLabels.open(store)
    write_json(tmp_path / "labels.json", export_labels(store))
    assert import_labels(store, tmp_path / "labels.json") == read_json(store / "stats.json")
    after = PseudoLabels.open(store)
    assert lines(store) == before == lines(tmp_path / "store.before_review")
    assert (known.reviewed, len(after.reviewed)) == ("", 16)
    assert after.content_hash == known.content_hash
    # The run goes on with it: its writer finds its own store, complete.
    writer = PseudoLabelWriter(store, ImageFolder(tmp_path / "images"), CATEGORIES, "abc", threshold=0.3, shard_size=2)
    assert writer.pending_shards() == []


def test_an_import_that_was_stopped_half_way_is_finished(store, tmp_path):
    write_json(tmp_path / "labels.json", export_labels(store))
    import_labels(store, tmp_path / "labels.json")
    reviewed = PseudoLabels.open(store).reviewed
    new, before, replaced = (tmp_path / f"store.{what}" for what in ("importing", "before_review", "replaced"))
    before.rename(replaced)  # after the second of three renames
    for _ in range(2):
        finish_import(store)
        assert PseudoLabels.open(store).reviewed == reviewed
        assert PseudoLabels.open(before).reviewed == ""
    store.rename(new)
    before.rename(replaced)  # after the first
    finish_import(store)
    assert PseudoLabels.open(store).reviewed == reviewed
    shutil.copytree(before, replaced)
    store.rename(new)  # the same of a second review: the first state stays
    finish_import(store)
    assert PseudoLabels.open(store).reviewed == reviewed
    assert PseudoLabels.open(before).reviewed == ""
    store.rename(new)  # before the first, and the labels were deleted
    finish_import(store)
    assert not store.exists()


def test_labels_that_a_run_trains_on_stay(store, tmp_path):
    (tmp_path / "run" / "pseudo_labels").mkdir(parents=True)
    store = store.rename(tmp_path / "run" / "pseudo_labels" / "adapted")
    write_json(tmp_path / "labels.json", export_labels(store))
    program = "import sys, time; from pathlib import Path; from cast_jax.core.files import only_writer\n"
    program += "with only_writer(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match=f"another run is at work in {tmp_path / 'run'}"):
            import_labels(store, tmp_path / "labels.json")
        run.kill()
    assert PseudoLabels.open(store).reviewed == ""
    read = PseudoLabels.open(store).read
    assert read("b.png")["image_id"] == "b.png"
    content = export_labels(store)
    del content["annotations"][0]
    write_json(tmp_path / "labels.json", content)
    import_labels(store, tmp_path / "labels.json")
    with pytest.raises(DataError, match=r"shard-00000\.jsonl: was replaced while it was read"):
        read("b.png")


def test_pycocotools_reads_the_export(store, tmp_path, capsys):
    for polygons in (False, True):
        write_json(tmp_path / "labels.json", export_labels(store, polygons))
        coco = COCO(str(tmp_path / "labels.json"))
        assert [image["file_name"] for image in coco.loadImgs([1, 2, 3])] == ["a.png", "b.png", "c.png"]
        annotations = coco.loadAnns(coco.getAnnIds())
        assert [annotation["category_id"] for annotation in annotations] == [24, 33, 33]
        assert [isinstance(annotation["segmentation"], list) for annotation in annotations] == [
            polygons,
            False,
            polygons,
        ]
        for annotation, mask in zip(annotations, (disc(10, 38, 8), RING, disc(20, 20, 9)), strict=True):
            shown = coco.annToMask(annotation).astype(bool)
            assert (shown & mask).sum() / (shown | mask).sum() >= (0.9 if polygons else 1)
            assert annotation["area"] == mask.sum()
    capsys.readouterr()


def test_corrections_come_back(store, tmp_path):
    content = export_labels(store)
    kept, ring, last = content["annotations"]
    ring["category_id"] = 24
    last["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
    drawn = {"id": 77, "image_id": 2, "category_id": 24, "iscrowd": 1}
    drawn["segmentation"] = {"size": list(SIZE), "counts": [0, 40, 1960]}  # run lengths as a list: the first column
    content["annotations"] = [drawn, ring, last]
    content["images"].reverse()
    write_json(tmp_path / "labels.json", content)
    identity = PseudoLabels.open(store).identity()
    statistics = import_labels(store, tmp_path / "labels.json")
    assert (statistics["instances"], statistics["empty_images"]) == (3, 0)
    source = PseudoLabelled(ImageFolder(tmp_path / "images"), PseudoLabels.open(store), CATEGORIES)
    of_a, of_b, of_c = (source.instances(index) for index in range(3))
    assert (of_a.labels.tolist(), of_a.scores.tolist()) == ([0], [0.5])
    np.testing.assert_array_equal(of_a.masks[0], RING)
    assert (of_b.labels.tolist(), of_b.scores.tolist(), of_b.ignore.any()) == ([0], [1.0], False)
    assert of_b.masks[0][:, 0].all()
    assert of_b.masks[0].sum() == 40
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(last["segmentation"], *SIZE)))
    np.testing.assert_array_equal(of_c.masks[0], expected)
    assert of_c.masks[0].sum() == 400
    new = PseudoLabels.open(store).identity()
    assert [new[key] == identity[key] for key in ("model_hash", "content_hash", "reviewed")] == [True, False, False]

    # A second review keeps the model's own labels beside it.
    content["annotations"].pop()
    write_json(tmp_path / "labels.json", content)
    assert import_labels(store, tmp_path / "labels.json")["instances"] == 2
    assert not (tmp_path / "store.replaced").exists()
    originals = lines(tmp_path / "store.before_review")
    np.testing.assert_array_equal(decode_mask(originals[0]["instances"][0]["segmentation"]), disc(10, 38, 8))
    assert kept["score"] == pytest.approx(0.9)


def test_categories_are_known_by_name(store, tmp_path, caplog):
    """Tools number them from 0 or 1, in their own order, and may leave out or add one without instances."""
    before, content = lines(store), export_labels(store)
    content["categories"] = [{"id": i, "name": name} for i, name in ((0, "bicycle"), (24, "person"), (7, "background"))]
    for annotation in content["annotations"]:
        annotation["category_id"] = {33: 0, 24: 24}[annotation["category_id"]]
    write_json(tmp_path / "labels.json", content)
    with caplog.at_level(logging.INFO):
        import_labels(store, tmp_path / "labels.json")
    assert caplog.messages == [f"{tmp_path / 'labels.json'} numbers categories anew: bicycle 0 -> 33"]
    assert lines(store) == before
    content["categories"] = [{"id": 33, "name": "person"}]
    content["annotations"] = [{**content["annotations"][0], "category_id": 33}]
    write_json(tmp_path / "labels.json", content)
    import_labels(store, tmp_path / "labels.json")
    assert [[found["category_id"] for found in line["instances"]] for line in lines(store)] == [[24], [], []]
    assert PseudoLabels.open(store).categories == CATEGORIES


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["images"].pop(1), r"lacks images: b\.png"),
        (lambda c: c["images"][1].update(file_name="z.png"), r"lacks images: b\.png"),
        (lambda c: c["images"].append({**c["images"][0], "id": 9, "file_name": "z.png"}), r"unknown images: z\.png"),
        (lambda c: c["images"][1].update(height=41), r"b\.png is \(41, 50\)"),
        (lambda c: c["annotations"][0].update(score=1.5), r"annotations\[0\]\.score is 1\.5"),
        (lambda c: c["annotations"][0].update(mask_quality="good"), r"annotations\[0\]\.mask_quality is 'good'"),
        (lambda c: c["annotations"][0].update(category_id=5), "category_id 5"),
        (lambda c: c["categories"][0].update(name="Person"), "unknown categories: Person; .* person, bicycle"),
        (lambda c: c["categories"][0].update(id="24"), r"categories\[0\]\.id is '24'; it must be int"),
        (lambda c: c["categories"][0].update(name="bicycle"), r"categories\[\]\.name is not unique: bicycle"),
        (lambda c: c["annotations"][0].update(segmentation=[]), "segmentation is missing or empty"),
        (lambda c: c["categories"][0].update(name="pedestrian"), "unknown categories: pedestrian; .* person, bicycle"),
        (lambda c: c.pop("images"), "needs a list of objects under the key 'images'"),
    ],
)
def test_a_faulty_review_changes_nothing(store, tmp_path, change, problem):
    content = copy.deepcopy(export_labels(store))
    change(content)
    (tmp_path / "labels.json").write_text(json.dumps(content))
    before = sorted((path.name, path.read_bytes()) for path in store.iterdir())
    with pytest.raises(DataError, match=rf"labels\.json.*{problem}"):
        import_labels(store, tmp_path / "labels.json")
    assert sorted((path.name, path.read_bytes()) for path in store.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "labels.json", "store"]
