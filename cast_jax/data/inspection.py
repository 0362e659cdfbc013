"""The thorough look at a data set: every pixel and every annotation once, counted, and held against the other sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from cast_jax.data.findings import Look, look_at, same_pixels, shared_pictures, warnings_of
from cast_jax.data.sources.base import Source, no_instances, noted


def inspect(sources: Mapping[str, Source], max_instances: int) -> dict[str, Any]:
    """Reads the images and annotations of all sources once, in parallel.

    Stricter than a run, which uses what it can: pictures of val that are trained on are an error here, and a warning
    there.

    Args:
      sources: by name; "val" has no cap on instances, and shares no image with the others.
      max_instances: slots for the instances of a training image.

    Returns:
      JSON-ready: ``sets`` (name to counts: ``images``, ``unreadable``, ``instances``, ``images_without_instances``,
      ``largest_number_of_instances``, ``over_cap``, ``instances_cut``, ``sizes``, ``classes``), ``shared_images``
      (groups of the same pixels), and ``errors`` and ``warnings`` as sentences.
    """
    caps = {name: None if name == "val" else max_instances for name in sources}
    looks = {name: look_at(name, source) for name, source in sources.items()}
    errors, warnings = [], []
    for name, source in sources.items():
        findings = looks[name].findings
        errors += [f"{name}: {fault}" for fault in (*looks[name].faults, *noted(source, "faults"))]
        if source.categories and findings and not any(found.labels for found in findings):
            errors.append(f"{name}: {no_instances(source)}")
        warnings += [f"{name}: {text}" for text in warnings_of(source, findings, caps[name])]
    shared = same_pixels({name: look.findings for name, look in looks.items()})
    for pair, text in shared_pictures(shared).items():
        (errors if "val" in pair else warnings).append(text)
    sets = {name: _counts(source, looks[name], caps[name]) for name, source in sources.items()}
    return {"sets": sets, "shared_images": shared, "errors": errors, "warnings": warnings}


def _counts(source: Source, look: Look, max_instances: int | None) -> dict[str, Any]:
    sizes = Counter((found.facts.height, found.facts.width) for found in look.findings)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    counts: dict[str, Any] = {
        "images": len(source),
        "unreadable": len(look.faults),
        "sizes": {
            "different": len(sizes),
            "smallest": by_area[0] if by_area else None,
            "largest": by_area[-1] if by_area else None,
            "commonest": max(sizes, key=lambda size: sizes[size], default=None),
        },
    }
    if not source.categories:
        return counts
    numbers = np.array([len(found.labels) for found in look.findings] or [0])
    excess = np.zeros_like(numbers) if max_instances is None else np.maximum(numbers - max_instances, 0)
    instances = Counter(label for found in look.findings for label in found.labels)
    images = Counter(label for found in look.findings for label in set(found.labels))
    return counts | {
        "instances": int(numbers.sum()),
        "images_without_instances": sum(not found.labels for found in look.findings),
        "largest_number_of_instances": int(numbers.max()),
        "over_cap": int((excess > 0).sum()),
        "instances_cut": int(excess.sum()),
        "classes": [
            {"id": category.id, "name": category.name, "instances": instances[label], "images": images[label]}
            for label, category in enumerate(source.categories)
        ],
    }
