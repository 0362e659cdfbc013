"""Which images are labelled: seeded, nested (a larger share contains every smaller one of its seed), kept in files.

A split file is JSON: ``{"format": "cast_jax split", "version": 1, ..., "labelled": [ids], "unlabelled": [ids]}``. Lists
of the literature, one image a line, are read as well: what they do not list is unlabelled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cast_jax.core.errors import DataError
from cast_jax.core.files import write_new_json
from cast_jax.data.sources.base import Source, name_some, read_list

FORMAT = {"format": "cast_jax split", "version": 1}
"""How a split file begins. Raise the version when the same seed no longer chooses the same images."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Image ids by their labels; ``unlabelled`` is ``None`` for all that are not labelled."""

    labelled: tuple[int | str, ...]
    unlabelled: tuple[int | str, ...] | None = None


def write_split(path: str | os.PathLike[str], split: Split, about: dict[str, Any]) -> None:
    """Writes a split file; ``about`` says how it was made (data set, seed, share). Raises where another one is."""
    write_new_json({Path(path): {**FORMAT, **about, "labelled": split.labelled, "unlabelled": split.unlabelled}})


def read_split(path: str | os.PathLike[str]) -> Split:
    """Reads a split file, or a text file with a labelled image a line.

    Raises:
      DataError: it is neither, of another version, or an image is in it twice.
    """
    if Path(path).suffix.lower() != ".json":
        split = Split(tuple(read_list(path)))
    else:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read as a split file ({error}); scripts/make_splits.py makes it"
            ) from error
        if not isinstance(content, dict) or {key: content.get(key) for key in FORMAT} != FORMAT:
            raise DataError(f"{path}: is not a split file, which says {json.dumps(FORMAT)[1:-1]}")
        rest = _ids(content, "unlabelled", path) if "unlabelled" in content else None
        split = Split(_ids(content, "labelled", path), rest)
    counts = Counter((*split.labelled, *(split.unlabelled or ())))
    if twice := [image for image, count in counts.items() if count > 1]:
        raise DataError(f"{path}: listed twice: {name_some(sorted(map(str, twice)))}")
    return split


def _ids(content: dict[str, Any], key: str, path: str | os.PathLike[str]) -> tuple[int | str, ...]:
    ids = content.get(key)
    if not isinstance(ids, list) or not ids or not all(type(image) in (int, str) for image in ids):
        raise DataError(f"{path}: {key} must be a list of image ids that is not empty")
    return tuple(ids)


def choose_images(
    images: str | os.PathLike[str] | Sequence[str], known: set[str], suffixes: Sequence[str]
) -> list[str]:
    """The stems of a list of images (or of the labelled ones in a file), checked against the stems that exist.

    Args:
      images: names with or without folders and ``suffixes``, or the path of a file for :func:`read_split`.
      known: the stems that exist.
      suffixes: endings of file names that do not belong to a stem, removed in this order.

    Raises:
      DataError: the list is empty, names an image that is not ``known``, or one twice.
    """
    if isinstance(images, str | os.PathLike):
        names, where = list(map(str, read_split(images).labelled)), f"{images}"
    else:
        names, where = list(images), "images"
    stems = [functools.reduce(str.removesuffix, suffixes, PurePosixPath(name).name) for name in names]
    if not stems:
        raise DataError(f"{where}: lists no images; leave it out to use them all")
    if unknown := [stem for stem in stems if stem not in known]:
        raise DataError(f"{where}: {len(unknown)} images are not in this split: {name_some(unknown)}")
    if repeated := sorted(stem for stem, count in Counter(stems).items() if count > 1):
        raise DataError(f"{where}: listed twice: {name_some(repeated)}")
    return stems


