"""Mask AP against values worked by hand and against pycocotools' own path through JSON files."""

from __future__ import annotations

import csv
import json
import math

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.evaluation.coco_map import MaskAPEvaluator

CATEGORIES = (Category(7, "cat"), Category(90, "dog"))
SIZE = (40, 50)


def box(top, left, bottom, right, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def truth(masks=(), labels=(), ignore=None, size=SIZE):
    return Instances(
        masks=np.array(list(masks), bool).reshape(-1, *size),
        labels=np.array(labels, np.int32),
        ignore=np.zeros(size, bool) if ignore is None else ignore,
        scores=np.ones(len(labels), np.float32),
    )


def found(masks=(), labels=(), scores=()):
    return Detections(
        labels=np.array(labels, np.int32),
        scores=np.array(scores, np.float32),
        mask_quality=np.ones(len(labels), np.float32),
        rles=[encode_mask(mask) for mask in masks],
    )


A, B, FAR = box(0, 0, 10, 10), box(20, 20, 30, 30), box(0, 30, 10, 40)


def test_perfect_detections_score_100():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A, B], [0, 1]), found([A, B], [0, 1], [0.9, 0.4]))
    results = evaluator.results()
    for key in ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small"):
        assert results[key] == pytest.approx(100)
    assert results["mask_ap_medium"] is None
    assert results["mask_ap_large"] is None
    assert results["per_class"]["dog"] == {
        "id": 90,
        "instances": 1,
        "ap": pytest.approx(100),
        "ap50": pytest.approx(100),
    }
    assert (results["images"], results["instances"], results["detections"], len(evaluator)) == (1, 2, 2, 1)


def test_iou_of_six_tenths_counts_at_three_of_ten_thresholds():
    # 60 of the 100 pixels: IoU 0.6, reached by the thresholds 0.50, 0.55 and 0.60.
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0]), found([box(0, 0, 6, 10)], [0], [0.9]))
    results = evaluator.results()
    assert results["mask_ap"] == pytest.approx(30)
    assert results["mask_ap50"] == pytest.approx(100)
    assert results["mask_ap75"] == 0
    assert results["per_class"]["dog"]["ap"] is None


def test_false_positive_above_the_hit_halves_precision():
    # Ranked: miss, hit. Precision 1/2 at every recall level.
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0]), found([FAR, A], [0, 0], [0.9, 0.8]))
    assert evaluator.results()["mask_ap"] == pytest.approx(50)


def test_class_confusion_is_an_error_for_both():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A, B], [0, 1]), found([A, B], [1, 1], [0.9, 0.8]))
    per_class = evaluator.results()["per_class"]
    assert per_class["cat"]["ap"] == 0
    assert per_class["dog"]["ap"] == pytest.approx(50)


@pytest.mark.parametrize(("left", "mask_ap50"), [(30, 100.0), (25, 100.0), (24, 50.0)])
def test_detection_in_the_ignore_region_is_dropped_when_half_of_it_lies_inside(left, mask_ap50):
    # The region starts at column 30; ten columns wide, a detection from column 25 has just half of its area in it.
    evaluator = MaskAPEvaluator(CATEGORIES)
    detections = found([box(0, left, 10, left + 10), A], [0, 0], [0.9, 0.8])
    evaluator.add(1, SIZE, truth([A], [0], ignore=box(0, 30, 40, 50)), detections)
    assert evaluator.results()["mask_ap50"] == pytest.approx(mask_ap50)


def test_ignore_region_serves_every_class_any_number_of_times_and_is_no_object():
    evaluator = MaskAPEvaluator(CATEGORIES)
    inside = box(2, 32, 6, 36)
    detections = found([inside, inside, inside, inside, A, B], [0, 0, 1, 1, 0, 1], [0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    evaluator.add(1, SIZE, truth([A, B], [0, 1], ignore=box(0, 30, 10, 40)), detections)
    results = evaluator.results()
    assert results["mask_ap"] == pytest.approx(100)
    assert results["instances"] == 2


def test_object_inside_the_ignore_region_is_still_found():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0], ignore=box(0, 0, 20, 20)), found([A], [0], [0.9]))
    assert evaluator.results()["mask_ap"] == pytest.approx(100)


def test_ignore_region_of_one_image_does_not_reach_another():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0], ignore=FAR), found([A], [0], [0.8]))
    evaluator.add(2, SIZE, truth(), found([FAR], [0], [0.9]))
    assert evaluator.results()["mask_ap"] == pytest.approx(50)


def test_only_the_best_detections_count():
    detections = found([FAR, A], [0, 0], [0.9, 0.8])
    strict, lenient = MaskAPEvaluator(CATEGORIES, max_detections=1), MaskAPEvaluator(CATEGORIES, max_detections=2)
    for evaluator in (strict, lenient):
        evaluator.add(1, SIZE, truth([A], [0]), detections)
    assert strict.results()["mask_ap"] == 0
    assert lenient.results()["mask_ap"] == pytest.approx(50)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ground_truth", "detections", "mask_ap"),
    [
        (truth(), found(), None),
        (truth(), found([A], [0], [0.5]), None),
        (truth([A], [0]), found(), 0.0),
        (truth(ignore=A), found([A], [0], [0.5]), None),
        (truth([np.zeros(SIZE, bool)], [0]), found(), None),
        (truth([A], [0]), found([np.zeros(SIZE, bool)], [0], [0.1]), 0.0),
    ],
    ids=["neither", "no truth", "no detections", "ignore only", "empty object", "empty detection"],
)
def test_empty_cases(ground_truth, detections, mask_ap, tmp_path, capfd):
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add("x", SIZE, ground_truth, detections)
    assert evaluator.write(tmp_path)["mask_ap"] == mask_ap
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("error")
def test_no_images_at_all(tmp_path):
    results = MaskAPEvaluator(CATEGORIES).write(tmp_path)
    assert results["mask_ap"] is results["mask_ap50"] is results["per_class"]["cat"]["ap"] is None
    assert json.loads((tmp_path / "coco_results.json").read_text()) == []


