"""What every segmenter returns, and how its queries become scored instances."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cast_jax.core.decoded import Decoded

# Mask logits beyond this are as good as certain (a probability of 0.982).
SATURATION = 4.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """The output of a segmenter; logits and features are float32.

    Attributes:
      mask_logits: ``[batch, queries, h, w]`` at the resolution of the pixel features.
      class_logits: ``[batch, queries, classes + 1]``; the last class is "no object".
      pixel_features: ``[batch, h, w, channels]``, what the contrastive projection reads.
      layers: what all decoder layers predict, the final one last, for deep supervision; None without a mask decoder.
      mask_quality: the IoU that the model itself expects of its masks; None where it has no opinion.
    """

    mask_logits: Float[Array, "batch queries h w"]
    class_logits: Float[Array, "batch queries classes+1"]
    pixel_features: Float[Array, "batch h w channels"]
    layers: Decoded | None = None
    mask_quality: Float[Array, "batch queries"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredMasks:
    """The best (query, class) pairs of each image, best first."""

    mask_logits: Float[Array, "batch top h w"]
    labels: Int[Array, "batch top"]
    scores: Float[Array, "batch top"]
    mask_quality: Float[Array, "batch top"]


def score_instances(prediction: Prediction, top_k: int) -> ScoredMasks:
    """Ranks queries x classes and scores each by class probability x mask quality.

    Mask quality is what the prediction says of it, or the mean foreground probability inside the predicted mask, as in
    Mask2Former's instance inference (Cheng et al. 2022, reference implementation ``instance_inference``).
    """
    batch, queries, classes = prediction.class_logits.shape
    top_k = min(top_k, queries * (classes - 1))
    class_probabilities = jax.nn.softmax(prediction.class_logits, axis=-1)[..., :-1]
    best, index = jax.lax.top_k(class_probabilities.reshape(batch, -1), top_k)
    query, labels = index // (classes - 1), index % (classes - 1)
    masks = jnp.take_along_axis(prediction.mask_logits, query[:, :, None, None], axis=1)
    if prediction.mask_quality is None:
        inside = masks > 0
        quality = jnp.sum(jax.nn.sigmoid(masks) * inside, axis=(2, 3)) / jnp.maximum(jnp.sum(inside, axis=(2, 3)), 1)
    else:
        quality = jnp.take_along_axis(prediction.mask_quality, query, axis=1)
    scores = best * quality
    order = jnp.argsort(-scores, axis=1)
    take = lambda values: jnp.take_along_axis(values, order, axis=1)
    return ScoredMasks(
        mask_logits=jnp.take_along_axis(masks, order[:, :, None, None], axis=1),
        labels=take(labels),
        scores=take(scores),
        mask_quality=take(quality),
    )
