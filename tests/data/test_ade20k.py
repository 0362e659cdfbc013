"""ADE20K's two forms of annotation, on the same tiny images."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.errors import DataError
from cast_jax.data.sources.ade20k import CATEGORIES, Ade20k
from cast_jax.data.sources.ade20k_classes import ROWS

# Row 0: wall, sky and a chair without an instance. Row 1: two chairs and a person. Row 2: both kinds of door, a flag.
_CLASS = np.array([[0, 0, 8], [8, 8, 4], [5, 5, 100]], np.uint8)
_INSTANCE = np.array([[0, 9, 0], [1, 2, 3], [4, 5, 255]], np.uint8)
_FULL = np.array([[2978, 2420, 471], [471, 471, 1831], [774, 783, 954]])
FORMS = ("challenge", "full")


def write(root: Path, form: str, stem: str, split: str = "training", size=(3, 3), pixels=None) -> Path:
    """One image with its annotation, as it is published; returns the annotation's path."""
    if form == "challenge":
        image, label = root / "images" / split / f"{stem}.jpg", root / "annotations_instance" / split / f"{stem}.png"
        values = np.stack([_CLASS, _INSTANCE, np.zeros_like(_CLASS)], -1)
    else:
        folder = root / "images" / "ADE" / split / "urban" / f"street_{stem[-1]}"
        image, label = folder / f"{stem}.jpg", folder / f"{stem}_seg.png"
        values = np.stack([_FULL // 256 * 10, _FULL % 256, _INSTANCE], -1).astype(np.uint8)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(image)
    Image.fromarray(values if pixels is None else pixels).save(label)
    return label


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_say_the_same(form, tmp_path):
    for stem in ("ADE_train_00000002", "ADE_train_00000001"):
        write(tmp_path, form, stem)
    source = pickle.loads(pickle.dumps(Ade20k(tmp_path, "training")))
    assert [source.record(i).image_id for i in range(len(source))] == ["ADE_train_00000001", "ADE_train_00000002"]
    assert source.record(0).path == tmp_path / source.record(0).file_name
    assert source.image(0).shape == (3, 3, 3)
    instances = source.instances(1)
    names = [source.categories[label].name for label in instances.labels]
    assert names == ["person", "door", "door", "chair", "chair", "flag"]
    for mask, number in zip(instances.masks, (3, 4, 5, 1, 2, 255), strict=True):
        np.testing.assert_array_equal(mask, number == _INSTANCE)
    np.testing.assert_array_equal(instances.ignore, (_CLASS > 0) & (_INSTANCE == 0))
    assert source.classes(1) == sorted(set(instances.labels.tolist()))
    assert (instances.masks.dtype, instances.labels.dtype, instances.scores.dtype) == (bool, np.int32, np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_without_instances(form, tmp_path):
    write(tmp_path, form, "ADE_val_00000001", "validation", pixels=np.zeros((3, 3, 3), np.uint8))
    source = Ade20k(tmp_path, "validation")
    instances = source.instances(0)
    assert (instances.masks.shape, len(instances.labels), instances.ignore.any()) == ((0, 3, 3), 0, False)
    assert source.classes(0) == []


def test_one_instance_number_of_two_classes_is_two_instances(tmp_path):
    pixels = np.array([[[8, 1, 0], [4, 1, 0]]], np.uint8)
    write(tmp_path, "challenge", "ADE_train_00000001", size=(1, 2), pixels=pixels)
    instances = Ade20k(tmp_path, "training").instances(0)
    assert instances.labels.tolist() == [3, 7]
    assert instances.masks.tolist() == [[[False, True]], [[True, False]]]


def test_both_conventions_of_ids():
    by_instance, by_scene = CATEGORIES["instance100"], CATEGORIES["sceneparse150"]
    assert [category.id for category in by_instance] == list(range(1, 101))
    assert (by_scene[0].id, by_scene[3].id, by_scene[-1].id) == (7, 12, 149)
    assert len({category.id for category in by_scene}) == 100
    assert [category.name for category in by_scene] == [category.name for category in by_instance]
    assert len({category.name for category in by_instance}) == 100


def test_the_table_is_the_challenge_s():
    """The 103 rows of its categoryMapping.txt with the names of its categories, by their hash."""
    rows = sorted((instance, scene, full, name) for instance, scene, fulls, name in ROWS for full in fulls)
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    assert (len(rows), hashlib.sha256(text.encode()).hexdigest()[:16]) == (103, "c52bf9b0c81e4030")


@pytest.mark.parametrize("form", FORMS)
def test_lists_and_the_unlabelled_pool(form, tmp_path):
    for number in range(1, 4):
        label = write(tmp_path, form, f"ADE_train_0000000{number}")
    listed = tmp_path / "list.txt"
    listed.write_text("ADE_train_00000003.jpg\nADE_train_00000001\n")
    source = Ade20k(tmp_path, "training", images=listed)
    assert [source.record(i).image_id for i in range(2)] == ["ADE_train_00000003", "ADE_train_00000001"]
    label.unlink()
    with pytest.raises(DataError, match=r"for 1 images: ADE_train_00000003; .*labelled=False"):
        Ade20k(tmp_path, "training")
    pool = Ade20k(tmp_path, "training", labelled=False)
    assert (len(pool), pool.categories) == (3, ())
    with pytest.raises(DataError, match="unlabelled"):
        pool.instances(0)


def test_what_is_not_ade20k_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no images in .*ADEChallengeData2016.*ADE20K_2021_17_01"):
        Ade20k(tmp_path, "training")
    with pytest.raises(DataError, match="'coco' is unknown; known: instance100, sceneparse150"):
        Ade20k(tmp_path, "training", category_ids="coco")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.zeros((3, 3), np.uint8), r"00000001\.png: holds 'L' pixels"),
        (np.zeros((3, 4, 3), np.uint8), r"\(3, 4\) pixels \(height, width\), its image \(3, 3\)"),
        (np.full((3, 3, 3), 101, np.uint8), "class 101 is unknown"),
    ],
)
def test_faulty_annotations_are_refused(pixels, problem, tmp_path):
    write(tmp_path, "challenge", "ADE_train_00000001", pixels=pixels)
    with pytest.raises(DataError, match=problem):
        Ade20k(tmp_path, "training").instances(0)
