"""Generated street scenes, written to disk in Cityscapes' own layout and read back by its own source.

They let the whole system run where no dataset is at hand: eight classes, groups, occlusion, perspective, and two looks
with a domain gap between them (``source`` to pretrain on, ``target`` as the task).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write, read_json, write_json
from cast_jax.data.scenes_compose import compose
from cast_jax.data.scenes_looks import LOOKS

MARKER = "scenes.json"
"""The file in a folder of scenes that says how they were made, and whether they are all there."""

_VERSION = 2
"""Of the painting. Raise it when the same parameters no longer give the same pixels."""

_CITIES = {"train": "demotown", "val": "modelbury", "test": "sampleton"}


def write_scenes(
    root: str | os.PathLike[str],
    *,
    split_sizes: Mapping[str, int],
    image_size: tuple[int, int] = (128, 256),
    look: str = "source",
    seed: int = 0,
) -> None:
    """Writes scenes that :class:`~cast_jax.data.sources.cityscapes.Cityscapes` reads. Does nothing if they are there.

    The scene of (seed, look, split, index) never depends on the others. Every file is written whole, so a run that was
    stopped is completed by the next one.

    Args:
      root: receives ``leftImg8bit/``, ``gtFine/`` and ``scenes.json``.
      split_sizes: how many images each split has, e.g. ``{"train": 400, "val": 60}``.
      image_size: (height, width) in pixels; the scenes are composed for about twice as wide as high.
      look: "source" (clear day) or "target" (hazy evening).
      seed: of everything.

    Raises:
      DataError: an unknown look, a size that cannot be painted, or a folder made with other parameters (names them).
    """
    parameters = _parameters(split_sizes, image_size, look, seed)
    marker = Path(root) / MARKER
    if marker.exists():
        known = read_json(marker)
        differences = [f"{k} is {known.get(k)}, not {v}" for k, v in parameters.items() if known.get(k) != v]
        if differences:
            raise DataError(
                f"{marker}: other scenes are here: {'; '.join(differences)}; delete the folder or use another"
            )
        if known.get("complete"):
            return
    write_json(marker, parameters | {"complete": False})
    todo = [scene for scene in _scenes(Path(root), split_sizes) if not (scene[2].exists() and scene[3].exists())]
    for split, index, image_path, label_path in tqdm(todo, desc=f"painting {look} scenes", unit="image", disable=None):
        image, ids = compose(_scene_rng(seed, look, split, index), LOOKS[look], *image_size)
        atomic_write(image_path, _png(image[..., ::-1]))
        atomic_write(label_path, _png(ids))
    write_json(marker, parameters | {"complete": True})


def _parameters(split_sizes: Mapping[str, int], image_size: tuple[int, int], look: str, seed: int) -> dict[str, Any]:
    if look not in LOOKS:
        raise DataError(f"look {look!r} is unknown; known looks: {', '.join(LOOKS)}")
    if min(image_size) < 32:
        raise DataError(f"image_size {tuple(image_size)} is too small to paint a street in; 32 pixels a side at least")
    if not split_sizes or any(size < 1 for size in split_sizes.values()):
        raise DataError(f"split_sizes {dict(split_sizes)} must name splits with one image each at least")
    parameters = {
        "version": _VERSION,
        "look": look,
        "seed": int(seed),
        "image_size": [int(side) for side in image_size],
        "split_sizes": {split: int(size) for split, size in split_sizes.items()},
    }
    return json.loads(json.dumps(parameters))


def _scenes(root: Path, split_sizes: Mapping[str, int]) -> Iterator[tuple[str, int, Path, Path]]:
    """Every (split, index, image file, label file)."""
    for split, size in split_sizes.items():
        city = _CITIES.get(split, f"{split.replace('_', '-')}ville")
        for index in range(size):
            stem = f"{city}_{index:06d}_000019"
            image_path = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
            yield split, index, image_path, root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png"


def _scene_rng(seed: int, look: str, split: str, index: int) -> np.random.Generator:
    # crc32, since Python's own hash of a string changes from run to run.
    return np.random.default_rng([seed, zlib.crc32(f"{look}/{split}".encode()), index])


def _png(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise RuntimeError(f"OpenCV could not encode an image of shape {pixels.shape}")
    return data.tobytes()
