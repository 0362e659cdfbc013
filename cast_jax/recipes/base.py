"""What a trained step optimises. The trainer drives every recipe through this interface and knows nothing else."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from cast_jax.core.geometry import unpack_masks
from cast_jax.losses.set_criterion import Targets

Params = dict[str, Any]
Batch = dict[str, Any]
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


class Recipe(Protocol):
    """Initial parameters and the loss of a step."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters."""
        ...

    def loss_fn(self, params: Params, frozen: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
        """The scalar loss and its metrics as (sum, count) pairs; ``frozen`` is never differentiated or saved."""
        ...


def view_images(view: Batch) -> Float[Array, "batch height width 3"]:
    """A view's uint8 images as floats in [0, 1]."""
    return view["image"].astype(jnp.float32) / 255.0


def view_targets(view: Batch, weights: Float[Array, "batch instances"] | None = None) -> Targets:
    """A view's packed annotations as criterion targets; ``weights`` scale single instances (default 1)."""
    width = view["image"].shape[2]
    return Targets(
        masks=unpack_masks(view["masks"], width),
        labels=view["labels"],
        valid=view["instance_valid"],
        weights=jnp.ones_like(view["scores"]) if weights is None else weights,
        ignore=unpack_masks(view["ignore"], width),
    )
