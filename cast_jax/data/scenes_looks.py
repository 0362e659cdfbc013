"""The two looks of the generated streets: same shapes, other light, colours and camera. The gap is the task."""

from __future__ import annotations

import dataclasses

from cast_jax.data.scenes_canvas import Colour

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Look:
    """What may vary between the scenes of one look. Colours are RGB 0-255; ranges are drawn from uniformly.

    Attributes:
      sky: pairs of colours, overhead and at the horizon, one pair drawn a scene.
      haze: the share of an object's colour lost to ``haze_colour`` a metre.
      exposure, saturation, tint: of the whole image.
      contrast: around mid-grey, after exposure.
      shadow: how dark the shadows on the ground are.
      texture: relative roughness of surfaces.
      blur, noise: of the camera; sigma in pixels of a 256 pixels wide image, and in grey levels.
      lamps: whether windows and head lamps shine.
      clouds: how much of the sky they cover, 0 to 1.
    """

    sky: tuple[tuple[Colour, Colour], ...]
    clouds: Range
    haze: Range
    haze_colour: Colour
    exposure: Range
    contrast: Range
    saturation: Range
    tint: Colour
    shadow: Range
    texture: float
    blur: Range
    noise: Range
    lamps: bool
    road: tuple[Colour, ...]
    sidewalk: tuple[Colour, ...]
    walls: tuple[Colour, ...]
    foliage: tuple[Colour, ...]
    vehicles: tuple[Colour, ...]
    transit: tuple[Colour, ...]
    cargo: tuple[Colour, ...]
    clothes: tuple[Colour, ...]
    glass: Colour


SKIN: tuple[Colour, ...] = ((240, 200, 170), (215, 165, 125), (150, 105, 75), (98, 66, 46))

LOOKS: dict[str, Look] = {
    # A clear day, bright paint, a clean camera.
    "source": Look(
        sky=(((70, 135, 220), (190, 218, 242)), ((96, 160, 232), (215, 230, 245)), ((55, 115, 205), (225, 220, 215))),
        clouds=(0.1, 0.6),
        haze=(0.003, 0.009),
        haze_colour=(205, 222, 240),
        exposure=(0.92, 1.1),
        contrast=(1.0, 1.1),
        saturation=(1.0, 1.2),
        tint=(1.02, 1.0, 0.97),
        shadow=(0.4, 0.6),
        texture=0.035,
        blur=(0.0, 0.3),
        noise=(1.0, 3.0),
        lamps=False,
        road=((98, 100, 106), (112, 112, 116), (88, 90, 98)),
        sidewalk=((172, 166, 156), (186, 180, 170), (160, 152, 146)),
        walls=((214, 178, 138), (196, 120, 94), (226, 210, 180), (176, 188, 196), (222, 190, 110), (170, 140, 120)),
        foliage=((62, 132, 52), (84, 150, 62), (50, 112, 58)),
        vehicles=((206, 42, 40), (36, 84, 190), (240, 240, 240), (244, 190, 34), (40, 150, 84), (240, 120, 30)),
        transit=((246, 200, 30), (214, 40, 40), (30, 120, 196), (60, 160, 80)),
        cargo=((240, 240, 236), (60, 110, 190), (230, 140, 50), (90, 170, 110)),
        clothes=(
            (210, 50, 60),
            (40, 90, 180),
            (245, 200, 60),
            (70, 160, 90),
            (230, 110, 160),
            (240, 240, 240),
            (60, 60, 90),
        ),
        glass=(120, 165, 195),
    ),
    # A hazy evening, faded paint, lit windows, a poor camera.
    "target": Look(
        sky=(((98, 92, 120), (214, 160, 128)), ((84, 94, 112), (168, 164, 166)), ((60, 66, 98), (190, 140, 136))),
        clouds=(0.5, 1.0),
        haze=(0.005, 0.014),
        haze_colour=(172, 150, 142),
        exposure=(0.85, 1.15),
        contrast=(0.95, 1.1),
        saturation=(0.75, 1.05),
        tint=(1.06, 0.97, 0.92),
        shadow=(0.2, 0.4),
        texture=0.045,
        blur=(0.1, 0.5),
        noise=(2.0, 5.0),
        lamps=True,
        road=((70, 68, 74), (84, 80, 80), (60, 60, 70)),
        sidewalk=((124, 116, 114), (110, 106, 108), (134, 122, 112)),
        walls=((126, 104, 96), (98, 92, 100), (144, 128, 112), (112, 116, 124), (90, 74, 72), (150, 120, 100)),
        foliage=((86, 88, 44), (108, 90, 40), (70, 76, 52)),
        vehicles=(
            (188, 190, 194),
            (62, 64, 70),
            (112, 84, 66),
            (150, 142, 120),
            (58, 74, 70),
            (70, 76, 104),
            (120, 44, 44),
        ),
        transit=((206, 204, 196), (72, 116, 104), (96, 104, 138), (170, 120, 70)),
        cargo=((176, 172, 164), (104, 112, 122), (136, 108, 84), (84, 98, 84)),
        clothes=(
            (56, 58, 66),
            (104, 88, 76),
            (84, 96, 84),
            (128, 120, 112),
            (90, 66, 72),
            (160, 152, 140),
            (44, 48, 64),
        ),
        glass=(78, 86, 98),
    ),
}
"""``source`` is what the teacher was pretrained on; ``target`` is the task with few labels."""
