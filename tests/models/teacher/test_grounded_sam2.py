"""The fused teacher: what it returns, what its parts would, where gradients go."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from teacher_tiny import SEGMENTER, spec
from tiny import drawn

from cast_jax.core.errors import UserError
from cast_jax.core.resize import resize
from cast_jax.core.rules import named_leaves
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.functional import Functional, count_parameters
from cast_jax.models.hiera import Hiera
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.segmenter import Prediction, score_instances
from cast_jax.models.swin import Swin
from cast_jax.models.teacher.grounded_sam2 import GroundedSam2, class_logits, corners_of, jittered
from cast_jax.models.teacher.grounding_dino import GroundingDino
from cast_jax.models.teacher.sam2 import Sam2
from cast_jax.models.teacher.text import load_tokenizer, make_prompts
from cast_jax.predict import Predictor

CLASSES = ("person", "traffic light", "car")
SIZE = (64, 96)
IMAGES = np.random.default_rng(0).random((2, *SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def fused(folder) -> tuple[Functional, dict, Prediction]:
    model = build_segmenter(spec(folder), CLASSES, SIZE)
    params = drawn(model.abstract(), 0.2)
    for head in params["detector"]["decoder"]["class_heads"].values():
        head["bias"] = jnp.full((), -3.0)  # so that an image's classes add up to less than 1
    return model, params, jax.jit(model.apply)(params, IMAGES)


def test_the_prediction(fused):
    _, _, prediction = fused
    assert prediction.mask_logits.shape == (2, 6, 16, 24)
    assert prediction.class_logits.shape == (2, 6, 4)
    assert prediction.pixel_features.shape == (2, 16, 24, 32)
    probabilities = np.asarray(jax.nn.softmax(prediction.class_logits))[..., :-1]
    best = probabilities.max(axis=-1)
    assert np.all(np.diff(best, axis=1) <= 1e-6)  # the best boxes first
    assert best.min() > 0
    scored = score_instances(prediction, 5)
    assert np.isfinite(scored.scores).all()


def test_it_is_the_detectors_boxes_through_sam2(folder, fused):
    """The same by the two networks on their own."""
    _, params, prediction = fused
    config = segmenter_config(spec(folder))
    images = (IMAGES - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    prompts = make_prompts(CLASSES, load_tokenizer(config.tokenizer))
    detector = Functional(lambda rngs: GroundingDino(config.detector, rngs=rngs))
    found = jax.jit(detector.apply)(params["detector"], images, prompts.tokens)
    tokens = np.asarray(jax.nn.sigmoid(found.class_logits[-1]))
    scores = np.stack([tokens[..., row > 0].mean(axis=-1) for row in prompts.class_map[0]], axis=-1)
    assert [int(row.sum()) for row in prompts.class_map[0]] == [1, 2, 1]
    order = np.argsort(-scores.max(axis=-1), axis=1, kind="stable")[:, :6, None]
    scores, boxes = (np.take_along_axis(np.asarray(values), order, axis=1) for values in (scores, found.boxes[-1]))
    np.testing.assert_allclose(jax.nn.softmax(prediction.class_logits)[..., :-1], scores, atol=1e-5)

    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = np.clip(np.concatenate([centre - half, centre + half], axis=-1), 0, 1) * np.array([96, 64, 96, 64])
    segmenter = Functional(lambda rngs: Sam2(config.segmenter, rngs=rngs))
    masks = jax.jit(segmenter.apply)(params["segmenter"], images, boxes=corners.astype(np.float32))
    np.testing.assert_allclose(prediction.mask_logits, masks.logits[:, :, 0], atol=2e-4)


def test_long_lists_of_classes_take_several_prompts(folder, fused):
    """Each with its own queries, which give the other prompts' classes nothing."""
    _, params, _ = fused
    config = segmenter_config(spec(folder))
    prompts = make_prompts(CLASSES, load_tokenizer(config.tokenizer), max_tokens=7)
    assert len(prompts.tokens.ids) == 2
    model = Functional(lambda rngs: GroundedSam2(config, prompts, rngs=rngs))
    prediction = jax.jit(model.apply)(params, IMAGES[:1])
    probabilities = jax.nn.softmax(prediction.class_logits)[0, :, :-1]
    assert np.all(np.isin(np.sum(np.asarray(probabilities) > 1e-5, axis=-1), (1, 2)))


