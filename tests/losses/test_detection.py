"""The detector's loss against a plain loop over queries and instances, and Hugging Face's formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers.loss.loss_for_object_detection import generalized_box_iou, sigmoid_focal_loss

from cast_jax.core.errors import UserError
from cast_jax.core.geometry import mask_boxes
from cast_jax.losses.detection import DetectionConfig, detection_loss, focal_loss, generalised_iou
from cast_jax.losses.targets import Targets

BATCH, LAYERS, QUERIES, INSTANCES, SIDE = 2, 3, 6, 4, 32
# Two prompts: the first asks for classes 0 (one word) and 1 (two), the second for class 2; the last token is padding.
CLASS_MAPS = np.array([[[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6], [[0] * 6, [0] * 6, [0, 1, 1, 0, 0, 0]]])
CONFIG = DetectionConfig()


def targets(seed: int = 0, ignored: bool = False) -> Targets:
    random = np.random.default_rng(seed)
    masks = np.zeros((BATCH, INSTANCES, SIDE, SIDE), bool)
    for image in range(BATCH):
        for slot in range(INSTANCES):
            top, left = random.integers(0, SIDE // 2, 2)
            masks[image, slot, top : top + random.integers(3, 16), left : left + random.integers(3, 16)] = True
    ignore = np.zeros((BATCH, SIDE, SIDE), bool)
    ignore[:, SIDE // 2 :, SIDE // 2 :] = ignored
    valid = np.array([[True, True, True, True], [True, True, False, False]])
    class_weights, box_weights = random.uniform(0.5, 1.5, (2, BATCH, INSTANCES)).astype(np.float32)
    background = random.uniform(0.5, 1.5, BATCH).astype(np.float32)
    labels = np.array([[0, 1, 2, 1], [2, 0, 1, 2]], np.int32)
    return Targets(*map(jnp.asarray, (masks, labels, valid, class_weights, box_weights, background, ignore)))


def detected(seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    random = np.random.default_rng(seed)
    sets = []
    for class_map in CLASS_MAPS:
        logits = random.normal(size=(BATCH, LAYERS, QUERIES, 6)).astype(np.float32)
        logits[..., -1] = -10_000.0
        boxes = random.uniform(0.1, 0.6, (BATCH, LAYERS, QUERIES, 4)).astype(np.float32)
        sets.append((logits, boxes, np.broadcast_to(class_map, (BATCH, *class_map.shape)).astype(np.float32)))
    return sets


loss = jax.jit(
    jax.value_and_grad(lambda found, target, config, n=None: detection_loss(found, target, config, n), has_aux=True),
    static_argnums=2,
)


def expected(found, target: Targets, config: DetectionConfig = CONFIG) -> tuple[float, dict[str, float]]:
    """The same one by one, in float64; ignored pixels left out."""
    total, last = 0.0, {"class": 0.0, "box": 0.0, "giou": 0.0}
    count = int(np.sum(target.valid))
    for logits, boxes, class_map in found:
        for image, layer in np.ndindex(BATCH, LAYERS):
            p = 1 / (1 + np.exp(-np.maximum(logits[image, layer].astype(np.float64), -700)))
            positive = -config.alpha * (1 - p) ** config.gamma * np.log(np.maximum(p, 1e-300))
            negative = -(1 - config.alpha) * p**config.gamma * np.log1p(-p)
            tokens = class_map[image][np.asarray(target.labels[image])]
            slots = [i for i in range(INSTANCES) if target.valid[image, i] and tokens[i].any()]
            corners = np.asarray(mask_boxes(target.masks[image]), np.float64)
            x, y, w, h = boxes[image, layer].astype(np.float64).T
            ours = torch.from_numpy(np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1))
            giou = generalized_box_iou(ours, torch.from_numpy(corners)).numpy()
            middle = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)
            distance = np.abs(boxes[image, layer][:, None] - middle).sum(-1)
            of_class = np.array([[np.where(tokens[i] > 0, pos, neg).sum() for i in range(INSTANCES)]
                                 for pos, neg in zip(positive, negative, strict=True)])  # fmt: skip
            cost = config.class_cost * of_class + config.box_cost * distance - config.giou_cost * giou
            queries, chosen = linear_sum_assignment(cost[:, slots])
            background = float(target.background_weights[image])
            terms = {"class": background * negative.sum(), "box": 0.0, "giou": 0.0}
            for query, slot in zip(queries, np.array(slots, int)[chosen], strict=True):
                weight, class_weight = (float(w[image, slot]) for w in (target.mask_weights, target.class_weights))
                terms["class"] += class_weight * of_class[query, slot] - background * negative[query].sum()
                terms["box"] += weight * distance[query, slot]
                terms["giou"] += weight * (1 - giou[query, slot])
            for name, value in terms.items():
                total += getattr(config, f"{name}_weight") * value / count
                last[name] += value * (layer == LAYERS - 1)
    return total, last


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_plain_loop(seed):
    (total, metrics), _ = loss(detected(seed), targets(seed), CONFIG)
    value, last = expected(detected(seed), targets(seed))
    np.testing.assert_allclose(total, value, rtol=1e-5)
    for name, (found, count) in metrics.items():
        np.testing.assert_allclose(found, last[name], rtol=1e-5)
        assert count == 6


def test_formulas_are_hugging_face_s():
    random = np.random.default_rng(3)
    logits = random.normal(size=(2, 5, 7)).astype(np.float32) * 4
    labels = (random.random((2, 5, 7)) < 0.3).astype(np.float32)
    theirs = sigmoid_focal_loss(torch.from_numpy(logits), torch.from_numpy(labels), num_boxes=1, alpha=0.25, gamma=2)
    np.testing.assert_allclose(focal_loss(logits, labels, 0.25, 2.0).mean(1).sum(), theirs, rtol=1e-5)
    boxes = np.sort(random.random((9, 2, 2)), axis=1).reshape(9, 4).astype(np.float32)
    theirs = generalized_box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes[:4]))
    np.testing.assert_allclose(generalised_iou(boxes[:, None], boxes[:4]), theirs, atol=1e-6)


def test_parts_of_a_batch_average_to_the_whole():
    whole, target = detected(), targets()
    part = lambda tree, i: jax.tree.map(lambda leaf: leaf[i : i + 1], tree)
    (total, _), _ = loss(whole, target, CONFIG)
    halves = [loss(part(whole, i), part(target, i), CONFIG, jnp.asarray(3.0))[0][0] for i in range(2)]
    np.testing.assert_allclose(np.mean(halves), total, rtol=1e-6)


def test_what_lies_on_ignored_pixels_is_no_lesson():
    found, target = detected(), dataclasses.replace(targets(ignored=True), valid=jnp.zeros((BATCH, INSTANCES), bool))
    found[0][1][:, :, 0] = [0.75, 0.75, 0.3, 0.3]  # nine tenths inside
    found[0][1][:, :, 1] = [0.25, 0.25, 0.3, 0.3]
    _, gradients = loss(found, target, CONFIG)
    assert not np.asarray(gradients[0][0])[:, :, 0].any()
    assert np.abs(np.asarray(gradients[0][0])[:, :, 1, :-1]).min() > 0
    assert not np.asarray(gradients[0][1]).any()  # no instance, no box


def test_broken_numbers_do_not_reach_the_others():
    found = detected()
    found[0][0][0, 0, 0, 0] = np.nan
    (_, metrics), _ = loss(found, targets(), CONFIG)
    assert all(np.isfinite(value) for value, _ in metrics.values())  # of the last layer
    (total, _), gradients = loss(detected(), dataclasses.replace(targets(), valid=targets().valid & False), CONFIG)
    assert np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_numbers_out_of_range_are_named():
    with pytest.raises(UserError, match=r"^alpha is 1\.5"):
        DetectionConfig(alpha=1.5)
    with pytest.raises(UserError, match=r"^giou_cost is -1"):
        DetectionConfig(giou_cost=-1.0)
