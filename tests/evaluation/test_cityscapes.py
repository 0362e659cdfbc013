"""The Cityscapes export, read back as cityscapesscripts reads it, and its AP beside COCO's on cases worked by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cast_jax.core.annotations import Category, Detections, encode_mask
from cast_jax.core.errors import DataError, UserError
from cast_jax.data.sources.cityscapes import CATEGORIES as CLASSES
from cast_jax.data.sources.cityscapes import instances_from_ids
from cast_jax.evaluation import cityscapes
from cast_jax.evaluation.cityscapes import official_ap, write_predictions
from cast_jax.evaluation.coco_map import MaskAPEvaluator

CATEGORIES = (Category(24, "person"), Category(33, "bicycle"))
STEM = "frankfurt_000000_000294"


def _detections(masks, labels, scores):
    return Detections(
        labels=np.array(labels, np.int32),
        scores=np.array(scores, np.float32),
        mask_quality=np.ones(len(labels), np.float32),
        rles=[encode_mask(mask) for mask in masks],
    )


def test_masks_class_ids_and_scores_are_read_back(tmp_path):
    masks = np.zeros((2, 6, 9), bool)
    masks[0, 1:3, 2:5] = True
    masks[1, 4:, 7:] = True
    path = write_predictions(tmp_path, STEM, _detections(masks, [1, 0], [0.75, 0.5]), CATEGORIES)
    assert path == tmp_path / f"{STEM}_pred.txt"
    rows = [line.split(" ") for line in path.read_text().splitlines()]
    assert [(int(row[1]), float(row[2])) for row in rows] == [(33, 0.75), (24, 0.5)]
    for row, mask in zip(rows, masks, strict=True):
        written = cv2.imread(str(path.parent / row[0]), cv2.IMREAD_UNCHANGED)
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, mask.astype(np.uint8) * 255)


def test_image_without_detections_has_an_empty_text(tmp_path):
    path = write_predictions(tmp_path, STEM, _detections([], [], []), CATEGORIES)
    assert path.read_text() == ""
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_class_that_cityscapes_does_not_score_is_named(tmp_path):
    with pytest.raises(DataError, match=r"\['tree'\]"):
        write_predictions(tmp_path, STEM, _detections([], [], []), (*CATEGORIES, Category(21, "tree")))
    assert not list(tmp_path.iterdir())


# Official and COCO's AP on the same pictures. Objects are strips of rows in a picture of 100 x 20 pixels: one row is
# 20 pixels, so IoUs are ratios of rows.
SIZE = (100, 20)
CAR, BICYCLE = 2, 7  # positions among the classes


def rows(first: int, last: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[first:last] = True
    return mask


def both(tmp_path, pictures):
    """(official ap, official ap50, COCO ap, COCO ap50) of pictures ``(id map, [(rows, class, score), ...])``."""
    evaluator, labels = MaskAPEvaluator(CLASSES), {}
    for number, (ids, found) in enumerate(pictures):
        stem = f"ulm_{number:06d}_000019"
        labels[stem] = tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png"
        labels[stem].parent.mkdir(exist_ok=True)
        cv2.imwrite(str(labels[stem]), ids)
        detections = _detections([rows(*span) for span, _, _ in found], *zip(*[f[1:] for f in found], strict=True))
        write_predictions(tmp_path / "predictions", stem, detections, CLASSES)
        evaluator.add(number, SIZE, instances_from_ids(ids, stem), detections)
    official, coco = official_ap(tmp_path / "predictions", labels), evaluator.results()
    assert set(official["per_class"]) == {category.name for category in CLASSES}
    return official["ap"], official["ap50"], coco["mask_ap"], coco["mask_ap50"]


def picture(*objects: tuple[int, int, int]) -> np.ndarray:
    """An id map of (first row, last row, id) on road."""
    ids = np.full(SIZE, 7, np.uint16)
    for first, last, value in objects:
        ids[first:last] = value
    return ids


def test_where_both_definitions_agree(tmp_path):
    """Perfect masks; then half of the objects (COCO reads 51 of 101 recalls)."""
    ids = picture((0, 30, 26000), (40, 60, 26001), (60, 90, 33000))
    perfect = [((0, 30), CAR, 0.9), ((40, 60), CAR, 0.8), ((60, 90), BICYCLE, 0.7)]
    assert both(tmp_path, [(ids, perfect)]) == pytest.approx((100, 100, 100, 100))
    values = both(tmp_path, [(ids, perfect[1:2])])
    assert values == pytest.approx((25, 25, 100 * 51 / 202, 100 * 51 / 202))
    # IoUs of 0.7 and a bit count at four thresholds in both.
    values = both(tmp_path, [(picture((0, 100, 26000)), [((0, 72), CAR, 0.9)])])
    assert values == pytest.approx((50, 100, 50, 100))


def test_iou_on_the_threshold_matches_in_coco_only(tmp_path):
    values = both(tmp_path, [(picture((0, 40, 26000)), [((0, 20), CAR, 0.9)])])  # IoU exactly 1/2
    assert values == pytest.approx((0, 0, 10, 100))


def test_a_false_positive_above_a_hit_costs_differently(tmp_path):
    """Points (recall 0, precision 0), (1, 1/2) and the artificial (0, 1). COCO: precision 1/2 at every recall.

    Official: the point (1, 1/2) covers half of the way to its neighbour and so does (0, 0): 1/4.
    """
    ids = picture((0, 30, 26000))
    values = both(tmp_path, [(ids, [((50, 80), CAR, 0.9), ((0, 30), CAR, 0.5)])])
    assert values == pytest.approx((25, 25, 50, 50))


def test_groups_and_small_objects_are_ignored(tmp_path):
    """A detection on a bicycle group counts for nothing in both; of objects under 100 pixels, only COCO wants to know.

    "Small" are fewer than 100 pixels; a detection of one is dropped, and so is the object.
    """
    group = picture((0, 30, 26000), (50, 80, 33), (90, 100, 33000))
    found = [((0, 30), CAR, 0.9), ((50, 80), BICYCLE, 0.8), ((90, 100), BICYCLE, 0.7)]
    assert both(tmp_path, [(group, found)]) == pytest.approx((100, 100, 100, 100))
    small = picture((0, 30, 26000), (50, 54, 26001))  # 80 pixels
    for detections, coco in (
        ([((0, 30), CAR, 0.9)], 100 * 51 / 101),
        ([((0, 30), CAR, 0.9), ((50, 54), CAR, 0.8)], 100),
    ):
        assert both(tmp_path, [(small, detections)]) == pytest.approx((100, 100, coco, coco))


def test_a_detection_on_a_caravan_is_false_only_officially(tmp_path):
    """The scorer knows caravans as void by their class id, 29, which the instance 29000 is not."""
    caravan = [((0, 30), CAR, 0.5), ((50, 80), CAR, 0.9)]
    assert both(tmp_path, [(picture((0, 30, 26000), (50, 80, 29000)), caravan)]) == pytest.approx((25, 25, 100, 100))
    assert both(tmp_path, [(picture((0, 30, 26000), (50, 80, 29)), caravan)]) == pytest.approx((100, 100, 100, 100))


def test_several_pictures_and_a_class_without_objects(tmp_path):
    pictures = [
        (picture((0, 30, 26000)), [((0, 30), CAR, 0.9), ((40, 60), BICYCLE, 0.99)]),  # no bicycle anywhere: no AP
        (picture((0, 30, 26000)), [((0, 28), CAR, 0.8)]),  # IoU 0.93: not at 0.95
    ]
    ap, ap50, coco_ap, coco_ap50 = both(tmp_path, pictures)
    assert (ap50, coco_ap50) == pytest.approx((100, 100))
    # At 0.95 one of two is found, and the other detection is a false one after it: points (1/2, 1), (1/2, 1/2).
    assert coco_ap == pytest.approx((9 * 100 + 100 * 51 / 101) / 10)
    assert ap == pytest.approx((9 * 100 + 50) / 10)


def test_what_official_scoring_needs(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no predictions for 1 images, the first is ulm_000000_000019_pred\.txt"):
        official_ap(tmp_path, {"ulm_000000_000019": tmp_path / "a.png"})
    monkeypatch.setattr(cityscapes, "official_scorer_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'cast_jax\[cityscapes\]'"):
        official_ap(tmp_path, {})
