"""The detector's loss: matching boxes, focal classification over the prompt's tokens, L1 and generalised IoU.

As in DINO (Zhang et al., 2022) and MM-Grounding-DINO (Zhao et al., 2024; mmdetection's ``GroundingDINOHead``), without
denoising queries. A class is asked for by words, so a query's label is the set of its class's tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cast_jax.core.config import check_ranges
from cast_jax.core.geometry import mask_boxes
from cast_jax.losses.matching import match_all
from cast_jax.losses.set_criterion import Metrics
from cast_jax.losses.targets import Targets

# (token_logits, boxes, class_map) of one prompt: of every layer, (x, y, width, height) of centres in [0, 1], and which
# tokens ask for which class.
Detected = tuple[
    Float[Array, "batch layers queries tokens"],
    Float[Array, "batch layers queries 4"],
    Float[Array, "batch classes tokens"],
]


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """Weights of the detector's terms; the defaults are mmdetection's.

    Attributes:
      class_weight, box_weight, giou_weight: in the loss.
      class_cost, box_cost, giou_cost: in the matching.
      alpha, gamma: of the focal loss (Lin et al., 2017): what positives weigh, and by how much easy tokens count less.
    """

    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        weights = [field.name for field in dataclasses.fields(self) if field.name != "alpha"]
        check_ranges(self, **dict.fromkeys(weights, "[0, inf)"), alpha="[0, 1]")


@jax.named_scope("criterion")
def detection_loss(
    detected: Sequence[Detected], targets: Targets, config: DetectionConfig, instances: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Sums the loss over all prompts and layers, each matched by itself.

    A prompt's queries meet the instances of the classes that it asks for. Of the others, those whose box lies mostly on
    ignored pixels count for nothing.

    Args:
      detected: by prompt.
      targets: what to match; boxes are those around the masks.
      config: weights.
      instances: what the terms are divided by; None for the number of instances in the (global) batch.

    Returns:
      The weighted loss, and the unweighted terms of the last layer as (sum, count) pairs.
    """
    corners = mask_boxes(targets.masks)
    found = jnp.sum(targets.valid).astype(jnp.float32)
    divisor = found if instances is None else instances
    divisor = jnp.where(divisor > 0.0, divisor, 1.0)
    weights = {"class": config.class_weight, "box": config.box_weight, "giou": config.giou_weight}
    total, last = jnp.zeros(()), dict.fromkeys(weights, jnp.zeros(()))
    # Over the images of the batch, and there over the layers, which share an image's instances.
    costs_of: Callable[..., Array] = _by_layer(functools.partial(_matching_cost, config=config), shared=2)
    terms_of: Callable[..., dict[str, Array]] = _by_layer(functools.partial(_layer_terms, config=config), shared=6)
    for logits, boxes, class_map in detected:
        logits, boxes = logits.astype(jnp.float32), boxes.astype(jnp.float32)
        labels = jnp.take_along_axis(class_map, targets.labels[..., None], axis=1)  # [batch, instances, tokens]
        asked = targets.valid & jnp.any(labels > 0, axis=-1)
        with jax.named_scope("matching"):
            costs = jnp.moveaxis(costs_of(logits, boxes, labels, corners), 1, 0)
            query, matched = (jnp.moveaxis(values, 0, 1) for values in match_all(costs, asked))
        weighted = (targets.class_weights, targets.mask_weights, targets.background_weights)
        terms = terms_of(logits, boxes, query, matched, labels, corners, *weighted, targets.ignore)
        for name, values in terms.items():  # [batch, layers]
            total = total + weights[name] * jnp.sum(values) / divisor
            last[name] = last[name] + jnp.sum(values[:, -1])
    return total, {name: (value, found) for name, value in last.items()}


def focal_loss(
    logits: Float[Array, "*shape"], labels: Float[Array, "*shape"], alpha: float, gamma: float
) -> Float[Array, "*shape"]:
    """-alpha_t (1 - p_t)^gamma log p_t, elementwise (Lin et al., 2017)."""
    probability = jax.nn.sigmoid(logits)
    wrong = probability + labels - 2.0 * probability * labels  # 1 - p_t
    cross_entropy = jax.nn.softplus(logits) - logits * labels
    return (alpha * labels + (1.0 - alpha) * (1.0 - labels)) * wrong**gamma * cross_entropy


