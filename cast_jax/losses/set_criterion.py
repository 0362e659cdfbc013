"""The set-prediction loss: matching, mask BCE + dice, class cross-entropy, deep supervision.

Follows Mask2Former (Cheng et al. 2022; ``criterion.py`` and ``matcher.py`` of the reference implementation).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.core.decoded import Decoded, mask_logits
from cast_jax.core.geometry import bilinear_sample
from cast_jax.core.sharding import over_images
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.mask_terms import MaskTargets, mask_terms, matched_mask_terms, number_of_blocks
from cast_jax.losses.matching import match_all
from cast_jax.losses.points import positions, read_at, uniform_points
from cast_jax.losses.targets import Targets, shrink

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def set_criterion(
    key: PRNGKeyArray,
    layers: Decoded,
    targets: Targets,
    config: CriterionConfig,
    instances: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Sums the set loss over all decoder layers, each matched by itself.

    Args:
      key: draws the points; unused when ``config.num_points`` is None.
      layers: what every supervised layer predicts, the final one last.
      targets: what to match.
      config: weights and sampling.
      instances: see :func:`set_loss`.

    Returns:
      See :func:`set_loss`.
    """
    images, number, queries, _ = layers.embeddings.shape
    keys = point_keys(key, images, number, targets.valid.shape[1])
    return set_loss(set_terms(keys, layers, targets, config), targets.valid, queries, config, instances)


def point_keys(key: PRNGKeyArray, images: int, layers: int, instances: int) -> PRNGKeyArray:
    """``[images, 1 + layers * blocks]`` keys: for the matching's points, and the loss's in each layer and block."""
    return jax.random.split(key, (images, 1 + layers * number_of_blocks(instances)))


@jax.named_scope("criterion")
def set_terms(
    keys: PRNGKeyArray, layers: Decoded, targets: Targets, config: CriterionConfig
) -> dict[str, tuple[Float[Array, "images layers"], Float[Array, "images layers"]]]:
    """The terms "class", "mask" and "dice" of each image in each layer, unweighted, as (sum, count).

    Whole masks are formed of the matched queries only. All layers are matched at the same points (chosen; Mask2Former
    draws new ones for each).

    Args:
      keys: see :func:`point_keys`.
      layers, targets, config: see :func:`set_criterion`.
    """
    size, whole = (layers.features.shape[1], layers.features.shape[2]), config.num_points is None
    soft_ignore = shrink(targets.ignore, size)
    compared = MaskTargets(
        shrink(targets.masks, size) if whole else targets.masks, soft_ignore if whole else targets.ignore
    )
    with jax.named_scope("matching"):
        costs_of = functools.partial(_matching_costs, config=config)
        fixed = jax.lax.stop_gradient(layers)
        costs, free = over_images(costs_of, keys[:, 0], fixed, targets.labels, compared, soft_ignore)
        matches = match_all(jnp.swapaxes(costs, 0, 1), targets.valid)
        queries, matched = (jnp.swapaxes(found, 0, 1) for found in matches)
    chosen = jnp.take_along_axis(layers.embeddings, queries[..., None], axis=2)
    keys = keys[:, 1:].reshape(*chosen.shape[:2], -1)
    bce, dice = matched_mask_terms(keys, chosen, layers.features, targets.valid, compared, config)
    weight = jnp.where(matched, targets.mask_weights[:, None], 0.0)
    count = jnp.sum(matched, axis=-1).astype(jnp.float32)
    return {
        "class": _class_terms(layers.class_logits, queries, matched, free, targets, config),
        "mask": (jnp.sum(weight * bce, axis=-1), count),
        "dice": (jnp.sum(weight * dice, axis=-1), count),
    }


