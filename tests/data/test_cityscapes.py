"""Cityscapes' layout and its instance ids, on a folder of three tiny images."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.errors import DataError
from cast_jax.data.checks import check_source
from cast_jax.data.sources.cityscapes import CATEGORIES, Cityscapes

# Row 0: road, a person group, a caravan, void. Row 1: two cars and a bicycle. Row 2: a train and a group of bicycles.
_IDS = np.array([[7, 24, 29003, 0], [26000, 26000, 26001, 33000], [31000, 31000, 33, 7]], np.uint16)


def _write(root, stem, ids=_IDS, size=None):
    city = stem.rsplit("_", 2)[0]
    for kind, suffix, pixels in (
        ("leftImg8bit", "leftImg8bit", np.zeros((*(size or ids.shape), 3), np.uint8)),
        ("gtFine", "gtFine_instanceIds", ids),
    ):
        folder = root / kind / "train" / city
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{stem}_{suffix}.png")


@pytest.fixture
def root(tmp_path):
    for stem in ("ulm_000001_000019", "bad-city_000000_000019", "ulm_000000_000019"):
        _write(tmp_path, stem)
    return tmp_path


def test_instances_groups_and_unscored_classes(root):
    instances = Cityscapes(root, "train").instances(0)
    assert [CATEGORIES[label].name for label in instances.labels] == ["car", "car", "train", "bicycle"]
    expected = [26000, 26001, 31000, 33000]
    for mask, value in zip(instances.masks, expected, strict=True):
        np.testing.assert_array_equal(mask, value == _IDS)
    np.testing.assert_array_equal(instances.ignore, (_IDS == 24) | (_IDS == 29003) | (_IDS == 33))
    assert instances.scores.tolist() == [1, 1, 1, 1]
    assert (instances.masks.dtype, instances.labels.dtype, instances.scores.dtype) == (bool, np.int32, np.float32)


def test_the_official_class_ids():
    assert [(c.id, c.name) for c in CATEGORIES] == [
        (24, "person"), (25, "rider"), (26, "car"), (27, "truck"),
        (28, "bus"), (31, "train"), (32, "motorcycle"), (33, "bicycle"),
    ]  # fmt: skip


def test_images_are_sorted_and_named(root):
    source = Cityscapes(root, "train")
    assert [source.record(i).image_id for i in range(len(source))] == [
        "bad-city_000000_000019",
        "ulm_000000_000019",
        "ulm_000001_000019",
    ]
    record = source.record(1)
    assert record.file_name == "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    assert record.path == root / record.file_name
    assert source.image(1).shape == (3, 4, 3)


def test_a_split_file_of_the_literature_and_own_ids(root):
    split = root / "split.txt"
    split.write_text("ulm_000001_000019_gtFine_instanceIds.png\nulm_000000_000019\n")
    for images in (split, ["ulm_000001_000019_leftImg8bit.png", "train/ulm/ulm_000000_000019"]):
        source = Cityscapes(root, "train", images=images)
        assert [source.record(i).image_id for i in range(2)] == ["ulm_000001_000019", "ulm_000000_000019"]


@pytest.mark.parametrize(
    "ending", ["labelTrainIds.png", "labelIds.png", "instanceIds.png", "polygons.json", "color.png"]
)
def test_lists_of_images_with_their_annotations(root, ending):
    """Two columns, as semi-supervised segmentation's partitions have them, by an editor that marks UTF-8."""
    pair = "leftImg8bit/train/ulm/{0}_leftImg8bit.png gtFine/train/ulm/{0}_gtFine_{1}"
    lines = [pair.format(stem, ending) for stem in ("ulm_000001_000019", "ulm_000000_000019")]
    (root / "labeled.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    source = Cityscapes(root, "train", images=root / "labeled.txt")
    assert [source.record(i).image_id for i in range(2)] == ["ulm_000001_000019", "ulm_000000_000019"]


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (["ulm_000009_000019"], "not in this split: ulm_000009_000019"),
        (["ulm_000000_000019"] * 2, "listed twice: ulm_000000_000019"),
        ([], "lists no images"),
    ],
)
def test_a_faulty_choice_is_refused(root, images, problem):
    with pytest.raises(DataError, match=problem):
        Cityscapes(root, "train", images=images)


def test_unlabelled_needs_no_annotations(root):
    for path in (root / "gtFine").rglob("*.png"):
        path.unlink()
    source = Cityscapes(root, "train", labelled=False)
    assert (len(source), source.categories) == (3, ())
    with pytest.raises(DataError, match="unlabelled"):
        source.instances(0)
    with pytest.raises(DataError, match=r"3 images: bad-city_000000_000019.*labelled=False"):
        Cityscapes(root, "train")


def test_a_missing_split_says_where_it_looked(root):
    with pytest.raises(DataError, match=r"leftImg8bit.val: no images"):
        Cityscapes(root, "val")


def test_no_instances_is_a_valid_image(tmp_path):
    _write(tmp_path, "ulm_000000_000019", np.full((3, 4), 7, np.uint16))
    instances = Cityscapes(tmp_path, "train").instances(0)
    assert (len(instances), instances.masks.shape, instances.ignore.any()) == (0, (0, 3, 4), False)


def test_a_size_mismatch_is_refused(tmp_path):
    _write(tmp_path, "ulm_000000_000019", size=(3, 5))
    with pytest.raises(DataError, match=r"instanceIds\.png.*\(3, 4\).*\(3, 5\)"):
        Cityscapes(tmp_path, "train").instances(0)


def test_wrong_kinds_of_annotation_are_refused(tmp_path):
    _write(tmp_path, "ulm_000000_000019", _IDS.astype(np.uint8))
    with pytest.raises(DataError, match="labelIds"):
        Cityscapes(tmp_path, "train").instances(0)
    _write(tmp_path, "ulm_000000_000019", np.full((3, 4), 7002, np.uint16))
    with pytest.raises(DataError, match="7002 are of no class with instances"):
        Cityscapes(tmp_path, "train").instances(0)


def test_a_truncated_annotation_is_refused(tmp_path):
    noise = np.random.default_rng(0).choice(_IDS.reshape(-1), (64, 64))
    _write(tmp_path, "ulm_000000_000019", noise)
    path = Cityscapes(tmp_path, "train").record(0).annotation
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match="instanceIds"):
        Cityscapes(tmp_path, "train").instances(0)


def test_a_source_survives_pickling(root):
    copy = pickle.loads(pickle.dumps(Cityscapes(root, "train")))
    assert len(copy.instances(0)) == 4


def test_annotations_that_are_links_out_are_told(root):
    outside = root.parent / f"{root.name}_outside.png"
    label = Cityscapes(root, "train").record(2).annotation
    label.rename(outside)
    label.symlink_to(outside)
    source = Cityscapes(root, "train")
    out = lambda report: [found.file_name for found in report.look.findings if found.link_out]
    assert out(check_source("labelled", source, None)) == [source.record(2).file_name]
    assert out(check_source("unlabelled", Cityscapes(root, "train", labelled=False), None)) == []
