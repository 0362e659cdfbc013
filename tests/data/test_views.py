"""Views: images, masks, boxes and the recorded map between the views all speak of the same points."""

from __future__ import annotations

import dataclasses

import cv2
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_jax.core.annotations import Instances, pack_masks
from cast_jax.core.errors import UserError
from cast_jax.core.geometry import apply_affine, bilinear_sample, inside_box, pixel_centres
from cast_jax.data.views import ViewConfig, eval_view, make_views

SILENT = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}
PLAIN = {**SILENT, "scale": (1.0, 1.0), "flip_horizontal": 0.0, "crop_area": (1.0, 1.0), "min_area": 1}

sizes = st.tuples(st.integers(60, 250), st.integers(60, 250))
seeds = st.integers(0, 2**32 - 1)
configs = st.builds(
    ViewConfig,
    image_size=st.sampled_from([(48, 64), (64, 48), (56, 56), (120, 88)]),
    max_instances=st.just(4),
    min_area=st.just(1),
    fit=st.sampled_from(["inside", "cover"]),
    scale=st.sampled_from([(0.4, 0.6), (0.7, 1.4), (1.5, 2.5)]),
    flip_vertical=st.just(0.5),
    rotate90=st.booleans(),
    crop_area=st.sampled_from([(0.25, 1.0), (0.3, 0.3), (1.0, 1.0)]),
    **{name: st.just(0.0) for name in SILENT},
)


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(packed, axis=-1, count=width, bitorder="little").astype(bool)


def position_image(height: int, width: int) -> np.ndarray:
    """Every pixel holds its own (y, x) in the first two channels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(y, 255)], axis=-1).astype(np.uint8)


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    return np.hypot(y - centre[0], x - centre[1]) < radius


def scene(height: int, width: int, masks: list[np.ndarray], ignore: np.ndarray | None = None) -> Instances:
    return Instances(
        masks=np.array(masks, bool).reshape(-1, height, width),
        labels=np.arange(len(masks), dtype=np.int32),
        ignore=np.zeros((height, width), bool) if ignore is None else ignore,
        scores=np.linspace(0.5, 1.0, len(masks), dtype=np.float32),
    )


def inner(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [height, width]: pixels whose centre lies in ``box``."""
    return np.asarray(inside_box(box, pixel_centres(*size))).reshape(size)


def original_positions(view: dict[str, np.ndarray]) -> np.ndarray:
    """(y, x) in the original image of every pixel of a view of a position image."""
    return view["image"][..., :2].astype(float) + 0.5


def pixel_pitch(view: dict[str, np.ndarray], size: tuple[int, int]) -> float:
    """Original pixels that one pixel of the view spans, along its coarser axis."""
    rows, columns = np.nonzero(inner(view["valid_box"], size))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    positions = original_positions(view)
    down = np.abs(positions[bottom, left] - positions[top, left]).max() / max(1, bottom - top)
    across = np.abs(positions[top, right] - positions[top, left]).max() / max(1, right - left)
    return max(down, across)


@settings(max_examples=60, deadline=None)
@given(size=sizes, seed=seeds, config=configs, centre=st.tuples(*[st.floats(0.1, 0.9)] * 2), radius=st.floats(8, 60))
def test_masks_lie_where_their_pixels_lie(size, seed, config, centre, radius):
    height, width = size
    centre = (centre[0] * height, centre[1] * width)
    mask = disc(height, width, centre, radius)
    group = make_views(
        position_image(height, width), scene(height, width, [mask], ~mask), np.random.default_rng(seed), config
    )
    for name in ("weak", "strong"):
        view = group[name]
        real = inner(view["valid_box"], config.image_size)
        distance = np.linalg.norm(original_positions(view) - centre, axis=-1)
        drawn = unpack(view["masks"], config.image_size[1])[0]
        ignored = unpack(view["ignore"], config.image_size[1])
        # Half a pixel of the view, and what 8-bit positions and the discrete disc lose.
        sure = real & (np.abs(distance - radius) > 0.5 * pixel_pitch(view, config.image_size) + 1.2)
        np.testing.assert_array_equal(drawn[sure], (distance < radius)[sure])
        np.testing.assert_array_equal(ignored[sure], (distance > radius)[sure])
        assert not drawn[~real].any()
        assert not ignored[~real].any()
        assert view["instance_valid"][0] == drawn.any()


