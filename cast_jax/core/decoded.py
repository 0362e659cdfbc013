"""What a mask decoder predicts, as models make it and losses read it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mask_logits(subscripts: str, embeddings: Array, features: Array) -> Array:
    """Products of queries' embeddings with mask features, float32.

    Of float32 factors no bit may be lost, as accelerators do where they are not told: a grid query's prior multiplies
    squares of coordinates, whose differences are what tells neighbours apart.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, embeddings, features, precision=highest, preferred_element_type=jnp.float32)


class Decoded(NamedTuple):
    """What is predicted before the first decoder layer and after each: mask logits are ``embeddings`` x ``features``.

    Only the last ones are formed whole. The product commutes with reading between pixels, and what needs the others
    looks at few places, or at few queries.
    """

    embeddings: Float[Array, "batch layers queries dim"]
    features: Float[Array, "batch h w dim"]
    class_logits: Float[Array, "batch layers queries classes+1"]

    def last_masks(self) -> Float[Array, "batch queries h w"]:
        """The final mask logits, float32."""
        return mask_logits("bqd,bhwd->bqhw", self.embeddings[:, -1], self.features)
