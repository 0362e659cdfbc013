"""One generated street scene: who stands where, painted from far to near, then lit and photographed."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

from cast_jax.data import scenes_canvas as paper
from cast_jax.data.scenes_canvas import Camera, Canvas, Figure, Light
from cast_jax.data.scenes_figures import VIEWS, Paint
from cast_jax.data.scenes_looks import SKIN, Look
from cast_jax.data.scenes_street import ROAD_HALF, paint_street, pick, post, tree
from cast_jax.data.sources.cityscapes import CATEGORIES

_CLASS_ID = {category.name: category.id for category in CATEGORIES} | {"tree": paper.VEGETATION, "post": paper.POLE}

_FREQUENCY = {
    "car": 5,
    "person": 5,
    "cyclist": 3,
    "motorcyclist": 2,
    "truck": 3,
    "bus": 2,
    "train": 2,
    "bicycle": 2,
    "motorcycle": 2,
}
"""How often each kind is drawn; a cyclist and a motorcyclist are two instances each."""

_DEPTHS = {
    "car": (9.0, 20.0),
    "person": (6.5, 13.0),
    "rider": (7.0, 13.0),
    "truck": (14.0, 26.0),
    "bus": (15.0, 28.0),
    "train": (20.0, 34.0),
    "bicycle": (6.5, 11.0),
    "motorcycle": (7.0, 12.0),
    "tree": (9.0, 50.0),
    "post": (8.0, 40.0),
}
_LARGE = ("truck", "bus", "train")
_GROUPS = {"person": 0.5, "bicycle": 0.75, "car": 4.6}
"""What may stand in an inseparable group, and the metres between its members."""

_MIN_VISIBLE = 20 / (128 * 256)
"""An instance that shows less than this share of the image becomes ignored, as Cityscapes' far crowds are."""


@dataclasses.dataclass(frozen=True)
class _Thing:
    name: str
    x: float
    depth: float
    facing: int
    view: int = 0
    members: int = 1


def compose(
    rng: np.random.Generator, look: Look, height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt16[np.ndarray, "height width"]]:
    """Paints a scene.

    Returns:
      The RGB image and its Cityscapes instance ids: class * 1000 + k for what can be told apart, the bare class id for
      groups, for figures that are nearly hidden, and for everything without instances.
    """
    focal = 1.1 * width
    camera = Camera(height, width, focal, rng.uniform(0.4, 0.47) * height, rng.uniform(0.4, 0.6) * width)
    light = Light(
        side=float(rng.uniform(-1, 1)),
        haze=float(rng.uniform(*look.haze)),
        haze_colour=look.haze_colour,
        shadow=float(rng.uniform(*look.shadow)),
        lamps=look.lamps,
    )
    canvas = Canvas(height, width)
    paint_street(canvas, camera, light, look, rng)
    things = sorted(_things(rng, camera), key=lambda thing: -thing.depth)
    for number, thing in enumerate(things):
        _draw(canvas, camera, light, look, rng, thing, paper.FIRST_FIGURE + number)
    colours, marks = canvas.finish()
    return _photograph(colours, look, rng), _instance_ids(marks, things)


def _things(rng: np.random.Generator, camera: Camera) -> list[_Thing]:
    """Who stands where: 2 to 5 draws of traffic, perhaps a group, some trees and posts."""
    things: list[_Thing] = []
    kinds, weights = list(_FREQUENCY), np.asarray(list(_FREQUENCY.values()), float)
    large = 0
    for kind in rng.choice(kinds, size=rng.integers(2, 6), p=weights / weights.sum()):
        if kind in _LARGE and (large := large + 1) > 2:
            kind = "person"
        if kind in ("cyclist", "motorcyclist"):
            vehicle = _place(rng, camera, "rider")
            things.append(dataclasses.replace(vehicle, name="bicycle" if kind == "cyclist" else "motorcycle"))
            things.append(dataclasses.replace(vehicle, depth=vehicle.depth - 1e-3))  # in the saddle: painted after
        else:
            things.append(_place(rng, camera, str(kind)))
    if rng.random() < 0.35:
        kind = rng.choice(list(_GROUPS))
        group = _place(rng, camera, str(kind))
        depth = float(rng.uniform(12, 22))
        x = group.x * depth / group.depth
        things.append(dataclasses.replace(group, x=x, depth=depth, view=0, members=int(rng.integers(4, 8))))
    for name, most in (("tree", 5), ("post", 3)):
        for _ in range(rng.integers(0, most + 1)):
            side = int(rng.choice([-1, 1]))
            depth = float(rng.uniform(*_DEPTHS[name]))
            things.append(_Thing(name, side * float(rng.uniform(ROAD_HALF + 0.5, 8.5)), depth, -side))
    return things