@settings(max_examples=60, deadline=None)
@given(size=sizes, seed=seeds, config=configs)
def test_strong_pixels_have_their_recorded_counterparts(size, seed, config):
    group = make_views(position_image(*size), Instances.empty(*size), np.random.default_rng(seed), config)
    weak, strong = group["weak"], group["strong"]
    real = inner(strong["valid_box"], config.image_size).ravel()
    centres = pixel_centres(*config.image_size)
    counterparts = np.asarray(apply_affine(group["strong_to_weak"], centres))
    expected = np.asarray(bilinear_sample(original_positions(weak).astype(np.float32), counterparts))
    # Half a weak pixel from the weak view's border, its repeated edge and not its neighbours would be read.
    box = weak["valid_box"] + np.array([0.5, 0.5, -0.5, -0.5])
    inland = real & np.asarray(inside_box(box, counterparts))
    error = np.abs(original_positions(strong).reshape(-1, 2) - expected)[inland]
    assert error.max(initial=0.0) <= 0.5 * pixel_pitch(weak, config.image_size) + 1.0
    # What is real in the strong view is real in the weak one, and nothing else is.
    slightly_more = np.array([-1e-3, -1e-3, config.image_size[0] + 1e-3, config.image_size[1] + 1e-3])
    in_weak = np.asarray(inside_box(weak["valid_box"], counterparts))
    on_the_border = np.abs(np.tile(counterparts, 2) - weak["valid_box"]).min(axis=-1) < 1e-3  # float32 cannot tell
    np.testing.assert_array_equal(real[~on_the_border], in_weak[~on_the_border])
    assert np.asarray(inside_box(slightly_more, counterparts)).all()


@settings(max_examples=60, deadline=None)
@given(size=sizes, seed=seeds, config=configs)
def test_valid_box_is_what_is_drawn(size, seed, config):
    white = np.full((*size, 3), 255, np.uint8)
    group = make_views(white, Instances.empty(*size), np.random.default_rng(seed), config)
    for name in ("weak", "strong"):
        real = inner(group[name]["valid_box"], config.image_size)
        assert real.any()
        np.testing.assert_array_equal(group[name]["image"], np.where(real[..., None], white[:1, :1], 0))


@settings(max_examples=30, deadline=None)
@given(size=sizes, seed=seeds, config=configs)
def test_the_weak_view_keeps_the_aspect_ratio(size, seed, config):
    config = dataclasses.replace(config, scale=(0.5, 1.0), fit="inside", rotate90=False)
    group = make_views(np.zeros((*size, 3), np.uint8), Instances.empty(*size), np.random.default_rng(seed), config)
    top, left, bottom, right = group["weak"]["valid_box"]
    # Both sides are the image's times one factor, rounded to a pixel.
    low = max((bottom - top - 0.5) / size[0], (right - left - 0.5) / size[1])
    high = min((bottom - top + 0.5) / size[0], (right - left + 0.5) / size[1])
    assert low <= high
    factor = min(config.image_size[0] / size[0], config.image_size[1] / size[1])
    assert 0.5 * factor <= high
    assert low <= factor


@settings(max_examples=30, deadline=None)
@given(size=sizes, seed=seeds, config=configs)
def test_painted_masks_move_with_the_image(size, seed, config):
    mask = disc(*size, (size[0] * 0.5, size[1] * 0.4), 25.0)
    painted = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    group = make_views(painted, scene(*size, [mask]), np.random.default_rng(seed), config)
    for name in ("weak", "strong"):
        drawn = unpack(group[name]["masks"], config.image_size[1])[0]
        colour = group[name]["image"][..., 0]
        # Where the paint is not a mixture, there is no doubt; a mixture is at most at the edge of the disc.
        np.testing.assert_array_equal(drawn[colour >= 224], True)
        np.testing.assert_array_equal(drawn[colour <= 32], False)


