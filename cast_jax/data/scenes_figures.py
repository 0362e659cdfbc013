"""The eight Cityscapes classes as painted figures: simple parts, the same shapes in every look."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from cast_jax.data.scenes_canvas import Colour, Figure

_TYRE: Colour = (28, 28, 32)
_METAL: Colour = (150, 152, 158)
_DARK: Colour = (45, 46, 52)
_TAIL_LAMP: Colour = (205, 30, 30)
_HEAD_LAMP: Colour = (255, 246, 205)
_SIGN: Colour = (255, 176, 40)


@dataclasses.dataclass(frozen=True)
class Paint:
    """The colours that a figure is given: a main one, a second one, skin and glass."""

    main: Colour
    second: Colour
    skin: Colour
    glass: Colour


def darker(colour: Colour, share: float = 0.7) -> Colour:
    """A colour times ``share``."""
    red, green, blue = (min(255.0, channel * share) for channel in colour)
    return red, green, blue


def _wheel(figure: Figure, x: float, radius: float) -> None:
    figure.ellipse(x, radius, radius, radius, _TYRE)
    figure.ellipse(x, radius, radius * 0.58, radius * 0.58, _METAL)
    figure.ellipse(x, radius, radius * 0.2, radius * 0.2, _DARK)


def car_side(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A saloon, hatchback or estate from the side."""
    figure.cast_shadow(4.3)
    tail = rng.choice([-1.15, -1.6, -1.95])  # where the roof ends: saloon, hatchback, estate
    roof = rng.uniform(1.42, 1.6)
    main = paint.main
    figure.polygon([(tail - 0.5, 0.9), (tail, roof), (0.25, roof + 0.03), (1.1, 0.9)], darker(main, 0.92))
    figure.polygon([(tail - 0.3, 0.94), (tail + 0.06, roof - 0.1), (-0.5, roof - 0.08), (-0.5, 0.94)], paint.glass)
    figure.polygon([(-0.4, 0.94), (-0.4, roof - 0.08), (0.2, roof - 0.08), (0.88, 0.94)], paint.glass)
    outline = [(-2.1, 0.28), (-2.17, 0.66), (-2.08, 0.95), (-1.4, 0.99), (1.05, 0.97), (1.85, 0.84), (2.15, 0.62)]
    figure.polygon([*outline, (2.14, 0.28)], main)
    figure.polygon([(-2.1, 0.24), (-2.12, 0.42), (2.14, 0.42), (2.12, 0.24)], darker(main, 0.55))
    figure.bar((-0.45, 0.95), (-0.45, 0.4), 0.04, darker(main, 0.6))
    figure.bar((-2.1, 0.78), (1.9, 0.76), 0.05, darker(main, 1.25))
    figure.box(-2.17, 0.68, -2.0, 0.86, _TAIL_LAMP)
    figure.polygon([(2.15, 0.58), (1.85, 0.62), (1.85, 0.78), (2.08, 0.72)], _HEAD_LAMP)
    for x in (-1.3, 1.3):
        figure.ellipse(x, 0.36, 0.42, 0.42, darker(main, 0.4))
        _wheel(figure, x, 0.34)


def _car_end(figure: Figure, paint: Paint, lamp: Colour) -> None:
    main = paint.main
    figure.cast_shadow(2.0)
    for x in (-0.7, 0.7):
        figure.box(x - 0.13, 0.0, x + 0.13, 0.4, _TYRE)
    figure.polygon([(-0.72, 0.85), (-0.58, 1.48), (0.58, 1.48), (0.72, 0.85)], darker(main, 0.9))
    figure.polygon([(-0.6, 0.92), (-0.5, 1.38), (0.5, 1.38), (0.6, 0.92)], paint.glass)
    figure.polygon([(-0.9, 0.25), (-0.92, 0.75), (-0.8, 0.95), (0.8, 0.95), (0.92, 0.75), (0.9, 0.25)], main)
    figure.box(-0.9, 0.22, 0.9, 0.42, darker(main, 0.5))
    figure.box(-0.26, 0.44, 0.26, 0.58, (235, 235, 225))
    for x in (-0.72, 0.72):
        figure.ellipse(x, 0.72, 0.17, 0.11, lamp)


