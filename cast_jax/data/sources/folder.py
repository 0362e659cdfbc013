"""Images without labels: a folder, a glob pattern, or a list."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import ImageRecord, check_relative, name_some, read_image, read_list

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What counts as an image when a folder or a pattern is searched (case is ignored)."""
OTHER_EXTENSIONS = (
    *(".avif", ".bpg", ".exr", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf"),
    *(".raf", ".rw2", ".czi", ".dcm", ".dicom", ".lif", ".mrxs", ".nd2", ".ndpi", ".nii", ".svs"),
)
"""Images of formats that are not read: of cameras, phones, microscopes and scanners."""


class ImageFolder:
    """Unlabelled images, sorted by name; an image's id is its path relative to the root.

    Args:
      images: a folder (searched with its sub-folders, linked ones too), a glob pattern (``**`` crosses folders), or a
        ``.txt`` file with one path a line (its order is kept).
      root: the folder that file names are relative to. By default the folder itself, the part of the pattern before
        its first wildcard, or the folder of the list.

    Attributes:
      left_out: files that a search has found with one of :data:`OTHER_EXTENSIONS`.

    Raises:
      DataError: nothing is there, or the list leaves its folder or repeats an image. Whether a list's images are there
        is not looked at here, but with those of all sources (:func:`cast_jax.data.findings.look_at`).
    """

    def __init__(self, images: str | os.PathLike[str], root: str | os.PathLike[str] | None = None):
        images = os.fspath(images)
        self.left_out: tuple[str, ...] = ()
        if images.lower().endswith(".txt"):
            self.root = Path(root if root is not None else Path(images).parent)
            self._names = _listed(images)
        elif glob.has_magic(images) and not Path(images).is_dir():
            if ".." in Path(images).relative_to(_before_wildcard(images)).parts:
                raise DataError(f"{images}: may not have .. after a wildcard; begin with the folder above the images")
            self.root = Path(root if root is not None else _before_wildcard(images))
            self._search(map(Path, glob.iglob(images, recursive=True)))
        else:
            if not Path(images).is_dir():
                raise DataError(f"{images}: no such folder of images (give a folder, a glob pattern or a .txt list)")
            self.root = Path(root if root is not None else images)
            self._search(_walk(Path(images)))
        if not self._names:
            others = f"; {said}" if (said := other_formats(self.left_out)) else ""
            raise DataError(f"{images}: holds no images; looked for {', '.join(EXTENSIONS)}{others}")

    def _search(self, paths: Iterable[Path]) -> None:
        found: list[str] = []
        others: list[str] = []
        for path in paths:
            if _is_image(path):
                (found if path.suffix.lower() in EXTENSIONS else others).append(_relative_to(path, self.root))
        self._names, self.left_out = sorted(found), tuple(sorted(others))

    @property
    def categories(self) -> tuple[Category, ...]:
        """None: the images are unlabelled."""
        return ()

    def __len__(self) -> int:
        return len(self._names)

    def record(self, index: int) -> ImageRecord:
        """The relative name and the file of image ``index``."""
        name = self._names[index]
        return ImageRecord(name, self.root / name, name)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB."""
        return read_image(self.record(index).path)

    def instances(self, index: int) -> Instances:
        """Raises :class:`DataError`: there are no labels."""
        raise DataError(f"{self.record(index).path}: a folder of images has no labels")


def other_formats(files: Sequence[str]) -> str:
    """A warning of the files that :class:`ImageFolder` has left out; nothing if there are none."""
    if not files:
        return ""
    extensions = ", ".join(sorted({PurePosixPath(file).suffix.lower() for file in files}))
    return (
        f"{len(files)} files with other extensions ({extensions}) are left out; save them as PNG or JPEG to use them: "
        f"{name_some(files, 3)}"
    )


def _is_image(path: Path) -> bool:
    # Files that begin with a dot are no one's images: macOS leaves "._name.jpg" beside every copied file.
    # A link to nowhere is one: the check before a run names it.
    named = path.suffix.lower() in (*EXTENSIONS, *OTHER_EXTENSIONS) and not path.name.startswith(".")
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, linked folders too, each folder once."""
    known = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(where) / name for name in names)
        real = {name: os.path.realpath(Path(where) / name) for name in sorted(folders)}
        folders[:] = [name for name in real if real[name] not in known]
        known.update(real.values())


def _relative_to(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        raise DataError(f"{path}: lies outside root {root}; leave root out or name a folder above the images") from None


def _before_wildcard(pattern: str) -> Path:
    parts = Path(pattern).parts
    first = next(position for position, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _listed(list_file: str) -> list[str]:
    names = [check_relative(line, list_file) for line in read_list(list_file)]
    if len(set(names)) < len(names):
        raise DataError(f"{list_file}: listed twice: {name_some(sorted({n for n in names if names.count(n) > 1}))}")
    return names
