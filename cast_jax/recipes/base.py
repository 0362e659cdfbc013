"""What recipes share: a batch's views as model inputs and criterion targets.

The interface that the trainer drives is :class:`cast_jax.core.step.Trainable`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cast_jax.core.geometry import mask_boxes, unpack_masks
from cast_jax.losses.targets import Targets

Batch = dict[str, Any]
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def view_images(view: Batch) -> Float[Array, "batch height width 3"]:
    """A view's uint8 images as floats in [0, 1]."""
    return view["image"].astype(jnp.float32) / 255.0


def view_boxes(view: Batch) -> Float[Array, "batch instances 4"]:
    """(left, top, right, bottom) around a view's instances, in [0, 1]; zeros on padding."""
    return mask_boxes(unpack_masks(view["masks"], view["image"].shape[2]))


def view_targets(view: Batch) -> Targets:
    """A view's packed annotations as criterion targets, each instance with its weights if the view has any."""
    width, ones = view["image"].shape[2], jnp.ones_like(view["scores"])
    return Targets(
        masks=unpack_masks(view["masks"], width),
        labels=view["labels"],
        valid=view["instance_valid"],
        class_weights=view.get("class_weights", ones),
        mask_weights=view.get("mask_weights", ones),
        background_weights=view.get("background_weights", jnp.ones(len(ones))),
        ignore=unpack_masks(view["ignore"], width),
    )
