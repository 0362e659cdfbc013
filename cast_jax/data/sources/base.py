"""What a source of images is, and the one way an image file is read.

A source never skips anything by itself: index ``i`` always means the same image. Files that cannot be read are found
before a run by :func:`cast_jax.data.checks.check_sources`, which either refuses them (``on_unreadable="error"``) or
counts them and returns the sources without them (``"skip"``, a :class:`~cast_jax.data.sources.subset.Subset`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import struct
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError

MAX_SIDE = 32_766
"""Pixels a side that an image may have: OpenCV cannot warp longer ones."""
MAX_PIXELS = 89_478_485
"""Pixels that an image may have: from here on Pillow warns of a decompression bomb."""
_SIXTEEN_BITS = re.compile(";16[BLN]")  # in the names of Pillow's raw modes, of a PNG or TIFF before it is decoded


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image of a source.

    Attributes:
      image_id: the dataset's own name of the image: the id in a COCO JSON, the Cityscapes stem
        ``<city>_<seq>_<frame>``, or the relative file name in a folder of images. Unique within a source.
      path: the image file.
      file_name: ``path`` relative to the source's root, with forward slashes.
      annotation: the file below the same root that holds its masks, where every image has one of its own.
    """

    image_id: int | str
    path: Path
    file_name: str
    annotation: Path | None = None


class Source(Protocol):
    """Random access to images and their annotations; thread-safe and picklable.

    Making one reads the index (a listing or a JSON); images and masks are read when they are asked for.
    """

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, in the order of the labels of :meth:`instances`; ``()`` when the source is unlabelled."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def record(self, index: int) -> ImageRecord:
        """The name and the file of image ``index``; reads nothing."""
        ...

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Decodes image ``index`` to RGB. Raises :class:`DataError` naming the file if it cannot be read."""
        ...

    def instances(self, index: int) -> Instances:
        """The ground truth (or pseudo-labels) of image ``index``, at the image's own size.

        Raises :class:`DataError` if the annotation does not fit the image, or if the source is unlabelled.
        """
        ...


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file completely, to RGB as COCO's tools see it.

    Grey, palette, CMYK and 16-bit images are converted (16 bits keep their high byte), an alpha channel is dropped,
    and an EXIF orientation is *not* applied, since COCO annotations are made on the stored pixels.

    Raises:
      DataError: the file is missing, truncated, not an image, too long, or has floating-point pixels; names the file.
    """
    try:
        with _open(path) as image:
            _check_sides(image)
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range; save it with 8 bits")
            if image.mode.startswith("I"):
                grey = (np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The (height, width) in an image file's header. Raises :class:`DataError` as :func:`read_image` does."""
    try:
        with _open(path) as image:
            _check_sides(image)
            return image.height, image.width
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def pixel_digest(image: UInt8[np.ndarray, "height width 3"]) -> str:
    """32 hexadecimal digits that only the same picture has, whatever its file."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, key=repr(image.shape).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What an image file says of its pixels.

    Attributes:
      orientation: EXIF's, 1 (upright) if there is none.
      frames: pages of a TIFF or frames of an animation; :func:`read_image` reads the first.
      bits: 16 if :func:`read_image` cuts a channel's values to 8 bits, else 8.
    """

    orientation: int
    frames: int
    bits: int


def read_header(path: str | os.PathLike[str]) -> ImageHeader:
    """The header of an image file. Raises :class:`DataError` naming the file if it cannot be read."""
    try:
        with _open(path) as image:
            bits = 16 if image.mode.startswith("I") or _SIXTEEN_BITS.search(str(getattr(image, "tile", ""))) else 8
            return ImageHeader(int(image.getexif().get(ExifTags.Base.Orientation, 1)), _frames(image), bits)
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def orientation(path: str | os.PathLike[str]) -> int:
    """The EXIF orientation in an image file's header, 1 (upright) if there is none. Raises as :func:`read_header`."""
    return read_header(path).orientation


def leaves_folder(record: ImageRecord) -> bool:
    """Whether an image or its annotation is a link (or lies under one) to outside the folder of its file name."""
    root = record.path
    for _ in PurePosixPath(record.file_name).parts:
        root = root.parent
    inside = root.resolve()
    return any(file and not file.resolve().is_relative_to(inside) for file in (record.path, record.annotation))


def noted(source: Source, attribute: str) -> Sequence[Any]:
    """What the source under any subset has noted of its annotations: nothing, or an attribute such as ``faults``."""
    while hasattr(source, "source"):
        source = source.source
    return getattr(source, attribute, ())


def no_instances(source: Source) -> str:
    """The fault of a labelled source without any instance, naming its JSON or folder."""
    where = noted(source, "annotations") or noted(source, "root") or source.record(0).path.parent
    return (
        f"{where}: none of the {len(source)} images has an instance to learn or to be measured by; give images with "
        "annotations that are not crowds and cover a pixel"
    )


def read_label_map(path: str | os.PathLike[str]) -> tuple[str, np.ndarray]:
    """An annotation image as it is stored: Pillow's mode and the pixels. Raises :class:`DataError` naming the file."""
    try:
        with _open(path) as image:
            image.load()
            return image.mode, np.asarray(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation; unpack the dataset again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); unpack the annotations again") from error


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, stripped, without empty lines and ``#`` comments.

    Raises:
      DataError: the file is missing, not text, or lists nothing.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list, one name a line ({error})") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"{path}: lists no images; write one name a line")
    return names


def check_relative(file_name: str, where: str) -> str:
    """Returns a relative file name with forward slashes.

    Raises:
      DataError: ``file_name`` is empty, absolute or climbs out of its folder; ``where`` names the file that holds it.
    """
    parts = PurePosixPath(file_name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or PureWindowsPath(file_name).drive:
        raise DataError(f"{where}: {file_name!r} must be a path inside the folder of images, without a leading / or ..")
    return "/".join(parts)


def name_some(names: Iterable[object], limit: int = 10) -> str:
    """The first ``limit`` names for an error message, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _check_sides(image: Image.Image) -> None:
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"a side of {max(image.size)} pixels; {MAX_SIDE} is the most, cut it into tiles")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width * image.height} pixels; {MAX_PIXELS} are the most, cut it into tiles")


def _frames(image: Image.Image) -> int:
    # A camera's MPO is a JPEG with previews behind it: no one's second page.
    if image.format not in ("GIF", "PNG", "TIFF", "WEBP"):
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except (EOFError, OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # what is damaged lies behind the first


def _open(path: str | os.PathLike[str]) -> Image.Image:
    """Opens an image, without waiting for a pipe."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")
    return Image.open(path)


def _missing(path: str | os.PathLike[str]) -> DataError:
    whole, hint = Path(path), ""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, str(whole))
        if os.path.exists(other) or whole.with_name(os.path.basename(other)).exists():
            hint = f"; it is there with a name in Unicode's form {form}: rename the file, or mend the list or JSON"
    return DataError(f"{path}: no such image file{hint}")


def _unreadable(path: str | os.PathLike[str], error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read as an image ({error}); replace the file, or remove it from the dataset")
