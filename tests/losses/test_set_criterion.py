"""The set criterion against Mask2Former's formulas, written out pair by pair in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from tiny import decoded

from cast_jax.core.errors import UserError
from cast_jax.losses import mask_terms
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.points import positions, uncertain_points
from cast_jax.losses.set_criterion import prompted_mask_loss, set_criterion
from cast_jax.losses.targets import Targets

LAYERS, BATCH, QUERIES, INSTANCES, CLASSES, SIDE = 2, 2, 5, 3, 3, 8
DENSE = CriterionConfig(num_points=None)
KEY = jax.random.key(0)


@jax.jit
def dense(mask_logits, class_logits, targets):
    """((loss, metrics), gradients); arguments have a leading layer axis."""

    def loss(mask_logits, class_logits):
        return set_criterion(KEY, decoded(mask_logits, class_logits), targets, DENSE)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(mask_logits, class_logits)


def logits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.normal(0.0, 3.0, (LAYERS, BATCH, QUERIES, SIDE, SIDE)).astype(np.float32)
    return masks, rng.normal(0.0, 1.0, (LAYERS, BATCH, QUERIES, CLASSES + 1)).astype(np.float32)


def enlarge(maps: np.ndarray) -> np.ndarray:
    """From the side of the mask logits to that of the images."""
    return np.repeat(np.repeat(maps, 2, axis=-1), 2, axis=-2)


def targets(seed: int = 0, aligned: bool = False, ignored: float = 0.1) -> Targets:
    """Boxes in images of twice the logits' side; where ``aligned``, their borders are borders of the logits' pixels.

    One image has three instances, the other two.
    """
    rng = np.random.default_rng(seed)
    side = SIDE if aligned else 2 * SIDE
    masks = np.zeros((BATCH, INSTANCES, side, side), bool)
    for mask in masks.reshape(-1, side, side):
        top, left = rng.integers(0, side // 2, 2)
        mask[top : top + side // 2 - 1, left : left + side // 3] = True
    masks = enlarge(masks) if aligned else masks
    valid = np.array([[True, True, True], [True, False, True]])
    return Targets(
        masks=jnp.asarray(masks & valid[..., None, None]),
        labels=jnp.asarray(rng.integers(0, CLASSES, (BATCH, INSTANCES))),
        valid=jnp.asarray(valid),
        class_weights=jnp.asarray(rng.uniform(0.5, 1.5, (BATCH, INSTANCES)).astype(np.float32)),
        mask_weights=jnp.asarray(rng.uniform(0.5, 1.5, (BATCH, INSTANCES)).astype(np.float32)),
        background_weights=jnp.asarray(rng.uniform(0.5, 1.5, BATCH).astype(np.float32)),
        ignore=jnp.asarray(rng.random((BATCH, 2 * SIDE, 2 * SIDE)) < ignored),
    )


# The reference


def bce(x, y, care):
    return float(np.sum((np.logaddexp(0.0, x) - x * y) * care) / max(care.sum(), 1.0))


def dice(x, y, care):
    p = care / (1.0 + np.exp(-x))
    return float(1.0 - (2.0 * np.sum(p * y) + 1.0) / (np.sum(p) + np.sum(y * care) + 1.0))


def shrink(maps: np.ndarray) -> np.ndarray:
    factor = maps.shape[-1] // SIDE
    return maps.reshape(*maps.shape[:-2], SIDE, factor, SIDE, factor).mean((-3, -1))


def reference_terms(mask_logits, class_logits, target: Targets, image: int) -> dict[str, tuple[float, float]]:
    """(sum, count) of each term of one image in one layer."""
    x, c = mask_logits.astype(np.float64), class_logits.astype(np.float64)
    probability = np.exp(c - np.logaddexp.reduce(c, axis=-1, keepdims=True))
    care = 1.0 - shrink(np.asarray(target.ignore[image], np.float64))
    wanted = [i for i in range(INSTANCES) if target.valid[image, i]]
    y = {i: shrink(np.asarray(target.masks[image, i], np.float64)) for i in wanted}
    label, of_classes = np.asarray(target.labels[image]), np.asarray(target.class_weights[image], np.float64)
    weight = np.asarray(target.mask_weights[image], np.float64)

    few = np.s_[::2, ::2]  # the documented shortcut: every fourth pixel decides the matching
    cost = np.array(
        [
            [
                -2.0 * probability[q, label[i]]
                + 5.0 * bce(x[q][few], y[i][few], care[few])
                + 5.0 * dice(x[q][few], y[i][few], care[few])
                for i in wanted
            ]
            for q in range(QUERIES)
        ]
    ).reshape(QUERIES, len(wanted))
    rows, columns = linear_sum_assignment(cost)
    owner = {int(q): wanted[i] for q, i in zip(rows, columns, strict=True)}

    classes, count = 0.0, 0.0
    for q in range(QUERIES):
        inside = 1.0 / (1.0 + np.exp(-x[q][::4, ::4]))
        on_ignored = np.sum(inside * (1 - care[::4, ::4])) > 0.5 * np.sum(inside)
        plain = 1.0 if q in owner else 0.1 * (not on_ignored)
        factor = of_classes[owner[q]] if q in owner else float(target.background_weights[image])
        classes -= plain * factor * np.log(probability[q, label[owner[q]] if q in owner else CLASSES])
        count += plain
    return {
        "class": (classes, count),
        "mask": (sum(weight[i] * bce(x[q], y[i], care) for q, i in owner.items()), len(owner)),
        "dice": (sum(weight[i] * dice(x[q], y[i], care) for q, i in owner.items()), len(owner)),
    }


def reference(mask_logits, class_logits, target: Targets) -> float:
    total = 0.0
    for masks, classes in zip(mask_logits, class_logits, strict=True):
        terms = [reference_terms(masks[b], classes[b], target, b) for b in range(BATCH)]
        for name, factor in {"class": 2.0, "mask": 5.0, "dice": 5.0}.items():
            total += factor * sum(t[name][0] for t in terms) / (sum(t[name][1] for t in terms) or 1.0)
    return total


# Every pixel


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_mask2formers(seed):
    mask_logits, class_logits = logits(seed)
    (loss, metrics), _ = dense(mask_logits, class_logits, targets(seed))
    np.testing.assert_allclose(loss, reference(mask_logits, class_logits, targets(seed)), rtol=1e-5)
    final = [reference_terms(mask_logits[-1, b], class_logits[-1, b], targets(seed), b) for b in range(BATCH)]
    for name, pair in metrics.items():
        np.testing.assert_allclose(pair, np.sum([terms[name] for terms in final], axis=0), rtol=1e-5)


def test_the_gradient_is_the_slope():
    """Central differences of the float64 reference; the matching does not change within them."""
    mask_logits, class_logits = (x.astype(np.float64) for x in logits(1))
    target = targets(1)
    _, gradients = dense(mask_logits.astype(np.float32), class_logits.astype(np.float32), target)
    rng = np.random.default_rng(0)
    for moves in ((1, 0), (0, 1)):
        masks, classes = (
            move * rng.normal(size=x.shape) for move, x in zip(moves, (mask_logits, class_logits), strict=True)
        )
        at = lambda size, a=masks, b=classes: reference(mask_logits + size * a, class_logits + size * b, target)
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradients[0] * masks) + np.sum(gradients[1] * classes), slope, rtol=1e-4)
    largest = np.argsort(-np.abs(np.asarray(gradients[0])).reshape(-1))[:5]
    for position in largest:  # and pixel by pixel where it is largest
        step = np.zeros_like(mask_logits)
        step.reshape(-1)[position] = 1e-4
        slope = reference(mask_logits + step, class_logits, target) - reference(
            mask_logits - step, class_logits, target
        )
        np.testing.assert_allclose(np.asarray(gradients[0]).reshape(-1)[position], slope / 2e-4, rtol=1e-3)


def perfect(target: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Query i + 1 is (aligned) instance i, in every layer."""
    mask_logits = np.full((LAYERS, BATCH, QUERIES, SIDE, SIDE), -30.0, np.float32)
    mask_logits[:, :, 1 : INSTANCES + 1] = np.where(target.masks[..., ::2, ::2], 30.0, -30.0)
    classes = np.full((BATCH, QUERIES), CLASSES)
    classes[:, 1 : INSTANCES + 1] = np.where(target.valid, target.labels, CLASSES)
    class_logits = 30.0 * np.eye(CLASSES + 1, dtype=np.float32)[classes]
    return mask_logits, np.stack([class_logits] * LAYERS)


