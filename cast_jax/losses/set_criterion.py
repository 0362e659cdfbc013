"""The set-prediction loss of method.md section 2: matching, mask BCE + dice, class cross-entropy, deep supervision.

Follows Mask2Former (Cheng et al. 2022; ``criterion.py`` and ``matcher.py`` of the reference implementation).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from cast_jax.core.config import check_ranges
from cast_jax.core.decoded import Decoded, mask_logits
from cast_jax.core.geometry import bilinear_sample, sample_each
from cast_jax.core.resize import resize
from cast_jax.core.selection import nearest_to_zero, take_rows
from cast_jax.core.sharding import over_images
from cast_jax.losses.matching import match_all

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class CriterionConfig:
    """Weights and sampling of the set criterion.

    Attributes:
      class_weight, mask_weight, dice_weight: weights of the terms, in the loss and in the matching cost.
      iou_weight: of the IoU that a model predicts for prompted masks.
      no_object_weight: weight of the "no object" class in the cross-entropy.
      num_points: points sampled per mask; None compares every pixel of the mask map (cheaper on small maps), and every
        fourth in the matching.
      oversample: how many candidate points are drawn per point kept.
      importance: share of the points that are the most uncertain candidates; the rest are uniform.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    iou_weight: float = 1.0
    no_object_weight: float = 0.1
    num_points: int | None = 12_544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        weights = ("class_weight", "mask_weight", "dice_weight", "iou_weight", "no_object_weight")
        check_ranges(self, **dict.fromkeys(weights, "[0, inf)"), importance="[0, 1]")
        # At most the pixels of a mask of 1024 x 1024; each point costs memory for every query, instance and layer.
        check_ranges(self, num_points="[1, 1048576]", oversample="[1, 16]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Padded ground truth or pseudo-labels.

    Attributes:
      masks: ``[batch, instances, height, width]`` at the input's resolution.
      labels: class positions.
      valid: False on padding.
      weights: a factor on each instance's mask and class terms (1 = plain).
      ignore: pixels that are neither object nor background error.
    """

    masks: Bool[Array, "batch instances height width"]
    labels: Int[Array, "batch instances"]
    valid: Bool[Array, "batch instances"]
    weights: Float[Array, "batch instances"]
    ignore: Bool[Array, "batch height width"]


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
    keys = point_keys(key, images, number)
    return set_loss(set_terms(keys, layers, targets, config), targets.valid, queries, config, instances)


def point_keys(key: PRNGKeyArray, images: int, layers: int) -> PRNGKeyArray:
    """``[images, 1 + layers]`` keys: for the points of the matching, and of the loss in each layer."""
    return jax.random.split(key, (images, 1 + layers))


@jax.named_scope("criterion")
def set_terms(
    keys: PRNGKeyArray, layers: Decoded, targets: Targets, config: CriterionConfig
) -> dict[str, tuple[Float[Array, "images layers"], Float[Array, "images layers"]]]:
    """The terms "class", "mask" and "dice" of each image in each layer, unweighted, as (sum, count).

    Whole masks are formed of the matched queries only. All layers are matched at the same points (chosen; Mask2Former
    draws new ones for each). The masks of layers are compared one after another by one compiled body: unrolled, they
    would take minutes to compile.

    Args:
      keys: see :func:`point_keys`.
      layers, targets, config: see :func:`set_criterion`.
    """
    maps = _target_maps(targets, (layers.features.shape[1], layers.features.shape[2]))
    with jax.named_scope("matching"):
        costs_of = functools.partial(_matching_costs, config=config)
        costs, free = over_images(costs_of, keys[:, 0], jax.lax.stop_gradient(layers), targets, maps)
        matches = match_all(jnp.swapaxes(costs, 0, 1), targets.valid)
        queries, matched = (jnp.swapaxes(found, 0, 1) for found in matches)
    chosen = jnp.take_along_axis(layers.embeddings, queries[..., None], axis=2)
    masks = mask_logits("blid,bhwd->blihw", chosen, layers.features)

    def of_image(keys, masks, targets, maps) -> tuple[Array, Array]:
        of_layer = functools.partial(_mask_terms, targets=targets, maps=maps, config=config)
        return jax.lax.map(lambda layer: of_layer(*layer), (keys, masks))

    bce, dice = over_images(of_image, keys[:, 1:], masks, targets, maps)
    weight, count = jnp.where(matched, targets.weights[:, None], 0.0), jnp.sum(matched, axis=-1).astype(jnp.float32)
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
    means = [weights[name] * jnp.sum(total / jnp.maximum(count, 1.0)) for name, (total, count) in sums.items()]
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
    maps = _target_maps(targets, (height, width))
    terms_of = functools.partial(_mask_terms, config=config)
    bce, dice = over_images(terms_of, jax.random.split(key, len(mask_logits)), mask_logits, targets, maps)
    terms = {"mask": bce, "dice": dice, "iou": jnp.abs(iou - _true_iou(mask_logits, *maps))}
    found = jnp.sum(targets.valid).astype(jnp.float32)
    divisor = found if instances is None else instances
    divisor = jnp.where(divisor > 0.0, divisor, 1.0)
    sums = {name: jnp.sum(jnp.where(targets.valid, targets.weights * values, 0.0)) for name, values in terms.items()}
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


def _target_maps(targets: Targets, size: tuple[int, int]) -> tuple[Array, Array]:
    """Soft instance masks and ignore share at the resolution of the mask logits."""
    return _shrink(targets.masks, size), _shrink(targets.ignore, size)


def _shrink(maps: Bool[Array, "*batch height width"], size: tuple[int, int]) -> Float[Array, "*batch h w"]:
    height, width = maps.shape[-2:]
    if height % size[0] == 0 and width % size[1] == 0:  # the mean of whole squares costs a fraction of a resize
        rows, columns = height // size[0], width // size[1]
        # Every so many-th row, then column, added up: on a CPU 20 times as fast as a mean over axes of squares.
        lines = functools.reduce(jnp.add, [maps[..., row::rows, :].astype(jnp.float32) for row in range(rows)])
        return functools.reduce(jnp.add, [lines[..., column::columns] for column in range(columns)]) / (rows * columns)
    flat = maps.reshape(-1, height, width, 1).astype(jnp.float32)
    return resize(flat, size, antialias=True).reshape(*maps.shape[:-2], *size)


def _class_terms(
    class_logits: Float[Array, "images layers queries classes"],
    queries: Int[Array, "images layers instances"],
    matched: Bool[Array, "images layers instances"],
    free: Bool[Array, "images layers queries"],
    targets: Targets,
    config: CriterionConfig,
) -> tuple[Float[Array, "images layers"], Float[Array, "images layers"]]:
    """Cross-entropy of all queries, and what they weigh. ``free`` is False where "no object" is not to be learned.

    Classes are compared, not gathered: kernels that address memory take longer to compile, and keep their addresses.
    A label that is no class makes the loss NaN.
    """
    *_, number, classes = class_logits.shape
    found = matched[..., None] & (queries[..., None] == jnp.arange(number))  # of an instance and a query
    of_query = lambda values: jnp.sum(jnp.where(found, values[:, None, :, None], 0), axis=2)
    alone = ~jnp.any(found, axis=2)
    label = jnp.where(alone, classes - 1, of_query(targets.labels))
    weight = jnp.where(alone, jnp.where(free, config.no_object_weight, 0.0), of_query(targets.weights))
    chosen = jnp.where(label[..., None] == jnp.arange(classes), jax.nn.log_softmax(class_logits), 0.0)
    cross_entropy = jnp.where((label >= 0) & (label < classes), -jnp.sum(chosen, axis=-1), jnp.nan)
    return jnp.sum(weight * cross_entropy, axis=-1), jnp.sum(weight, axis=-1)


def _mask_terms(key, logits, targets: Targets, maps, config) -> tuple[Array, Array]:
    """Cross-entropy and dice of one image's mask logits, one for each instance; padding's too."""
    if config.num_points is not None:
        points = _uncertain_points(key, jax.lax.stop_gradient(logits), config)
        return _point_terms(points, logits, targets.masks, targets.ignore)
    flat = lambda maps: maps.reshape(len(maps), -1)
    soft_masks, soft_ignore = maps
    return _bce_and_dice(flat(logits), flat(soft_masks), 1.0 - flat(soft_ignore[None]))


@jax.checkpoint  # reading again costs less than keeping what was read
def _point_terms(points, logits, masks, ignore) -> tuple[Array, Array]:
    care = 1.0 - _sample(ignore[None], points.reshape(1, -1)).reshape(points.shape)
    return _bce_and_dice(_sample(logits, points), _sample(masks, points), care)


def _matching_costs(
    key: PRNGKeyArray, layers: Decoded, targets: Targets, maps: tuple[Array, Array], config: CriterionConfig
) -> tuple[Float[Array, "layers queries instances"], Bool[Array, "layers queries"]]:
    """The same costs as the loss, on one set of points for all pairs of an image; no gradient.

    With them False for queries whose mask lies mostly on ignored pixels: calling them "no object" would be a false
    lesson.
    """
    soft_masks, soft_ignore = maps
    if config.num_points is None:
        features = layers.features[::2, ::2].reshape(-1, layers.features.shape[-1])
        labels, ignored = soft_masks[:, ::2, ::2].reshape(len(soft_masks), -1), soft_ignore[::2, ::2].reshape(-1)
    else:
        points = _uniform_points(key, (1, config.num_points))
        y, x = _positions(points, layers.features.shape[:2])
        features = bilinear_sample(layers.features, jnp.stack([y[0], x[0]], axis=-1))
        labels = _sample(targets.masks, jnp.broadcast_to(points, (len(targets.masks), config.num_points)))
        ignored = _sample(targets.ignore[None], points)[0]
    # One pixel in sixteen tells where most of a mask lies.
    seldom = layers.features[::4, ::4].reshape(-1, layers.features.shape[-1])
    care, seldom_ignored = 1.0 - ignored, soft_ignore[::4, ::4].reshape(-1)

    def of_layer(layer: tuple[Array, Array]) -> tuple[Array, Array]:
        embeddings, class_logits = layer
        logits = mask_logits("qd,pd->qp", embeddings, features)
        cost = _matching_cost(logits, class_logits, targets.labels, labels, care, config)
        probability = jax.nn.sigmoid(mask_logits("qd,pd->qp", embeddings, seldom))
        return cost, probability @ seldom_ignored <= 0.5 * jnp.sum(probability, axis=-1)

    return jax.lax.map(of_layer, (layers.embeddings, layers.class_logits))


def _matching_cost(logits, class_logits, classes, labels, care, config) -> Float[Array, "queries instances"]:
    """Of one image in one layer: mask logits ``[queries, points]`` against labels ``[instances, points]``."""
    class_cost = -jax.nn.softmax(class_logits)[:, classes]
    labels = labels * care
    # softplus(x) - x y is the cross-entropy; split so that pairs are one matrix product.
    mask_cost = ((jax.nn.softplus(logits) @ care)[:, None] - logits @ labels.T) / jnp.maximum(jnp.sum(care), 1.0)
    probability = jax.nn.sigmoid(logits)
    size = (probability @ care)[:, None] + jnp.sum(labels, -1)[None]
    dice_cost = 1.0 - (2.0 * (probability @ labels.T) + 1.0) / (size + 1.0)
    return config.class_weight * class_cost + config.mask_weight * mask_cost + config.dice_weight * dice_cost


def _bce_and_dice(logits, labels, care) -> tuple[Array, Array]:
    """Of each row of logits: cross-entropy and dice, where ``care`` is 1 (of each row, or of all)."""
    care = jnp.broadcast_to(care, logits.shape)
    cross_entropy = jax.nn.softplus(logits) - logits * labels
    bce = jnp.sum(cross_entropy * care, -1) / jnp.maximum(jnp.sum(care, -1), 1.0)
    probability = jax.nn.sigmoid(logits) * care
    overlap = 2.0 * jnp.sum(probability * labels, -1)
    return bce, 1.0 - (overlap + 1.0) / (jnp.sum(probability, -1) + jnp.sum(labels * care, -1) + 1.0)


def _sample(maps: Float[Array, "maps h w"], points: UInt32[Array, "maps points"]) -> Float[Array, "maps points"]:
    """Reads each map at its own points."""
    return sample_each(maps, *_positions(points, maps.shape[1:]))


def _uncertain_points(key, logits: Float[Array, "maps h w"], config: CriterionConfig) -> UInt32[Array, "maps points"]:
    """PointRend's importance sampling: most uncertain of an oversampled uniform set, topped up uniformly."""
    assert config.num_points is not None
    num_candidates = int(config.num_points * config.oversample)
    num_uncertain = int(config.num_points * config.importance)
    drawn = _uniform_points(key, (logits.shape[0], num_candidates + config.num_points - num_uncertain))
    candidates, uniform = jnp.split(drawn, [num_candidates], axis=1)
    best = nearest_to_zero(_sample(logits, candidates), num_uncertain)
    return jnp.concatenate([take_rows(candidates, best), uniform], axis=1)


def _uniform_points(key, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Points of the unit square, 16 bits a coordinate: more would cost a second random number."""
    return jax.random.bits(key, shape, jnp.uint32)


def _positions(points: UInt32[Array, "*shape"], size: tuple[int, ...]) -> tuple[Array, Array]:
    """The points' (y, x) on a map of ``size``."""
    height, width = size
    y, x = (points >> 16).astype(jnp.float32), (points & 0xFFFF).astype(jnp.float32)
    return y * (height / 2.0**16), x * (width / 2.0**16)
