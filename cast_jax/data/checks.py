"""The look at the data before a long run: every image file, every annotation, both category lists."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import Source, image_size, name_some
from cast_jax.data.sources.coco import require_same_categories
from cast_jax.data.sources.subset import Subset

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What :func:`check_source` found.

    Attributes:
      source: the source to use from here on: the one that was checked, less the unreadable images.
      usable: int64 ``[n]``, the readable images' indices in the source that was checked.
      images: how many images it had.
      decoded: how many of them were read in full, pixels and annotation; the others by their header alone.
      instances, empty, over_cap, cut: among the decoded: instances, images without any, images with more than
        ``max_instances``, and the instances that exceed it.
      unreadable: what is wrong with each image that cannot be used.
    """

    source: Source
    usable: np.ndarray
    images: int
    decoded: int
    instances: int
    empty: int
    over_cap: int
    cut: int
    unreadable: tuple[str, ...]


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
    decode_limit: int | None = 2000,
) -> DataReport:
    """Checks the data of a run before it starts; see :func:`check_source`. Warns of images that two sources share.

    Raises:
      DataError: a source without images, an unreadable image (unless skipped), or other categories in ``val`` than in
        ``labelled``.
    """
    if labelled is not None and val is not None:
        require_same_categories(labelled.categories, val.categories, "val")
    reports = {
        name: None if source is None else check_source(name, source, cap, on_unreadable, decode_limit)
        for name, source, cap in (
            ("labelled", labelled, max_instances),
            ("unlabelled", unlabelled, max_instances),
            ("val", val, None),  # evaluation compares with every instance
        )
    }
    warnings = [text for name, report in reports.items() if report for text in _warnings(name, report, max_instances)]
    warnings += _shared_images({name: report.source for name, report in reports.items() if report})
    for text in warnings:
        _LOG.warning(text)
    return DataReport(**reports, warnings=tuple(warnings))


def check_source(
    name: str, source: Source, max_instances: int | None, on_unreadable: str = "error", decode_limit: int | None = 2000
) -> SourceReport:
    """Opens every image of a source and counts its instances.

    All headers are read. Pixels and annotations are read too, which is what finds truncated files: of every image, or
    of ``decode_limit`` evenly spread ones when there are more (``None``: always of all).

    Args:
      name: what messages call the source ("labelled", "unlabelled", "val").
      source: the images; annotations are looked at if it has categories.
      max_instances: more than this in an image is counted as ``over_cap``; ``None`` for no cap.
      on_unreadable: "error" refuses unreadable images; "skip" leaves them out of the report's ``source``.
      decode_limit: see above.

    Raises:
      DataError: no images, or none that is readable; or unreadable ones and ``on_unreadable`` is "error" (lists ten).
    """
    if on_unreadable not in ("error", "skip"):
        raise DataError(f"on_unreadable {on_unreadable!r} is unknown; known values: error, skip")
    total = len(source)
    if not total:
        raise DataError(f"the {name} source has no images")
    complete = total if decode_limit is None else min(total, decode_limit)
    decoded = set(np.linspace(0, total - 1, complete).round().astype(int).tolist())

    def look(index: int) -> int | str:
        """The number of instances (0 if they were not read), or what is wrong."""
        try:
            image_size(source.record(index).path)
            if index not in decoded:
                return 0
            source.image(index)
            return len(source.instances(index)) if source.categories else 0
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
            "mend or remove them, or set on_unreadable to 'skip'"
        )
    if not len(usable):
        raise DataError(f"the {name} source has no readable image among {total}; the first: {faults[0]}")
    counts = np.asarray([found[index] for index in usable if index in decoded], np.int64)
    excess = np.zeros_like(counts) if max_instances is None else np.maximum(counts - max_instances, 0)
    report = SourceReport(
        source=Subset(source, usable) if faults else source,
        usable=usable,
        images=total,
        decoded=len(counts),
        instances=int(counts.sum()),
        empty=int((counts == 0).sum()) if source.categories else 0,
        over_cap=int((excess > 0).sum()),
        cut=int(excess.sum()),
        unreadable=faults,
    )
    annotated = f", {report.instances} instances, {report.empty} images without any" if source.categories else ""
    _LOG.info(f"{name}: {total} images, {report.decoded} read in full{annotated}")
    return report


def _shared_images(sources: Mapping[str, Source]) -> list[str]:
    """Warnings of image files that two sources share, links followed."""
    files = {name: {os.path.realpath(s.record(i).path) for i in range(len(s))} for name, s in sources.items()}
    effects = {
        ("labelled", "val"): "the evaluation will look better than it is; take them out of one",
        ("labelled", "unlabelled"): "their pseudo-labels compete with their labels; take them out of unlabelled",
        ("unlabelled", "val"): "training will have seen validation images; take them out of unlabelled",
    }
    return [
        f"{first} and {second} share {len(shared)} images ({name_some(sorted(shared), 3)}): {effect}"
        for (first, second), effect in effects.items()
        if (shared := files.get(first, set()) & files.get(second, set()))
    ]


def _warnings(name: str, report: SourceReport, max_instances: int) -> list[str]:
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
    if report.source.categories and report.instances == 0:
        warnings.append(f"{name}: no instances in {report.decoded} images")
    return warnings
