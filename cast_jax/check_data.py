"""``:check_data``: everything about a run's images and annotations that can be known before it, with pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cast_jax.core.errors import DataError
from cast_jax.core.files import write_json
from cast_jax.data.inspection import inspect
from cast_jax.data.sources.base import Source
from cast_jax.visualize import contact_sheet, overlay, save_image

logger = logging.getLogger(__name__)
PICTURES = 12


def check_data(sources: Mapping[str, Source], max_instances: int, folder: Path) -> dict[str, Any]:
    """Reads everything once, and writes ``report.json`` and a sheet of samples with their masks for every set.

    Args:
      sources: of "labelled", "unlabelled" and "val" those that are to be looked at, opened with ``on_fault="skip"``, so
        that all faults are counted.
      max_instances: slots for the instances of a training image.
      folder: receives the files.

    Returns:
      What :func:`cast_jax.data.inspection.inspect` does.

    Raises:
      DataError: there are errors (lists ten); everything is written before.
    """
    report = inspect(sources, max_instances)
    write_json(folder / "report.json", report)
    for name, source in sources.items():
        if pictures := _samples(source):
            save_image(folder / f"{name}.jpg", contact_sheet(pictures))
        logger.info("%s", _sentence(name, report["sets"][name]))
    for text in report["warnings"]:
        logger.warning("%s", text)
    if errors := report["errors"]:
        listed = "\n  ".join(errors[:10])
        raise DataError(f"{len(errors)} errors, all of them in {folder / 'report.json'}:\n  {listed}")
    logger.info("no errors; the report and pictures are in %s", folder)
    return report


def _samples(source: Source) -> list[np.ndarray]:
    """Evenly spread images that can be read, with their masks."""
    pictures = []
    for index in np.unique(np.linspace(0, len(source) - 1, PICTURES).astype(int)).tolist():
        try:
            image = source.image(index)
            if source.categories:
                truth = source.instances(index)
                image = overlay(
                    image, truth.masks, truth.labels, None, source.categories, ignore=truth.ignore, long_side=480
                )
        except DataError:
            continue  # counted as an error already
        pictures.append(image)
    return pictures


def _sentence(name: str, counts: dict[str, Any]) -> str:
    sizes = counts["sizes"]
    parts = [f"{counts['images']} images", f"{counts['unreadable']} unreadable", f"{sizes['different']} sizes"]
    if sizes["smallest"]:
        parts[-1] += " from {}x{} to {}x{}".format(*sizes["smallest"], *sizes["largest"])
    if "instances" in counts:
        empty, most = counts["images_without_instances"], counts["largest_number_of_instances"]
        classes = sum(entry["instances"] > 0 for entry in counts["classes"])
        parts += [f"{counts['instances']} instances of {classes} classes (at most {most} an image)", f"{empty} empty"]
    return f"{name}: {', '.join(parts)}"
