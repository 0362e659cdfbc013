"""The detector's two stages: proposals from the encoded image, and a decoder that refines them layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cast_jax.models.layers import Linear, rematerialise
from cast_jax.models.stack import Stack
from cast_jax.models.teacher.deformable_attention import DeformableAttention, Levels
from cast_jax.models.teacher.grounding_dino_layers import (
    Attention,
    FeedForward,
    Perceptron,
    TokenLogits,
    box_head,
    layer_norm,
    logit,
    sine,
)

TEMPERATURE = 10_000.0  # of the encoding of boxes
SIDE = 0.05  # of a proposal on the finest map; it doubles from map to map
MARGIN = 0.01  # from the image's borders, within which nothing is proposed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """What the decoder looks at: image and text after the encoder."""

    image: Float[Array, "batch positions features"]
    text: Float[Array, "batch tokens features"]
    text_mask: Bool[Array, "batch tokens"]
    levels: Levels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposals:
    """The first stage's choice, best first.

    Attributes:
      indices: ``[batch, queries]``, positions of the encoded image.
      class_logits: ``[batch, queries, tokens]``.
      boxes: ``[batch, queries, 4]``, (x, y, width, height) of the centre in [0, 1].
    """

    indices: Int[Array, "batch queries"]
    class_logits: Float[Array, "batch queries tokens"]
    boxes: Float[Array, "batch queries 4"]


class Selection(nnx.Module):
    """The positions that resemble any token of the text most, each with a box around it."""

    def __init__(self, features: int, num_queries: int, scaled_logits: bool, *, dtype, rngs: nnx.Rngs):
        self.linear = Linear(features, features, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(features, dtype=dtype, rngs=rngs)
        self.class_head, self.box_head = TokenLogits(scaled_logits), box_head(features, rngs=rngs)
        self.num_queries = num_queries

    def scores(self, scene: Scene) -> Float[Array, "batch positions"]:
        """How much every position resembles the token that it resembles most."""
        return self.class_head(self._objects(scene)[0], scene.text, scene.text_mask).max(axis=-1)

    def choose(self, scene: Scene) -> Int[Array, "batch queries"]:
        """The positions with the highest scores, best first.

        Raises ValueError if the image has fewer than there are queries.
        """
        positions = scene.image.shape[1]
        if positions < self.num_queries:
            raise ValueError(f"{self.num_queries} queries, but the image has {positions} positions; use larger images")
        return jax.lax.top_k(self.scores(scene), self.num_queries)[1]

    def __call__(self, scene: Scene, indices: Int[Array, "batch queries"]) -> Proposals:
        """What is proposed at the positions ``indices``."""
        objects, anchors = self._objects(scene)
        take = lambda values: jnp.take_along_axis(values, indices[..., None], axis=1)
        boxes = jax.nn.sigmoid(self.box_head(take(objects)) + take(anchors))
        return Proposals(indices, self.class_head(take(objects), scene.text, scene.text_mask), boxes)

    def _objects(self, scene: Scene) -> tuple[Float[Array, "batch positions features"], Array]:
        """What might be at every position, and the logits of a box there."""
        anchors, inside = proposals_around(scene.levels)
        return self.norm(self.linear(jnp.where(inside, scene.image, 0.0))), anchors


def proposals_around(levels: Levels) -> tuple[Float[Array, "batch positions 4"], Bool[Array, "batch positions 1"]]:
    """The logits of a square around every position, and whether it is proposed.

    Those near the image's borders or on padding are not: their logits are infinite, so their boxes are (1, 1, 1, 1).
    """
    centres = levels.centres()
    sides = jnp.concatenate(
        [jnp.full((rows * columns, 2), SIDE * 2.0**level) for level, (rows, columns) in enumerate(levels.sizes)]
    )
    boxes = jnp.concatenate([centres, jnp.broadcast_to(sides, centres.shape)], axis=-1)
    inside = jnp.all((boxes > MARGIN) & (boxes < 1 - MARGIN), axis=-1, keepdims=True) & levels.valid[..., None]
    return jnp.where(inside, logit(boxes, MARGIN / 2), jnp.inf), inside


class DecoderLayer(nnx.Module):
    """Queries look at each other, at the text and at the image, each with a residual and a norm after it."""

    def __init__(
        self, features: int, ffn_dim: int, num_heads: int, num_levels: int, num_points: int, *, dtype, rngs: nnx.Rngs
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.self_attention, self.text_attention = (Attention(features, num_heads, **options) for _ in range(2))
        self.image_attention = DeformableAttention(features, num_heads, num_levels, num_points, **options)
        self.self_norm, self.text_norm, self.image_norm = (layer_norm(features, **options) for _ in range(3))
        self.ffn = FeedForward(features, ffn_dim, **options)

    def __call__(self, inputs: tuple[Array, Array, Array, Scene], key: None) -> Float[Array, "batch queries features"]:
        """``inputs`` are queries, their position encodings, their boxes in every map, and the scene."""
        del key  # no dropout, as the published weights were trained
        queries, positions, boxes, scene = inputs
        placed = queries + positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        visible = jnp.broadcast_to(scene.text_mask[:, None], (*queries.shape[:2], scene.text.shape[1]))
        read = self.text_attention(queries + positions, scene.text, scene.text, visible)
        queries = self.text_norm(queries + read)
        read = self.image_attention(queries + positions, boxes, scene.image, scene.levels)
        return self.ffn(self.image_norm(queries + read))


class Decoder(nnx.Module):
    """Refines learned queries and proposed boxes; every layer predicts.

    ``shared_boxes`` and ``shared_logits`` say whether one head serves all layers.
    """

    def __init__(
        self,
        features: int,
        ffn_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        num_layers: int,
        num_queries: int,
        *,
        scaled_logits: bool,
        shared_boxes: bool,
        shared_logits: bool,
        remat: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        sizes = (features, ffn_dim, num_heads, num_levels, num_points)
        self.queries = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_queries, features)))
        self.position_head = Perceptron(2 * features, features, features, rngs=rngs)
        self.layers = Stack(functools.partial(DecoderLayer, *sizes, dtype=dtype), num_layers, rngs=rngs)
        self.norm = layer_norm(features, dtype=dtype, rngs=rngs)
        box_heads, class_heads = (1 if shared else num_layers for shared in (shared_boxes, shared_logits))
        self.box_heads = Stack(functools.partial(box_head, features), box_heads, rngs=rngs)
        self.class_heads = Stack(lambda rngs: TokenLogits(scaled_logits), class_heads, rngs=rngs)
        self.remat, self.dtype = remat, dtype

    def __call__(
        self, scene: Scene, boxes: Float[Array, "batch queries 4"]
    ) -> tuple[
        Float[Array, "layers batch queries tokens"],
        Float[Array, "layers batch queries 4"],
        Float[Array, "batch queries features"],
    ]:
        """The class logits and boxes of every layer, and the last layer's queries; boxes are (x, y, width, height).

        A layer starts from the boxes of the one before without their gradient, but what it predicts passes it on, so
        that each head learns from two layers ("look forward twice"; Zhang et al., 2022, DINO).
        """
        batch, features = len(boxes), scene.image.shape[-1]
        queries = jnp.broadcast_to(self.queries[...].astype(self.dtype), (batch, *self.queries.shape))
        ratios = jnp.concatenate([scene.levels.ratios] * 2, axis=-1)[:, None]

        def run(layers: list[DecoderLayer], carry: tuple[Array, ...], heads: list[Any]) -> tuple[Any, list[Any]]:
            queries, boxes, _ = carry
            references = jax.lax.stop_gradient(boxes)
            in_maps = references[:, :, None] * ratios
            positions = self.position_head(encode_boxes(in_maps[:, :, 0], features)).astype(self.dtype)
            inputs = (queries, positions, in_maps, scene)
            queries = rematerialise(DecoderLayer.__call__, layers[0], inputs, None, when=self.remat)
            normed = self.norm(queries)
            correct, classify = self.box_heads.layer(heads[0][0]), self.class_heads.layer(heads[0][1])
            predicted = jax.nn.sigmoid(correct(normed) + logit(boxes))
            boxes = jax.nn.sigmoid(correct(queries) + logit(references))
            return (queries, boxes, normed), [(classify(normed, scene.text, scene.text_mask), predicted)]

        share = lambda array: jnp.broadcast_to(array, (self.layers.count, *array.shape[1:]))
        heads = jax.tree.map(share, (self.box_heads.parameters, self.class_heads.parameters))
        carry, (logits, predicted) = self.layers.scan(run, (queries, jax.lax.stop_gradient(boxes), queries), heads)
        return logits, predicted, carry[2]


def encode_boxes(boxes: Float[Array, "*shape 4"], features: int) -> Float[Array, "*shape double"]:
    """Sine encodings of y, x, width and height, in this order, half of ``features`` each."""
    y_first = jnp.stack([boxes[..., 1], boxes[..., 0], boxes[..., 2], boxes[..., 3]], axis=-1)
    return sine(y_first, features // 2, TEMPERATURE).reshape(*boxes.shape[:-1], -1)
