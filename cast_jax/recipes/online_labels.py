"""Pseudo-labels made during training: a moving average of the model looks at the weak view and teaches the strong one.

The systems that CAST is compared with label their images so: Unbiased Teacher (Liu et al., 2021), Guided Distillation
(Berrada et al., 2024) and PAIS (Hu et al., 2023).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from cast_jax.contrastive.correspondence import correspond
from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.geometry import inside_box, pixel_centres, scale_positions
from cast_jax.data.views import VIEW_NAMES
from cast_jax.models.segmenter import SATURATION, Prediction, score_instances
from cast_jax.recipes.base import Batch

WEIGHTINGS = ("none", "quality")
CANDIDATES = 100  # the best predictions of an image (or as many as it has slots), of which duplicates are left out


@dataclasses.dataclass(frozen=True)
class OnlineLabelsConfig:
    """Which instances become labels, and what they weigh.

    Attributes:
      class_threshold: least class probability (0.7 in Unbiased Teacher and Guided Distillation, 0.35 in PAIS).
      mask_threshold: least mask quality (0.3 in PAIS).
      max_iou: of two instances that overlap by more, the one with the better score stays; ``config.pseudo_labels``' if
        a run leaves it unset.
      min_area: an instance with fewer pixels than this in a view is absent from that view; the views' own if unset.
      weighting: "none", or "quality": PAIS's, by which a class term weighs 12 min(p, 1/2)^4 for a class of probability
        p, the terms of a mask 2.5 q^4 for one of quality q, and "no object" 0.35^2 (the values of its reference
        implementation).
    """

    class_threshold: float = 0.7
    mask_threshold: float = 0.0
    max_iou: float | None = None
    min_area: int | None = None
    weighting: str = "none"

    def __post_init__(self) -> None:
        check_ranges(self, class_threshold="[0, 1]", mask_threshold="[0, 1]", max_iou="[0, 1]", min_area="[1, inf)")
        check_choices(self, weighting=WEIGHTINGS)


def label_views(
    prediction: Prediction, group: Batch, config: OnlineLabelsConfig, views: Sequence[str] = VIEW_NAMES
) -> Batch:
    """``group`` with what is found in its weak view as the labels of ``views``, in the same slots.

    These views get ``class_weights`` and ``mask_weights`` [images, slots] and ``background_weights`` [images] besides,
    and the group counts as ``instances_cut`` what is found and has no slot.

    Args:
      prediction: of the weak view's images; no gradient flows through the labels.
      group: both views of unlabelled images, as ``cast_jax.data.views.make_views`` makes them.
    """
    assert config.max_iou is not None, "see RunConfig.online_labels"
    assert config.min_area is not None
    weak = group["weak"]
    size, slots = weak["image"].shape[1:3], weak["labels"].shape[1]
    found = jax.lax.stop_gradient(score_instances(prediction, max(CANDIDATES, slots)))
    probability = found.scores / jnp.maximum(found.mask_quality, 1e-6)
    kept = (probability >= config.class_threshold) & (found.mask_quality >= config.mask_threshold)
    grid = (found.mask_logits.shape[2], found.mask_logits.shape[3])
    centres = scale_positions(pixel_centres(*grid), grid, size)
    real = jax.vmap(inside_box, (0, None))(weak["valid_box"], centres).reshape(-1, 1, *grid)
    masks = (found.mask_logits > 0) & real
    kept = jax.vmap(functools.partial(without_duplicates, max_iou=config.max_iou))(masks, kept)
    pixels = size[0] * size[1] / (grid[0] * grid[1])  # of the image under one of the grid
    speck = jnp.sum(masks, axis=(2, 3)) * pixels < config.min_area
    cut = jnp.maximum(jnp.sum(kept & ~speck, axis=1, dtype=jnp.int32) - slots, 0)
    best = jnp.argsort(jnp.where(kept, speck, 2), axis=1, stable=True)[:, :slots]
    in_slots = lambda values: jnp.take_along_axis(values, best.reshape(*best.shape, *(1,) * (values.ndim - 2)), axis=1)
    found, probability, kept = jax.tree.map(in_slots, (found, probability, kept))

    if config.weighting == "quality":
        weights = 12.0 * jnp.minimum(probability, 0.5) ** 4, 2.5 * found.mask_quality**4, 0.35**2
    else:
        weights = jnp.ones_like(probability), jnp.ones_like(probability), 1.0
    shared = {
        "labels": found.labels.astype(jnp.int32),
        "scores": jnp.where(kept, found.scores, 0.0),
        "class_weights": weights[0],
        "mask_weights": weights[1],
        "background_weights": jnp.full(len(kept), weights[2], jnp.float32),
    }
    # Bounded and read bilinearly, as predictions are (``cast_jax.predict.mask_at_original``).
    logits = jnp.moveaxis(jnp.clip(found.mask_logits, -SATURATION, SATURATION), 1, -1)
    to_weak = group["strong_to_weak"]
    labelled = {**group, "instances_cut": cut}
    for name in views:
        view, matrix = group[name], to_weak if name == "strong" else jnp.broadcast_to(jnp.eye(2, 3), to_weak.shape)
        boxes = {"valid_box_strong": view["valid_box"], "valid_box_weak": weak["valid_box"]}
        read, shown = correspond(logits, matrix, image_size=size, strong_grid=size, **boxes)
        masks = jnp.moveaxis((read > 0) & shown[..., None], 2, 1).reshape(-1, slots, *size)
        valid = kept & (jnp.sum(masks, axis=(2, 3)) >= config.min_area)
        packed = jnp.packbits(masks & valid[..., None, None], axis=-1, bitorder="little")
        labelled[name] = {**view, **shared, "masks": packed, "instance_valid": valid}
    return labelled


def without_duplicates(
    masks: Bool[Array, "instances h w"], candidates: Bool[Array, "instances"], max_iou: float
) -> Bool[Array, "instances"]:
    """Of instances, best first, the candidates that overlap no kept one before them by more than ``max_iou``.

    As ``core.annotations.suppress_duplicates``, on the device.
    """
    flat = masks.reshape(len(masks), -1).astype(jnp.float32)
    both = flat @ flat.T
    area = jnp.diagonal(both)
    overlaps = both > max_iou * (area[:, None] + area - both)
    before = jnp.tri(len(masks), k=-1, dtype=bool)

    def decide(position: Array, kept: Array) -> Array:
        covered = jnp.any(kept & overlaps[position] & before[position])
        return kept.at[position].set(kept[position] & ~covered)

    return jax.lax.fori_loop(0, len(masks), decide, candidates)