def test_a_perfect_prediction_costs_nothing():
    target = targets(aligned=True, ignored=0.0)
    (loss, _), _ = dense(*perfect(target), target)
    assert float(loss) < 1e-5


def test_ignored_pixels_do_not_matter():
    target = targets(aligned=True, ignored=0.0)
    ignore = np.zeros((BATCH, SIDE, SIDE), bool)
    ignore[:, -2:] = True  # a quarter of the image
    mask_logits, class_logits = logits(3)
    target = dataclasses.replace(target, ignore=jnp.asarray(enlarge(ignore)))
    (_, before), gradients = dense(mask_logits, class_logits, target)
    changed = mask_logits.copy()
    changed[..., -2:, :] *= -1.0
    painted = dataclasses.replace(target, masks=target.masks & ~enlarge(ignore)[:, None])
    for (_, after), _ in (dense(changed, class_logits, target), dense(mask_logits, class_logits, painted)):
        np.testing.assert_allclose(after["mask"], before["mask"], rtol=1e-6)
        np.testing.assert_allclose(after["dice"], before["dice"], rtol=1e-6)
    assert not np.asarray(gradients[0])[..., -2:, :].any()
    assert np.asarray(gradients[0])[..., :-2, :].any()


def test_a_query_on_ignored_pixels_is_not_called_background():
    """Its class logits get no gradient; those of the other free queries do."""
    target = targets(aligned=True, ignored=0.0)
    ignore = np.zeros((BATCH, SIDE, SIDE), bool)
    ignore[:, 4:] = True
    ignore = enlarge(ignore)
    target = dataclasses.replace(target, ignore=jnp.asarray(ignore), masks=target.masks & ~ignore[:, None])
    mask_logits, class_logits = perfect(target)
    mask_logits[:, :, 4, 4:] = 30.0  # query 4 lies on ignored pixels, query 0 nowhere
    _, (_, gradient) = dense(mask_logits, class_logits * 0.1, target)
    assert not np.asarray(gradient)[:, :, 4].any()
    assert np.abs(np.asarray(gradient)[:, :, 0]).min() > 0


