"""The look at the data before a long run: every image file, every annotation, both category lists."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write
from cast_jax.data.facts import ImageFacts, facts_warnings, image_facts
from cast_jax.data.sources.base import Source, leaves_folder, name_some, no_instances, noted
from cast_jax.data.sources.coco import cover_no_pixel, require_same_categories
from cast_jax.data.sources.folder import other_formats
from cast_jax.data.sources.subset import Subset

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What :func:`check_source` found.

    Attributes:
      source: the source to use from here on: the one that was checked, less the unreadable images.
      usable: int64 ``[n]``, the readable images' indices in the source that was checked.
      images: how many images it had.
      instances, empty, over_cap, cut: among the usable: instances, images without any, images with more than
        ``max_instances``, and the instances that exceed it.
      unreadable: what is wrong with each image that cannot be used.
      facts: what was found in the usable images and their files.
      pixels, content: a name of all of them in their order, and one of their ids and annotations, too.
      links_out: file names of images that are links (or whose annotations are) to outside their folder.
      without_pixels: ids of annotations that cover no pixel, with their images.
    """

    source: Source
    usable: np.ndarray
    images: int
    instances: int
    empty: int
    over_cap: int
    cut: int
    unreadable: tuple[str, ...]
    facts: tuple[ImageFacts, ...]
    pixels: str
    content: str
    links_out: tuple[str, ...]
    without_pixels: tuple[str, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the usable images' pixels, see :func:`cast_jax.data.sources.base.pixel_digest`."""
        return tuple(fact.digest for fact in self.facts)


class _Look(NamedTuple):
    """What was found of one image: the number of its instances and a name of what is said of them, too."""

    facts: ImageFacts
    link_out: bool
    instances: int = 0
    truth: str = ""
    without_pixels: tuple[str, ...] = ()


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
                    brightest, orientation, frames, bits = map(int, numbers)
                    self._facts[mark] = ImageFacts(digest, brightest, orientation, frames, bits)

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


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What :func:`check_sources` found, and its warnings. Sources that were not given are ``None``."""

    labelled: SourceReport | None
    unlabelled: SourceReport | None
    val: SourceReport | None
    warnings: tuple[str, ...]


def check_sources(
    labelled: Source | None,
    unlabelled: Source | None,
    val: Source | None,
    max_instances: int,
    on_unreadable: str = "error",
    seen: SeenImages | None = None,
) -> DataReport:
    """Checks the data of a run before it starts; see :func:`check_source`. Warns of pictures that two sources share.

    Raises:
      DataError: a source without images, an unreadable image (unless skipped), no instance in ``labelled`` or ``val``,
        or other categories in ``val`` than in ``labelled``.
    """
    if labelled is not None and val is not None:
        require_same_categories(labelled.categories, val.categories, "val")
    reports = {
        name: None if source is None else check_source(name, source, cap, on_unreadable, seen)
        for name, source, cap in (
            ("labelled", labelled, max_instances),
            ("unlabelled", unlabelled, max_instances),
            ("val", val, None),  # evaluation compares with every instance
        )
    }
    warnings = [text for name, report in reports.items() if report for text in _warnings(name, report, max_instances)]
    shared = _shared_images({name: report for name, report in reports.items() if report})
    for text in shared:
        _LOG.warning(text)
    return DataReport(**reports, warnings=(*warnings, *shared))


def check_source(
    name: str,
    source: Source,
    max_instances: int | None,
    on_unreadable: str = "error",
    seen: SeenImages | None = None,
) -> SourceReport:
    """Reads every image of a source and its annotation in parallel, which finds truncated files; logs warnings.

    Args:
      name: what messages call the source ("labelled", "unlabelled", "val").
      source: the images; annotations are looked at if it has categories.
      max_instances: more than this in an image is counted as ``over_cap``; ``None`` for no cap.
      on_unreadable: "error" refuses unreadable images; "skip" leaves them out of the report's ``source``.
      seen: images that it knows are not decoded again; those that are sound are told to it.

    Raises:
      DataError: no images, or none that is readable; unreadable ones and ``on_unreadable`` is "error" (lists ten); or
        categories, but no instance.
    """
    if on_unreadable not in ("error", "skip"):
        raise DataError(f"on_unreadable {on_unreadable!r} is unknown; known values: error, skip")
    total = len(source)
    if not total:
        raise DataError(f"the {name} source has no images")

    def look(index: int) -> _Look | str:
        """What is found of an image, or what is wrong."""
        record = source.record(index)
        path = record.path
        try:
            facts = seen[path] if seen is not None and path.is_file() else None
            if facts is None:
                facts = image_facts(record, source.image(index))
                if seen is not None:
                    seen[path] = facts
            if not source.categories:
                return _Look(facts, leaves_folder(record))
            truth = source.instances(index)
            content = _name_of(truth.labels, np.packbits(truth.masks), np.packbits(truth.ignore))
            without_pixels = tuple(f"{name} of {record.file_name}" for name in truth.without_pixels)
            return _Look(facts, leaves_folder(record), len(truth), content, without_pixels)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(tqdm(pool.map(look, range(total)), f"checking {name}", total, unit="image", disable=None))
    faults = tuple(result for result in found if isinstance(result, str))
    usable = np.asarray([index for index, result in enumerate(found) if not isinstance(result, str)], np.int64)
    if faults and on_unreadable == "error":
        listed = "\n  ".join(faults[:10])
        raise DataError(
            f"the {name} source has {len(faults)} unreadable images of {total}:\n  {listed}\n"
            "mend or remove them, or leave them out (--config.data.on_unreadable=skip; cast-predict: --skip-unreadable)"
        )
    if not len(usable):
        raise DataError(f"the {name} source has no readable image among {total}; the first: {faults[0]}")
    sound = [result for result in found if not isinstance(result, str)]
    counts = np.asarray([result.instances for result in sound], np.int64)
    digests = [result.facts.digest for result in sound]
    records = [source.record(index) for index in usable]
    excess = np.zeros_like(counts) if max_instances is None else np.maximum(counts - max_instances, 0)
    report = SourceReport(
        source=Subset(source, usable) if faults else source,
        usable=usable,
        images=total,
        instances=int(counts.sum()),
        empty=int((counts == 0).sum()) if source.categories else 0,
        over_cap=int((excess > 0).sum()),
        cut=int(excess.sum()),
        unreadable=faults,
        facts=tuple(result.facts for result in sound),
        pixels=_name_of(*digests),
        content=_name_of(*(str(record.image_id) for record in records), *digests, *(result.truth for result in sound)),
        links_out=tuple(record.file_name for record, result in zip(records, sound, strict=True) if result.link_out),
        without_pixels=tuple(name for result in sound for name in result.without_pixels),
    )
    annotated = f", {report.instances} instances, {report.empty} images without any" if source.categories else ""
    _LOG.info(f"{name}: {total} images{annotated}")
    for text in _warnings(name, report, max_instances):
        _LOG.warning(text)
    if source.categories and not report.instances:
        raise DataError(f"{name}: {no_instances(source)}")
    return report


def _name_of(*parts: str | np.ndarray) -> str:
    """16 hexadecimal digits that tell these parts from others."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _shared_images(reports: Mapping[str, SourceReport]) -> list[str]:
    """Warnings of pictures that two sources share, by their pixels."""
    files = {
        name: {digest: report.source.record(i).file_name for i, digest in enumerate(report.digests)}
        for name, report in reports.items()
    }
    effects = {
        ("labelled", "val"): "the evaluation will look better than it is; take them out of one",
        ("labelled", "unlabelled"): "their pseudo-labels compete with their labels; take them out of unlabelled",
        ("unlabelled", "val"): "training will have seen validation images; take them out of unlabelled",
    }
    return [
        f"{first} and {second} share {len(shared)} images ({name_some(shared, 3)}): {effect}"
        for (first, second), effect in effects.items()
        if (shared := sorted(file for digest, file in files.get(first, {}).items() if digest in files.get(second, {})))
    ]


def _warnings(name: str, report: SourceReport, max_instances: int | None) -> list[str]:
    warnings = []
    if report.unreadable:
        first = name_some(report.unreadable, 3)
        warnings.append(
            f"{name}: {len(report.unreadable)} of {report.images} images are unreadable and left out: {first}"
        )
    if report.over_cap:
        warnings.append(
            f"{name}: {report.over_cap} images have more than {max_instances} instances, which cuts {report.cut}; "
            "raise data.max_instances to keep them"
        )
    times = Counter(report.digests)
    if repeated := [report.source.record(i).file_name for i, digest in enumerate(report.digests) if times[digest] > 1]:
        warnings.append(f"{name}: {len(repeated)} images show the same pixels as another: {name_some(repeated, 4)}")
    files = [report.source.record(i).file_name for i in range(len(report.facts))]
    warnings += [f"{name}: {text}" for text in facts_warnings(files, report.facts)]
    if report.links_out:
        out = name_some(report.links_out, 3)
        warnings.append(f"{name}: {len(report.links_out)} images are links that leave their folder: {out}")
    if copies := noted(report.source, "copies"):
        some = name_some(copies, 3)
        warnings.append(f"{name}: {len(copies)} annotations are exact copies of another in their image: {some}")
    if report.without_pixels:
        warnings.append(f"{name}: {cover_no_pixel(report.without_pixels)}")
    if others := other_formats(noted(report.source, "left_out")):
        warnings.append(f"{name}: {others}")
    return warnings
