"""COCO's format: shapes of every kind against hand-worked masks, and everything that can be wrong in a JSON."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Category, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.data.sources.coco import Coco, require_same_categories

_SIZE = (6, 8)


def _square(top, left, bottom, right):
    mask = np.zeros(_SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def _polygon(top, left, bottom, right):
    return [left, top, right, top, right, bottom, left, bottom]


def _annotation(number, segmentation, image_id=7, category_id=3, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, **more}


def _content(annotations=()):
    return {
        "info": {"description": "made for a test"},
        "images": [
            {"id": 7, "file_name": "a.png", "height": 6, "width": 8, "license": 1},
            {"id": 2, "file_name": "sub/b.png", "height": 6, "width": 8},
        ],
        "annotations": list(annotations),
        "categories": [{"id": 90, "name": "tooth brush", "supercategory": "x"}, {"id": 3, "name": "car"}],
    }


def _write(folder, content, name="train"):
    for image in ("a.png", "sub/b.png"):
        path = folder / name / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*_SIZE, 3), np.uint8)).save(path)
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def _open(folder, *annotations):
    return Coco(_write(folder, _content(annotations)))


def test_sparse_ids_become_positions_by_order_of_id(tmp_path):
    source = _open(
        tmp_path, _annotation(1, [_polygon(0, 0, 2, 2)], category_id=90), _annotation(2, [_polygon(3, 3, 5, 5)])
    )
    assert source.categories == (Category(3, "car"), Category(90, "tooth brush"))
    assert source.instances(0).labels.tolist() == [1, 0]


def test_images_keep_the_order_of_the_json_and_their_sub_folders(tmp_path):
    source = _open(tmp_path)
    assert [source.record(i).image_id for i in range(len(source))] == [7, 2]
    assert source.record(1).file_name == "sub/b.png"
    assert source.image(1).shape == (6, 8, 3)


def test_every_kind_of_segmentation(tmp_path):
    wanted = _square(1, 2, 4, 5)
    # Column by column: 6 rows x 2 empty columns and one empty pixel, then three columns of 3 pixels, 3 empty between.
    uncompressed = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 20]}
    for number, segmentation in enumerate([[_polygon(1, 2, 4, 5)], encode_mask(wanted), uncompressed]):
        instances = _open(tmp_path / str(number), _annotation(1, segmentation)).instances(0)
        np.testing.assert_array_equal(instances.masks, wanted[None])
        assert instances.masks.dtype == bool
        assert instances.scores.tolist() == [1.0]


def test_any_mask_that_pycocotools_encodes_is_understood(tmp_path):
    rng = np.random.default_rng(0)
    wanted = [rng.random(_SIZE) < share for share in (0.02, 0.1, 0.5, 0.9)] + [np.ones(_SIZE, bool)]
    instances = _open(tmp_path, *(_annotation(i, encode_mask(mask)) for i, mask in enumerate(wanted))).instances(0)
    np.testing.assert_array_equal(instances.masks, [mask for mask in wanted if mask.any()])


def test_a_polygon_in_two_parts_is_one_instance(tmp_path):
    parts = [_polygon(0, 0, 2, 2), _polygon(3, 4, 5, 7)]
    instances = _open(tmp_path, _annotation(1, parts)).instances(0)
    np.testing.assert_array_equal(instances.masks, (_square(0, 0, 2, 2) | _square(3, 4, 5, 7))[None])


def test_a_crowd_is_ignored_except_under_an_instance(tmp_path):
    crowd = encode_mask(_square(0, 0, 3, 8))
    instances = _open(
        tmp_path, _annotation(1, crowd, iscrowd=1), _annotation(2, [_polygon(2, 2, 5, 4)], iscrowd=0)
    ).instances(0)
    assert instances.labels.tolist() == [0]
    np.testing.assert_array_equal(instances.ignore, _square(0, 0, 3, 8) & ~_square(2, 2, 5, 4))


def test_an_image_with_only_a_crowd_and_one_with_nothing(tmp_path):
    source = _open(tmp_path, _annotation(1, encode_mask(_square(0, 0, 3, 8)), iscrowd=1))
    only_crowd, nothing = source.instances(0), source.instances(1)
    assert (len(only_crowd), only_crowd.masks.shape) == (0, (0, 6, 8))
    np.testing.assert_array_equal(only_crowd.ignore, _square(0, 0, 3, 8))
    assert (len(nothing), nothing.masks.shape, nothing.ignore.any()) == (0, (0, 6, 8), False)


def test_instances_without_a_pixel_are_left_out(tmp_path):
    tiny = [1.1, 1.1, 1.2, 1.1, 1.2, 1.2]
    crowd = _annotation(3, encode_mask(np.zeros(_SIZE, bool)), iscrowd=1)
    source = _open(tmp_path, _annotation(1, [tiny]), _annotation(2, [_polygon(0, 0, 2, 2)]), crowd)
    assert len(source.instances(0)) == 1
    assert source.instances(0).without_pixels == (1, 3)
    assert source.instances(1).without_pixels == ()


def test_a_polygon_may_stick_out_a_little_and_is_cut_at_the_border(tmp_path):
    instances = _open(tmp_path, _annotation(1, [_polygon(-1.5, 5, 3, 9.9)])).instances(0)
    np.testing.assert_array_equal(instances.masks, _square(0, 5, 3, 8)[None])


@pytest.mark.parametrize("polygon", [_polygon(1, 2, 4, 10.5), _polygon(-2.5, 2, 4, 5)])
def test_a_polygon_far_outside_is_refused_with_its_place(tmp_path, polygon):
    with pytest.raises(DataError, match=r"train\.json: annotation 55 of image 7: .*more than 2 pixels outside"):
        _open(tmp_path, _annotation(55, [polygon]))


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ([], "missing or empty"),
        (None, "missing or empty"),
        ("polygon", "missing or empty"),
        ([[1, 1, 2, 2]], "three points"),
        ([[1, 1, 2, 2, 3, 3, 4]], "three points"),
        ([[1, 1, 2, "x", 3, 3]], "three points"),
        ([[[1, 1], [2, 2], [3, 1]]], "three points"),
        ([1, 1, 2, 2, 3, 3], "three points"),
        ([[1, 1, 2, 2, 3, float("nan")]], "outside its image"),
        ({"size": [8, 6], "counts": [48]}, "size of its image"),
        ({"size": [6, 8]}, "size of its image"),
        ({"size": [6, 8], "counts": [40, 3]}, "with the sum 48"),
        ({"size": [6, 8], "counts": [50, -2]}, "with the sum 48"),
        ({"size": [6, 8], "counts": encode_mask(_square(1, 2, 4, 5))["counts"][:-1]}, "with the sum 48"),
        ({"size": [6, 8], "counts": "P"}, "with the sum 48"),
        ({"size": [6, 8], "counts": "\u00e4\u00f6"}, "with the sum 48"),
        ({"size": [6, 8], "counts": ""}, "with the sum 48"),
    ],
)
def test_malformed_segmentations_are_refused_with_their_place(tmp_path, segmentation, problem):
    with pytest.raises(DataError, match=rf"train\.json: annotation 4 of image 7: .*{problem}"):
        _open(tmp_path, _annotation(4, segmentation))


@pytest.mark.parametrize(
    "content", ["{", '{"images": [}', "", '[{"images": 1}]', '"text"', "[" * 200_000], ids=range(6)
)
def test_broken_json_names_the_file(tmp_path, content):
    with pytest.raises(DataError, match=r"train\.json"):
        Coco(_write(tmp_path, content))


def test_a_missing_json_or_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: no such annotation file"):
        Coco(tmp_path / "gone.json")
    path = _write(tmp_path, _content())
    moved = path.rename(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"other: no such folder with the images of .*other\.json") as caught:
        Coco(moved)
    for option in ("labelled_images or --config.data.val_images", "--labelled-images or --val-images of check_data.py"):
        assert option in str(caught.value)
    assert len(Coco(moved, images=tmp_path / "train")) == 2


@pytest.mark.parametrize(
    ("image_id", "annotated", "problem"),
    [
        ("49", 49, "49, which is not in images as a number, but as the string '49': write ids as numbers in both"),
        (49, "49", "'49', which is not in images as a string, but as the number 49: write ids as numbers in both"),
        (49, "50", "'50', which is not in images$"),
        ("a", 49, "49, which is not in images$"),
    ],
)
def test_ids_that_are_strings_in_one_list_and_numbers_in_the_other_are_told(tmp_path, image_id, annotated, problem):
    content = _content([_annotation(5, [_polygon(1, 2, 4, 5)], image_id=annotated)])
    content["images"][0]["id"] = image_id
    with pytest.raises(DataError, match=rf"(?m)train\.json: annotation 5 has image_id {problem}"):
        Coco(_write(tmp_path, content))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(tmp_path, key):
    content = _content()
    del content[key]
    with pytest.raises(DataError, match=rf"train\.json: needs a list .*'{key}'"):
        Coco(_write(tmp_path, content))


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "height"),
        ("images", "width"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_missing_and_mistyped_keys_are_named(tmp_path, group, key):
    whole = _content([_annotation(1, [_polygon(0, 0, 2, 2)])])
    missing, mistyped = copy.deepcopy(whole), copy.deepcopy(whole)
    del missing[group][0][key]
    mistyped[group][0][key] = 1.5
    for content, problem in ((missing, "is missing"), (mistyped, "is 1.5")):
        with pytest.raises(DataError, match=rf"train\.json: {group}\[0\]\.{key} {problem}"):
            Coco(_write(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["images"][1].update(id=7), r"images\[\]\.id is not unique: 7"),
        (lambda c: c["categories"][1].update(id=90), r"categories\[\]\.id is not unique: 90"),
        (lambda c: c["categories"][1].update(name="tooth brush"), r"categories\[\]\.name is not unique"),
        (lambda c: c["annotations"][0].update(category_id=5), "annotation 1 has category_id 5"),
        (lambda c: c["annotations"][0].update(image_id=5), "annotation 1 has image_id 5"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), "annotation 1 has iscrowd '0'; it must be 0 or 1"),
        (lambda c: c["images"][0].update(file_name="/etc/a.png"), "inside the folder"),
        (lambda c: c["images"][0].update(file_name="../train/a.png"), "inside the folder"),
        (lambda c: c.update(images=[], annotations=[]), "images is empty"),
        (lambda c: c["images"][0].update(height=0), "images\\[0\\] has height, width \\[0, "),
        (lambda c: c["images"][0].update(width=10**25), "they must be its size in pixels"),
        (lambda c: c.update(categories=[]), "categories is empty"),
    ],
)
def test_inconsistent_content_is_refused(tmp_path, change, problem):
    content = _content([_annotation(1, [_polygon(0, 0, 2, 2)])])
    change(content)
    with pytest.raises(DataError, match=problem):
        Coco(_write(tmp_path, content))


def test_faulty_annotations_are_listed_together_or_left_out(tmp_path, caplog):
    sound = _annotation(1, [_polygon(1, 1, 4, 4)])
    faulty = [
        _annotation(2, [_polygon(1, 1, 4, 4)], image_id=99),
        _annotation(3, [_polygon(1, 1, 4, 4)], category_id=5),
        _annotation(1, [_polygon(0, 0, 2, 2)]),
        _annotation([4], [[1, 2]]),
    ]
    path = _write(tmp_path, _content([sound, *faulty, _annotation(5, [_polygon(2, 2, 5, 5)])]))
    problems = [
        "image_id 99",
        "category_id 5",
        r"annotations\[3\]\.id 1 is not unique",
        "annotation \\[4\\] of image 7",
    ]
    with pytest.raises(DataError, match="(?s)4 of 6 annotations are faulty:.*" + ".*".join(problems)):
        Coco(path)
    source = Coco(path, on_fault="skip")
    assert (len(source.faults), len(source.instances(0))) == (4, 2)
    assert "4 faulty annotations are left out" in caplog.text


def test_boxes_outside_their_image_are_noted(tmp_path):
    boxes = [[0, 0, 8, 6], [-1.5, 0, 9, 6], [-3, 0, 4, 4], [2, 2, 9, 2], [0, 0, 1, 9], "none", None]
    annotations = [_annotation(i, [_polygon(1, 1, 4, 4)], bbox=box) for i, box in enumerate(boxes)]
    assert _open(tmp_path, *annotations).boxes_outside == (2, 3, 4)


def test_a_file_of_another_size_than_the_json_says(tmp_path):
    source = _open(tmp_path)
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(tmp_path / "train" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is \(8, 6\).*\(6, 8\) for image 7"):
        source.instances(0)


@pytest.mark.parametrize(("orientation", "said"), [(1, False), (3, False), (5, True), (6, True), (8, True)])
def test_images_annotated_as_their_exif_turns_them(tmp_path, orientation, said):
    source, exif = _open(tmp_path), Image.Exif()
    exif[0x0112] = orientation
    for size in ((8, 6), (9, 6)):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "train" / "a.png", exif=exif)
        with pytest.raises(DataError, match=r"a\.png: is .*\(6, 8\) for image 7") as caught:
            source.instances(0)
        hint = f"EXIF orientation {orientation}, which is not applied: turn its pixels (exiftran"
        assert (hint in str(caught.value)) == ("EXIF" in str(caught.value)) == (said and size == (8, 6))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = _write(tmp_path, "\ufeff" + json.dumps(_content()))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert len(Coco(path)) == 2


def test_val_must_have_the_labelled_categories(tmp_path):
    labelled = (Category(3, "car"), Category(90, "tooth brush"))
    path = _write(tmp_path, _content(), "val")
    assert Coco(path, categories=labelled).categories == labelled
    with pytest.raises(
        DataError, match=r"val\.json: .*5 'bus' is missing, 90 .* is not in the labelled set, 3 is 'car', not 'van'"
    ):
        Coco(path, categories=(Category(3, "van"), Category(5, "bus")))


def test_category_order_does_not_matter():
    require_same_categories([Category(1, "a"), Category(2, "b")], [Category(2, "b"), Category(1, "a")], "val")


def test_a_source_survives_pickling(tmp_path):
    source = _open(
        tmp_path, _annotation(1, [_polygon(0, 0, 2, 2)]), _annotation(2, {"size": [6, 8], "counts": [47, 1]})
    )
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).instances(0).masks, source.instances(0).masks)
