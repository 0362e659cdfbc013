"""What a mask decoder predicts, as models make it and losses read it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


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
        last = self.embeddings[:, -1]
        return jnp.einsum("bqd,bhwd->bqhw", last, self.features, preferred_element_type=jnp.float32)
