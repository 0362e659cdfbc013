"""What one look at an image finds besides its annotations, and the warnings that follow from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from cast_jax.data.sources.base import ImageRecord, name_some, pixel_digest, read_header

DARK = 32
"""An image without a value as high as this is black, or nearly so."""


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What was found in an image and its file.

    Attributes:
      digest: of the pixels, see :func:`cast_jax.data.sources.base.pixel_digest`.
      brightest: the highest value of any channel, of 255.
      orientation, frames, bits: see :class:`cast_jax.data.sources.base.ImageHeader`.
    """

    digest: str
    brightest: int
    orientation: int = 1
    frames: int = 1
    bits: int = 8


def image_facts(record: ImageRecord, image: UInt8[np.ndarray, "height width 3"]) -> ImageFacts:
    """The facts of a decoded image. Raises :class:`DataError` as :func:`cast_jax.data.sources.base.read_header`."""
    header = dataclasses.asdict(read_header(record.path)) if record.path.is_file() else {}
    return ImageFacts(pixel_digest(image), int(image.max()), **header)


def facts_warnings(files: Sequence[str], facts: Sequence[ImageFacts]) -> Iterator[str]:
    """Sentences on images that are black, of several frames, or turned; ``files`` are their names."""
    both = list(zip(files, facts, strict=True))
    if dark := [file for file, fact in both if fact.brightest < DARK]:
        deep = any(fact.bits == 16 and fact.brightest < DARK for fact in facts)
        reason = "values of 16-bit images are taken as parts of 65535: scale them to the full range, or save 8 bits"
        yield (
            f"{len(dark)} images are black or nearly so, without a value of {DARK} of 255 or more: "
            f"{name_some(dark, 3)}{f' ({reason})' if deep else ''}"
        )
    if several := [file for file, fact in both if fact.frames > 1]:
        yield (
            f"{len(several)} files hold several pages or frames, of which only the first is read; save each as a file "
            f"of its own to use them: {name_some(several, 3)}"
        )
    if turned := [file for file, fact in both if fact.orientation != 1]:
        yield f"{len(turned)} images have an EXIF orientation, which is not applied: {name_some(turned, 3)}"
