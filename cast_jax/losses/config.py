"""Settings of the set criterion."""

from __future__ import annotations

import dataclasses

from cast_jax.core.config import check_ranges


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
