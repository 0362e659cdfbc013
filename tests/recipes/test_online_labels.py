"""Labels made during training: where they lie, which are kept, what they weigh, what the objective makes of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, SIZE, Linear, drawn, group

from cast_jax.core import sharding
from cast_jax.core.annotations import Instances, encode_mask, suppress_duplicates
from cast_jax.core.errors import UserError
from cast_jax.core.geometry import unpack_masks
from cast_jax.data.views import ViewConfig, make_views
from cast_jax.losses.config import CriterionConfig
from cast_jax.models.functional import Functional
from cast_jax.models.segmenter import Prediction
from cast_jax.recipes.base import view_targets
from cast_jax.recipes.online_labels import OnlineLabelsConfig, label_views, without_duplicates
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised

MADE = OnlineLabelsConfig(max_iou=0.5, min_area=16)
CANVAS = (96, 128)
VIEWS = ViewConfig(
    image_size=CANVAS,
    max_instances=4,
    scale=(0.6, 1.6),
    flip_vertical=0.5,
    crop_area=(0.3, 0.9),
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
)


def views_of_discs(seed: int) -> dict:
    """A batch of one image with three discs, and its two views."""
    y, x = np.mgrid[:120, :150] + 0.5
    discs = np.stack([np.hypot(y - cy, x - cx) < 20 for cy, cx in ((35, 40), (80, 60), (60, 115))])
    nothing = np.zeros(discs.shape[1:], bool)
    instances = Instances(discs, np.arange(3, dtype=np.int32), nothing, np.ones(3, np.float32))
    image = np.full((*nothing.shape, 3), 255, np.uint8)
    return jax.tree.map(lambda array: array[None], make_views(image, instances, np.random.default_rng(seed), VIEWS))


def prediction_of(masks: np.ndarray, classes: np.ndarray, quality: np.ndarray | None = None) -> Prediction:
    """Masks at half their resolution, sure of every pixel; class probabilities ``[batch, queries, classes + 1]``."""
    halves = masks.reshape(*masks.shape[:2], masks.shape[2] // 2, 2, masks.shape[3] // 2, 2).mean((3, 5))
    logits = jnp.log(jnp.asarray(classes, jnp.float32))
    return Prediction(
        jnp.asarray(40.0 * halves - 20.0), logits, None, None, None if quality is None else jnp.asarray(quality)
    )


def sure(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.where(np.arange(classes + 1) == labels[..., None], 0.97, 0.03 / classes)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.mark.parametrize("seed", range(8))
def test_labels_lie_where_the_image_s_own_masks_lie(seed):
    """Predicted on the weak view, as its masks are; carried to the strong one they are what the loader draws there."""
    batch = views_of_discs(seed)
    weak = unpack_masks(jnp.asarray(batch["weak"]["masks"]), CANVAS[1])
    predicted = prediction_of(np.asarray(weak, float), sure(batch["weak"]["labels"], 3))
    labelled = label_views(predicted, batch, MADE)
    compared = 0
    for name in ("weak", "strong"):
        found, true = labelled[name], batch[name]
        assert {key: value.shape for key, value in true.items()}.items() <= {
            k: v.shape for k, v in found.items()
        }.items()
        masks = np.asarray(unpack_masks(found["masks"], CANVAS[1]))[0]
        for slot in np.flatnonzero(true["instance_valid"][0] & batch["weak"]["instance_valid"][0]):
            own = np.asarray(unpack_masks(jnp.asarray(true["masks"][0, slot]), CANVAS[1]))
            if own.sum() < 100:
                continue
            best = max(range(4), key=lambda k: iou(masks[k], own))
            assert found["instance_valid"][0, best]
            assert found["labels"][0, best] == true["labels"][0, slot]
            assert iou(masks[best], own) > 0.85
            compared += 1
        valid = np.asarray(found["instance_valid"])
        assert not masks[~valid[0]].any()
    assert compared >= 2


def test_nothing_lies_outside_of_the_image(monkeypatch):
    """Masks that are everywhere end where either view's real pixels end, on many devices as on one."""
    prediction, unlabelled = (
        prediction_of(np.ones((2, 4, *SIZE)), sure(np.array([[0, 1, 2, 0]] * 2), CLASSES)),
        group(2, 0),
    )
    unlabelled["weak"]["valid_box"] = np.array([[0, 0, *SIZE], [4, 0, SIZE[0], 30]], np.float32)
    unlabelled["strong"]["valid_box"] = np.array([[2, 0, *SIZE], [0, 0, *SIZE]], np.float32)
    options = dataclasses.replace(MADE, max_iou=1.0)
    found = label_views(prediction, unlabelled, options)
    strong = np.zeros((2, *SIZE), bool)
    strong[0, 2:] = True
    strong[1, :, :36] = True  # half as far from 12 on: 30 of the weak view's columns
    weak = np.zeros((2, *SIZE), bool)
    weak[0] = weak[1, 4:, :30] = True
    for name, wanted in (("weak", weak), ("strong", strong)):
        masks = np.asarray(unpack_masks(found[name]["masks"], SIZE[1]))
        np.testing.assert_array_equal(masks, np.broadcast_to(wanted[:, None], masks.shape))
    monkeypatch.setattr(sharding, "on_one_cpu", lambda: False)
    jax.tree.map(np.testing.assert_array_equal, found, label_views(prediction, unlabelled, options))