def generalised_iou(a: Float[Array, "*#shape 4"], b: Float[Array, "*#shape 4"]) -> Float[Array, "*shape"]:
    """IoU less the share of the smallest box around both that neither covers (Rezatofighi et al., 2019).

    Boxes are (left, top, right, bottom).
    """
    area = lambda box: (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    overlap = jnp.prod(jnp.maximum(sides, 0.0), axis=-1)
    union = area(a) + area(b) - overlap
    around = jnp.prod(jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2]), axis=-1)
    return overlap / jnp.maximum(union, 1e-7) - (around - union) / jnp.maximum(around, 1e-7)


def _by_layer(of: Callable[..., Any], shared: int) -> Callable[..., Any]:
    """``of`` over images and layers; of its arguments the last ``shared`` are the same for all layers."""

    def over_layers(*arguments: Array) -> Any:
        own = len(arguments) - shared
        return jax.vmap(of, in_axes=(0,) * own + (None,) * shared)(*arguments)

    return jax.vmap(over_layers)


def _matching_cost(logits, boxes, labels, corners, config: DetectionConfig) -> Float[Array, "queries instances"]:
    logits, boxes = jax.lax.stop_gradient((logits, boxes))
    focal = functools.partial(focal_loss, logits, alpha=config.alpha, gamma=config.gamma)
    classes = focal(jnp.ones_like(logits)) @ labels.T + focal(jnp.zeros_like(logits)) @ (1.0 - labels).T
    distance = jnp.sum(jnp.abs(boxes[:, None] - _centred(corners)), axis=-1)
    giou = generalised_iou(_cornered(boxes)[:, None], corners)
    return config.class_cost * classes + config.box_cost * distance - config.giou_cost * giou


def _layer_terms(
    logits, boxes, query, matched, labels, corners, class_weights, box_weights, background_weight, ignore, config
) -> dict[str, Array]:
    """The sums of one image's terms in one layer, given the matched query of each instance."""
    weight = jnp.where(matched, box_weights, 0.0)
    # Unmatched instances write out of bounds, which `mode="drop"` discards.
    slot = jnp.where(matched, query, len(logits))
    tokens = jnp.zeros_like(logits).at[slot].set(labels, mode="drop")
    background = background_weight * _outside_ignore(_cornered(boxes), ignore)
    counted = background.at[slot].set(class_weights, mode="drop")
    of_classes = jnp.sum(counted[:, None] * focal_loss(logits, tokens, config.alpha, config.gamma))
    found = boxes[query]
    distance = jnp.sum(jnp.abs(found - _centred(corners)), axis=-1)
    giou = generalised_iou(_cornered(found), corners)
    return {"class": of_classes, "box": jnp.sum(weight * distance), "giou": jnp.sum(weight * (1.0 - giou))}


def _outside_ignore(corners: Float[Array, "queries 4"], ignore: Bool[Array, "height width"]) -> Float[Array, "queries"]:
    """0 for boxes that lie mostly on ignored pixels: calling them background would be a false lesson."""
    height, width = ignore.shape
    sums = jnp.pad(jnp.cumsum(jnp.cumsum(ignore.astype(jnp.float32), axis=0), axis=1), ((1, 0), (1, 0)))
    scaled = jnp.clip(jax.lax.stop_gradient(corners), 0.0, 1.0) * jnp.array([width, height] * 2)
    left, top, right, bottom = jnp.round(scaled).astype(jnp.int32).T
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return jnp.where(inside > 0.5 * (bottom - top) * (right - left), 0.0, 1.0)


def _cornered(boxes: Float[Array, "*shape 4"]) -> Float[Array, "*shape 4"]:
    """(x, y, width, height) of centres as (left, top, right, bottom)."""
    return jnp.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1)


def _centred(corners: Float[Array, "*shape 4"]) -> Float[Array, "*shape 4"]:
    """The inverse of :func:`_cornered`."""
    return jnp.concatenate([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], axis=-1)