def set_loss(
    terms: dict[str, tuple[Float[Array, "images layers"], Float[Array, "images layers"]]],
    valid: Bool[Array, "images instances"],
    queries: int,
    config: CriterionConfig,
    instances: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch from its images' terms.

    Args:
      terms: from :func:`set_terms`.
      valid: the targets'.
      queries: of an image.
      config: the weights.
      instances: where this is one of several equal parts of a batch, the instances of an average part. The mean of the
        parts' losses is then the batch's: exactly in the mask terms, and in the class term as long as no query lies on
        ignored pixels (how many do is known only of this part). Every instance must find a query.

    Returns:
      The weighted loss over all layers, and the unweighted terms of the final layer as (sum, count) pairs.
      Mask terms are averages over all instances of the (global) batch, so a batch without any instance gives zero.
    """
    weights: dict[str, Any] = {"class": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
    if instances is not None:
        factors = _part_weights(jnp.sum(valid), instances, len(valid) * queries, config)
        weights = {name: weight * factors[name] for name, weight in weights.items()}
    sums = jax.tree.map(lambda values: jnp.sum(values, axis=0), terms)
    means = [weights[name] * jnp.sum(total / jnp.where(count > 0, count, 1.0)) for name, (total, count) in sums.items()]
    return jnp.sum(jnp.stack(means)), jax.tree.map(lambda values: values[-1], sums)


@jax.named_scope("criterion")
def prompted_mask_loss(
    key: PRNGKeyArray,
    mask_logits: Float[Array, "batch instances h w"],
    iou: Float[Array, "batch instances"],
    targets: Targets,
    config: CriterionConfig,
    instances: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The mask terms of :func:`set_criterion` where each instance has its own mask; nothing is to be matched.

    ``iou`` is what the model says of its masks; it learns the true IoU by L1 (Ravi et al., 2024), weighted
    ``config.iou_weight``. The terms are divided by ``instances``, or by those in the (global) batch.

    Returns:
      The weighted loss, and the unweighted terms as (sum, count) pairs.
    """
    mask_logits = mask_logits.astype(jnp.float32)
    height, width = mask_logits.shape[-2:]
    maps = shrink(targets.masks, (height, width)), shrink(targets.ignore, (height, width))
    terms_of = functools.partial(mask_terms, config=config)
    compared = MaskTargets(*(maps if config.num_points is None else (targets.masks, targets.ignore)))
    bce, dice = over_images(terms_of, jax.random.split(key, len(mask_logits)), mask_logits, compared)
    terms = {"mask": bce, "dice": dice, "iou": jnp.abs(iou - _true_iou(mask_logits, *maps))}
    found = jnp.sum(targets.valid).astype(jnp.float32)
    divisor = found if instances is None else instances
    divisor = jnp.where(divisor > 0.0, divisor, 1.0)
    weighted = lambda values: jnp.where(targets.valid, targets.mask_weights * values, 0.0)
    sums = {name: jnp.sum(weighted(values)) for name, values in terms.items()}
    weights = {"mask": config.mask_weight, "dice": config.dice_weight, "iou": config.iou_weight}
    total = sum((weights[name] * value for name, value in sums.items()), jnp.zeros(())) / divisor
    return total, {name: (value, found) for name, value in sums.items()}


def _true_iou(mask_logits, soft_masks, soft_ignore) -> Float[Array, "batch instances"]:
    """Of the predicted masks with the given ones, where nothing is ignored."""
    care = (soft_ignore < 0.5)[:, None]
    found, true = (mask_logits > 0.0) & care, (soft_masks > 0.5) & care
    count = lambda mask: jnp.sum(mask, axis=(-2, -1), dtype=jnp.float32)
    return count(found & true) / jnp.maximum(count(found | true), 1.0)


def _part_weights(found, average, queries: int, config: CriterionConfig) -> dict[str, Array]:
    """What each term's mean over a part of a batch weighs, by its instances and those of an average part."""
    of_masks = jnp.maximum(found, 1.0) / jnp.where(average > 0.0, average, 1.0)
    class_weights = lambda matched: config.no_object_weight * (queries - matched) + matched
    of_classes = class_weights(found) / jnp.maximum(class_weights(average), 1e-6)
    return {"class": of_classes, "mask": of_masks, "dice": of_masks}


def _class_terms(
    class_logits: Float[Array, "images layers queries classes"],
    queries: Int[Array, "images layers instances"],
    matched: Bool[Array, "images layers instances"],
    free: Bool[Array, "images layers queries"],
    targets: Targets,
    config: CriterionConfig,
) -> tuple[Float[Array, "images layers"], Float[Array, "images layers"]]:
    """Cross-entropy of all queries, and what they weigh. ``free`` is False where "no object" is not to be learned.

    The targets' own factors do not count in what the queries weigh, or a batch's would cancel out.

    Classes are compared, not gathered: kernels that address memory take longer to compile, and keep their addresses.
    A label that is no class makes the loss NaN.
    """
    *_, number, classes = class_logits.shape
    found = matched[..., None] & (queries[..., None] == jnp.arange(number))  # of an instance and a query
    of_query = lambda values: jnp.sum(jnp.where(found, values[:, None, :, None], 0), axis=2)
    alone = ~jnp.any(found, axis=2)
    label = jnp.where(alone, classes - 1, of_query(targets.labels))
    weight = jnp.where(alone, jnp.where(free, config.no_object_weight, 0.0), 1.0)
    factor = jnp.where(alone, targets.background_weights[:, None, None], of_query(targets.class_weights))
    chosen = jnp.where(label[..., None] == jnp.arange(classes), jax.nn.log_softmax(class_logits), 0.0)
    cross_entropy = jnp.where((label >= 0) & (label < classes), -jnp.sum(chosen, axis=-1), jnp.nan)
    return jnp.sum(weight * factor * cross_entropy, axis=-1), jnp.sum(weight, axis=-1)


def _matching_costs(
    key: PRNGKeyArray,
    layers: Decoded,
    labels: Int[Array, "instances"],
    targets: MaskTargets,
    soft_ignore: Float[Array, "h w"],
    config: CriterionConfig,
) -> tuple[Float[Array, "layers queries instances"], Bool[Array, "layers queries"]]:
    """The same costs as the loss, on one set of points for all pairs of an image; no gradient.

    With them False for queries whose mask lies mostly on ignored pixels: calling them "no object" would be a false
    lesson.
    """
    if config.num_points is None:
        features = layers.features[::2, ::2].reshape(-1, layers.features.shape[-1])
        true, ignored = (maps[..., ::2, ::2].reshape(*maps.shape[:-2], -1) for maps in targets)
    else:
        points = uniform_points(key, (1, config.num_points))
        y, x = positions(points, layers.features.shape[:2])
        features = bilinear_sample(layers.features, jnp.stack([y[0], x[0]], axis=-1))
        true = read_at(jnp.broadcast_to(points, (len(targets.masks), config.num_points)), targets.masks)
        ignored = read_at(points, targets.ignore[None])[0]
    # One pixel in sixteen tells where most of a mask lies.
    seldom = layers.features[::4, ::4].reshape(-1, layers.features.shape[-1])
    care, seldom_ignored = 1.0 - ignored, soft_ignore[::4, ::4].reshape(-1)
    true = true * care

    def of_layer(layer: tuple[Array, Array]) -> tuple[Array, Array]:
        embeddings, class_logits = layer
        logits = mask_logits("qd,pd->qp", embeddings, features)
        cost = _matching_cost(logits, class_logits, labels, true, care, config)
        probability = jax.nn.sigmoid(mask_logits("qd,pd->qp", embeddings, seldom))
        return cost, probability @ seldom_ignored <= 0.5 * jnp.sum(probability, axis=-1)

    return jax.lax.map(of_layer, (layers.embeddings, layers.class_logits))


def _matching_cost(logits, class_logits, classes, labels, care, config) -> Float[Array, "queries instances"]:
    """Of one image in one layer: mask logits ``[queries, points]`` against labels, 0 where there is no ``care``."""
    class_cost = -jax.nn.softmax(class_logits)[:, classes]
    # softplus(x) - x y is the cross-entropy; split so that pairs are one matrix product.
    mask_cost = ((jax.nn.softplus(logits) @ care)[:, None] - logits @ labels.T) / jnp.maximum(jnp.sum(care), 1.0)
    probability = jax.nn.sigmoid(logits)
    size = (probability @ care)[:, None] + jnp.sum(labels, -1)[None]
    dice_cost = 1.0 - (2.0 * (probability @ labels.T) + 1.0) / (size + 1.0)
    return config.class_weight * class_cost + config.mask_weight * mask_cost + config.dice_weight * dice_cost
