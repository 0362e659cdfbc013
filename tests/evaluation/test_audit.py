"""The pseudo-label audit on scenes worked by hand."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.evaluation.audit import audit, calibration_figure, tenths_from

CATEGORIES = (Category(1, "cat"), Category(2, "dog"))
SIZE = (10, 40)


def strip(left, right):
    """A mask of whole columns: overlaps are then ratios of column counts."""
    mask = np.zeros(SIZE, bool)
    mask[:, left:right] = True
    return mask


def truth(objects, ignore=None):
    return Instances(
        masks=np.array([strip(*span) for span, _ in objects], bool).reshape(-1, *SIZE),
        labels=np.array([label for _, label in objects], np.int32),
        ignore=strip(*(ignore or (0, 0))),
        scores=np.ones(len(objects), np.float32),
    )


def found(objects):
    return Detections(
        labels=np.array([label for _, label, _ in objects], np.int32),
        scores=np.array([score for _, _, score in objects], np.float32),
        mask_quality=np.ones(len(objects), np.float32),
        rles=[encode_mask(strip(*span)) for span, _, _ in objects],
    )


EDGES = (0.3, 0.5, 0.7, 0.9, 1.0)


def test_two_images_worked_by_hand():
    pairs = [
        (
            truth([((0, 10), 0), ((20, 30), 1)]),
            # A hit of IoU 8/10, a hit of IoU 6/10, a second claim on the first object, and one under the threshold.
            found([((0, 8), 0, 0.95), ((20, 26), 1, 0.6), ((0, 10), 0, 0.7), ((20, 30), 1, 0.29)]),
        ),
        (truth([((0, 10), 0)]), found([((0, 10), 1, 0.4)])),  # the right mask under the wrong class
    ]
    report = audit(iter(pairs), CATEGORIES, score_edges=EDGES)
    json.dumps(report)
    assert (report["images"], report["truth"], report["detections"]) == (2, 3, 4)
    assert report["precision"] == pytest.approx(2 / 4)
    assert report["recall"] == pytest.approx(2 / 3)
    assert report["mean_iou"] == pytest.approx((0.8 + 0.6) / 2)
    assert report["mean_score"] == pytest.approx((0.95 + 0.6 + 0.7 + 0.4) / 4)
    assert report["truth_per_image"] == 1.5
    assert report["detections_per_image"] == 2
    # One detection a bin, of which the right ones' scores are too low and the wrong ones' too high.
    assert report["calibration_error"] == pytest.approx((0.05 + 0.4 + 0.7 + 0.4) / 4)
    columns = ("from", "to", "detections", "precision", "recall", "mean_iou", "mean_score")
    by_score = [
        (0.3, 0.5, 1, 0, 0, None, 0.4),
        (0.5, 0.7, 1, 1, 1 / 3, 0.6, 0.6),
        (0.7, 0.9, 1, 0, 0, None, 0.7),
        (0.9, 1.0, 1, 1, 1 / 3, 0.8, 0.95),
    ]
    for row, expected in zip(report["by_score"], by_score, strict=True):
        assert row == {k: None if v is None else pytest.approx(v) for k, v in zip(columns, expected, strict=True)}
    cat, dog = report["by_class"]["cat"], report["by_class"]["dog"]
    measures = ("truth", "detections", "precision", "recall", "mean_iou", "mean_score")
    assert [cat[key] for key in measures] == pytest.approx([2, 2, 0.5, 0.5, 0.8, 0.825])
    assert [dog[key] for key in measures] == pytest.approx([1, 2, 0.5, 1, 0.6, 0.5])
    assert [(row["detections"], row["recall"]) for row in cat["by_score"]] == [(0, 0), (0, 0), (1, 0), (1, 0.5)]
    assert [(row["detections"], row["precision"]) for row in dog["by_score"]] == [(1, 0), (1, 1), (0, None), (0, None)]


def test_the_better_score_chooses_first_whatever_the_order():
    # The stronger detection takes the object it overlaps most and leaves nothing for the weaker, better mask.
    objects = truth([((0, 10), 0)])
    detections = [((0, 10), 0, 0.5), ((0, 6), 0, 0.8)]
    for order in (detections, detections[::-1]):
        report = audit([(objects, found(order))], CATEGORIES)
        assert report["mean_iou"] == pytest.approx(0.6)
        assert report["precision"] == 0.5


def test_a_detection_takes_the_free_object_that_it_overlaps_most():
    # Two equal detections overlap the objects by 8/10 and 9/10: the first takes the second object, the other the rest.
    report = audit([(truth([((0, 8), 0), ((1, 10), 0)]), found([((0, 10), 0, 0.9), ((0, 10), 0, 0.8)]))], CATEGORIES)
    assert report["precision"] == report["recall"] == 1
    assert report["mean_iou"] == pytest.approx((0.9 + 0.8) / 2)


def test_edges_belong_to_the_upper_bin_and_one_to_the_last():
    scores = [0.3, 0.5, 0.7, 0.9, 1.0]
    report = audit([(truth([]), found([((0, 5), 0, score) for score in scores]))], CATEGORIES, score_edges=EDGES)
    assert [row["detections"] for row in report["by_score"]] == [1, 1, 1, 2]


def test_ignored_detections_do_not_count_but_matched_ones_do():
    objects = truth([((0, 10), 0)], ignore=(0, 30))
    detections = found([((0, 10), 0, 0.9), ((20, 40), 0, 0.8), ((21, 41), 1, 0.8)])
    report = audit([(objects, detections)], CATEGORIES)
    # (20, 40) lies by half in the region and is dropped; (21, 40) by 9/19 is an error.
    assert report["detections"] == 2
    assert report["precision"] == 0.5
    assert report["recall"] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pairs", [[], [(truth([]), found([]))]], ids=["no images", "an empty image"])
def test_nothing_to_audit(pairs):
    report = audit(pairs, CATEGORIES)
    assert report["images"] == len(pairs)
    assert report["precision"] is report["recall"] is report["mean_iou"] is report["by_class"]["cat"]["recall"] is None


def test_no_detections_is_no_recall():
    report = audit([(truth([((0, 10), 0)]), found([]))], CATEGORIES)
    assert report["precision"] is None
    assert report["recall"] == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="score_edges"):
        audit([], CATEGORIES, score_edges=(0.5, 0.3))
    with pytest.raises(ValueError, match="iou_threshold"):
        audit([], CATEGORIES, iou_threshold=0)


def test_bins_begin_at_the_threshold():
    assert tenths_from(0.3) == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert tenths_from(0.0)[:2] == (0.0, 0.1)
    assert tenths_from(0.85) == (0.85, 0.9, 1.0)
    one = audit([(truth([]), found([((0, 5), 0, 1.0)]))], CATEGORIES, score_edges=tenths_from(1.0))
    assert one["detections"] == 1


@pytest.mark.filterwarnings("error")
def test_the_calibration_plot_shows_precision_over_score():
    """Pictures of a sure and right labeller, of a sure and wrong one, and of none: all different."""
    objects = truth([((0, 10), 0)])
    reports = [
        audit([(objects, found(seen))], CATEGORIES) for seen in ([((0, 10), 0, 0.95)], [((20, 30), 0, 0.95)], [])
    ]
    assert [report["calibration_error"] for report in reports] == [pytest.approx(0.05), pytest.approx(0.95), None]
    pictures = [cv2.imdecode(np.frombuffer(calibration_figure(report), np.uint8), 1) for report in reports]
    assert {picture.shape for picture in pictures} == {(960, 960, 3)}
    assert not any(np.array_equal(pictures[i], pictures[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