def test_an_image_is_encoded_once(folder, monkeypatch):
    """By either network, however many prompts, boxes and given boxes there are."""
    config = segmenter_config(spec(folder))
    prompts = make_prompts(CLASSES, load_tokenizer(config.tokenizer), max_tokens=4 + 1)
    assert len(prompts.tokens.ids) == 3
    calls = []
    for trunk in (Swin, Hiera):
        original = trunk.__call__

        def counted(self, *arguments, original=original, **options):
            calls.append(type(self).__name__)
            return original(self, *arguments, **options)

        monkeypatch.setattr(trunk, "__call__", counted)
    model = Functional(lambda rngs: GroundedSam2(config, prompts, rngs=rngs))
    boxes = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    jax.eval_shape(lambda params, boxes: model.apply(params, IMAGES, boxes=boxes), model.abstract(), boxes)
    assert sorted(calls) == ["Hiera", "Swin"]


def test_masks_teach_the_segmenter_and_classes_the_detector(fused):
    model, params, _ = fused

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(which, params):
        def total(params):
            prediction = model.apply(params, IMAGES[:1])
            return jnp.sum(getattr(prediction, which) ** 2)

        return jax.grad(total)(params)

    moved = lambda tree: any(np.any(leaf) for leaf in named_leaves(tree).values())
    by_masks, by_classes = gradients("mask_logits", params), gradients("class_logits", params)
    assert moved(by_masks["segmenter"])
    assert not moved(by_masks["detector"])
    assert moved(by_classes["detector"]["bert"])
    assert moved(by_classes["detector"]["backbone"])
    assert not moved(by_classes["segmenter"])


def test_class_logits_are_the_probabilities():
    scores = jnp.array([[0.2, 0.3], [0.0, 0.0], [0.9, 0.6]])
    found = jax.nn.softmax(class_logits(scores))
    np.testing.assert_allclose(found, [[0.2, 0.3, 0.5], [0, 0, 1], [0.6, 0.4, 0]], atol=1e-5)


def test_corners_are_cut_at_the_border():
    boxes = jnp.array([[0.5, 0.5, 0.2, 0.4], [0.0, 1.0, 0.5, 0.5], [1.5, -0.4, 0.2, 0.4]])
    expected = [[0.4, 0.3, 0.6, 0.7], [0, 0.75, 0.25, 1], [1, 0, 1, 0]]  # the last lies outside: a point at the border
    np.testing.assert_allclose(corners_of(boxes), expected, atol=1e-6)


def test_boxes_without_extent_and_outside_are_prompts_too(fused):
    """Finite masks and gradients of what a detector may say, and of the zeros that pad the instances of an image."""
    model, params, _ = fused
    boxes = np.array([[[0, 0, 0, 0], [1, 0, 1, 0], [-0.5, 0.2, 1.7, 2.0], [0.6, 0.5, 0.2, 0.1]]], np.float32)

    def total(params):
        logits, iou = model.apply(params, IMAGES[:1], boxes=boxes, key=jax.random.key(0)).prompted
        return jnp.mean(logits**2) + jnp.sum(iou), logits

    gradient, logits = jax.jit(jax.grad(total, has_aux=True))(params)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in named_leaves(gradient).values())


def test_an_image_without_detections_is_valid(fused):
    """Nothing that scores enough: an image without instances, not a fault."""

    class Grey:
        categories = ()

        def __len__(self):
            return 2

        def image(self, index):
            return np.full((40, 70, 3), 100 + index, np.uint8)

    model, params, _ = fused
    found = list(Predictor(model, SIZE, batch_size=2, min_score=0.0)(params, Grey()))
    assert [len(detections) > 0 for _, detections in found] == [True, True]
    none = list(Predictor(model, SIZE, batch_size=2, min_score=1.0)(params, Grey()))
    assert [(index, len(detections), detections.rles) for index, detections in none] == [(0, 0, []), (1, 0, [])]


def test_images_of_any_size_are_resized(folder, fused):
    """The canvas of the student is no multiple of 32."""
    model, params, _ = fused
    images = resize(jnp.asarray(IMAGES[:1]), (70, 98))
    prediction = jax.jit(model.apply)(params, images)
    assert prediction.mask_logits.shape == (1, 6, 16, 24)
    config = segmenter_config(spec(folder, segmenter_size=()))
    assert config.pixel_map((70, 98)) == (16, 24)
    assert config.queries((70, 98)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmenter_size": (64, 90)}, r"segmenter_size is .*multiples of 32"),
        ({"num_queries": 13}, r"num_queries is 13; it must lie in \[1, 12\]"),
        ({"encoder": {}}, "encoder"),
        ({"detector": {"backbone": {"depth": 3}}}, r"detector\.backbone.*depth"),
    ],
)
def test_what_cannot_be_is_named(folder, changes, message):
    described = spec(folder)
    for key, value in changes.items():
        described[key] = {**described[key], **value} if key == "detector" else value
    with pytest.raises(UserError, match=message):
        segmenter_config(described)


