"""What one look at the images of a source and their annotations finds, and the warnings that follow from it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write
from cast_jax.data.sources.base import (
    ImageRecord,
    Source,
    leaves_folder,
    name_some,
    noted,
    pixel_digest,
    read_header,
)
from cast_jax.data.sources.coco import cover_no_pixel
from cast_jax.data.sources.folder import other_formats

DARK = 32
"""An image without a value as high as this is black, or nearly so."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFacts:
    """What was found in an image and its file.

    Attributes:
      digest: of the pixels, see :func:`cast_jax.data.sources.base.pixel_digest`.
      brightest: the highest value of any channel, of 255.
      height, width: in pixels.
      orientation, frames, bits: see :class:`cast_jax.data.sources.base.ImageHeader`.
    """

    digest: str
    brightest: int
    height: int
    width: int
    orientation: int = 1
    frames: int = 1
    bits: int = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What one image holds.

    Attributes:
      file_name: of the image.
      facts: of its pixels and its file.
      link_out: whether it, or its annotations, are a link to outside its folder.
      labels: of its instances.
      truth: a name of its annotations.
      without_pixels: the annotations that cover no pixel.
    """

    file_name: str
    facts: ImageFacts
    link_out: bool
    labels: tuple[int, ...] = ()
    truth: str = ""
    without_pixels: tuple[int | str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Look:
    """What was found in the images of a source.

    Attributes:
      usable: the positions of images that can be used.
      findings: one for each of them.
      faults: what is wrong with each of the others.
    """

    usable: tuple[int, ...]
    findings: tuple[Finding, ...]
    faults: tuple[str, ...]


class SeenImages:
    """Image files that were found sound, with what was found, so that a restart need not decode them again.

    A file counts as the same as long as its path, size and time of change are.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads ``path``, which :meth:`save` has written, if it is there."""
        self.path, self._facts = Path(path), dict[str, ImageFacts]()
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a damaged or older line: the image is decoded again
                    mark, digest, *numbers = line.split()
                    brightest, height, width, orientation, frames, bits = map(int, numbers)
                    self._facts[mark] = ImageFacts(digest, brightest, height, width, orientation, frames, bits)

    def __getitem__(self, image: Path) -> ImageFacts | None:
        """What was found in a file, None if it has to be decoded."""
        return self._facts.get(self._mark(image))

    def __setitem__(self, image: Path, facts: ImageFacts) -> None:
        self._facts[self._mark(image)] = facts

    def save(self) -> None:
        """Writes what is known, whole or not at all."""
        lines = (" ".join(map(str, (mark, *dataclasses.astuple(facts)))) for mark, facts in sorted(self._facts.items()))
        atomic_write(self.path, "".join(f"{line}\n" for line in lines))

    @staticmethod
    def _mark(image: Path) -> str:
        found = image.stat()
        mark = f"{os.path.realpath(image)} {found.st_size} {found.st_mtime_ns}"
        return hashlib.blake2b(mark.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def look_at(name: str, source: Source, seen: SeenImages | None = None) -> Look:
    """Reads every image of a source, and its annotation if there are categories, in parallel.

    Args:
      name: what the progress bar calls the source.
      source: the images.
      seen: images that it knows are not decoded again; those that are sound are told to it.
    """

    def look(index: int) -> Finding | str:
        """What is found in an image, or what is wrong with it."""
        record = source.record(index)
        try:
            facts = _facts(source, index, record, seen)
            if not source.categories:
                return Finding(record.file_name, facts, leaves_folder(record))
            truth = source.instances(index)
            return Finding(
                record.file_name,
                facts,
                leaves_folder(record),
                labels=tuple(truth.labels.tolist()),
                truth=name_of(truth.labels, np.packbits(truth.masks), np.packbits(truth.ignore)),
                without_pixels=truth.without_pixels,
            )
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looking = pool.map(look, range(len(source)))
        found = list(tqdm(looking, f"checking {name}", len(source), unit="image", disable=None))
    return Look(
        tuple(index for index, result in enumerate(found) if isinstance(result, Finding)),
        tuple(result for result in found if isinstance(result, Finding)),
        tuple(result for result in found if isinstance(result, str)),
    )


def _facts(source: Source, index: int, record: ImageRecord, seen: SeenImages | None) -> ImageFacts:
    if seen is None or not record.path.is_file():
        return _image_facts(record, source.image(index))
    if (facts := seen[record.path]) is None:
        facts = seen[record.path] = _image_facts(record, source.image(index))
    return facts


def _image_facts(record: ImageRecord, image: UInt8[np.ndarray, "height width 3"]) -> ImageFacts:
    """The facts of a decoded image. Raises :class:`DataError` as :func:`cast_jax.data.sources.base.read_header`."""
    header = dataclasses.asdict(read_header(record.path)) if record.path.is_file() else {}
    return ImageFacts(pixel_digest(image), int(image.max()), *image.shape[:2], **header)


def name_of(*parts: str | np.ndarray) -> str:
    """16 hexadecimal digits that tell these parts from others."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def warnings_of(source: Source, findings: Sequence[Finding], max_instances: int | None) -> Iterator[str]:
    """Sentences on what can be used, but most likely is not meant so.

    Args:
      source: what was looked at.
      findings: what :func:`look_at` found in the images that can be used.
      max_instances: slots for the instances of an image; ``None`` for no cap.
    """
    cap = np.inf if max_instances is None else max_instances
    if excess := [len(found.labels) - cap for found in findings if len(found.labels) > cap]:
        yield (
            f"{len(excess)} images have more than {max_instances} instances, which cuts {sum(excess)}; raise "
            "data.max_instances to keep them"
        )
    if repeated := [group[""] for group in same_pixels({"": findings})]:
        some = name_some(map(_equal, repeated), 2)
        yield f"{sum(map(len, repeated))} images show the same pixels as another: {some}"
    yield from _warnings_of_files(findings)
    if others := other_formats(noted(source, "left_out")):
        yield others
    if source.categories:
        yield from _warnings_of_annotations(source, findings)