def test_adding_after_results_rescores():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0]), found([A], [0], [0.9]))
    assert evaluator.results()["mask_ap"] == evaluator.results()["mask_ap"] == pytest.approx(100)
    evaluator.add(2, SIZE, truth([A], [0]), found())
    # Recall stops at one half: 51 of the 101 recall levels, 0.00 to 0.50, have precision 1.
    assert evaluator.results()["mask_ap"] == pytest.approx(100 * 51 / 101)


def test_equal_to_pycocotools_on_json_files(tmp_path, capsys):
    """Random scenes scored through this evaluator and through COCO's JSON, loadRes and summarize."""
    rng = np.random.default_rng(0)
    evaluator = MaskAPEvaluator(CATEGORIES)
    images, annotations = [], []
    size = (160, 190)
    for image_id in range(100, 112):
        masks, labels, detected = [], [], []
        for _ in range(rng.integers(1, 7)):
            side = int(rng.integers(5, 150))
            top, left = int(rng.integers(0, size[0] // 3)), int(rng.integers(0, size[1] // 3))
            masks.append(box(top, left, top + side, left + side, size))
            labels.append(int(rng.integers(2)))
            if rng.random() < 0.8:
                shift = int(rng.integers(0, 4))
                label = labels[-1] if rng.random() < 0.9 else 1 - labels[-1]
                detected.append((box(top + shift, left, top + shift + side, left + side, size), label, rng.random()))
        images.append({"id": image_id, "height": size[0], "width": size[1]})
        for mask, label in zip(masks, labels, strict=True):
            rle = encode_mask(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[label].id,
                    "iscrowd": 0,
                    "area": int(coco_mask.area(rle)),
                    "segmentation": rle,
                }
            )
        columns = list(zip(*detected, strict=True)) or [(), (), ()]
        evaluator.add(image_id, size, truth(masks, labels, size=size), found(*columns))
    results = evaluator.write(tmp_path)

    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    coco = COCO(str(tmp_path / "truth.json"))
    reference = COCOeval(coco, coco.loadRes(str(tmp_path / "coco_results.json")), "segm")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    capsys.readouterr()
    keys = ["mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large"]
    assert 5 < results["mask_ap"] < 95
    np.testing.assert_allclose([results[key] for key in keys], 100 * reference.stats[:6], atol=1e-9)
    # COCOeval sorts classes by id, as CATEGORIES are.
    per_class = 100 * reference.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    np.testing.assert_allclose([row["ap"] for row in results["per_class"].values()], per_class, atol=1e-9)


def test_output_has_the_datasets_own_ids(tmp_path):
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add("frankfurt_000000_000294", SIZE, truth([B], [1]), found([B], [1], [0.5]))
    evaluator.write(tmp_path)
    expected = {
        "image_id": "frankfurt_000000_000294",
        "category_id": 90,
        "segmentation": encode_mask(B),
        "score": 0.5,
    }
    assert json.loads((tmp_path / "coco_results.json").read_text()) == [expected]
    rows = list(csv.reader((tmp_path / "per_class_ap.csv").open()))
    assert rows == [
        ["class", "id", "instances", "ap", "ap50"],
        ["cat", "7", "0", "n/a", "n/a"],
        ["dog", "90", "1", *["100.000"] * 2],
    ]
    assert cv2.imread(str(tmp_path / "pr_curve.png")).shape[1] >= 640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco_results.json", "per_class_ap.csv", "pr_curve.png"]


def test_classes_of_one_name_stay_apart():
    evaluator = MaskAPEvaluator((Category(1, "crane"), Category(2, "crane"), Category(3, "owl")))
    assert list(evaluator.results()["per_class"]) == ["crane (1)", "crane (2)", "owl"]


def test_only_run_lengths_are_kept():
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth([A], [0], ignore=B), found([A], [0], [0.9]))
    held = [annotation["segmentation"] for annotation in evaluator._truth + evaluator._detections]
    assert len(held) == 3
    assert all(isinstance(rle["counts"], str) for rle in held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, SIZE, truth(), found()), "added twice"),
        ((2, (40, 51), truth(), found()), r"\(40, 51\)"),
        ((2, SIZE, truth(), found([box(0, 0, 5, 5, (50, 40))], [0], [1])), r"\(50, 40\)"),
        ((2, SIZE, truth([A], [2]), found()), r"labels \[2\]"),
        ((2, SIZE, truth(), found([A], [-1], [1])), r"labels \[-1\]"),
        ((2, SIZE, truth(), found([A], [0], [math.nan])), "not finite"),
    ],
)
def test_bad_input_names_the_image(arguments, message):
    evaluator = MaskAPEvaluator(CATEGORIES)
    evaluator.add(1, SIZE, truth(), found())
    with pytest.raises(DataError, match=f"image {arguments[0]}.*{message}"):
        evaluator.add(*arguments)


def test_bad_construction():
    with pytest.raises(DataError, match="category"):
        MaskAPEvaluator(())
    with pytest.raises(ValueError, match="max_detections"):
        MaskAPEvaluator(CATEGORIES, max_detections=0)