def _place(rng: np.random.Generator, camera: Camera, name: str) -> _Thing:
    near, far = _DEPTHS[name]
    depth = float(np.exp(rng.uniform(np.log(near), np.log(far))))
    view = int(rng.integers(len(VIEWS[name]))) if rng.random() < 0.6 else 0
    facing = int(rng.choice([-1, 1]))
    if view == 0:
        x = (rng.uniform(0.04, 0.96) * camera.width - camera.vanishing_x) / camera.scale(depth)
        return _Thing(name, float(np.clip(x, -9, 9)), depth, facing)
    coming = VIEWS[name][view].__name__.endswith("_front")
    lane = float((-2.5 if coming else 2.5) + rng.normal(0, 0.3))  # people drive on the right here
    return _Thing(name, lane, depth, facing, view)


def _draw(
    canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator, thing: _Thing, mark: int
) -> None:
    spread = _GROUPS.get(thing.name, 0.0)
    for member in range(thing.members):
        shift = (member - (thing.members - 1) / 2) * spread + (rng.normal(0, 0.1) if thing.members > 1 else 0.0)
        grow = float(rng.uniform(0.92, 1.08)) if thing.name not in ("rider", "bicycle", "motorcycle") else 1.0
        figure = Figure(canvas, camera, light, thing.x + shift, thing.depth, thing.facing, mark, grow)
        if thing.name in ("tree", "post"):
            (tree if thing.name == "tree" else post)(figure, look, rng)
        else:
            VIEWS[thing.name][thing.view](figure, _paint(rng, look, thing.name), rng)
    figure.shade(rng, look.texture * 0.6)


def _paint(rng: np.random.Generator, look: Look, name: str) -> Paint:
    if name in ("person", "rider"):
        main, second = pick(rng, look.clothes), pick(rng, look.clothes)
    elif name in ("bus", "train"):
        main, second = pick(rng, look.transit), pick(rng, look.transit)
        if name == "train":
            main = pick(rng, ((226, 226, 222),)) if not look.lamps else pick(rng, ((168, 164, 158),))
    else:
        main, second = pick(rng, look.vehicles), pick(rng, look.cargo)
    return Paint(main, second, pick(rng, SKIN, 6), pick(rng, (look.glass,), 8))


def _instance_ids(marks: np.ndarray, things: list[_Thing]) -> np.ndarray:
    """Marks to Cityscapes' ids; ``k`` counts the instances of a class."""
    table = np.arange(256, dtype=np.uint16)
    visible = np.bincount(marks.reshape(-1), minlength=256)
    counts: dict[str, int] = {}
    for mark, thing in enumerate(things, paper.FIRST_FIGURE):
        class_id = _CLASS_ID[thing.name]
        countable = thing.name in VIEWS and thing.members == 1 and visible[mark] >= _MIN_VISIBLE * marks.size
        table[mark] = class_id * 1000 + counts.setdefault(thing.name, 0) if countable else class_id
        if countable:
            counts[thing.name] += 1
    return table[marks]


def _photograph(colours: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Exposure, colour, glow, focus, noise: from the painted colours float32 to the uint8 image."""
    height, width = colours.shape[:2]
    colours = colours * (np.float32(rng.uniform(*look.exposure)) * np.asarray(look.tint, np.float32))
    grey = colours.mean(axis=-1, keepdims=True)
    colours = grey + np.float32(rng.uniform(*look.saturation)) * (colours - grey)
    colours = 110 + np.float32(rng.uniform(*look.contrast)) * (colours - 110)
    pixel = width / 256
    if look.lamps:
        colours += 0.9 * cv2.GaussianBlur(np.maximum(colours - 150, 0), (0, 0), 2.5 * pixel)
    if (sigma := rng.uniform(*look.blur) * pixel) > 0.2:
        colours = cv2.GaussianBlur(colours, (0, 0), sigma)
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    colours *= (1 - 0.1 * (y[:, None] ** 2 + x[None, :] ** 2))[..., None]
    colours += np.float32(rng.uniform(*look.noise)) * rng.standard_normal(colours.shape, dtype=np.float32)
    return cv2.convertScaleAbs(np.maximum(colours, 0))