def _warnings_of_annotations(source: Source, findings: Sequence[Finding]) -> Iterator[str]:
    if boxes := noted(source, "boxes_outside"):
        yield f"{len(boxes)} annotations have a bbox outside their image, which is not used: {name_some(boxes, 3)}"
    if copies := noted(source, "copies"):
        yield f"{len(copies)} annotations are exact copies of another in their image: {name_some(copies, 3)}"
    if names := [f"{name} of {found.file_name}" for found in findings for name in found.without_pixels]:
        yield cover_no_pixel(names)
    there = {label for found in findings for label in found.labels}
    if absent := [category.name for label, category in enumerate(source.categories) if there and label not in there]:
        yield f"{len(absent)} classes have no instance: {name_some(absent, 10)}"


def _warnings_of_files(findings: Sequence[Finding]) -> Iterator[str]:
    """On images that are black, of several frames, turned, or links."""

    def some(which: Sequence[Finding]) -> str:
        return name_some((found.file_name for found in which), 3)

    if dark := [found for found in findings if found.facts.brightest < DARK]:
        deep = any(found.facts.bits == 16 for found in dark)
        reason = "values of 16-bit images are taken as parts of 65535: scale them to the full range, or save 8 bits"
        yield (
            f"{len(dark)} images are black or nearly so, without a value of {DARK} of 255 or more: "
            f"{some(dark)}{f' ({reason})' if deep else ''}"
        )
    if several := [found for found in findings if found.facts.frames > 1]:
        yield (
            f"{len(several)} files hold several pages or frames, of which only the first is read; save each as a file "
            f"of its own to use them: {some(several)}"
        )
    if turned := [found for found in findings if found.facts.orientation != 1]:
        yield f"{len(turned)} images have an EXIF orientation, which is not applied: {some(turned)}"
    if out := [found for found in findings if found.link_out]:
        yield f"{len(out)} images are links that leave their folder: {some(out)}"


def same_pixels(findings: Mapping[str, Sequence[Finding]]) -> list[dict[str, list[str]]]:
    """Of every picture that is there more than once, its file names by source."""
    places: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, of_source in findings.items():
        for found in of_source:
            places[found.facts.digest].setdefault(name, []).append(found.file_name)
    return [group for group in places.values() if sum(map(len, group.values())) > 1]


def _equal(files: list[str]) -> str:
    """File names of one picture, of many the first three."""
    return " = ".join(files) if len(files) < 4 else f"{' = '.join(files[:3])} = ... ({len(files)} files)"


def shared_pictures(groups: Sequence[Mapping[str, Sequence[str]]]) -> dict[tuple[str, str], str]:
    """A sentence for every two sources that share pictures, of the groups of :func:`same_pixels`."""
    effects = {
        ("labelled", "val"): "the evaluation will look better than it is; take them out of one",
        ("labelled", "unlabelled"): "their pseudo-labels compete with their labels; take them out of unlabelled",
        ("unlabelled", "val"): "training will have seen validation images; take them out of unlabelled",
    }
    return {
        (first, second): f"{first} and {second} share {len(shared)} images ({name_some(shared, 3)}): {effect}"
        for (first, second), effect in effects.items()
        if (shared := sorted(group[first][0] for group in groups if first in group and second in group))
    }
