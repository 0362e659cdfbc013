"""Overlays change what they should and nothing else; sheets and files have the right shape and content."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.visualize import PALETTE, _font, contact_sheet, overlay, save_image, side_by_side

CATEGORIES = (Category(3, "cat"), Category(9, "dog"))
GREY = np.full((60, 80, 3), 100, np.uint8)


def square(top, left, side=20, size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def instances(masks, labels):
    return Instances(
        np.array(masks, bool).reshape(-1, 60, 80),
        np.array(labels, np.int32),
        np.zeros((60, 80), bool),
        np.ones(len(labels), np.float32),
    )


def detections(masks, labels, scores):
    ones = np.ones(len(labels), np.float32)
    rles = [encode_mask(mask) for mask in masks]
    return Detections(np.array(labels, np.int32), np.array(scores, np.float32), ones, rles)


def fill(k, opacity=0.45):
    return np.rint((1 - opacity) * 100 + opacity * PALETTE[k].astype(float))


def test_fill_outline_and_untouched_background():
    image = GREY.copy()
    drawn = overlay(image, np.stack([square(10, 10), square(30, 50)]), [0, 1])
    np.testing.assert_array_equal(image, GREY)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[20, 20], fill(0))
    np.testing.assert_array_equal(drawn[40, 60], fill(1))
    np.testing.assert_allclose(drawn[10, 20].astype(int), PALETTE[0], atol=20)  # the line is antialiased
    outside = ~(cv2.dilate((square(10, 10) | square(30, 50)).astype(np.uint8), np.ones((5, 5))) > 0)
    np.testing.assert_array_equal(drawn[outside], GREY[outside])


def test_small_instances_lie_on_large_ones_in_any_order():
    small, large = square(25, 25, 8), square(10, 10, 40)
    np.testing.assert_array_equal(
        overlay(GREY, [encode_mask(small), encode_mask(large)], [0, 0]),
        overlay(GREY, np.stack([large, small]), [0, 0], colours=[1, 0]),
    )
    both = overlay(GREY, np.stack([large, small]), [0, 0])[29, 29]
    np.testing.assert_array_equal(both, np.rint(0.55 * fill(0) + 0.45 * PALETTE[1]))


def test_names_only_with_categories_and_scores_only_for_one_class():
    masks = square(20, 10, 40)[None]
    plain, named = overlay(GREY, masks, [0], [0.5]), overlay(GREY, masks, [0], [0.5], CATEGORIES)
    score_only = overlay(GREY, masks, [0], [0.5], CATEGORIES[:1])
    changed = [(drawn != plain).any(axis=2) for drawn in (named, score_only)]
    assert changed[0].sum() > changed[1].sum() > 0
    np.testing.assert_array_equal(overlay(GREY, masks, [0], None, CATEGORIES[:1]), plain)
    # The score leaves most of this instance visible, so it stands on it; the longer text stands above.
    assert not (changed[1] & ~masks[0]).any()
    assert not changed[0][20:].any()


def test_ignored_pixels_are_marked():
    drawn = overlay(GREY, np.zeros((0, 60, 80), bool), [], ignore=square(5, 5))
    changed = (drawn != GREY).any(axis=2)
    assert not (changed & ~square(5, 5)).any()
    assert changed[square(5, 5)].mean() > 0.9


@pytest.mark.parametrize("long_side", [40, 160])
def test_resized_result(long_side):
    drawn = overlay(GREY, [encode_mask(square(10, 10, 40))], [0], [0.9], CATEGORIES[:1], long_side=long_side)
    scale = long_side / 80
    assert drawn.shape == (60 * scale, long_side, 3)
    np.testing.assert_array_equal(drawn[int(15 * scale), int(15 * scale)], fill(0))


@pytest.mark.parametrize("count", [0, 1, 78])
def test_any_number_of_instances_down_to_one_pixel(count):
    masks = np.zeros((count, 60, 80), bool)
    masks[np.arange(count), np.arange(count) % 60, np.arange(count)] = True
    drawn = overlay(GREY, masks, [1] * count, np.ones(count), CATEGORIES)
    assert drawn.shape == GREY.shape
    assert (drawn != GREY).any() == (count > 0)


def test_empty_masks_and_names_wider_than_the_image_are_left_out():
    wide = (Category(1, "a" * 60), Category(2, "b"))
    np.testing.assert_array_equal(overlay(GREY, np.zeros((1, 60, 80), bool), [0], [1.0], wide), GREY)
    masks = square(10, 10)[None]
    np.testing.assert_array_equal(overlay(GREY, masks, [0], [1.0], wide), overlay(GREY, masks, [0]))


def test_side_by_side_gives_a_detection_the_colour_of_its_object():
    truth = instances([square(0, 0), square(38, 55)], [0, 0])
    found = detections([square(38, 56), square(0, 1), square(35, 5), square(5, 40)], [0] * 4, [0.9, 0.8, 0.7, 0.2])
    sheet = side_by_side(GREY, truth, found, CATEGORIES[:1], long_side=80)
    # Panels of 80 pixels with a gap of 6 around; a picture's last row is 6 above the bottom.
    panel = sheet[-66:-6, 6 + 2 * 86 : 6 + 2 * 86 + 80]
    np.testing.assert_array_equal(panel[54, 60], fill(1))
    np.testing.assert_array_equal(panel[17, 5], fill(0))
    np.testing.assert_array_equal(panel[51, 9], fill(2 + 2))
    np.testing.assert_array_equal(panel[20, 55], GREY[20, 55])  # under the threshold
    np.testing.assert_array_equal(sheet[-66:-6, 6:86], GREY)


def test_side_by_side_without_truth_or_detections():
    nothing = detections([], [], [])
    assert side_by_side(GREY, instances([], []), nothing, CATEGORIES, long_side=80).shape[1] == 3 * 86 + 6
    assert side_by_side(GREY, None, nothing, CATEGORIES, long_side=80).shape[1] == 2 * 86 + 6


def test_contact_sheet_places_images_row_by_row():
    images = [np.full((40, 60, 3), value, np.uint8) for value in (50, 100, 150)]
    sheet = contact_sheet(images, columns=2, max_side=30)
    assert sheet.shape == (2 * 20 + 3 * 6, 2 * 30 + 3 * 6, 3)
    assert [sheet[16, 20, 0], sheet[16, 60, 0], sheet[42, 20, 0]] == [50, 100, 150]
    assert sheet[42, 60, 0] not in (50, 100, 150)
    # Nothing is enlarged, and one image needs one column.
    assert contact_sheet(images[:1], columns=4, max_side=500).shape == (52, 72, 3)


def test_contact_sheet_of_nothing():
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([GREY], columns=0)


def test_saved_images_are_read_back(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    save_image(tmp_path / "deep" / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "deep" / "a.png"))[..., ::-1], image)
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 100, 50], np.uint8)
    save_image(tmp_path / "b.JPG", flat)
    np.testing.assert_allclose(cv2.imread(str(tmp_path / "b.JPG"))[..., ::-1].astype(int), flat, atol=3)


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [("a.gif", GREY, "gif"), ("a.png", GREY[..., 0], "uint8"), ("a.png", GREY.astype(np.float32), "float32")],
)
def test_images_that_cannot_be_saved(tmp_path, name, image, message):
    with pytest.raises(ValueError, match=message):
        save_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


def test_letters_beyond_ascii_are_drawn_apart():
    pictures = {bytes(_font(20).getmask(letter)) for letter in "öüжå"}
    assert len(pictures) == 4
