"""The "pseudo probability" of a pixel: what the model itself believes about its instance and its class.

The debiased sampler compares pixels by this vector. Nothing here is differentiated: the sampler is no part of the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MAPS = ("fusion", "mask", "class", "uniform")


def pseudo_probability(
    mask_logits: Float[Array, "batch queries height width"],
    class_logits: Float[Array, "batch queries classes"],
    kind: str = "fusion",
) -> Float[Array, "batch height width dim"]:
    """``g = [m ; π]`` of the paper's section 3.2, in float32 and without gradient.

    ``m`` is the softmax of the mask logits over the queries, ``π = Σ_q m_q c_q`` the class distribution expected under
    it, ``c`` the softmax of the class logits (the last class is "no object"). Resize the mask logits to the features'
    resolution first. ``kind`` chooses an ablation: ``"mask"`` keeps ``m`` and makes ``π`` uniform, ``"class"`` keeps
    ``π`` and makes ``m`` uniform, ``"uniform"`` compares nothing: its map has no channels (dim = 0), and
    ``ContrastiveConfig(map="uniform")`` draws every candidate alike without reading it.

    Raises:
        ValueError: for an unknown ``kind``.
    """
    if kind not in MAPS:
        raise ValueError(f"unknown pseudo-probability map {kind!r}; known: {', '.join(MAPS)}")
    mask_logits, class_logits = jax.lax.stop_gradient((mask_logits, class_logits))
    membership = jax.nn.softmax(jnp.moveaxis(mask_logits, 1, -1).astype(jnp.float32), axis=-1)
    if kind == "uniform":
        return membership[..., :0]
    class_probabilities = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)
    expected_class = jnp.einsum("bhwq,bqc->bhwc", membership, class_probabilities, precision=jax.lax.Precision.HIGHEST)
    if kind == "mask":
        expected_class = jnp.full_like(expected_class, 1 / expected_class.shape[-1])
    if kind == "class":
        membership = jnp.full_like(membership, 1 / membership.shape[-1])
    return jnp.concatenate([membership, expected_class], axis=-1)


def normalise(vectors: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Divides by the L2 norm, in float32; a zero vector stays zero and has a finite gradient."""
    vectors, squared_norm = _with_squared_norm(vectors)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))


def normalise_finite(
    vectors: Float[Array, "*batch dim"], wanted: Bool[Array, "*batch"]
) -> tuple[Float[Array, "*batch dim"], Bool[Array, "*batch"]]:
    """:func:`normalise` where ``wanted``, zeros elsewhere; and which vectors, with their squared norm, are finite."""
    vectors, squared_norm = _with_squared_norm(vectors)
    finite = jnp.isfinite(squared_norm)
    unit = vectors * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))
    return jnp.where(wanted[..., None] & finite, unit, 0.0), finite[..., 0]


def _with_squared_norm(vectors: Float[Array, "*batch dim"]) -> tuple[Array, Array]:
    vectors = jnp.asarray(vectors)
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    return vectors, jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