@pytest.mark.full
def test_the_papers_teacher_at_full_size(folder):
    """Shapes only: the published sum, less a norm that is never used, and the Fourier matrix, a buffer there."""
    described = {"name": "grounded_sam2_l", "tokenizer": spec(folder)["tokenizer"]}
    model = build_segmenter(described, CLASSES, (1024, 2048))
    assert count_parameters(model.abstract()) == 343_055_703 - 2 * 1536 + 216_924_865 + 256
    prediction = jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((1, 1024, 2048, 3), jnp.float32))
    assert prediction.mask_logits.shape == (1, 100, 256, 256)


def test_boxes_prompt_for_masks_of_their_own(folder, fused):
    """What SAM 2 alone makes of them, in pixels of its image, in training."""
    model, params, prediction = fused
    assert prediction.prompted is None
    boxes = np.array([[[0.1, 0.2, 0.6, 0.9], [0.3, 0.0, 1.0, 0.5]]], np.float32)
    assert model.takes("boxes")
    model = build_segmenter(spec(folder, box_jitter=0.0), CLASSES, SIZE)
    run = lambda params: model.apply(params, IMAGES[:1], boxes=boxes, key=jax.random.key(0)).prompted
    logits, iou = jax.jit(run)(params)
    images = (IMAGES[:1] - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    segmenter = Functional(lambda rngs: Sam2(SEGMENTER, rngs=rngs))
    pixels = boxes * np.array([96, 64, 96, 64], np.float32)
    alone = jax.jit(functools.partial(segmenter.apply, train=True))(params["segmenter"], images, boxes=pixels)
    np.testing.assert_allclose(logits, alone.logits[:, :, 0], atol=2e-4)
    np.testing.assert_allclose(iou, alone.iou[:, :, 0], atol=1e-5)


def test_jitter_keeps_boxes_boxes():
    corners = jnp.array([[0.0, 0.2, 0.5, 0.6], [0.9, 0.9, 1.0, 1.0], [0, 0, 0, 0]])
    moved = jax.vmap(lambda key: jittered(key, corners, 0.1))(jax.random.split(jax.random.key(0), 500))
    assert np.all((moved >= 0) & (moved <= 1))
    assert np.all(moved[..., 2:] >= moved[..., :2])
    np.testing.assert_allclose(moved[:, 0, 1:].std(0), [0.04, 0.05, 0.04], rtol=0.15)
    assert not np.asarray(moved[:, 2]).any()
    np.testing.assert_array_equal(jittered(jax.random.key(0), corners, 0.0), corners)


def test_the_tiny_teacher_needs_nothing():
    """No file, no weights; only as many words as its table has."""
    model = build_segmenter({"name": "grounded_sam2_tiny"}, CLASSES, SIZE)
    assert count_parameters(model.abstract()) < 5e6
    assert model.takes("boxes")
    with pytest.raises(UserError, match=r"tokenizer 'words' has \d+ words, more than the model's table, 1032"):
        build_segmenter({"name": "grounded_sam2_tiny", "detector": {"bert": {"vocab_size": 1032}}}, CLASSES, SIZE)


def test_images_one_at_a_time(folder, fused):
    """The same masks as all together; the gradient, through blocks that are computed again, can at least be lowered."""
    _, params, _ = fused
    boxes = np.array([[[0.1, 0.2, 0.6, 0.9]], [[0.3, 0.0, 1.0, 0.5]]], np.float32)
    described = spec(folder, box_jitter=0.0)
    for part, network in (("detector", "backbone"), ("segmenter", "encoder")):
        described[part] |= {network: {**described[part][network], "remat": "blocks"}}
    described["detector"] |= {"remat": True, "bert": {**described["detector"]["bert"], "remat": True}}

    def run(at_once: int):
        model = build_segmenter({**described, "images_at_once": at_once}, CLASSES, SIZE)

        def results(params):
            found = model.apply(params, IMAGES, boxes=boxes, key=jax.random.key(0))
            return found.prompted[0], found.detections[0].boxes

        return results

    for together, apart in zip(*(jax.jit(run(at_once))(params) for at_once in (0, 1)), strict=True):
        np.testing.assert_allclose(together, apart, atol=2e-4)
    jax.jit(jax.grad(lambda params: sum(map(jnp.sum, run(1)(params))))).lower(params)
