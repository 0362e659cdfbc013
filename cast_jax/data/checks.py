"""The look at the data before a long run: every image file, every annotation, both category lists."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from cast_jax.core.errors import DataError
from cast_jax.data.findings import Look, SeenImages, look_at, name_of, same_pixels, shared_pictures, warnings_of
from cast_jax.data.sources.base import Source, name_some, no_instances
from cast_jax.data.sources.coco import require_same_categories
from cast_jax.data.sources.subset import Subset

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What :func:`check_source` found.

    Attributes:
      source: the source to use from here on: the one that was checked, less the unreadable images.
      look: what was found in the one that was checked.
      pixels, content: a name of the pixels of all usable images in their order, and one of their ids and annotations,
        too.
      warnings: sentences.
    """

    source: Source
    look: Look
    pixels: str
    content: str
    warnings: tuple[str, ...]


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
        or other categories in ``val`` than in ``labelled``; of all sources at once.
    """
    if labelled is not None and val is not None:
        require_same_categories(labelled.categories, val.categories, "val")
    reports: dict[str, SourceReport | None] = {}
    faults = []
    for name, source, cap in (
        ("labelled", labelled, max_instances),
        ("unlabelled", unlabelled, max_instances),
        ("val", val, None),  # evaluation compares with every instance
    ):
        try:
            reports[name] = None if source is None else check_source(name, source, cap, on_unreadable, seen)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    given = {name: report for name, report in reports.items() if report}
    shared = shared_pictures(same_pixels({name: report.look.findings for name, report in given.items()})).values()
    for text in shared:
        _LOG.warning(text)
    warnings = [text for report in given.values() for text in report.warnings]
    return DataReport(**reports, warnings=(*warnings, *shared))


def check_source(
    name: str,
    source: Source,
    max_instances: int | None,
    on_unreadable: str = "error",
    seen: SeenImages | None = None,
) -> SourceReport:
    """Reads every image of a source and its annotation, which finds truncated files; logs warnings.

    Args:
      name: what messages call the source ("labelled", "unlabelled", "val").
      source: the images; annotations are looked at if it has categories.
      max_instances: slots for the instances of an image; ``None`` for no cap.
      on_unreadable: "error" refuses unreadable images; "skip" leaves them out of the report's ``source``.
      seen: see :func:`cast_jax.data.findings.look_at`.

    Raises:
      DataError: no images, or none that is readable; unreadable ones and ``on_unreadable`` is "error" (lists ten); or
        categories, but no instance.
    """
    if on_unreadable not in ("error", "skip"):
        raise DataError(f"on_unreadable {on_unreadable!r} is unknown; known values: error, skip")
    total = len(source)
    if not total:
        raise DataError(f"the {name} source has no images")
    look = look_at(name, source, seen)
    findings, faults = look.findings, look.faults
    if faults and on_unreadable == "error":
        listed = "\n  ".join(faults[:10])
        raise DataError(
            f"the {name} source has {len(faults)} unreadable images of {total}:\n  {listed}\n"
            "mend or remove them, or leave them out (--config.data.on_unreadable=skip; cast-predict: --skip-unreadable)"
        )
    if len(faults) == total:
        raise DataError(f"the {name} source has no readable image among {total}; the first: {faults[0]}")
    warnings = (
        [f"{len(faults)} of {total} images are unreadable and left out: {name_some(faults, 3)}"] if faults else []
    )
    warnings += warnings_of(source, findings, max_instances)
    digests = [found.facts.digest for found in findings]
    ids = [str(source.record(index).image_id) for index in look.usable]
    report = SourceReport(
        source=Subset(source, np.asarray(look.usable)) if faults else source,
        look=look,
        pixels=name_of(*digests),
        content=name_of(*ids, *digests, *(found.truth for found in findings)),
        warnings=tuple(f"{name}: {text}" for text in warnings),
    )
    instances, empty = sum(len(found.labels) for found in findings), sum(not found.labels for found in findings)
    annotated = f", {instances} instances, {empty} images without any" if source.categories else ""
    _LOG.info(f"{name}: {total} images{annotated}")
    for text in report.warnings:
        _LOG.warning(text)
    if source.categories and not instances:
        raise DataError(f"{name}: {no_instances(source)}")
    return report
