"""From mask logits on a canvas to instances in images of their own size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.core.annotations import Category, decode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.sharding import make_mesh
from cast_jax.data.sources.base import ImageRecord
from cast_jax.models.segmenter import Prediction
from cast_jax.predict import ArrayPredictor, Predictor, mask_at_original

CANVAS = (32, 48)


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    """Signed distance to a circle, positive inside; positions are (y, x) with pixel centres at +0.5."""
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    return (radius - np.hypot(rows - y, columns - x)).astype(np.float32)


def farthest_fault(mask: np.ndarray, distance: np.ndarray) -> float:
    """How far from the true outline the farthest pixel lies that is on the wrong side."""
    wrong = mask != (distance > 0)
    return float(np.abs(distance[wrong]).max(initial=0.0))


def test_a_small_disc_keeps_its_area_though_the_background_is_surer():
    """Without the bound the zero crossing between logits of -20 and 3 moves inwards: a third of the area is lost."""
    rows, columns = np.mgrid[:16, :16] + 0.5
    logits = np.where((rows - 8.3) ** 2 + (columns - 7.6) ** 2 < 2.4**2, 3.0, -20.0).astype(np.float32)
    size = (128, 128)
    mask = mask_at_original(logits, valid_box=np.array([0, 0, *CANVAS], np.float32), canvas=CANVAS, size=size)
    assert 0.85 < mask.sum() / (np.sum(logits > 0) * 64) < 1.1


def test_equal_sizes_are_the_identity():
    logits = np.random.default_rng(0).normal(size=CANVAS).astype(np.float32)
    box = np.array([0, 0, *CANVAS], np.float32)
    np.testing.assert_array_equal(mask_at_original(logits, valid_box=box, canvas=CANVAS, size=CANVAS), logits > 0)


@pytest.mark.parametrize("grid", [(8, 12), (16, 24), (32, 48), (64, 96)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_a_disc_keeps_its_place_and_size(grid, scale):
    """Within one pixel of the coarser of both grids, whatever the resolution of the logits and of the image."""
    logits = disc(*grid, 0.4 * grid[0], 0.6 * grid[1], 0.3 * grid[0])
    size = (int(CANVAS[0] * scale), int(CANVAS[1] * scale))
    mask = mask_at_original(logits, valid_box=np.array([0, 0, *CANVAS], np.float32), canvas=CANVAS, size=size)
    assert mask.shape == size
    assert mask.dtype == bool
    wanted = disc(*size, 0.4 * size[0], 0.6 * size[1], 0.3 * size[0])
    assert farthest_fault(mask, wanted) <= max(1.0, 0.5 * size[0] / grid[0])


@pytest.mark.parametrize("box", [(0, 0, 32, 20), (4, 10, 28, 46)])
def test_only_the_valid_box_is_the_image(box):
    """The disc is drawn in the image and moved to where the image lies on the canvas."""
    top, left, bottom, right = box
    size = (3 * (bottom - top), 3 * (right - left))
    wanted = disc(*size, 30.0, 25.0, 20.0)
    logits = disc(2 * CANVAS[0], 2 * CANVAS[1], 2 * (top + 10.0), 2 * (left + 25 / 3), 2 * 20 / 3)
    mask = mask_at_original(logits, valid_box=np.array(box, np.float32), canvas=CANVAS, size=size)
    assert farthest_fault(mask, wanted) <= 1.0


class Pictures:
    """Images of different sizes, each with a bright disc (and the last one empty)."""

    categories = ()
    sizes = ((32, 48), (64, 64), (20, 60), (90, 40), (33, 47))

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, index: int) -> ImageRecord:
        raise AssertionError("prediction needs no names")

    def distance(self, index: int) -> np.ndarray:
        height, width = self.sizes[index]
        return disc(height, width, 0.45 * height, 0.6 * width, 0.3 * min(height, width))

    def image(self, index: int) -> np.ndarray:
        bright = (self.distance(index) > 0) & (index < 4)
        return np.repeat(np.where(bright, 255, 20)[..., None], 3, axis=-1).astype(np.uint8)


class Brightness:
    """A segmenter that finds what is bright (class 1, surely), and all of the canvas (class 0, hardly)."""

    def apply(self, params, images):
        grey = images.mean(-1)
        bright = params["gain"] * (grey - 0.5)
        whole = jnp.full_like(grey, 9.0)
        classes = jnp.log(jnp.array([[0.005, 0.99, 0.005], [0.1, 0.001, 0.899]]))
        return Prediction(
            mask_logits=jnp.stack([bright, whole], axis=1),
            class_logits=jnp.broadcast_to(classes, (len(images), 2, 3)),
            pixel_features=images,
        )


@pytest.mark.parametrize("mesh", [None, "one device"])
def test_every_image_once_and_in_order(mesh):
    source = Pictures()
    predictor = Predictor(
        Brightness(), CANVAS, batch_size=2, min_score=0.02, mesh=mesh and make_mesh(devices=jax.devices()[:1])
    )
    found = list(predictor({"gain": jnp.float32(20.0)}, source))
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]
    for index, detections in found:
        size = source.sizes[index]
        assert all(rle["size"] == list(size) for rle in detections.rles)
        assert len(detections.labels) == len(detections.scores) == len(detections.rles) == len(detections)
        assert (np.diff(detections.scores) <= 0).all()
        assert detections.labels.tolist() == ([1, 0] if index < 4 else [0])  # an empty mask is no detection
        mask = decode_mask(detections.rles[-1])
        assert mask.all()  # "all of the canvas" fills the image, not the padding
        if index < 4:
            truth = source.distance(index) > 0
            mask = decode_mask(detections.rles[0])
            assert np.sum(mask & truth) / np.sum(mask | truth) > 0.85
            np.testing.assert_allclose(detections.scores[0], 0.99 * detections.mask_quality[0], rtol=1e-3)


def test_chosen_images_and_a_floor():
    predictor = Predictor(Brightness(), CANVAS, batch_size=4, min_score=0.2)
    found = list(predictor({"gain": jnp.float32(20.0)}, Pictures(), [4, 1]))
    assert [(index, detections.labels.tolist()) for index, detections in found] == [(4, []), (1, [1])]
    assert list(predictor({"gain": jnp.float32(20.0)}, Pictures(), [])) == []


CATEGORIES = (Category(7, "canvas"), Category(11, "disc"))


def of_arrays(**options) -> ArrayPredictor:
    predictor = Predictor(Brightness(), CANVAS, batch_size=2, **options)
    return ArrayPredictor(predictor, {"gain": jnp.float32(20.0)}, CATEGORIES)


def test_an_array_gives_masks_at_its_size_with_names_ids_and_scores():
    pictures = Pictures()
    predictor = of_arrays(min_score=0.02)
    every = [pictures.image(index) for index in range(len(pictures))]
    for index, (image, found) in enumerate(zip(every, predictor(every), strict=True)):
        assert found.labels == (("disc", "canvas") if index < 4 else ("canvas",))
        assert found.category_ids.tolist() == ([11, 7] if index < 4 else [7])
        assert found.masks.shape == (len(found), *image.shape[:2])
        assert found.masks.dtype == bool
        assert found.scores.shape == (len(found),)
        assert (np.diff(found.scores) <= 0).all()
        alone = predictor(image[..., ::-1])  # grey, so that BGR is the same
        np.testing.assert_array_equal(alone.masks, found.masks)
        assert (alone.labels, alone.scores.tolist()) == (found.labels, found.scores.tolist())
    assert predictor([]) == []
    nothing = of_arrays(min_score=1.0)(every[0])
    assert (len(nothing), nothing.masks.shape, nothing.scores.shape) == (0, (0, 32, 48), (0,))


def test_of_two_masks_of_one_thing_the_better_one_is_kept():
    bright = np.full((20, 30, 3), 255, np.uint8)
    assert of_arrays(min_score=0.02)(bright).labels == ("disc",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 5, 3)), r"the image has dtype float64; it must be uint8"),
        (np.zeros((4, 5), np.uint8), r"shape \(4, 5\); it must be \[height, width, 3\], in RGB: np\.stack"),
        (np.zeros((4, 5, 4), np.uint8), r"shape \(4, 5, 4\); .*: image\[\.\.\., :3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\); .*: image\.transpose\(1, 2, 0\)"),
        (np.zeros((4, 5, 1), np.uint8), r"shape \(4, 5, 1\); it must be \[height, width, 3\], in RGB$"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"shape \(2, 4, 5, 3\); .*; give several as a list"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\); its sides must have 1 to 32766 pixels"),
        ([np.zeros((4, 5, 3), np.uint8), "a.png"], r"image 1 is of type str; give a numpy array"),
    ],
)
def test_a_wrong_array_is_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        of_arrays()(wrong)