def test_an_instance_without_a_query_teaches_no_class():
    mask_logits, class_logits = logits()
    target = dataclasses.replace(targets(ignored=0.0), valid=jnp.ones((BATCH, INSTANCES), bool))
    (_, metrics), _ = dense(mask_logits[:, :, :1], class_logits[:, :, :1], target)
    cross_entropy = -np.asarray(jax.nn.log_softmax(class_logits[-1, :, 0]))
    weights, labels = np.asarray(target.class_weights), np.asarray(target.labels)
    sums = weights * np.take_along_axis(cross_entropy, labels, axis=1)  # of one instance in each image
    matched = np.isclose(sums[0][:, None] + sums[1], metrics["class"][0], rtol=1e-5)
    assert matched.sum() == 1
    assert metrics["class"][1] == metrics["mask"][1] == BATCH


def test_a_label_that_is_no_class_is_not_passed_over():
    for label in (-1, CLASSES + 1):
        target = dataclasses.replace(targets(), labels=jnp.full((BATCH, INSTANCES), label))
        assert np.isnan(dense(*logits(), target)[0][0])


def test_a_batch_without_instances_is_finite():
    empty = dataclasses.replace(targets(), valid=jnp.zeros((BATCH, INSTANCES), bool))
    mask_logits, class_logits = logits()
    (loss, metrics), gradients = dense(mask_logits, class_logits, empty)
    assert float(metrics["mask"][0]) == float(metrics["dice"][0]) == float(metrics["mask"][1]) == 0.0
    background = -empty.background_weights[:, None] * jax.nn.log_softmax(class_logits)[..., -1]
    np.testing.assert_allclose(loss, 2.0 * np.sum(np.mean(background, (1, 2))), rtol=1e-5)
    assert not np.asarray(gradients[0]).any()
    assert np.isfinite(gradients[1]).all()


def test_few_queries_of_no_object_are_averaged_too():
    """What they weigh, 5 x 0.1, is less than one, and still what their loss is divided by."""
    alone = jax.tree.map(lambda array: array[:1], dataclasses.replace(targets(), valid=jnp.zeros((BATCH, 1), bool)))
    alone = dataclasses.replace(alone, valid=jnp.zeros((1, INSTANCES), bool))
    mask_logits, class_logits = logits()
    (loss, _), _ = dense(mask_logits[:, :1], class_logits[:, :1], alone)
    background = -alone.background_weights[:, None] * jax.nn.log_softmax(class_logits[:, :1])[..., -1]
    np.testing.assert_allclose(loss, 2.0 * np.sum(np.mean(background, (1, 2))), rtol=1e-5)


