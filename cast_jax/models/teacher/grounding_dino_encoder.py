"""The detector's encoder: in each layer image and text look at each other, then each at itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cast_jax.models.layers import LayerScale, Linear, drop_path
from cast_jax.models.teacher.chunks import in_chunks
from cast_jax.models.teacher.deformable_attention import DeformableAttention, Levels
from cast_jax.models.teacher.grounding_dino_layers import Attention, FeedForward, layer_norm

FIRST_GAIN = 1e-4  # of an untrained fusion's two results
MASKED = -1e9  # the logit of padding, below any other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What all layers of an encoder share.

    Attributes:
      levels: the image's maps.
      positions: ``[batch, positions, features]``, the encoding of every position and its level.
      references: ``[batch, positions, levels, 2]``, where every position lies in every map.
      text_mask: ``[batch, tokens]``, False on padding.
      text_blocks: ``[batch, tokens, tokens]``, True between tokens of one phrase.
      text_positions: ``[batch, tokens, features]``, the encoding of the place in the phrase.
    """

    levels: Levels
    positions: Float[Array, "batch positions features"]
    references: Float[Array, "batch positions levels 2"]
    text_mask: Bool[Array, "batch tokens"]
    text_blocks: Bool[Array, "batch tokens tokens"]
    text_positions: Float[Array, "batch tokens features"]


class Fusion(nnx.Module):
    """Cross-attention in both directions from one product of image and text (Li et al., 2022, GLIP)."""

    def __init__(self, features: int, hidden: int, num_heads: int, drop_path: float = 0.0, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        linear = lambda i, o: Linear(i, o, dtype=dtype, kernel_init=init, rngs=rngs)
        self.image_norm, self.text_norm = (layer_norm(features, dtype=dtype, rngs=rngs) for _ in range(2))
        self.image_query, self.text_key = linear(features, hidden), linear(features, hidden)
        self.image_value, self.text_value = linear(features, hidden), linear(features, hidden)
        self.image_out, self.text_out = linear(hidden, features), linear(hidden, features)
        self.image_scale, self.text_scale = (LayerScale(features, init=FIRST_GAIN, dtype=dtype) for _ in range(2))
        self.num_heads, self.drop_path = num_heads, drop_path

    def __call__(
        self,
        image: Float[Array, "batch positions features"],
        text: Float[Array, "batch tokens features"],
        image_mask: Bool[Array, "batch positions"],
        text_mask: Bool[Array, "batch tokens"],
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch positions features"], Float[Array, "batch tokens features"]]:
        """Both with what they see of each other added; the masks are False on padding.

        The residuals start after the norms, as published. The published code also subtracts the largest logit of the
        batch and clips at ±50,000, for softmaxes in half precision; these are in float32, which is the same as long as
        logits differ by less. The softmax over the image is put together from those over chunks of it.
        """
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        image, text = self.image_norm(image), self.text_norm(text)
        split = lambda values: values.reshape(*values.shape[:2], self.num_heads, -1)
        text_key, text_value = split(self.text_key(text)), split(self.text_value(text))

        def look(image: Array, image_mask: Array) -> tuple[Array, ...]:
            query = split(self.image_query(image))
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, text_key, preferred_element_type=jnp.float32)
            logits = logits * query.shape[-1] ** -0.5
            over_text = jax.nn.softmax(jnp.where(text_mask[:, None, None], logits, MASKED), axis=-1)
            seen = jnp.einsum("bhqk,bkhd->bqhd", over_text.astype(image.dtype), text_value)
            logits = jnp.where(image_mask[:, None, :, None], logits, MASKED)
            highest = jax.lax.stop_gradient(logits.max(axis=2, keepdims=True))
            weights, value = jnp.exp(logits - highest), split(self.image_value(image))
            total = weights.astype(image.dtype)
            total = jnp.einsum("bhqk,bqhd->bhkd", total, value, preferred_element_type=jnp.float32)
            by_chunk = highest[:, :, 0], weights.sum(axis=2), total
            return self.image_out(seen.reshape(*seen.shape[:2], -1)), *(part[:, None] for part in by_chunk)

        to_image, highest, weights, total = in_chunks(look, image, image_mask)
        gain = jnp.exp(highest - highest.max(axis=1, keepdims=True))
        seen = jnp.sum(gain[..., None] * total, axis=1) / jnp.sum(gain * weights, axis=1)[..., None]
        seen = seen.astype(text.dtype).transpose(0, 2, 1, 3).reshape(*text.shape[:2], -1)
        to_image, to_text = self.image_scale(to_image[:, : image.shape[1]]), self.text_scale(self.text_out(seen))
        return image + drop_path(to_image, self.drop_path, keys[0]), text + drop_path(to_text, self.drop_path, keys[1])


class EncoderLayer(nnx.Module):
    """Fusion, self-attention of the text within its phrases, deformable self-attention of the image."""

    def __init__(
        self,
        features: int,
        ffn_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        fusion_drop_path: float,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.fusion = Fusion(features, ffn_dim // 2, num_heads // 2, fusion_drop_path, **options)
        self.text_attention = Attention(features, num_heads // 2, **options)
        self.text_norm = layer_norm(features, **options)
        self.text_ffn = FeedForward(features, ffn_dim // 2, **options)
        self.image_attention = DeformableAttention(features, num_heads, num_levels, num_points, **options)
        self.image_norm = layer_norm(features, **options)
        self.image_ffn = FeedForward(features, ffn_dim, **options)

    def __call__(
        self,
        inputs: tuple[Float[Array, "batch positions features"], Float[Array, "batch tokens features"], Surroundings],
        key: Array | None,
    ) -> tuple[Float[Array, "batch positions features"], Float[Array, "batch tokens features"]]:
        """``inputs`` are the image, the text and what surrounds them; ``key`` switches drop path on."""
        image, text, around = inputs
        image, text = self.fusion(image, text, around.levels.valid, around.text_mask, key)
        placed = text + around.text_positions
        text = self.text_norm(text + self.text_attention(placed, placed, text, around.text_blocks))
        read = self.image_attention(image + around.positions, around.references, image, around.levels)
        image = self.image_norm(image + read)
        return in_chunks(self.image_ffn, image)[:, : image.shape[1]], self.text_ffn(text)
