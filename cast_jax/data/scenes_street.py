"""The empty street: sky, houses, pavement, road and its markings, in perspective."""

from __future__ import annotations

import cv2
import numpy as np

from cast_jax.data import scenes_canvas as paper
from cast_jax.data.scenes_canvas import Camera, Canvas, Colour, Figure, Light
from cast_jax.data.scenes_looks import Look

ROAD_HALF = 5.2
"""Metres from the middle of the road to its kerb."""

WALL = 9.5
"""Metres from the middle of the road to the houses."""

_NEAR, _FAR = 3.0, 120.0


def pick(rng: np.random.Generator, colours: tuple[Colour, ...], spread: float = 10.0) -> Colour:
    """One of the colours, a little changed."""
    chosen, change = colours[rng.integers(len(colours))], rng.normal(0, spread, 3).tolist()
    red, green, blue = (min(max(channel + more, 0.0), 255.0) for channel, more in zip(chosen, change, strict=True))
    return red, green, blue


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` with ``share`` of ``second`` in it."""
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(first, second, strict=True))
    return red, green, blue


def paint_street(canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator) -> None:
    """Paints everything that has no instances, behind all figures, and gives it a grain."""
    _sky(canvas, camera, light, look, rng)
    _ground(canvas, camera, light, look, rng)
    _skyline(canvas, camera, light, look, rng)
    for side in (-1, 1):
        _houses(canvas, camera, light, look, rng, side)
    grain = rng.standard_normal((canvas.marks.shape[0] // 8, canvas.marks.shape[1] // 8), dtype=np.float32)
    fine = rng.standard_normal((canvas.marks.shape[0] // 2, canvas.marks.shape[1] // 2), dtype=np.float32)
    size = canvas.marks.shape[::-1]
    gain = 1 + look.texture * (cv2.resize(grain, size) + cv2.resize(fine, size, interpolation=cv2.INTER_NEAREST))
    gain[canvas.marks == paper.SKY] = 1.0
    cv2.multiply(canvas.colours, cv2.merge([gain] * 3), dst=canvas.colours, dtype=cv2.CV_8U)


def _sky(canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator) -> None:
    rows, width = int(np.ceil(camera.horizon * paper.SUPERSAMPLING)) + 1, canvas.marks.shape[1]
    size = (width // 4, rows // 4)  # a sky is smooth: it is made small and enlarged
    top, bottom = (np.asarray(colour, np.float32) for colour in look.sky[rng.integers(len(look.sky))])
    down = np.linspace(0, 1, size[1], dtype=np.float32)[:, None, None] ** 1.3
    across = np.linspace(-1, 1, size[0], dtype=np.float32)[None, :, None]
    sky = top + (bottom - top) * down + 22 * light.side * across
    large, small = (rng.standard_normal(shape, dtype=np.float32) for shape in ((5, 9), (10, 18)))
    puffs = sum(
        share * cv2.resize(blobs, size, interpolation=cv2.INTER_CUBIC) for share, blobs in ((1, large), (0.5, small))
    )
    cover = np.clip(puffs + 2.2 * rng.uniform(*look.clouds) - 1.2, 0, 1)[..., None] * 0.75
    cloud = bottom + 0.55 * (255 - bottom) * (0.35 if look.lamps else 1.0)
    painted = np.clip(sky + cover * (cloud - sky), 0, 255)
    canvas.colours[:rows] = cv2.resize(painted, (width, rows))


def _ground(canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator) -> None:
    def strip(left: float, right: float, near: float, far: float) -> list[tuple[float, float]]:
        return [camera.ground(x, z) for x, z in ((left, near), (left, far), (right, far), (right, near))]

    haze = light.haze_colour
    pavement, road = pick(rng, look.sidewalk, 6), pick(rng, look.road, 5)
    paint = mix(pick(rng, ((232, 232, 226),), 4), road, 0.25 if not look.lamps else 0.5)
    bands = [_NEAR, 6, 9, 13, 19, 28, 45, 80, 4000]
    for near, far in zip(bands[-2::-1], bands[:0:-1], strict=True):
        share = 1 - float(np.exp(-light.haze * near))
        canvas.fill([strip(-4 * near - 40, 4 * near + 40, near, far)], mix(pavement, haze, share), paper.SIDEWALK)
        for side in (-1, 1):
            kerb = strip(side * (ROAD_HALF + 0.25), side * ROAD_HALF, near, far)
            canvas.fill([kerb], mix(mix(pavement, (255, 255, 255), 0.3), haze, share), paper.SIDEWALK)
        canvas.fill([strip(-ROAD_HALF, ROAD_HALF, near, far)], mix(road, haze, share), paper.ROAD)
    start = rng.uniform(0, 4)
    dashes = [strip(-0.09, 0.09, z + start, z + start + 2.2) for z in np.arange(_NEAR, 60, 5.0)]
    edges = [strip(x - 0.06, x + 0.06, _NEAR, 90) for x in (-ROAD_HALF + 0.4, ROAD_HALF - 0.4)]
    canvas.fill(dashes, paint, paper.ROAD)
    canvas.fill(edges, paint, paper.ROAD)
    if rng.random() < 0.45:
        crossing = rng.uniform(6, 16)
        stripes = [
            strip(x, x + 0.5, crossing, crossing + 2.6) for x in np.arange(-ROAD_HALF + 0.5, ROAD_HALF - 0.6, 1.0)
        ]
        canvas.fill(stripes, paint, paper.ROAD)
    if rng.random() < 0.6:
        x, z = rng.uniform(-4, 3), rng.uniform(6, 20)
        canvas.fill(
            [strip(x, x + rng.uniform(0.8, 2.5), z, z + rng.uniform(1, 4))], mix(road, (0, 0, 0), 0.18), paper.ROAD
        )


def _skyline(canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator) -> None:
    x = -110.0
    while x < 110.0:
        wide, tall = rng.uniform(10, 26), rng.uniform(8, 34)
        green = rng.random() < 0.25
        colour = pick(rng, look.foliage if green else look.walls)
        corners = [camera.point(a, up, _FAR) for a, up in ((x, 0), (x, tall), (x + wide, tall), (x + wide, 0))]
        hazy = mix(colour, light.haze_colour, 1 - float(np.exp(-light.haze * _FAR * 0.8)))
        canvas.fill([corners], hazy, paper.VEGETATION if green else paper.BUILDING)
        x += wide


def _houses(canvas: Canvas, camera: Camera, light: Light, look: Look, rng: np.random.Generator, side: int) -> None:
    ends = [8.0]
    while ends[-1] < 95:
        ends.append(ends[-1] + rng.uniform(9, 18))
    for near, far in zip(ends[-2::-1], ends[:0:-1], strict=True):
        tall, wall = rng.uniform(6, 17), pick(rng, look.walls)
        if rng.random() < 0.12:
            continue
        share = 1 - float(np.exp(-light.haze * (near + far) / 2))
        lit = 1.0 - 0.22 * light.side * side  # the sun on the left lights the houses on the right
        tone = mix(mix(wall, (0, 0, 0), max(0.0, 1 - lit * 0.9)), light.haze_colour, share)

        def face(z0: float, z1: float, low: float, high: float) -> list[tuple[float, float]]:
            return [camera.point(side * WALL, up, z) for z, up in ((z0, low), (z0, high), (z1, high), (z1, low))]

        front = [camera.point(side * a, up, near) for a, up in ((WALL, 0), (WALL, tall), (40, tall), (40, 0))]
        canvas.fill([front], mix(tone, (0, 0, 0), 0.15), paper.BUILDING)
        canvas.fill([face(near, far, 0, tall)], tone, paper.BUILDING)
        canvas.fill([face(near, far, tall - 0.5, tall)], mix(tone, (0, 0, 0), 0.3), paper.BUILDING)
        canvas.fill([face(near, far, 0, 0.8)], mix(tone, (0, 0, 0), 0.25), paper.BUILDING)
        panes = _panes(camera, side, near, far, tall)
        shining = rng.random(len(panes)) < (0.4 if look.lamps else 0.1)
        lamp = (255, 208, 128) if look.lamps else (210, 228, 242)
        canvas.fill(panes[~shining], mix(look.glass, tone, 0.3), paper.BUILDING)
        canvas.fill(panes[shining], mix(lamp, tone, 0.25), paper.BUILDING)


def _panes(camera: Camera, side: int, near: float, far: float, tall: float) -> np.ndarray:
    """The windows of a house's wall along the street: image pixels (x, y), ``[windows, 4, 2]``."""
    low, start = np.meshgrid(np.arange(1.2, tall - 2.2, 2.9), np.arange(near + 1.0, far - 1.5, 2.6))
    depth = np.stack([start, start, start + 1.4, start + 1.4], axis=-1).reshape(-1, 4)
    up = np.stack([low, low + 1.6, low + 1.6, low], axis=-1).reshape(-1, 4)
    scale = camera.focal / depth
    return np.stack([camera.vanishing_x + side * WALL * scale, camera.horizon + (camera.eye - up) * scale], axis=-1)


def tree(figure: Figure, look: Look, rng: np.random.Generator) -> None:
    """A tree: a trunk under a crown of blobs, brighter towards the sun."""
    figure.cast_shadow(2.5)
    tall, leaf = rng.uniform(4.5, 7.5), pick(rng, look.foliage)
    figure.bar((0, 0), (rng.normal(0, 0.1), tall * 0.6), 0.28, (92, 72, 56))
    for _ in range(9):
        x, y = rng.normal(0, 0.85), tall * 0.74 + rng.normal(0, 0.7)
        glow = 0.12 * y - 0.12 * tall * 0.74 + 0.12 * x * figure.light.side + rng.normal(0, 0.05)
        figure.ellipse(x, y, rng.uniform(0.7, 1.3), rng.uniform(0.6, 1.1), mix(leaf, (255, 255, 200), max(0.0, glow)))


def post(figure: Figure, look: Look, rng: np.random.Generator) -> None:
    """A street lamp, a road sign, or a traffic light."""
    grey = (112, 116, 120)
    kind = rng.integers(3)
    if kind == 0:
        figure.bar((0, 0), (0, 6.2), 0.16, grey)
        figure.bar((0, 6.2), (1.4, 6.5), 0.12, grey)
        figure.ellipse(1.5, 6.42, 0.35, 0.14, (255, 236, 170) if look.lamps else (225, 225, 220))
    elif kind == 1:
        figure.bar((0, 0), (0, 2.6), 0.1, grey)
        figure.ellipse(0, 2.6, 0.38, 0.38, ((206, 40, 40), (40, 90, 190))[rng.integers(2)])
        figure.ellipse(0, 2.6, 0.24, 0.24, (240, 240, 240))
    else:
        figure.bar((0, 0), (0, 3.0), 0.12, grey)
        figure.box(-0.2, 2.3, 0.2, 3.4, (30, 32, 34))
        lit = rng.integers(3)
        for lamp, colour in enumerate(((230, 50, 40), (250, 190, 50), (70, 210, 110))):
            figure.ellipse(0, 3.2 - 0.34 * lamp, 0.13, 0.13, colour if lamp == lit else (60, 60, 60))
