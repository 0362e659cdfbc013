"""Images decoded and shrunk once, then read from disk as plain pixels."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.files import atomic_file
from cast_jax.data.sources.base import ImageRecord, Source
from cast_jax.data.views import ViewConfig, needed_size

_LOG = logging.getLogger(__name__)
_VERSION = 1
"""Of what lies in a file. Raise it when the same image no longer gives the same pixels."""


class Cached:
    """``source`` with images and masks at the size that is needed, the images from ``folder`` once they are there.

    A cached image is known by its file's path, length and time of change and by its size, so a folder can serve several
    runs, threads and processes, and a replaced image is read anew. Masks are made from the annotation every time. Views
    show the same as without the cache, but for resampling twice; strong views of images that had to be shrunk are a
    little softer, since they enlarge parts of the weak one.

    Args:
      source: the images.
      folder: receives a file of height * width * 3 bytes an image. If it cannot be written to, or is full, images are
        read as without it, and a warning says so.
      view: the views that are made of them: images are kept as large as the largest weak view.
    """

    def __init__(self, source: Source, folder: str | os.PathLike[str], view: ViewConfig):
        self.source, self.folder, self.view = source, Path(folder), view
        self._writable = True

    @property
    def categories(self) -> tuple[Category, ...]:
        """The source's categories."""
        return self.source.categories

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> ImageRecord:
        """The name and the original file of image ``index``."""
        return self.source.record(index)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB, shrunk."""
        path = self._path(self.record(index).path)
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):  # not there yet, or not whole
            pass
        image = self.source.image(index)
        image = np.ascontiguousarray(_shrink(image, needed_size((image.shape[0], image.shape[1]), self.view)))
        if self._writable:
            try:
                with atomic_file(path) as file:
                    np.save(file, image)
            except OSError as error:
                self._writable = False
                _LOG.warning("data.cache %s cannot be written to (%s); going on without it", self.folder, error)
        return image

    def instances(self, index: int) -> Instances:
        """The instances of image ``index`` at its shrunk size; a pixel is theirs when half of its area was."""
        instances = self.source.instances(index)
        height, width = instances.ignore.shape
        kept = needed_size((height, width), self.view)
        if kept == (height, width):
            return instances
        halves = lambda mask: _shrink(mask.astype(np.uint8) * 255, kept) >= 128
        return Instances(
            masks=np.array([halves(mask) for mask in instances.masks], bool).reshape(-1, *kept),
            labels=instances.labels,
            ignore=halves(instances.ignore),
            scores=instances.scores,
        )

    def _path(self, image: Path) -> Path:
        view = self.view
        size = (_VERSION, *view.image_size, view.fit, float(view.scale[1]), view.rotate90)
        try:
            status = image.stat()
            known = (os.path.realpath(image), status.st_size, status.st_mtime_ns, size)
        except OSError:
            known = (os.fspath(image), 0, 0, size)  # the source says what is wrong with it
        name = hashlib.sha256(repr(known).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.npy"


def _shrink(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA)