def car_rear(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A car seen from behind: red lamps."""
    _car_end(figure, paint, _TAIL_LAMP)


def car_front(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A car that comes towards us: white lamps and a grille."""
    _car_end(figure, paint, _HEAD_LAMP)
    figure.box(-0.45, 0.62, 0.45, 0.8, _DARK)


def truck_side(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A lorry from the side: a cab, a gap, and a tall box or an open bed."""
    figure.cast_shadow(8.2)
    figure.box(-4.1, 0.55, 3.9, 0.85, _DARK)
    if rng.random() < 0.7:
        figure.box(-4.1, 0.85, 1.65, 3.5, paint.second)
        figure.box(-4.1, 0.85, 1.65, 1.0, darker(paint.second, 0.6))
        for x in np.arange(-3.2, 1.5, 0.95):
            figure.bar((x, 1.0), (x, 3.45), 0.06, darker(paint.second, 0.82))
        figure.box(-3.4, 2.0, 0.9, 2.55, paint.main)
    else:
        figure.polygon([(-4.1, 0.85), (-4.3, 2.1), (1.7, 2.1), (1.7, 0.85)], paint.second)
        figure.polygon([(-3.9, 2.1), (-2.6, 2.8), (-0.6, 2.95), (0.9, 2.5), (1.5, 2.1)], (122, 96, 66))
        for x in np.arange(-3.6, 1.6, 0.9):
            figure.bar((x, 0.9), (x, 2.1), 0.09, darker(paint.second, 0.7))
    figure.polygon([(1.9, 0.5), (1.9, 2.95), (3.2, 2.9), (3.85, 1.75), (4.05, 1.6), (4.05, 0.5)], paint.main)
    figure.polygon([(2.5, 1.75), (2.5, 2.65), (3.1, 2.6), (3.6, 1.75)], paint.glass)
    figure.bar((2.35, 0.6), (2.35, 2.8), 0.05, darker(paint.main, 0.6))
    figure.box(3.85, 0.75, 4.07, 1.05, _HEAD_LAMP)
    figure.box(-4.15, 0.9, -4.0, 1.3, _TAIL_LAMP)
    for x in (-3.1, -1.95, 2.95):
        _wheel(figure, x, 0.52)


def truck_rear(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A lorry from behind: two tall doors above twin tyres."""
    figure.cast_shadow(2.6)
    for x in (-0.85, 0.85):
        figure.box(x - 0.3, 0.0, x + 0.3, 0.9, _TYRE)
    figure.box(-1.2, 0.5, 1.2, 0.8, _DARK)
    figure.box(-1.25, 0.8, 1.25, 3.5, paint.second)
    figure.box(-1.25, 3.3, 1.25, 3.5, darker(paint.second, 0.75))
    for x in (-1.2, 0.0, 1.2):
        figure.bar((x, 0.85), (x, 3.3), 0.08, darker(paint.second, 0.6))
    for x in (-0.35, 0.35):
        figure.bar((x, 1.0), (x, 3.2), 0.06, _METAL)
    for x in (-1.02, 1.02):
        figure.box(x - 0.17, 0.56, x + 0.17, 0.78, _TAIL_LAMP)


def bus_side(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A city bus from the side: one long box of windows with two doors on two wheels."""
    figure.cast_shadow(11.2)
    main = paint.main
    figure.polygon([(-5.5, 0.35), (-5.55, 2.9), (-5.3, 3.15), (5.35, 3.15), (5.6, 2.8), (5.6, 0.35)], main)
    figure.box(-5.5, 0.3, 5.58, 0.75, darker(main, 0.6))
    figure.box(-5.35, 1.5, 5.6, 2.65, _DARK)
    for x in np.arange(-5.2, 4.4, 1.4):
        figure.box(x, 1.58, x + 1.24, 2.58, paint.glass)
    figure.polygon([(4.55, 1.3), (4.55, 2.6), (5.52, 2.6), (5.58, 1.3)], paint.glass)
    for x in (0.1, 3.95):
        figure.box(x, 0.5, x + 1.0, 2.6, _DARK)
        figure.box(x + 0.08, 0.6, x + 0.46, 2.5, paint.glass)
        figure.box(x + 0.54, 0.6, x + 0.92, 2.5, paint.glass)
    figure.box(1.6, 2.72, 4.9, 3.02, _SIGN)
    figure.box(-5.58, 0.9, -5.42, 1.4, _TAIL_LAMP)
    figure.box(5.45, 0.8, 5.62, 1.1, _HEAD_LAMP)
    for x in (-3.3, 3.0):
        figure.ellipse(x, 0.6, 0.64, 0.64, darker(main, 0.4))
        _wheel(figure, x, 0.5)


def bus_front(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A bus that comes towards us: a wide windscreen under a lit route sign."""
    figure.cast_shadow(2.7)
    main = paint.main
    for x in (-0.95, 0.95):
        figure.box(x - 0.18, 0.0, x + 0.18, 0.5, _TYRE)
    figure.polygon([(-1.27, 0.3), (-1.27, 2.9), (-1.1, 3.15), (1.1, 3.15), (1.27, 2.9), (1.27, 0.3)], main)
    figure.box(-1.15, 1.15, 1.15, 2.6, paint.glass)
    figure.bar((0.0, 1.15), (0.0, 2.6), 0.05, _DARK)
    figure.box(-0.9, 2.68, 0.9, 3.0, _SIGN)
    figure.box(-1.27, 0.28, 1.27, 0.5, darker(main, 0.55))
    for x in (-0.95, 0.95):
        figure.ellipse(x, 0.78, 0.2, 0.14, _HEAD_LAMP)
        figure.bar((x * 1.3, 2.3), (x * 1.38, 1.7), 0.16, _DARK)


def train_side(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A tram: two long cars with sloping noses, joined by bellows, skirts over the wheels, a pantograph on the roof."""
    figure.cast_shadow(19.0)
    figure.bar((-1.6, 3.5), (-0.7, 4.3), 0.1, _DARK)
    figure.bar((-0.7, 4.3), (-1.5, 5.0), 0.1, _DARK)
    figure.bar((-2.1, 5.05), (-0.9, 5.05), 0.12, _DARK)
    figure.box(-5.5, 3.4, -3.5, 3.75, _METAL)
    figure.box(3.2, 3.4, 5.6, 3.75, _METAL)
    body = [(0.0, 0.2), (0.0, 3.5), (7.4, 3.5), (8.7, 2.4), (9.3, 1.2), (9.3, 0.2)]
    for side in (-1, 1):
        figure.polygon([(side * x, y) for x, y in body], paint.main)
        figure.polygon([(side * x, y) for x, y in [(0.0, 0.2), (0.0, 1.1), (9.3, 1.1), (9.3, 0.2)]], paint.second)
        figure.polygon([(side * x, y) for x, y in [(7.7, 1.75), (7.7, 2.9), (8.2, 2.75), (8.9, 1.75)]], paint.glass)
        for x in np.arange(0.8, 7.2, 1.6):
            figure.polygon(
                [(side * a, b) for a, b in [(x, 1.6), (x, 2.8), (x + 1.25, 2.8), (x + 1.25, 1.6)]], paint.glass
            )
        figure.polygon([(side * a, b) for a, b in [(0.0, 3.1), (0.0, 3.3), (7.6, 3.3), (7.85, 3.1)]], paint.second)
        figure.box(side * 9.1 - 0.15, 0.75, side * 9.1 + 0.15, 1.05, _HEAD_LAMP if side > 0 else _TAIL_LAMP)
        figure.box(side * 5.0 - 1.1, 0.0, side * 5.0 + 1.1, 0.22, _DARK)
    for x in (-0.32, 0.0, 0.32):
        figure.box(x - 0.13, 0.3, x + 0.13, 3.45, (70, 70, 74))


def motorcycle(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A motorcycle from the side: fat tyres, an engine, a tank and a seat."""
    figure.cast_shadow(2.0)
    for x in (-0.7, 0.72):
        _wheel(figure, x, 0.34)
    figure.bar((0.72, 0.34), (0.42, 1.02), 0.1, _METAL)
    figure.bar((-0.95, 0.42), (-0.1, 0.36), 0.13, _METAL)
    figure.polygon([(-0.3, 0.28), (-0.36, 0.66), (0.34, 0.7), (0.36, 0.3)], _DARK)
    figure.polygon([(-1.0, 0.86), (-0.95, 0.98), (-0.15, 0.86), (-0.15, 0.66), (-0.6, 0.6)], _DARK)
    figure.polygon([(-0.2, 0.66), (-0.15, 0.92), (0.22, 1.02), (0.52, 0.86), (0.3, 0.64)], paint.main)
    figure.polygon([(0.4, 0.62), (0.52, 1.04), (0.78, 0.92), (0.66, 0.64)], paint.main)
    figure.bar((0.45, 0.98), (0.28, 1.16), 0.07, _DARK)
    figure.ellipse(0.74, 0.88, 0.1, 0.1, _HEAD_LAMP)
    figure.box(-1.06, 0.8, -0.94, 0.9, _TAIL_LAMP)


def bicycle(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """A bicycle from the side: two thin rings and a frame."""
    figure.cast_shadow(1.7)
    for x in (-0.53, 0.55):
        figure.ring(x, 0.36, 0.34, 0.07, _TYRE)
        figure.bar((x - 0.3, 0.36), (x + 0.3, 0.36), 0.02, _METAL)
        figure.bar((x, 0.06), (x, 0.66), 0.02, _METAL)
    crank, saddle, head = (-0.08, 0.36), (-0.22, 0.86), (0.38, 0.86)
    for start, end in [((-0.53, 0.36), crank), ((-0.53, 0.36), saddle), (crank, saddle), (crank, head), (saddle, head)]:
        figure.bar(start, end, 0.075, paint.main)
    figure.bar((0.55, 0.36), (0.34, 1.02), 0.07, paint.main)
    figure.bar((0.3, 1.04), (0.5, 1.08), 0.07, _DARK)
    figure.polygon([(-0.4, 0.92), (-0.36, 1.0), (-0.1, 0.97), (-0.08, 0.91)], _DARK)
    figure.ellipse(*crank, 0.1, 0.1, _DARK)


def person(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """Someone on foot: head, hair, coat, swinging arms and legs, sometimes a bag."""
    figure.cast_shadow(0.8)
    stride = rng.uniform(0.04, 0.32)
    swing = rng.uniform(0.05, 0.3)
    figure.bar((-0.06, 0.88), (-stride, 0.06), 0.2, darker(paint.second, 0.75))
    figure.box(-stride - 0.1, 0.0, -stride + 0.18, 0.1, _DARK)
    figure.bar((0.0, 1.38), (-swing - 0.1, 0.86), 0.14, darker(paint.main, 0.72))
    figure.bar((0.06, 0.88), (stride, 0.06), 0.21, paint.second)
    figure.box(stride - 0.1, 0.0, stride + 0.19, 0.1, _DARK)
    hem = rng.choice([0.82, 0.82, 0.55])
    figure.polygon([(-0.25, 1.4), (-0.13, 1.49), (0.13, 1.49), (0.25, 1.4), (0.24, hem), (-0.24, hem)], paint.main)
    if rng.random() < 0.35:
        figure.polygon([(-0.2, 1.0), (-0.42, 1.02), (-0.45, 1.38), (-0.2, 1.44)], darker(paint.second, 0.8))
    figure.bar((0.14, 1.4), (swing + 0.14, 0.9), 0.14, darker(paint.main, 0.85))
    figure.ellipse(swing + 0.15, 0.86, 0.07, 0.07, paint.skin)
    figure.box(-0.05, 1.45, 0.06, 1.55, paint.skin)
    figure.ellipse(0.0, 1.65, 0.125, 0.15, _hair(rng))
    figure.ellipse(0.035, 1.62, 0.1, 0.12, paint.skin)


def rider(figure: Figure, paint: Paint, rng: np.random.Generator) -> None:
    """Someone in the saddle of a bicycle or a motorcycle: leaning on the handlebar, a knee up, a helmet on."""
    hip, knee, shoulder = (-0.24, 0.98), (0.16, 0.78), (0.06, 1.5)
    figure.bar((-0.2, 0.95), (0.02, 0.62), 0.18, darker(paint.second, 0.7))
    figure.bar((0.02, 0.62), (-0.14, 0.22), 0.14, darker(paint.second, 0.7))
    figure.bar(hip, knee, 0.22, paint.second)
    figure.bar(knee, (0.02, 0.3), 0.17, paint.second)
    figure.box(-0.06, 0.2, 0.24, 0.32, _DARK)
    figure.polygon([(-0.42, 0.94), (-0.3, 1.3), (-0.1, 1.56), (0.12, 1.54), (0.1, 1.25), (-0.06, 0.92)], paint.main)
    figure.bar((shoulder[0], 1.44), (0.26, 1.2), 0.14, darker(paint.main, 0.8))
    figure.bar((0.24, 1.22), (0.42, 1.1), 0.12, paint.skin)
    figure.ellipse(0.14, 1.72, 0.11, 0.14, paint.skin)
    figure.polygon([(-0.04, 1.7), (0.0, 1.86), (0.12, 1.92), (0.26, 1.86), (0.3, 1.77)], paint.main)
    figure.bar((-0.04, 1.73), (0.3, 1.76), 0.05, darker(paint.main, 0.5))


def _hair(rng: np.random.Generator) -> Colour:
    red, green, blue = ((38, 30, 26), (92, 62, 34), (190, 158, 92), (120, 120, 122))[rng.integers(4)]
    return red, green, blue


Drawing = Callable[[Figure, Paint, np.random.Generator], None]

VIEWS: dict[str, tuple[Drawing, ...]] = {
    "person": (person,),
    "rider": (rider,),
    "car": (car_side, car_rear, car_front),
    "truck": (truck_side, truck_rear),
    "bus": (bus_side, bus_front),
    "train": (train_side,),
    "motorcycle": (motorcycle,),
    "bicycle": (bicycle,),
}
"""How each class may be drawn; the first way is from the side, facing right."""