def test_the_normaliser_is_global():
    """An image's terms do not depend on its neighbours, and sums are divided once, by all instances of the batch."""
    mask_logits, class_logits = logits(4)
    target = targets(4)
    (_, both), _ = dense(mask_logits, class_logits, target)
    doubled = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), target)
    (_, first), _ = dense(mask_logits[:, [0, 0]], class_logits[:, [0, 0]], doubled)
    doubled = jax.tree.map(lambda x: jnp.stack([x[1], x[1]]), target)
    (_, second), _ = dense(mask_logits[:, [1, 1]], class_logits[:, [1, 1]], doubled)
    for name in ("class", "mask", "dice"):
        np.testing.assert_allclose(np.add(first[name], second[name]) / 2, both[name], rtol=1e-5)
    assert float(both["mask"][1]) == 5.0


def test_infinite_logits_do_not_reach_the_matching():
    mask_logits, class_logits = logits(0)
    layers = decoded(mask_logits, class_logits)
    broken = layers._replace(embeddings=layers.embeddings.at[0, :, 2].set(np.nan))
    _, metrics = jax.jit(set_criterion, static_argnums=3)(KEY, broken, targets(), DENSE)
    assert float(metrics["mask"][1]) == 5.0  # still one-to-one: no instance is matched to the broken query
    assert np.isfinite(metrics["mask"][0])


# Sampled points


def sampled(config: CriterionConfig):
    def loss(key, mask_logits, class_logits, target):
        return set_criterion(key, decoded(mask_logits[None], class_logits[None]), target, config)[1]

    return jax.jit(jax.vmap(loss, in_axes=(0, None, None, None)))


def test_points_agree_with_pixels():
    """On constant maps each draw is exact; on smooth maps uniform points are right on average, within noise."""
    uniform = sampled(CriterionConfig(num_points=SIDE * SIDE, oversample=1.0, importance=0.0))
    keys = jax.random.split(jax.random.key(1), 32)
    target = targets(aligned=True, ignored=0.0)
    mask_logits, class_logits = logits(0)
    # Two instances that differ in nothing but their weights would be matched as well one way as the other.
    ones = jnp.ones_like(target.mask_weights)
    target = dataclasses.replace(target, class_weights=ones, mask_weights=ones)
    whole = dataclasses.replace(target, masks=jnp.broadcast_to(target.valid[..., None, None], target.masks.shape))
    flat = np.broadcast_to(mask_logits[..., :1, :1], mask_logits.shape)
    (_, exact), _ = dense(flat, class_logits, whole)
    drawn = uniform(keys, flat[-1], class_logits[-1], whole)
    for name in ("class", "mask", "dice"):
        np.testing.assert_allclose(drawn[name][0], exact[name][0], rtol=1e-4)

    smooth = flat + np.linspace(-2.0, 2.0, SIDE, dtype=np.float32)
    (_, exact), _ = dense(smooth, class_logits, target)
    drawn = uniform(keys, smooth[-1], class_logits[-1], target)
    for name in ("mask", "dice"):
        np.testing.assert_allclose(np.mean(drawn[name][0]), exact[name][0], rtol=0.05)
        assert np.std(drawn[name][0]) > 0


