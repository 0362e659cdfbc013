"""The Cityscapes export, read back as cityscapesscripts reads it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.evaluation.cityscapes import ignore_small, write_predictions

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


def test_small_instances_become_ignored():
    masks = np.zeros((2, 20, 20), bool)
    masks[0, :10, :10] = True  # 100 pixels: stays
    masks[1, 10:, :10] = True
    masks[1, 10, 0] = False  # 99 pixels: goes
    ignore = np.zeros((20, 20), bool)
    ignore[0, 19] = True
    kept = ignore_small(Instances(masks, np.array([3, 4], np.int32), ignore, np.ones(2, np.float32)))
    np.testing.assert_array_equal(kept.masks, masks[:1])
    assert kept.labels.tolist() == [3]
    assert len(kept.scores) == 1
    np.testing.assert_array_equal(kept.ignore, ignore | masks[1])