def test_flips_are_exact():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mask = np.random.default_rng(1).random((16, 24)) < 0.5
    config = ViewConfig(image_size=(16, 24), max_instances=2, **{**PLAIN, "flip_horizontal": 1.0})
    group = make_views(image, scene(16, 24, [mask]), np.random.default_rng(0), config)
    np.testing.assert_array_equal(group["weak"]["image"], image[:, ::-1])
    np.testing.assert_array_equal(group["strong"]["image"], image[:, ::-1])
    np.testing.assert_array_equal(group["weak"]["masks"][0], pack_masks(mask[:, ::-1]))
    config = dataclasses.replace(config, flip_horizontal=0.0, flip_vertical=1.0)
    group = make_views(image, scene(16, 24, [mask]), np.random.default_rng(0), config)
    np.testing.assert_array_equal(group["weak"]["image"], image[::-1])
    np.testing.assert_array_equal(group["weak"]["masks"][0], pack_masks(mask[::-1]))
    np.testing.assert_array_equal(group["strong_to_weak"], [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(group["weak"]["valid_box"], [0, 0, 16, 24])


def test_quarter_turns_are_exact_and_all_happen():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = image[..., 0] > 100
    config = ViewConfig(image_size=(16, 16), max_instances=1, rotate90=True, **PLAIN)
    seen = set()
    for seed in range(20):
        weak = make_views(image, scene(16, 16, [mask]), np.random.default_rng(seed), config, ("weak",))["weak"]
        (turns,) = [k for k in range(4) if np.array_equal(weak["image"], np.rot90(image, k))]
        np.testing.assert_array_equal(weak["masks"][0], pack_masks(np.rot90(mask, turns)))
        seen.add(turns)
    assert seen == {0, 1, 2, 3}


def test_halving_averages_four_pixels():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    config = ViewConfig(image_size=(8, 12), max_instances=1, **PLAIN)
    group = make_views(image, Instances.empty(16, 24), np.random.default_rng(0), config, ("weak",))
    mean = image.reshape(8, 2, 12, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(group["weak"]["image"], mean, atol=0.5)


@pytest.mark.parametrize("size", [(20, 30), (13, 19), (6, 9), (1, 1)])
def test_what_is_finer_than_the_view_is_averaged(size):
    """A grid of single pixels has no stripes in a view of half its size and below."""
    image = np.repeat((np.indices((40, 60)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=-1)
    config = ViewConfig(image_size=size, max_instances=1, **PLAIN)
    weak = make_views(image, Instances.empty(40, 60), np.random.default_rng(0), config, ("weak",))["weak"]
    inside = tuple(slice(int(low), int(high)) for low, high in weak["valid_box"].reshape(2, 2).T)
    assert np.ptp(weak["image"][inside]) <= 1
    assert abs(weak["image"][inside].mean() - 127.5) <= 1


def test_same_numbers_same_views():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    instances = scene(50, 70, [disc(50, 70, (25, 35), 12.0)])
    config = ViewConfig(image_size=(32, 48), max_instances=3)
    first, again, other = (make_views(image, instances, np.random.default_rng(s), config) for s in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["weak"]["image"], other["weak"]["image"])
    assert not np.array_equal(first["strong_to_weak"], other["strong_to_weak"])


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_a_view_alone_is_the_same_view(name):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    instances = scene(50, 70, [np.ones((50, 70), bool)])
    config = ViewConfig(image_size=(32, 48), max_instances=3)
    both = make_views(image, instances, np.random.default_rng(3), config)
    alone = make_views(image, instances, np.random.default_rng(3), config, (name,))
    assert set(both) == {"weak", "strong", "strong_to_weak", "instances_cut"}
    assert set(alone) == {name, "instances_cut"}
    jax.tree.map(np.testing.assert_array_equal, both[name], alone[name])


def test_arrays_are_as_batches_need_them():
    config = ViewConfig(image_size=(32, 44), max_instances=3)
    group = make_views(np.zeros((50, 70, 3), np.uint8), Instances.empty(50, 70), np.random.default_rng(0), config)
    shapes = jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.shape), group)
    view = {
        "image": ("uint8", (32, 44, 3)),
        "valid_box": ("float32", (4,)),
        "masks": ("uint8", (3, 32, 6)),
        "labels": ("int32", (3,)),
        "instance_valid": ("bool", (3,)),
        "scores": ("float32", (3,)),
        "ignore": ("uint8", (32, 6)),
    }
    assert shapes == {
        "weak": view,
        "strong": view,
        "strong_to_weak": ("float32", (2, 3)),
        "instances_cut": ("int32", ()),
    }


def test_the_largest_instances_stay_in_their_order_and_the_rest_are_counted():
    masks = [np.zeros((32, 32), bool) for _ in range(5)]
    for mask, side in zip(masks, (4, 10, 3, 20, 1), strict=True):  # areas 16, 100, 9, 400, 1
        mask[:side, :side] = True
    config = ViewConfig(image_size=(32, 32), max_instances=3, **{**PLAIN, "min_area": 5})
    group = make_views(np.zeros((32, 32, 3), np.uint8), scene(32, 32, masks), np.random.default_rng(0), config)
    assert group["instances_cut"] == 1  # the third; the last is too small to count
    for name in ("weak", "strong"):
        np.testing.assert_array_equal(group[name]["labels"], [0, 1, 3])
        np.testing.assert_array_equal(group[name]["instance_valid"], [True, True, True])
        np.testing.assert_allclose(group[name]["scores"], [0.5, 0.625, 0.875])
        np.testing.assert_array_equal(unpack(group[name]["masks"], 32), [masks[0], masks[1], masks[3]])


def test_an_instance_cropped_away_keeps_its_slot():
    left, right = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    left[18:22, :3], right[18:22, 37:] = True, True
    config = ViewConfig(image_size=(40, 40), max_instances=4, **{**PLAIN, "crop_area": (0.5, 0.5)})
    seen = set()
    for seed in range(30):
        group = make_views(
            np.zeros((40, 40, 3), np.uint8), scene(40, 40, [left, right]), np.random.default_rng(seed), config
        )
        weak, strong = group["weak"], group["strong"]
        np.testing.assert_array_equal(weak["instance_valid"], [True, True, False, False])
        np.testing.assert_array_equal(weak["labels"], strong["labels"])
        np.testing.assert_array_equal(strong["instance_valid"], unpack(strong["masks"], 40).any(axis=(1, 2)))
        seen.add(tuple(strong["instance_valid"][:2].tolist()))
    assert {(True, False), (False, True)} <= seen


def test_padding_stays_black_when_colours_change():
    config = ViewConfig(
        image_size=(64, 64),
        max_instances=1,
        scale=(0.5, 0.5),
        crop_area=(1.0, 1.0),
        jitter_probability=1.0,
        blur_probability=1.0,
    )
    for seed in range(10):
        image = np.full((40, 40, 3), (200, 90, 30), np.uint8)
        strong = make_views(image, Instances.empty(40, 40), np.random.default_rng(seed), config)["strong"]
        assert not strong["image"][~inner(strong["valid_box"], (64, 64))].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (300, 2), (7, 5)])
def test_odd_sizes_work(size):
    config = ViewConfig(image_size=(28, 42), max_instances=2, min_area=1)
    instances = scene(*size, [np.ones(size, bool)])
    for seed in range(10):
        group = make_views(np.full((*size, 3), 9, np.uint8), instances, np.random.default_rng(seed), config)
        for name in ("weak", "strong"):
            assert inner(group[name]["valid_box"], (28, 42)).any()
    canvas, box, _ = eval_view(np.full((*size, 3), 9, np.uint8), (28, 42))
    np.testing.assert_array_equal(canvas[..., 0], np.where(inner(box, (28, 42)), 9, 0))


def test_eval_view_by_hand():
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    canvas, box, matrix = eval_view(image, (16, 20))
    np.testing.assert_array_equal(box, [0, 0, 10, 20])
    np.testing.assert_array_equal(matrix, [[0.5, 0, 0], [0, 0.5, 0]])
    np.testing.assert_allclose(canvas[:10], image.reshape(10, 2, 20, 2, 3).mean(axis=(1, 3)), atol=0.5)
    assert not canvas[10:].any()


@settings(max_examples=30, deadline=None)
@given(size=sizes)
def test_a_mask_of_the_eval_view_returns_to_its_place(size):
    height, width = size
    mask = disc(height, width, (height * 0.4, width * 0.6), 25.0)
    painted = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    canvas, box, _ = eval_view(painted, (64, 80))
    top, left, bottom, right = box.astype(int)
    back = cv2.resize(canvas[top:bottom, left:right, 0], (width, height)) >= 128
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(y - height * 0.4, x - width * 0.6)
    sure = np.abs(distance - 25.0) > 0.5 * max(height / bottom, width / right) + 1
    np.testing.assert_array_equal(back[sure], mask[sure])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (0.0, 1.0)),
        ("scale", (2.0, 1.0)),
        ("crop_area", (0.5, 1.5)),
        ("crop_ratio", (1.2, 1.5)),
        ("fit", "stretch"),
        ("flip_horizontal", 1.5),
        ("blur_probability", -0.1),
        ("hue", 0.7),
        ("brightness", -1.0),
        ("blur_sigma", (0.0, 1.0)),
        ("max_instances", 0),
        ("image_size", (0, 5)),
        ("image_size", (5, 10**6)),
        ("scale", (0.5, float("inf"))),
        ("crop_area", (float("nan"), 1.0)),
    ],
)
def test_wrong_numbers_are_named(field, value):
    with pytest.raises(UserError, match=rf"^{field} "):
        ViewConfig(**{"image_size": (32, 32), "max_instances": 3, field: value})


def test_wrong_names_are_refused():
    config = ViewConfig(image_size=(32, 32), max_instances=3)
    for names in ((), ("weak", "medium")):
        with pytest.raises(UserError, match="views"):
            make_views(np.zeros((9, 9, 3), np.uint8), Instances.empty(9, 9), np.random.default_rng(0), config, names)
