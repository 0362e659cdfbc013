"""Colours change as their definitions say, and nothing moves."""

from __future__ import annotations

import numpy as np
import pytest

from cast_jax.data.photometric import PhotometricConfig, distort

NOTHING = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
ALWAYS = {"jitter_probability": 1.0, "grayscale_probability": 0.0, "blur_probability": 0.0, **NOTHING}


class Fixed:
    """Random numbers that are known: every probability is met, every range gives this share of its extent."""

    def __init__(self, share: float):
        self.share = share

    def random(self, count: int) -> np.ndarray:
        return np.zeros(count)

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)

    def uniform(self, low: float, high: float, count: int | None = None) -> np.ndarray | float:
        value = low + self.share * (high - low)
        return value if count is None else np.full(count, value)


def apply(image: np.ndarray, share: float, **changes: float | tuple[float, float]) -> np.ndarray:
    return distort(image, Fixed(share), PhotometricConfig(**{**ALWAYS, **changes}))


def pixel(*colour: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (4, 4, 1))


def test_nothing_changes_at_probability_zero():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    config = PhotometricConfig(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)
    np.testing.assert_array_equal(distort(image, np.random.default_rng(1), config), image)


def test_brightness_scales_and_clips():
    np.testing.assert_array_equal(apply(pixel(100, 200, 10), 1.0, brightness=0.5), pixel(150, 255, 15))
    np.testing.assert_array_equal(apply(pixel(100, 200, 10), 0.0, brightness=0.5), pixel(50, 100, 5))
    np.testing.assert_array_equal(apply(pixel(100, 200, 10), 0.0, brightness=3.0), pixel(0, 0, 0))


def test_contrast_scales_about_the_mean():
    image = np.concatenate([pixel(50, 50, 50), pixel(150, 150, 150)])  # mean 100
    expected = np.concatenate([pixel(25, 25, 25), pixel(175, 175, 175)])
    np.testing.assert_array_equal(apply(image, 1.0, contrast=0.5), expected)


def test_saturation_scales_about_grey():
    grey = pixel(80, 80, 80)
    np.testing.assert_array_equal(apply(grey, 1.0, saturation=0.5), grey)
    faded = apply(pixel(200, 100, 0), 0.0, saturation=1.0)
    luma = round(0.299 * 200 + 0.587 * 100)
    np.testing.assert_allclose(faded, pixel(luma, luma, luma), atol=1)
    assert (apply(pixel(120, 100, 80), 1.0, saturation=0.5)[0, 0] == (128, 98, 68)).all()  # 1.5 · c - 0.5 · 104 (luma)


@pytest.mark.parametrize(("turns", "colour"), [(1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (1 / 2, (0, 255, 255))])
def test_hue_turns_red(turns, colour):
    turned = apply(pixel(255, 0, 0), 1.0 if turns > 0 else 0.0, hue=abs(turns))
    np.testing.assert_allclose(turned.astype(int), pixel(*colour), atol=6)  # a step of the hue


def test_grayscale_is_luma_in_three_channels():
    grey = apply(pixel(200, 100, 0), 0.5, grayscale_probability=1.0)
    np.testing.assert_allclose(grey, np.full((4, 4, 3), 118.5), atol=1)


def test_blur_is_the_gaussian_and_stays_in_place():
    image = np.zeros((31, 31, 3), np.uint8)
    image[15, 15] = 255
    blurred = apply(image, 0.5, blur_probability=1.0, blur_sigma=(1.5, 1.5)).astype(float)
    y, x = np.mgrid[:31, :31] - 15
    bell = np.exp(-(y**2 + x**2) / (2 * 1.5**2))
    np.testing.assert_allclose(blurred, (255 * bell / bell.sum())[..., None].repeat(3, -1), atol=1)
    np.testing.assert_array_equal(blurred, blurred[::-1, ::-1])


def test_an_edge_stays_where_it_is():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :10], image[:, 10:] = (40, 60, 50), (190, 200, 180)
    for seed in range(40):
        changed = distort(image, np.random.default_rng(seed), PhotometricConfig(blur_sigma=(0.1, 1.0))).astype(int)
        steps = np.abs(np.diff(changed.sum(axis=-1), axis=1))
        assert (steps.argmax(axis=1) == 9).all()


def test_probabilities_are_kept():
    image = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    config = PhotometricConfig(jitter_probability=0.0, blur_probability=0.0, grayscale_probability=0.2)
    rng = np.random.default_rng(0)
    grey = sum(bool(np.ptp(distort(image, rng, config), axis=-1).max() == 0) for _ in range(2000))
    assert 340 <= grey <= 460  # 400 ± 3.4 standard deviations
