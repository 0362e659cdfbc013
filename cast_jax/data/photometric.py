"""Changes of colour and sharpness that leave every pixel where it is (the strong view's, as in UniMatch V2)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter

from cast_jax.core.errors import UserError

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


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
        for name in ("jitter_probability", "grayscale_probability", "blur_probability"):
            require_probability(name, getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise UserError(f"data.view.{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"data.view.hue is {self.hue}; it must lie in [0, 0.5]")
        require_range("blur_sigma", self.blur_sigma)


def require_probability(name: str, value: float) -> None:
    """Raises :class:`UserError` unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"data.view.{name} is {value}; it is a probability and must lie in [0, 1]")


def require_range(name: str, value: tuple[float, float]) -> None:
    """Raises :class:`UserError` unless ``value`` is (low, high) with 0 < low <= high."""
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise UserError(f"data.view.{name} is {value}; it must be (low, high) with 0 < low <= high")


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
    order = rng.permutation(["brightness", "contrast", "saturation", "hue"])
    amount = dict(zip(("brightness", "contrast", "saturation", "hue"), rng.uniform(-1, 1, 4), strict=True))
    sigma = rng.uniform(*config.blur_sigma)

    picture = Image.fromarray(image)
    if jitter:
        for name in order:
            change = amount[name] * getattr(config, name)
            if name == "hue":
                picture = _turn_hue(picture, change)
            else:
                picture = _ENHANCERS[name](picture).enhance(max(0.0, 1.0 + change))
    if grayscale:
        picture = picture.convert("L").convert("RGB")
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(picture)


def _turn_hue(picture: Image.Image, turns: float) -> Image.Image:
    """Turns every colour by ``turns`` around the colour circle; nothing is rounded when the turn is below 1/512."""
    shift = round(turns * 256)
    if shift == 0:
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
