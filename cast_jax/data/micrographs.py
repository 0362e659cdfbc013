"""Generated micrographs: nuclei of many sizes, crowds and stains, written to disk as COCO JSON with exact masks.

What a teacher is pretrained on where no foundation model is at hand. Most are bright nuclei on a dark ground, as under
a fluorescence microscope; the others are dark on a bright, tinted ground.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from cast_jax.core.annotations import Category, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write, read_json

MIN_AREA = 12
"""Pixels; nuclei of which less is seen are not painted."""

_VERSION = 1
"""Of the painting. Raise it when the same parameters no longer give the same pixels."""

_BRIGHT_FIELD = 0.15  # share of images with dark nuclei on a bright ground


def write_micrographs(
    annotations: str | os.PathLike[str], *, count: int, image_size: tuple[int, int], seed: int, category: Category
) -> None:
    """Writes ``count`` images into the folder beside the JSON file ``annotations``; nothing if they are there.

    The image of (seed, index) never depends on the others. The JSON is written last.

    Args:
      annotations: the COCO JSON; its images go into the folder with its name.
      count: images.
      image_size: (height, width) in pixels.
      seed: of everything.
      category: what all nuclei are called.

    Raises:
      DataError: the file was made with other parameters (names it).
    """
    path = Path(annotations)
    made_with = {"version": _VERSION, "seed": seed, "image_size": list(image_size), "count": count}
    made_with |= {"category": [category.id, category.name]}
    if path.exists():
        if (known := read_json(path).get("info")) != made_with:
            raise DataError(f"{path}: other micrographs are here, made with {known}; delete the file or use another")
        return
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc="painting micrographs", unit="image", disable=None):
        image, masks = paint(np.random.default_rng([seed, index]), *image_size)
        name = f"{index:06d}.png"
        atomic_write(path.with_suffix("") / name, cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        images.append({"id": index + 1, "file_name": name, "height": image_size[0], "width": image_size[1]})
        for mask in masks:
            entry = {"id": len(entries) + 1, "image_id": index + 1, "category_id": category.id, "iscrowd": 0}
            entries.append(entry | {"area": int(mask.sum()), "segmentation": encode_mask(mask)})
    categories = [{"id": category.id, "name": category.name}]
    content = {"info": made_with, "images": images, "annotations": entries, "categories": categories}
    atomic_write(path, json.dumps(content))


def paint(
    rng: np.random.Generator, height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "nuclei height width"]]:
    """One image and the visible parts of its nuclei, which never overlap."""
    light = np.zeros((height, width))
    owner = np.zeros((height, width), np.int32)
    radius = rng.uniform(4.0, 11.0) * min(height, width) / 256  # of this image's typical nucleus
    spread, elongation, brightness_spread = rng.uniform(0.08, 0.35), rng.uniform(1.0, 1.9), rng.uniform(0.1, 0.6)
    for number, centre in enumerate(_centres(rng, height, width, radius), 1):
        _paint_nucleus(
            rng,
            light,
            owner,
            number,
            centre,
            radius * np.exp(rng.normal(0, spread)),
            1 + (elongation - 1) * rng.uniform(0, 1.4),
            np.exp(rng.normal(0, brightness_spread)),
        )
    masks = [owner == number for number in range(1, owner.max() + 1)]
    masks = [mask for mask in masks if mask.sum() >= MIN_AREA]
    light[~np.isin(owner, [owner[mask][0] for mask in masks])] = 0
    return _develop(rng, light), np.stack(masks) if masks else np.zeros((0, height, width), bool)


def _centres(rng: np.random.Generator, height: int, width: int, radius: float) -> Float[np.ndarray, "nuclei 2"]:
    """(y, x) of nuclei: some strewn evenly, some in clusters; none in the middle of another."""
    room = height * width / (np.pi * radius**2)
    wanted = int(np.clip(rng.uniform(0.02, 0.25) * room, 3, 64))
    clustered, nearest = rng.uniform(0, 0.9), radius * rng.uniform(1.2, 2.4)
    kept: list[np.ndarray] = []
    for _ in range(6 * wanted):
        place = rng.uniform((0, 0), (height, width))
        if kept and rng.random() < clustered:
            place = kept[rng.integers(len(kept))] + rng.normal(0, 1.6 * radius, 2)
        inside = (place >= 0).all() and (place < (height, width)).all()
        if inside and all(np.hypot(*(place - other)) > nearest for other in kept):
            kept.append(place)
        if len(kept) == wanted:
            break
    return np.array(kept)


def _paint_nucleus(
    rng: np.random.Generator,
    light: Float[np.ndarray, "height width"],
    owner: np.ndarray,
    number: int,
    centre: Float[np.ndarray, "2"],
    radius: float,
    elongation: float,
    brightness: float,
) -> None:
    """A bumpy ellipse with speckles over what is there."""
    reach = int(np.ceil(1.5 * radius * np.sqrt(elongation))) + 1
    top, left = (max(int(c) - reach, 0) for c in centre)
    window = (slice(top, int(centre[0]) + reach), slice(left, int(centre[1]) + reach))
    y, x = np.mgrid[window][:, : light.shape[0] - top, : light.shape[1] - left] + 0.5 - centre[:, None, None]
    turn = rng.uniform(0, np.pi)
    along, across = y * np.sin(turn) + x * np.cos(turn), y * np.cos(turn) - x * np.sin(turn)
    along, across = along / np.sqrt(elongation), across * np.sqrt(elongation)
    angle = np.arctan2(across, along)
    border = radius * np.ones_like(angle)
    for waves, bump in ((2, 0.05), (3, 0.05), (4, 0.02)):
        border += radius * rng.normal(0, bump) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    distance = np.hypot(along, across) / border
    inside = distance < 1
    speckles = cv2.GaussianBlur(rng.normal(0, 1, y.shape), (0, 0), max(radius / 5, 0.7))
    texture = 1 + rng.uniform(0.1, 0.8) * speckles - rng.uniform(0, 0.5) * distance**2
    light[window][inside] = (brightness * np.clip(texture, 0.3, None))[inside]
    owner[window][inside] = number


def _develop(rng: np.random.Generator, light: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """The picture that a microscope takes of this light: out of focus, with haze, stain and noise."""
    height, width = light.shape
    sharp = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.5, 1.6))
    glow = cv2.GaussianBlur(light, (0, 0), rng.uniform(4, 10)) * rng.uniform(0, 0.25)
    haze = cv2.resize(rng.random((3, 3)), (width, height), interpolation=cv2.INTER_CUBIC) * rng.choice([0.02, 0.1, 0.4])
    exposure, ground = np.exp(rng.uniform(np.log(0.12), np.log(0.9))), rng.uniform(0.01, 0.08)
    seen = ground + exposure * (sharp + glow + rng.uniform(0, 1) * haze)
    if rng.random() < _BRIGHT_FIELD:
        stain, paper = rng.uniform(0.1, 0.9, 3), rng.uniform(0.75, 0.98, 3)
        colours = paper * np.exp(-2.5 * seen[..., None] * stain)
    else:
        colours = np.repeat(seen[..., None], 3, axis=-1)
    colours = colours + rng.normal(0, rng.uniform(0.002, 0.02), (height, width, 1))
    return np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)