def find_images(source: Source, names: Sequence[int | str], where: str) -> list[int]:
    """The indices of the images that a list names, by id, or by a file name that is one image's and no other's id.

    Args:
      names: ids, or file names as the source has them.
      where: the list, for messages.

    Raises:
      DataError: a name that the source does not have, or an image that is listed twice.
    """
    records = [source.record(index) for index in range(len(source))]
    times = Counter(record.file_name for record in records)
    files = {record.file_name: index for index, record in enumerate(records) if times[record.file_name] == 1}
    positions = files | {str(record.image_id): index for index, record in enumerate(records)}
    texts = list(map(str, names))
    texts = [text if text in positions else PurePosixPath(text.replace("\\", "/")).as_posix() for text in texts]
    if unknown := [text for text in texts if text not in positions]:
        ids, some = (name_some(known[:3]) for known in ([record.image_id for record in records], list(files)))
        raise DataError(
            f"{where}: {len(unknown)} images are not in the training set: {name_some(unknown)}; name images by their "
            f"ids, such as {ids}" + (f", or by their files, such as {some}" if files else "")
        )
    found = [positions[text] for text in texts]
    if repeated := sorted(records[index].file_name for index, count in Counter(found).items() if count > 1):
        raise DataError(f"{where}: listed twice: {name_some(repeated)}")
    return found


def share_of(total: int, percent: float) -> int:
    """``percent`` of ``total`` images, half rounded up: 10 % of Cityscapes' 2,975 are the literature's 298."""
    return math.floor(total * percent / 100 + 0.5)


def split_indices(total: int, labelled: int, seed: int) -> tuple[list[int], list[int]]:
    """(labelled, unlabelled) indices of ``total`` images, each sorted.

    Raises:
      ValueError: ``labelled`` is not between 1 and ``total``.
    """
    if not 1 <= labelled <= total:
        raise ValueError(f"cannot label {labelled} of {total} images")
    order = np.random.default_rng(seed).permutation(total)
    return sorted(order[:labelled].tolist()), sorted(order[labelled:].tolist())


def some_of_each_class(classes: Sequence[Sequence[int]], per_class: int, seed: int) -> list[int]:
    """Sorted indices of ``per_class`` images for every class that occurs, each image standing for one class.

    The rarest class takes its images first, so that a commoner one never takes its last. A class whose images are all
    taken goes without. For one seed, the choice of fewer images a class is part of that of more.

    Args:
      classes: the classes in each image.
    """
    order = np.random.default_rng(seed).permutation(len(classes)).tolist()
    images_of: dict[int, list[int]] = {}
    for image in order:
        for label in set(classes[image]):
            images_of.setdefault(label, []).append(image)
    rarest_first = sorted(images_of, key=lambda label: (len(images_of[label]), label))
    taken: set[int] = set()
    for label in rarest_first:
        taken.update([image for image in images_of[label] if image not in taken][:per_class])
    return sorted(taken)


def stratified(classes: Sequence[Sequence[int]], size: int, seed: int, include: Sequence[int] = ()) -> list[int]:
    """Sorted indices of ``size`` images, those of ``include`` among them, with the whole's shares of every class.

    Iterative stratification (Sechidis et al., ECML 2011): the class with the fewest undecided images comes first, and
    each of its images goes to the side that lacks the class more.

    Raises:
      ValueError: ``size`` is less than ``include`` or more than all.
    """
    total, include = len(classes), sorted(set(include))
    if not len(include) <= size <= total:
        raise ValueError(f"cannot choose {size} of {total} images with {len(include)} of them given")
    labels = [sorted(set(of_image)) for of_image in classes]
    counts = Counter(label for of_image in labels for label in of_image)
    room = [size, total - size]
    lacks = [{label: count * side / total for label, count in counts.items()} for side in room]
    undecided = dict.fromkeys(np.random.default_rng(seed).permutation(total).tolist())
    chosen: list[int] = []

    def put(image: int, side: int) -> None:
        del undecided[image]
        room[side] -= 1
        for label in labels[image]:
            lacks[side][label] -= 1
            counts[label] -= 1
        if side == 0:
            chosen.append(image)

    for image in include:
        put(image, 0)
    while left := [(count, label) for label, count in counts.items() if count]:
        _, rarest = min(left)
        for image in [image for image in undecided if rarest in labels[image]]:
            put(image, max((0, 1), key=lambda side: (room[side] > 0, lacks[side][rarest], room[side])))
    for image in list(undecided):
        put(image, 0 if room[0] else 1)
    return sorted(chosen)
