"""What generated street scenes are painted on: colours and marks, drawn together so that masks fit their objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

Colour = tuple[float, float, float]
Points = Sequence[tuple[float, float]] | np.ndarray

SUPERSAMPLING = 2
FIRST_FIGURE = 64
"""Marks from here on are figures; smaller ones are Cityscapes' ids of what has no instances (road 7, sky 23, ...)."""

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, TERRAIN, SKY = 7, 8, 11, 17, 21, 22, 23
_SHIFT = 4  # cv2 takes coordinates in sixteenths of a pixel
_TURN = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along a street. Pixels are those of the finished image, metres the street's."""

    height: int
    width: int
    focal: float
    horizon: float
    vanishing_x: float
    eye: float = 2.0

    def scale(self, depth: float) -> float:
        """Pixels a metre at this depth (metres)."""
        return self.focal / depth

    def ground(self, x: float, depth: float) -> tuple[float, float]:
        """The pixel (x, y) of the ground point ``x`` metres to the right, ``depth`` metres ahead."""
        return self.point(x, 0.0, depth)

    def point(self, x: float, up: float, depth: float) -> tuple[float, float]:
        """The pixel (x, y) of a point ``up`` metres above the ground."""
        scale = self.scale(depth)
        return self.vanishing_x + x * scale, self.horizon + (self.eye - up) * scale


