"""Changes of colour and sharpness that leave every pixel where it is (the strong view's, as in UniMatch V2)."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import UInt8

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotometricConfig:
    """How far colours go. Defaults are UniMatch V2's strong view (Yang et al. 2024).

    Attributes:
      jitter_probability: that brightness, contrast, saturation and hue change at all.
      brightness, contrast, saturation: a factor is drawn from [max(0, 1 - value), 1 + value].
      hue: a shift is drawn from [-hue, hue], in turns of the colour circle; at most 0.5.
      grayscale_probability: that the colours are dropped.
      blur_probability: that a Gaussian blur is applied.
      blur_sigma: the blur's standard deviation is drawn from this range, in pixels of the view.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        check_ranges(self, jitter_probability="[0, 1]", grayscale_probability="[0, 1]", blur_probability="[0, 1]")
        check_ranges(self, brightness="[0, inf)", contrast="[0, inf)", saturation="[0, inf)", hue="[0, 0.5]")
        require_range("blur_sigma", self.blur_sigma)


def require_range(name: str, value: tuple[float, float]) -> None:
    """Raises :class:`UserError` unless ``value`` is (low, high) with 0 < low <= high."""
    if len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise UserError(f"{name} is {value}; it must be (low, high) with 0 < low <= high")


def distort(
    image: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator, config: PhotometricConfig
) -> UInt8[np.ndarray, "height width 3"]:
    """Colour jitter in random order, then grayscale, then blur, each with its probability.

    The same numbers are drawn from ``rng`` whatever is applied, so one probability can change without the rest moving.
    """
    jitter, grayscale, blur = rng.random(3) < (
        config.jitter_probability,
        config.grayscale_probability,
        config.blur_probability,
    )
    names = ("brightness", "contrast", "saturation", "hue")
    order = rng.permutation(len(names))
    changes = rng.uniform(-1, 1, len(names)) * (config.brightness, config.contrast, config.saturation, config.hue)
    sigma = rng.uniform(*config.blur_sigma)

    if jitter:
        for position in order:
            image = _JITTER[names[position]](image, float(changes[position]))
    if grayscale:
        image = _grey(image)
    if blur:
        # An odd width of about 4 sigma on each side holds the whole bell in 8 bits.
        image = cv2.GaussianBlur(image, (2 * math.ceil(4 * sigma) + 1,) * 2, sigma, borderType=cv2.BORDER_REPLICATE)
    return image


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _blend(image: np.ndarray, other: np.ndarray, offset: float, change: float) -> np.ndarray:
    """(1 + change) · image - change · (other + offset), rounded and clipped to 8 bits: away from ``other`` or to it."""
    share = max(0.0, 1.0 + change)
    return cv2.addWeighted(image, share, other, 1.0 - share, (1.0 - share) * offset)


def _brightness(image: np.ndarray, change: float) -> np.ndarray:
    return _blend(image, np.zeros_like(image), 0.0, change)


def _contrast(image: np.ndarray, change: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _blend(image, np.zeros_like(image), mean, change)


def _saturation(image: np.ndarray, change: float) -> np.ndarray:
    return _blend(image, _grey(image), 0.0, change)


def _hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Turns every colour around the colour circle, in steps of 1/256."""
    shift = round(turns * 256) % 256
    if shift == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(shift)  # 8 bits are the whole circle, so wrapping around is what is meant
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}
