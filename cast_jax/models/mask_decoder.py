"""A light masked-attention transformer decoder in the spirit of Mask2Former (Cheng et al. 2022).

Two kinds of queries. ``learned`` are Mask2Former's: free vectors that find their object by attention; they need
pretraining or long schedules. ``grid`` places one query on each cell of the pixel map: it starts from the pixel
feature there and its mask logits carry a quadratic spatial prior around a predicted centre (in the spirit of SMCA,
Gao et al. 2021), so that a model trained from scratch separates neighbours from the first steps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cast_jax.core import target
from cast_jax.core.config import check_ranges
from cast_jax.core.decoded import Decoded
from cast_jax.core.errors import UserError
from cast_jax.core.geometry import bilinear_sample, pixel_centres, scale_positions
from cast_jax.core.resize import resize
from cast_jax.core.sharding import of_own_images, over_images
from cast_jax.models.attention import attend
from cast_jax.models.layers import LayerNorm, Linear
from cast_jax.models.stack import Stack


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """Sizes of the decoder.

    Attributes:
      hidden_dim, num_heads, ffn_dim, num_layers: of the transformer layers.
      mask_dim: channels of the product that makes mask logits.
      num_queries: learned queries (used where ``query_stride`` is 0).
      query_stride: side of a grid query's cell, in pixels of the pixel map; 0 for learned queries.
      num_levels: how many of the pyramid's maps are attended to, coarse to fine, in turn.
      dropout: on attention and feed-forward outputs.
    """

    hidden_dim: int = 256
    mask_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 2048
    num_layers: int = 9
    num_queries: int = 100
    query_stride: int = 0
    num_levels: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = ("hidden_dim", "mask_dim", "num_heads", "ffn_dim", "num_layers", "num_queries")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 65536]"), query_stride="[0, 65536]", num_levels="[1, 3]")
        check_ranges(self, dropout="[0, 1)")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:  # sines and cosines of y and x
            raise UserError(f"hidden_dim {self.hidden_dim} must be a multiple of 4 and of num_heads {self.num_heads}")


def encode_positions(positions: Float[Array, "points 2"], dim: int, longest: float) -> Float[Array, "points dim"]:
    """Sine features of (y, x) positions, y before x, with wavelengths from 4 to ``longest`` in geometric steps."""
    steps = dim // 4
    wavelengths = 4.0 * (longest / 4.0) ** (jnp.arange(steps) / max(steps - 1, 1))
    angles = 2.0 * jnp.pi * positions[:, :, None] / wavelengths
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return features.reshape(positions.shape[0], -1)


class Attention(nnx.Module):
    """Multi-head attention with separate query, key and value inputs and an optional mask."""

    def __init__(self, dim: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        linear = lambda: Linear(dim, dim, dtype=dtype, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.num_heads = num_heads

    def __call__(
        self,
        query: Float[Array, "batch queries dim"],
        key: Float[Array, "batch keys dim"],
        value: Float[Array, "batch keys dim"],
        allowed: Bool[Array, "batch queries keys"] | None = None,
    ) -> Float[Array, "batch queries dim"]:
        """``allowed`` marks the keys that each query may read; some, at least one."""
        split = lambda x: x.reshape(*x.shape[:2], self.num_heads, -1)
        # The softmax does not see the keys' bias, which adds the same to all of a query's logits. Its weights add up to
        # one, so that the values' bias can wait. The gradients of both would be passes over whole maps.
        q, k, v = split(self.query(query)), split(self.key.product(key)), split(self.value.product(value))
        mixed = attend(q, k, v, None if allowed is None else allowed[:, None])
        return self.out(self.value.add_bias(mixed.reshape(*mixed.shape[:2], -1)))


class DecoderLayer(nnx.Module):
    """Masked cross-attention, self-attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self, config: MaskDecoderConfig, *, dtype, rngs: nnx.Rngs):
        dim = config.hidden_dim
        norm = lambda: LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        linear = lambda i, o: Linear(i, o, dtype=dtype, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        self.cross = Attention(dim, config.num_heads, dtype=dtype, rngs=rngs)
        self.self_attention = Attention(dim, config.num_heads, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(dim, config.ffn_dim), linear(config.ffn_dim, dim)
        self.cross_norm, self.self_norm, self.ffn_norm = norm(), norm(), norm()
        self.dropout = config.dropout

    def __call__(
        self,
        queries: Float[Array, "batch queries dim"],
        query_positions: Float[Array, "batch queries dim"],
        keys: Float[Array, "batch keys dim"],
        values: Float[Array, "batch keys dim"],
        allowed: Bool[Array, "batch queries keys"],
        keep: Bool[Array, "batch queries _"] | None,
    ) -> Float[Array, "batch queries dim"]:
        """``keep`` is what dropout leaves: of the three branches, and of the hidden units."""
        dim = queries.shape[-1]

        def drop(x: Array, keep: Array | None, first: int) -> Array:
            return x if keep is None else jnp.where(keep[..., first : first + x.shape[-1]], x / (1.0 - self.dropout), 0)

        dropped = jax.checkpoint(drop, static_argnums=2)  # else each part of ``keep`` would be kept for the gradient

        @jax.checkpoint  # ``hidden`` is kept, and neither its signs nor what is left of it
        def contract(hidden: Array, keep: Array | None) -> Array:
            return self.down(drop(jax.nn.relu(hidden), keep, 3 * dim))

        cross = self.cross(queries + query_positions, keys, values, allowed)
        queries = self.cross_norm(queries + dropped(cross, keep, 0))
        located = queries + query_positions
        queries = self.self_norm(queries + dropped(self.self_attention(located, located, queries), keep, dim))
        return self.ffn_norm(queries + dropped(contract(self.up(queries), keep), keep, 2 * dim))


class MLP(nnx.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int, out_dim: int, *, dtype, rngs: nnx.Rngs):
        self.layers = nnx.List([Linear(dim, width, dtype=dtype, rngs=rngs) for width in (dim, dim, out_dim)])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nnx.Module):
    """Turns a feature pyramid into mask and class logits by query."""

    def __init__(self, config: MaskDecoderConfig, feature_dim: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        dim = config.hidden_dim
        linear = lambda i, o: Linear(i, o, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.level_projections = nnx.List([linear(feature_dim, dim) for _ in range(config.num_levels)])
        self.level_embeddings = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.num_levels, dim)))
        self.mask_features = linear(feature_dim, config.mask_dim)
        self.position_projection = linear(dim, dim)
        num_free = 1 if config.query_stride else config.num_queries
        self.query_content = nnx.Param(jax.random.normal(rngs.params(), (num_free, dim)))
        self.query_positions = nnx.Param(jax.random.normal(rngs.params(), (num_free, dim)))
        self.layers = Stack(functools.partial(DecoderLayer, config, dtype=dtype), config.num_layers, rngs=rngs)
        self.norm = LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.class_head = linear(dim, num_classes + 1)
        self.mask_head = MLP(dim, config.mask_dim, dtype=dtype, rngs=rngs)
        if config.query_stride:
            self.query_projection = linear(feature_dim, dim)
            self.prior_head = MLP(dim, 3, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        pixel_map: Float[Array, "batch h w features"],
        pyramid: list[Float[Array, "batch _ _ features"]],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Decoded:
        """Decodes.

        Args:
          pixel_map: the map at whose resolution masks are predicted.
          pyramid: at least ``num_levels`` maps, coarse to fine; the first ``num_levels`` are attended to in turn.
          rngs: feeds dropout; None for none.

        Returns:
          What is predicted before the first layer and after each.

        Raises:
          ValueError: the pyramid has fewer than ``num_levels`` maps.
        """
        config = self.config
        if len(pyramid) < config.num_levels:
            raise ValueError(f"mask decoder: num_levels={config.num_levels}, but the pyramid has {len(pyramid)} maps")
        batch, height, width, _ = pixel_map.shape
        anchors = self._anchors(height, width)
        mask_features = self._mask_features(pixel_map)
        queries, positions = self._initial_queries(pixel_map, anchors)

        sizes = [(source.shape[1], source.shape[2]) for source in pyramid[: config.num_levels]]
        centres = [scale_positions(pixel_centres(*size), size, (height, width)) for size in sizes]
        values, seen = [], []
        for level, centres_there in enumerate(centres):
            value = self.level_projections[level](pyramid[level]).reshape(batch, len(centres_there), -1)
            values.append(value + self.level_embeddings[level].astype(self.dtype))
            seen.append(_resize(mask_features, sizes[level]))
        keys = self._located(values, centres, height, width)

        def read(queries: Array) -> tuple[Array, Array]:
            normed = self.norm(queries)
            return normed, self._embed(normed, anchors)

        def run(layers: list[DecoderLayer], carry: tuple[Array, Array], keep: list[Any]) -> tuple[Any, Any]:
            queries, embedding = carry
            found = []
            for level, layer in enumerate(layers):
                allowed = _attention_mask(embedding, seen[level])
                queries = layer(queries, positions, keys[level], values[level], allowed, keep[level])
                found.append(read(queries))
                embedding = found[-1][1]
            return (queries, embedding), found

        first = read(queries)
        keep = self._draw_dropout(batch, queries.shape[1], rngs)
        # Keys and values of whole maps are kept for the gradient; a loop would copy them twice.
        unrolled = target.backend() == "gpu"
        _, later = self.layers.scan(run, (queries, first[1]), keep, together=config.num_levels, unrolled=unrolled)
        join = lambda one, more: jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1)
        normed, embeddings = jax.tree.map(join, first, later)
        return Decoded(embeddings, mask_features, self.class_head(normed).astype(jnp.float32))

    def _draw_dropout(self, batch: int, queries: int, rngs: nnx.Rngs | None) -> Array | None:
        """What dropout keeps in the layers, ``[layers, batch, queries, _]``: of their three branches, and hidden units.

        Drawn at once: a generator for each of 36 masks takes long to compile.
        """
        config = self.config
        if rngs is None or config.dropout == 0.0:
            return None
        dim = config.hidden_dim
        shape = (config.num_layers, batch, queries, 3 * dim + config.ffn_dim)
        return jax.random.bernoulli(rngs.dropout(), 1.0 - config.dropout, shape)

    def _located(self, values: list[Array], positions: list[Array], height: int, width: int) -> list[Array]:
        """``values`` of [batch, points, dim] with the projected sine features of their [points, 2] ``positions``.

        Learned queries see positions relative to the map, grid queries see pixels.
        """
        joined = jnp.concatenate(positions)
        if not self.config.query_stride:
            joined = joined * (1024.0 / jnp.array([height, width]))
        sines = encode_positions(joined, self.config.hidden_dim, 1024.0).astype(self.dtype)
        starts = list(accumulate(map(len, positions)))[:-1]
        graph, projection = nnx.split(self.position_projection)

        def add(projection: nnx.State, values: list[Array]) -> list[Array]:
            encoded = jnp.split(nnx.merge(graph, projection)(sines), starts)
            return [value + there for value, there in zip(values, encoded, strict=True)]

        return of_own_images(add, projection, values)

    def _anchors(self, height: int, width: int) -> Float[Array, "queries 2"] | None:
        stride = self.config.query_stride
        if not stride:
            return None
        rows, columns = max(round(height / stride), 1), max(round(width / stride), 1)
        return pixel_centres(rows, columns) * jnp.array([height / rows, width / columns])

    def _initial_queries(self, pixel_map, anchors):
        batch, height, width, _ = pixel_map.shape
        content = self.query_content.astype(self.dtype)[None]
        positions = self.query_positions.astype(self.dtype)[None]
        if anchors is not None:
            seen = over_images(lambda features: bilinear_sample(features, anchors), pixel_map)
            content = content + self.query_projection(seen)
        dim = self.config.hidden_dim
        num_queries = content.shape[1] if anchors is None else len(anchors)
        content, positions = (jnp.broadcast_to(x, (batch, num_queries, dim)) for x in (content, positions))
        if anchors is not None:
            (positions,) = self._located([positions], [anchors], height, width)
        return content, positions

    def _embed(self, normed, anchors):
        """What of the queries is multiplied with the mask features."""
        embedding = self.mask_head(normed) / math.sqrt(self.config.mask_dim)
        if anchors is None:
            return embedding
        # The prior is four more channels of the same product, in float32: squares of coordinates need it.
        prior = self._prior_embedding(self.prior_head(normed), anchors)
        return jnp.concatenate([embedding.astype(jnp.float32), prior], axis=-1)

    def _mask_features(self, pixel_map):
        features = self.mask_features(pixel_map)
        if not self.config.query_stride:
            return features
        return jnp.concatenate([features.astype(jnp.float32), self._prior_features(*features.shape[:3])], axis=-1)

    def _prior_embedding(self, raw, anchors) -> Float[Array, "batch queries 4"]:
        """Coefficients of ``1 - sharpness |position - centre|^2``, in cells: positive within a cell before training."""
        raw = raw.astype(jnp.float32)
        centre = anchors[None] / self.config.query_stride + 2.0 * jnp.tanh(raw[..., :2])
        sharpness = jax.nn.softplus(raw[..., 2:] + 0.5)
        constant = 1.0 - sharpness * jnp.sum(centre**2, axis=-1, keepdims=True)
        return jnp.concatenate([-sharpness, 2.0 * sharpness * centre, constant], axis=-1)

    def _prior_features(self, batch: int, height: int, width: int) -> Float[Array, "batch h w 4"]:
        """``(|position|^2, y, x, 1)`` of every pixel, in cells: what the coefficients multiply."""
        position = pixel_centres(height, width) / self.config.query_stride
        square = jnp.sum(position**2, axis=-1, keepdims=True)
        features = jnp.concatenate([square, position, jnp.ones_like(square)], axis=-1)
        return jnp.broadcast_to(features.reshape(height, width, 4), (batch, height, width, 4))


def _resize(features: Float[Array, "batch h w dim"], size: tuple[int, int]) -> Float[Array, "batch keys dim"]:
    """The mask features at a level's pixels: their product there is what resized mask logits would be."""
    resized = resize(jax.lax.stop_gradient(features), size)
    return resized.reshape(len(features), -1, features.shape[-1])


def _attention_mask(
    embedding: Float[Array, "batch queries dim"], features: Float[Array, "batch keys dim"]
) -> Bool[Array, "batch queries keys"]:
    """Keys inside the predicted mask; a query whose mask is empty at this level may read everything."""
    highest = jax.lax.Precision.HIGHEST  # as `mask_logits`, but of the features' type: rounding leaves signs alone
    allowed = jnp.einsum("bqd,bkd->bqk", jax.lax.stop_gradient(embedding), features, precision=highest) > 0
    return allowed | ~jnp.any(allowed, axis=-1, keepdims=True)