def test_points_crowd_where_the_mask_is_uncertain():
    config = CriterionConfig(num_points=64, oversample=6.0, importance=0.75)
    maps = jnp.where(jnp.arange(SIDE) < SIDE // 2, -8.0, 8.0) * jnp.ones((2, SIDE, SIDE))  # sure but at the middle
    y, x = jax.jit(lambda key: positions(uncertain_points(key, maps, config), (1, 1)))(KEY)
    assert y.shape == x.shape == (2, 64)
    assert min(y.min(), x.min()) >= 0.0
    assert max(y.max(), x.max()) < 1.0
    unsure = np.mean(np.abs(x - 0.5) < 0.5 / SIDE, axis=1)
    # A uniform point lies there in an eighth of all cases: so do about 48 of 384 candidates, which are all taken.
    assert (unsure > 0.55).all()
    assert np.ptp(y) > 0.8


POINTS = CriterionConfig(num_points=48, importance=0.5)


def sampled_loss(mask_logits, config):
    class_logits = jnp.asarray(logits()[1])
    return set_criterion(KEY, decoded(mask_logits, class_logits), targets(), config)[0]


@pytest.mark.parametrize("config", [POINTS, DENSE])
def test_image_by_image_is_side_by_side(config, monkeypatch):
    """What a CPU does and what others do: the same loss and the same gradient."""
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        update = jax.value_and_grad(functools.partial(sampled_loss, config=config))
        found[backend] = jax.jit(update)(logits()[0]), str(jax.make_jaxpr(update)(logits()[0])).count("scan[")
    (cpu, loops), (gpu, fewer) = found["cpu"], found["gpu"]
    assert loops > fewer
    np.testing.assert_allclose(cpu[0], gpu[0], rtol=1e-5)
    np.testing.assert_allclose(cpu[1], gpu[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_blocks_of_instances_are_all_instances(backend, monkeypatch):
    """Blocks of two of three slots, of which one is padding and another is empty."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    given = dataclasses.replace(targets(), valid=jnp.asarray([[True, True, False], [True, False, True]]))
    found = {}
    for together in (20, 2):
        monkeypatch.setattr(mask_terms, "_SLOTS", together)
        found[together] = jax.jit(lambda *given: dense.__wrapped__(*given))(*logits(), given)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7), *found.values())


def test_the_gradient_at_points_is_the_loss_difference():
    """Of uniform points, which stay where they are; the matching is that of queries far apart."""
    config = dataclasses.replace(POINTS, importance=0.0)
    loss = jax.jit(functools.partial(sampled_loss, config=config))
    there = jnp.asarray(logits()[0])
    gradient = jax.grad(loss)(there)
    length = jnp.linalg.norm(gradient)
    ahead, behind = (loss(there + step * gradient / length) for step in (0.05, -0.05))
    np.testing.assert_allclose((ahead - behind) / 0.1, length, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_weight": -1.0}, "mask_weight is -1.0"),
        ({"num_points": 0}, r"num_points is 0; it must lie in \[1, 1048576\]"),
        ({"num_points": 10**11}, "num_points is 100000000000"),
        ({"oversample": 0.5}, "oversample is 0.5"),
        ({"importance": 1.5}, "importance is 1.5"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        CriterionConfig(**options)


# Prompted masks


@jax.jit
def prompted(mask_logits, iou, target, instances=None):
    return jax.value_and_grad(
        lambda *given: prompted_mask_loss(KEY, *given, target, DENSE, instances), argnums=(0, 1), has_aux=True
    )(mask_logits, iou)


def test_prompted_masks_meet_their_own_instances():
    """Pair by pair in float64, with the IoU of what is cut at zero; padding teaches nothing."""
    target = targets()
    mask_logits, iou = logits()[0][0, :, :INSTANCES], np.full((BATCH, INSTANCES), 0.4, np.float32)
    (total, metrics), gradients = prompted(mask_logits, iou, target)
    soft = lambda maps: np.asarray(maps, np.float64).reshape(*maps.shape[:-2], SIDE, 2, SIDE, 2).mean((-3, -1))
    masks, ignore = soft(target.masks), soft(target.ignore)
    sums = {"mask": 0.0, "dice": 0.0, "iou": 0.0}
    for image, slot in zip(*np.nonzero(np.asarray(target.valid)), strict=True):
        x, y, care = mask_logits[image, slot].astype(np.float64), masks[image, slot], 1 - ignore[image]
        found, true = (x > 0) & (care > 0.5), (y > 0.5) & (care > 0.5)
        own = {"mask": bce(x, y, care), "dice": dice(x, y, care)}
        own["iou"] = abs(0.4 - (found & true).sum() / max((found | true).sum(), 1))
        for name, value in own.items():
            sums[name] += float(target.mask_weights[image, slot]) * value
    for name, (found, count) in metrics.items():
        np.testing.assert_allclose(found, sums[name], rtol=1e-5)
        assert count == 5
    np.testing.assert_allclose(total, (5 * sums["mask"] + 5 * sums["dice"] + sums["iou"]) / 5, rtol=1e-5)
    for gradient in gradients:
        assert np.abs(np.asarray(gradient)[0]).max() > 0
        assert not np.asarray(gradient)[1, 1].any()


def test_prompted_masks_of_parts_of_a_batch():
    target, mask_logits, iou = targets(), logits()[0][0, :, :INSTANCES], np.full((BATCH, INSTANCES), 0.4, np.float32)
    (total, _), _ = prompted(mask_logits, iou, target)
    part = lambda tree, i: jax.tree.map(lambda leaf: leaf[i : i + 1], tree)
    parts = [prompted(*part((mask_logits, iou, target), i), jnp.asarray(2.5))[0][0] for i in range(BATCH)]
    np.testing.assert_allclose(np.mean(parts), total, rtol=1e-6)
