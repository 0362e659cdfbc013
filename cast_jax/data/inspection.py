"""The thorough look at a data set: every pixel and every annotation once, counted, and held against the other sets."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import numpy as np
from tqdm import tqdm

from cast_jax.core.annotations import Instances
from cast_jax.core.errors import DataError
from cast_jax.data.facts import ImageFacts, facts_warnings, image_facts
from cast_jax.data.sources.base import Source, leaves_folder, name_some, no_instances, noted
from cast_jax.data.sources.coco import cover_no_pixel
from cast_jax.data.sources.folder import other_formats


@dataclasses.dataclass(frozen=True)
class _Look:
    """What one image holds, or the fault that keeps it from being used."""

    fault: str = ""
    size: tuple[int, int] = (0, 0)
    facts: ImageFacts | None = None
    labels: tuple[int, ...] = ()
    link_out: bool = False
    without_pixels: tuple[int | str, ...] = ()


def inspect(sources: Mapping[str, Source], max_instances: int) -> dict[str, Any]:
    """Reads the images and annotations of all sources once, in parallel.

    Args:
      sources: by name; "val" has no cap on instances, and shares no image with the others.
      max_instances: slots for the instances of a training image.

    Returns:
      JSON-ready: ``sets`` (name to counts: ``images``, ``unreadable``, ``instances``, ``images_without_instances``,
      ``largest_number_of_instances``, ``over_cap``, ``instances_cut``, ``sizes``, ``classes``), ``shared_images``
      (groups of the same pixels), and ``errors`` and ``warnings`` as sentences.
    """
    looks = {name: _look_at_all(name, source) for name, source in sources.items()}
    errors, warnings = [], []
    for name, source in sources.items():
        errors += [f"{name}: {look.fault}" for look in looks[name] if look.fault]
        errors += [f"{name}: {fault}" for fault in noted(source, "faults")]
        sound = [look for look in looks[name] if not look.fault]
        if source.categories and sound and not any(look.labels for look in sound):
            errors.append(f"{name}: {no_instances(source)}")
        warnings += [f"{name}: {text}" for text in _warnings(source, looks[name], max_instances, name == "val")]
    shared = list(_same_pixels(sources, looks))
    for first, second in combinations(sources, 2):
        files = [group[first][0] for group in shared if first in group and second in group]
        if files:
            text = f"{first} and {second} share {len(files)} images: {name_some(files, 3)}"
            (errors if "val" in (first, second) else warnings).append(text)
    for name in sources:
        if repeated := [group[name] for group in shared if len(group.get(name, ())) > 1]:
            some, copies = name_some(map(_equal, repeated), 2), sum(map(len, repeated))
            warnings.append(f"{name}: {copies} images show the same pixels as another: {some}")
    sets = {name: _counts(source, looks[name], max_instances, name == "val") for name, source in sources.items()}
    return {"sets": sets, "shared_images": shared, "errors": errors, "warnings": warnings}


def _look_at_all(name: str, source: Source) -> list[_Look]:
    def look(index: int) -> _Look:
        record = source.record(index)
        try:
            image = source.image(index)
            truth = source.instances(index) if source.categories else Instances.empty(*image.shape[:2])
            return _Look(
                size=(image.shape[0], image.shape[1]),
                facts=image_facts(record, image),
                labels=tuple(truth.labels.tolist()),
                link_out=leaves_folder(record),
                without_pixels=truth.without_pixels,
            )
        except DataError as error:
            return _Look(fault=str(error))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looking = pool.map(look, range(len(source)))
        return list(tqdm(looking, f"reading {name}", len(source), unit="image", disable=None))


def _warnings(source: Source, looks: list[_Look], max_instances: int, any_number: bool) -> Iterator[str]:
    files = [source.record(index).file_name for index in range(len(source))]
    over = [len(look.labels) - max_instances for look in looks if len(look.labels) > max_instances]
    if over and not any_number:
        yield f"{len(over)} images have more than {max_instances} instances, which cuts {sum(over)}"
    sound = [(file, look.facts) for file, look in zip(files, looks, strict=True) if look.facts]
    yield from facts_warnings([file for file, _ in sound], [facts for _, facts in sound])
    if out := [file for file, look in zip(files, looks, strict=True) if look.link_out]:
        yield f"{len(out)} images are links that leave their folder: {name_some(out, 3)}"
    if boxes := noted(source, "boxes_outside"):
        yield f"{len(boxes)} annotations have a bbox outside their image, which is not used: {name_some(boxes, 3)}"
    if copies := noted(source, "copies"):
        yield f"{len(copies)} annotations are exact copies of another in their image: {name_some(copies, 3)}"
    if names := [f"{name} of {file}" for file, look in zip(files, looks, strict=True) for name in look.without_pixels]:
        yield cover_no_pixel(names)
    if others := other_formats(noted(source, "left_out")):
        yield others
    if source.categories:
        seen = {label for look in looks for label in look.labels}
        if absent := [category.name for label, category in enumerate(source.categories) if label not in seen]:
            yield f"{len(absent)} classes have no instance: {name_some(absent, 10)}"


def _same_pixels(sources: Mapping[str, Source], looks: Mapping[str, list[_Look]]) -> Iterator[dict[str, list[str]]]:
    """Of every picture that is there more than once, its file names by source."""
    places: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, source in sources.items():
        for index, look in enumerate(looks[name]):
            if look.facts:
                places[look.facts.digest].setdefault(name, []).append(source.record(index).file_name)
    yield from (group for group in places.values() if sum(map(len, group.values())) > 1)


def _equal(files: list[str]) -> str:
    """File names of one picture, of many the first three."""
    return " = ".join(files) if len(files) < 4 else f"{' = '.join(files[:3])} = ... ({len(files)} files)"


def _counts(source: Source, looks: list[_Look], max_instances: int, any_number: bool) -> dict[str, Any]:
    sound = [look for look in looks if not look.fault]
    sizes = Counter(look.size for look in sound)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    counts: dict[str, Any] = {
        "images": len(looks),
        "unreadable": len(looks) - len(sound),
        "sizes": {
            "different": len(sizes),
            "smallest": by_area[0] if by_area else None,
            "largest": by_area[-1] if by_area else None,
            "commonest": max(sizes, key=lambda size: sizes[size], default=None),
        },
    }
    if not source.categories:
        return counts
    numbers = np.array([len(look.labels) for look in sound] or [0])
    excess = np.zeros_like(numbers) if any_number else np.maximum(numbers - max_instances, 0)
    instances = Counter(label for look in sound for label in look.labels)
    images = Counter(label for look in sound for label in set(look.labels))
    return counts | {
        "instances": int(numbers.sum()),
        "images_without_instances": sum(not look.labels for look in sound),
        "largest_number_of_instances": int(numbers.max()),
        "over_cap": int((excess > 0).sum()),
        "instances_cut": int(excess.sum()),
        "classes": [
            {"id": category.id, "name": category.name, "instances": instances[label], "images": images[label]}
            for label, category in enumerate(source.categories)
        ],
    }