class Canvas:
    """Colours uint8 and marks uint8 at twice the image's size; the last figure painted hides those behind it."""

    def __init__(self, height: int, width: int):
        self.colours = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING, 3), np.uint8)
        self.marks = np.full(self.colours.shape[:2], SKY, np.uint8)

    def fill(self, polygons: Sequence[Points] | np.ndarray, colour: Colour | None, mark: int | None) -> None:
        """Fills polygons, given in image pixels (x, y). Colour or mark stay as they are when ``None``."""
        if not len(polygons):
            return
        fine = SUPERSAMPLING << _SHIFT
        if isinstance(polygons, np.ndarray):
            fixed = list(np.rint(polygons * fine).astype(np.int32))
        else:
            fixed = [np.rint(np.asarray(points) * fine).astype(np.int32) for points in polygons]
        if colour is not None:
            cv2.fillPoly(self.colours, fixed, colour, shift=_SHIFT)
        if mark is not None:
            cv2.fillPoly(self.marks, fixed, mark, shift=_SHIFT)

    def window(self, points: np.ndarray) -> tuple[slice, slice]:
        """The part of the canvas that encloses points (x, y)."""
        left, top = (max(int(low * SUPERSAMPLING) - 1, 0) for low in points.min(axis=0).tolist())
        right, bottom = (max(int(high * SUPERSAMPLING) + 3, 0) for high in points.max(axis=0).tolist())
        return slice(top, bottom), slice(left, right)

    def shadow(self, centre: tuple[float, float], radii: tuple[float, float], strength: float) -> None:
        """Darkens the ground (never a figure) in soft ellipse around ``centre``, in image pixels."""
        for grown, share in ((1.0, 0.5), (0.72, 0.5)):
            points = np.asarray(centre) + _CIRCLE * np.asarray(radii) * grown
            rows, columns = self.window(points)
            colours, marks = self.colours[rows, columns], self.marks[rows, columns]
            inside = np.zeros(marks.shape, np.uint8)
            offset = np.array([columns.start, rows.start])
            fixed = np.rint((points * SUPERSAMPLING - offset) * (1 << _SHIFT)).astype(np.int32)
            if inside.size:
                cv2.fillPoly(inside, [fixed], 1, shift=_SHIFT)
                dark = (inside > 0) & (marks < FIRST_FIGURE)
                colours[dark] = (colours[dark] * (1 - strength * share)).astype(np.uint8)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The smoothed colours float32 ``[height, width, 3]`` and the marks uint8 ``[height, width]`` of the image."""
        height, width = (side // SUPERSAMPLING for side in self.marks.shape)
        colours = cv2.resize(self.colours, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        return colours, self.marks[::SUPERSAMPLING, ::SUPERSAMPLING]


@dataclasses.dataclass(frozen=True)
class Light:
    """How a scene is lit. ``side`` is -1 (sun on the left) to 1; ``haze`` is its share a metre of depth."""

    side: float
    haze: float
    haze_colour: Colour
    shadow: float
    lamps: bool


class Figure:
    """One thing standing on the ground, drawn in metres: x to its front, y up, (0, 0) where it touches the ground."""

    def __init__(
        self,
        canvas: Canvas,
        camera: Camera,
        light: Light,
        x: float,
        depth: float,
        facing: int,
        mark: int,
        grow: float = 1.0,
    ):
        self.canvas, self.light, self.mark = canvas, light, mark
        self.origin = np.asarray(camera.ground(x, depth))
        self.scale = camera.scale(depth) * grow
        self._axes = np.array([facing, -1.0]) * self.scale
        self._haze = 1.0 - float(np.exp(-light.haze * depth))
        self._points: list[np.ndarray] = []

    def polygon(self, points: Points, colour: Colour | None) -> None:
        """Fills a polygon; with ``None`` for a colour only the mark is set (the air between spokes)."""
        placed = self.origin + np.asarray(points, np.float64) * self._axes
        self._points.append(placed)
        self.canvas.fill([placed], None if colour is None else self._hazed(colour), self.mark)

    def box(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        """Fills an upright rectangle."""
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour | None) -> None:
        """Fills an ellipse around (x, y)."""
        self.polygon(_CIRCLE * (radius_x, radius_y) + (x, y), colour)

    def bar(self, start: tuple[float, float], end: tuple[float, float], width: float, colour: Colour) -> None:
        """Draws a straight limb, tube or pole; never thinner than a pixel of the canvas."""
        begin, finish = np.asarray(start, np.float64), np.asarray(end, np.float64)
        along = finish - begin
        across = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) * width / 2
        self.polygon(np.stack([begin + across, finish + across, finish - across, begin - across]), colour)

    def ring(self, x: float, y: float, radius: float, width: float, colour: Colour) -> None:
        """Draws a wheel's rim; the air inside belongs to the figure but keeps its colour."""
        self.ellipse(x, y, radius, radius, None)
        edges = [self.origin + (_CIRCLE * r + (x, y)) * self._axes for r in (radius + width / 2, radius - width / 2)]
        self.canvas.fill(edges, self._hazed(colour), None)  # cv2 fills what lies inside one of the two, not both

    def cast_shadow(self, length: float, x: float = 0.0) -> None:
        """Darkens the ground under a thing of this length (metres), a little away from the sun."""
        centre = self.origin + np.array([x - self.light.side * 0.25 * min(length, 2.0), -0.02]) * self.scale
        self.canvas.shadow(
            tuple(centre), (0.56 * length * self.scale, (0.1 + 0.035 * length) * self.scale), self.light.shadow
        )

    def shade(self, rng: np.random.Generator, texture: float) -> None:
        """Lights the figure's visible pixels from the sun's side and from above, and roughens them a little."""
        if not self._points:
            return
        rows, columns = self.canvas.window(np.concatenate(self._points))
        colours, own = self.canvas.colours[rows, columns], self.canvas.marks[rows, columns] == self.mark
        if not own.any():
            return
        height, width = own.shape
        gain = texture * rng.standard_normal((height, width), dtype=np.float32)
        gain += 0.16 * self.light.side * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        gain += 1 + 0.14 * np.linspace(1, -1, height, dtype=np.float32)[:, None]
        lit = cv2.multiply(colours, cv2.merge([gain] * 3), dtype=cv2.CV_8U)
        cv2.copyTo(lit, own.astype(np.uint8), colours)

    def _hazed(self, colour: Colour) -> Colour:
        share = self._haze
        red, green, blue = ((1 - share) * c + share * h for c, h in zip(colour, self.light.haze_colour, strict=True))
        return red, green, blue