@pytest.mark.parametrize("max_iou", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_duplicates_go_as_they_do_from_stored_labels(max_iou):
    random = np.random.default_rng(1)
    masks = np.zeros((12, 20, 24), bool)
    for mask in masks:
        top, left, height, width = random.integers((0, 0, 4, 4), (12, 14, 10, 12))
        mask[top : top + height, left : left + width] = True
    masks[7] = masks[2]
    candidates = np.arange(12) != 4
    kept = without_duplicates(jnp.asarray(masks), jnp.asarray(candidates), max_iou)
    rows = np.flatnonzero(candidates)
    wanted = rows[suppress_duplicates([encode_mask(masks[row]) for row in rows], max_iou)]
    np.testing.assert_array_equal(np.flatnonzero(kept), wanted)


def stripes(quality) -> tuple[Prediction, dict]:
    """Four masks side by side, of classes 0, 1, 2, 0 with probabilities 0.9, 0.6, 0.4 and 0.2."""
    masks = np.zeros((1, 4, *SIZE))
    for slot in range(4):
        masks[0, slot, :, 12 * slot : 12 * slot + 12] = 1.0
    classes = np.full((1, 4, CLASSES + 1), 1e-4)
    for slot, (label, probability) in enumerate(((0, 0.9), (1, 0.6), (2, 0.4), (0, 0.2))):
        classes[0, slot, label], classes[0, slot, -1] = probability, 1 - probability
    return prediction_of(masks, classes, quality), group(1, 0)


def test_thresholds_and_quality():
    """Class and mask are judged apart, and weigh what PAIS has them weigh."""
    prediction, unlabelled = stripes(np.array([[0.5, 0.9, 0.8, 0.95]], np.float32))
    chosen = lambda **options: label_views(prediction, unlabelled, dataclasses.replace(MADE, **options))["weak"]
    by_class = chosen(class_threshold=0.35)
    order = np.asarray(by_class["labels"])[0, np.asarray(by_class["instance_valid"])[0]]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(by_class["scores"][0, :3], [0.6 * 0.9, 0.9 * 0.5, 0.4 * 0.8], rtol=2e-3)
    for key in ("class_weights", "mask_weights", "background_weights"):
        np.testing.assert_array_equal(by_class[key], np.ones(by_class[key].shape))
    by_both = chosen(class_threshold=0.35, mask_threshold=0.6)
    valid = np.asarray(by_both["instance_valid"])[0]
    assert valid.tolist() == [True, True, False, False]
    assert np.asarray(by_both["labels"])[0, valid].tolist() == [1, 2]
    weighed = chosen(class_threshold=0.1, weighting="quality")
    np.testing.assert_allclose(weighed["background_weights"], [0.35**2], rtol=1e-6)
    np.testing.assert_allclose(weighed["class_weights"][0], 12 * np.array([0.5, 0.5, 0.4, 0.2]) ** 4, rtol=5e-3)
    np.testing.assert_allclose(weighed["mask_weights"][0], 2.5 * np.array([0.9, 0.5, 0.8, 0.95]) ** 4, rtol=5e-3)


def test_the_best_of_overlapping_ones_stays_and_leaves_its_slots_to_others():
    """Five of one object, the surest of them below the threshold, and three others, in four slots."""
    masks, classes = np.zeros((1, 8, *SIZE)), np.full((1, 8, CLASSES + 1), 1e-4)
    for query in range(8):
        masks[0, query, :, 12 * max(query - 4, 0) :][:, :12] = 1.0
    quality = np.array([[0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5]], np.float32)
    classes[0, :, 1], classes[0, :, -1] = 0.9, 0.1
    classes[0, 0, 1], classes[0, 0, -1] = 0.99, 0.01
    found = label_views(
        prediction_of(masks, classes, quality), group(1, 0), dataclasses.replace(MADE, mask_threshold=0.2)
    )
    assert np.asarray(found["weak"]["instance_valid"]).all()
    seen = np.asarray(unpack_masks(found["weak"]["masks"], SIZE[1]))[0]
    assert sorted(mask.any(0).argmax() for mask in seen) == [0, 12, 24, 36]
    np.testing.assert_allclose(np.sort(found["weak"]["scores"][0]), [0.45, 0.45, 0.45, 0.81], rtol=2e-3)


def test_how_much_may_overlap():
    """Two masks that share a third of what they cover together."""
    masks, classes = np.zeros((1, 2, *SIZE)), np.full((1, 2, CLASSES + 1), 0.01)
    masks[0, 0, :, :16] = masks[0, 1, :, 8:24] = 1.0
    classes[0, :, 0] = 0.95, 0.9
    classes = np.concatenate([classes, np.full((1, 4, CLASSES + 1), 0.25)], axis=1)
    masks = np.concatenate([masks, np.zeros((1, 4, *SIZE))], axis=1)
    for max_iou, kept in ((0.3, 1), (0.4, 2)):
        found = label_views(prediction_of(masks, classes), group(1, 0), dataclasses.replace(MADE, max_iou=max_iou))[
            "weak"
        ]
        assert np.asarray(found["instance_valid"]).sum() == kept
        assert np.count_nonzero(found["scores"]) == kept  # nothing is said of those that are left out
    # What both cover of the padding counts for nothing.
    masks[0, :2, SIZE[0] // 2 :] = 1.0
    padded = group(1, 0)
    padded["weak"]["valid_box"] = np.array([[0, 0, SIZE[0] // 2, SIZE[1]]], np.float32)
    found = label_views(prediction_of(masks, classes), padded, dataclasses.replace(MADE, max_iou=0.4))["weak"]
    assert np.asarray(found["instance_valid"]).sum() == 2


def test_only_the_views_that_are_read_are_labelled():
    prediction, unlabelled = stripes(None)
    both, one = (label_views(prediction, unlabelled, MADE, views) for views in (("weak", "strong"), ("strong",)))
    assert one["weak"] is unlabelled["weak"]
    jax.tree.map(np.testing.assert_array_equal, one["strong"], both["strong"])


def test_bounded_logits_keep_small_objects():
    """Between a pixel of 2 and a background of -50 the border lies in the middle, not at a twenty-fifth."""
    logits = jnp.full((1, 4, *(side // 8 for side in SIZE)), -50.0).at[:, :, 2, 3].set(4.0)
    classes = np.full((1, 4, CLASSES + 1), 0.01)
    classes[0, :, 0] = 0.97
    prediction = Prediction(logits, jnp.log(jnp.asarray(classes)), None, None, None)
    found = label_views(prediction, group(1, 0), MADE)
    assert np.asarray(unpack_masks(found["weak"]["masks"], SIZE[1])).sum() >= 32


def test_slots_are_for_what_is_seen_and_the_rest_is_counted():
    """Four slots; four specks that are the surest, and six objects."""
    logits = np.full((1, 10, *(side // 4 for side in SIZE)), -9.0)
    for number in range(10):
        if number < 4:
            logits[0, number, 0, 2 * number] = 9.0
        else:
            logits[0, number, number - 2, 1:] = 9.0
    classes = np.full((1, 10, CLASSES + 1), 0.01)
    classes[0, :, 0] = 0.97
    quality = np.where(np.arange(10) < 4, 0.9, 0.8)[None]
    prediction = Prediction(jnp.asarray(logits), jnp.log(jnp.asarray(classes)), None, None, jnp.asarray(quality))
    unlabelled = group(1, 0)
    slots = unlabelled["weak"]["labels"].shape[1]
    found = label_views(prediction, unlabelled, dataclasses.replace(MADE, min_area=17))
    assert int(np.sum(found["weak"]["instance_valid"])) == min(slots, 6)
    assert found["instances_cut"].tolist() == [max(6 - slots, 0)]
    assert slots < 6


def test_weights_reach_the_criterion_s_targets():
    prediction, unlabelled = stripes(np.array([[0.5, 0.9, 0.8, 0.95]], np.float32))
    view = label_views(prediction, unlabelled, dataclasses.replace(MADE, weighting="quality"))["strong"]
    targets = view_targets(view)
    for key in ("class_weights", "mask_weights", "background_weights"):
        np.testing.assert_array_equal(getattr(targets, key), view[key])
    assert len({float(jnp.sum(view[key])) for key in ("class_weights", "mask_weights", "background_weights")}) == 3


def test_small_remains_are_absent_from_their_view_alone():
    prediction, unlabelled = stripes(None)
    options = dataclasses.replace(MADE, class_threshold=0.1, min_area=SIZE[0] * 12)
    found = label_views(prediction, unlabelled, options)  # the strong view shows the middle, twice as large
    assert np.asarray(found["weak"]["instance_valid"]).all()
    seen = np.asarray(unpack_masks(found["strong"]["masks"], SIZE[1])).sum((2, 3))[0]
    np.testing.assert_array_equal(np.asarray(found["strong"]["instance_valid"])[0], seen > 0)
    assert sorted(seen) == [0, 0, SIZE[0] * 24, SIZE[0] * 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_threshold": 1.2}, "class_threshold is 1.2"),
        ({"max_iou": -0.1}, "max_iou is -0.1"),
        ({"min_area": 0}, "min_area is 0"),
        ({"weighting": "score"}, "weighting 'score' is unknown; known: none, quality"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        OnlineLabelsConfig(**options)


# The objective

LINEAR = Functional(lambda rngs: Linear(rngs))
ONLINE = OnlineLabelsConfig(class_threshold=0.2, max_iou=0.5, min_area=1)
OBJECTIVE = ObjectiveConfig(
    supervised_weight=0.7,
    pseudo_label_weight=0.5,
    supervised_views=("weak",),
    pseudo_label_views=("strong",),
    criterion=CriterionConfig(num_points=None),
)


@functools.cache
def batch():
    return {"labelled": group(2, 0), "unlabelled": group(2, 10)}


def learned(online, average, data):
    recipe = SemiSupervised(LINEAR, None, OBJECTIVE, online_labels=online)
    value = jax.jit(jax.value_and_grad(recipe.loss_fn, has_aux=True))
    return value({"segmenter": drawn(LINEAR.abstract(), 1.0)}, {"ema": {"segmenter": average}}, data, jax.random.key(0))


@pytest.mark.parametrize("weighting", ["none", "quality"])
def test_the_average_s_labels_are_learned_as_others_are(weighting):
    """The same loss, gradient and metrics as if they had stood in the batch; another average, another loss."""
    online = dataclasses.replace(ONLINE, weighting=weighting)
    average = drawn(LINEAR.abstract(), 2.0, seed=7)
    images = jnp.asarray(batch()["unlabelled"]["weak"]["image"] / np.float32(255))
    found = label_views(LINEAR.apply(average, images), batch()["unlabelled"], online)
    assert np.asarray(found["strong"]["instance_valid"]).any()
    (loss, metrics), gradient = learned(online, average, batch())
    stored = {**found, "weak": found["strong"]}  # whose number is reported
    (wanted, others), known = learned(None, average, {**batch(), "unlabelled": stored})
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), (gradient, metrics), (known, others)
    )
    assert metrics["pseudo_labels/per_image"][0] == np.asarray(found["strong"]["instance_valid"]).sum()
    assert abs(loss - learned(online, drawn(LINEAR.abstract(), 2.0, seed=8), batch())[0][0]) > 1e-3


def test_only_views_that_teach_are_looked_at():
    """Without a contrast; the average looks at the weak view all the same."""
    seen = []

    class Spied:
        takes = staticmethod(LINEAR.takes)

        def apply(self, params, images, key=None):
            seen.append((len(images), key is None))  # the average, without dropout
            return LINEAR.apply(params, images, key=key)

    params = {"segmenter": drawn(LINEAR.abstract())}
    for online, wanted in ((None, [(4, False)]), (ONLINE, [(2, True), (4, False)])):
        seen.clear()
        recipe = SemiSupervised(Spied(), None, OBJECTIVE, online_labels=online)
        jax.eval_shape(recipe.loss_fn, params, {"ema": params}, batch(), jax.random.key(0))
        assert seen == wanted


def test_parts_of_a_batch_know_only_their_own_labels():
    """The number of instances that are still to be found is nobody's normaliser."""
    known = SemiSupervised(LINEAR, None, OBJECTIVE).normalisers(batch())
    assert set(known) == {"labelled", "unlabelled"}
    online = SemiSupervised(LINEAR, None, OBJECTIVE, online_labels=ONLINE).normalisers(batch())
    assert set(online) == {"labelled"}
    assert online["labelled"] == known["labelled"]
