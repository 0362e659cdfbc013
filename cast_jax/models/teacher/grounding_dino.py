"""Grounding DINO (Liu et al., 2023) and MM-Grounding-DINO (Zhao et al., 2024): boxes for what a text names.

Inference computes what Hugging Face's modules do; where those train differently, gradients are mmdetection's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cast_jax.models.convolution import Conv3x3, PatchEmbedding
from cast_jax.models.layers import Linear, rematerialise
from cast_jax.models.stack import Stack
from cast_jax.models.swin import Swin
from cast_jax.models.teacher.bert import Bert
from cast_jax.models.teacher.deformable_attention import levels_of
from cast_jax.models.teacher.grounding_dino_config import GROUPS, GroundingDinoConfig
from cast_jax.models.teacher.grounding_dino_decoder import Decoder, Proposals, Scene, Selection
from cast_jax.models.teacher.grounding_dino_encoder import EncoderLayer, Surroundings
from cast_jax.models.teacher.grounding_dino_layers import EPSILON, sine
from cast_jax.models.teacher.text import Tokens

Maps = list[Float[Array, "batch _rows _columns features"]]
IMAGE_TEMPERATURE, TEXT_TEMPERATURE = 20.0, 10_000.0  # of the position encodings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Prompts after BERT, in the detector's width; one for the batch or one for each image."""

    features: Float[Array, "prompts tokens features"]
    mask: Bool[Array, "prompts tokens"]
    blocks: Bool[Array, "prompts tokens tokens"]
    positions: Int[Array, "prompts tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
    """The detector's results. Logits and boxes are float32; boxes are (x, y, width, height), of the centre, in [0, 1].

    Of a padded image, 1 is the end of its valid part.

    Attributes:
      class_logits: ``[layers, batch, queries, tokens]``, of every decoder layer; those of padding tokens are -10,000.
      boxes: ``[layers, batch, queries, 4]``.
      proposals: the first stage's.
      query_features: ``[batch, queries, features]``, of the last decoder layer.
      scene: image and text after the encoder.
    """

    class_logits: Float[Array, "layers batch queries tokens"]
    boxes: Float[Array, "layers batch queries 4"]
    proposals: Proposals
    query_features: Float[Array, "batch queries features"]
    scene: Scene


def class_probabilities(
    class_logits: Float[Array, "*batch queries tokens"], class_map: Float[Array, "classes tokens"]
) -> Float[Array, "*batch queries classes"]:
    """The mean probability over each class's tokens; zero for classes that the prompt does not ask for.

    ``class_map`` is a prompt's row of ``text.Prompts.class_map``.
    """
    total = jnp.einsum("...qt,ct->...qc", jax.nn.sigmoid(class_logits), class_map)
    return total / jnp.maximum(jnp.sum(class_map, axis=-1), 1.0)


class InputProjection(nnx.Module):
    """A map in the detector's width, normalised in groups of channels; ``halve`` makes it half as large."""

    def __init__(self, in_features: int, features: int, halve: bool, *, dtype, rngs: nnx.Rngs):
        layer = functools.partial(Conv3x3, stride=2) if halve else functools.partial(PatchEmbedding, patch=1)
        self.convolution = layer(in_features, features, dtype=dtype, rngs=rngs)
        self.norm = nnx.GroupNorm(features, GROUPS, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Float[Array, "batch rows columns in_features"]
    ) -> Float[Array, "batch _rows _columns features"]:
        return self.norm(self.convolution(maps))


class GroundingDino(nnx.Module):
    """The detector. Parameters are float32, activations ``dtype``, boxes, logits and positions float32."""

    def __init__(self, config: GroundingDinoConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        features = config.hidden_dim
        self.backbone = Swin(config.backbone, **options)
        self.bert = Bert(config.bert, **options)
        self.text_projection = Linear(config.bert.hidden_dim, features, **options)
        widths = [config.backbone.map_widths[stage] for stage in config.stages]
        made = [widths[-1], *(features,) * config.num_levels][: config.num_levels - len(widths)]
        projections = [(width, False) for width in widths] + [(width, True) for width in made]
        self.input_projections = nnx.List(
            [InputProjection(width, features, halve, **options) for width, halve in projections]
        )
        self.level_embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.num_levels, features)))
        sizes = (config.num_heads, config.num_levels, config.num_points)
        make = functools.partial(
            EncoderLayer, features, config.encoder_ffn_dim, *sizes, config.fusion_drop_path, dtype=dtype
        )
        self.encoder = Stack(make, config.encoder_layers, rngs=rngs)
        self.selection = Selection(features, config.num_queries, config.scaled_logits, **options)
        self.decoder = Decoder(
            features,
            config.decoder_ffn_dim,
            *sizes,
            config.decoder_layers,
            config.num_queries,
            scaled_logits=config.scaled_logits,
            shared_boxes=config.shared_boxes,
            shared_logits=config.shared_logits,
            remat=config.remat,
            **options,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width 3"] | Maps,
        text: Tokens | EncodedText,
        *,
        pixel_mask: Bool[Array, "batch height width"] | None = None,
        indices: Int[Array, "batch queries"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Detections:
        """Detects.

        Args:
          images: normalised with ImageNet's mean and deviation; sides are multiples of 32. Or what
            :meth:`encode_image` made of them.
          text: a prompt for each image or one for all: tokens, or what :meth:`encode_text` made of them.
          pixel_mask: False on padding, at the bottom and right; None for none.
          indices: forces the first stage's choice of positions.
          rngs: switches drop path on.

        Raises:
          ValueError: sizes that are no multiple of 32, or too small for the number of queries.
        """
        scene = self.encode(images, text, pixel_mask=pixel_mask, rngs=rngs)
        proposals = self.selection(scene, self.selection.choose(scene) if indices is None else indices)
        class_logits, boxes, queries = self.decoder(scene, proposals.boxes)
        return Detections(class_logits, boxes, proposals, queries, scene)

    def encode_text(self, tokens: Tokens) -> EncodedText:
        """What depends on the text alone: computed once, it serves all images."""
        encoded = self.text_projection(self.bert(tokens.ids, tokens.positions, tokens.blocks))
        return EncodedText(encoded, tokens.mask, tokens.blocks, tokens.positions)

    def encode_image(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> Maps:
        """What depends on the images alone, computed once for all prompts: the backbone's maps and coarser ones.

        All are in the detector's width, fine to coarse; ``rngs`` switches drop path on.
        """
        found = self.backbone(images, layers=self.config.stages, rngs=rngs)
        maps = [project(level) for project, level in zip(self.input_projections, found, strict=False)]
        coarsest = found[-1]
        for project in self.input_projections[len(found) :]:
            coarsest = project(coarsest)
            maps.append(coarsest)
        return maps

    def encode(
        self,
        images: Float[Array, "batch height width 3"] | Maps,
        text: Tokens | EncodedText,
        *,
        pixel_mask: Bool[Array, "batch height width"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Scene:
        """Image and text after the encoder; arguments as of the call."""
        return self._scenes(images, text, pixel_mask, rngs)[-1]

    def intermediates(
        self,
        images: Float[Array, "batch height width 3"],
        text: Tokens | EncodedText,
        *,
        pixel_mask: Bool[Array, "batch height width"] | None = None,
        indices: Int[Array, "batch queries"] | None = None,
    ) -> dict[str, Array]:
        """The text before the encoder, both after each of its layers, and all that is predicted, by name."""
        first, *scenes = self._scenes(images, text, pixel_mask, None)
        stages = {"text": first.text}
        for number, scene in enumerate(scenes):  # at least one
            stages |= {f"encoder/{number}/image": scene.image, f"encoder/{number}/text": scene.text}
        stages["logits/positions"] = self.selection.scores(scene)
        proposals = self.selection(scene, self.selection.choose(scene) if indices is None else indices)
        stages |= {"logits/proposals": proposals.class_logits, "boxes/proposals": proposals.boxes}
        class_logits, boxes, queries = self.decoder(scene, proposals.boxes)
        return stages | {"logits/layers": class_logits, "boxes/layers": boxes, "queries": queries}

    def _scenes(
        self,
        images: Float[Array, "batch height width 3"] | Maps,
        text: Tokens | EncodedText,
        pixel_mask: Bool[Array, "batch height width"] | None,
        rngs: nnx.Rngs | None,
    ) -> list[Scene]:
        """Image and text before the encoder and after each of its layers."""
        words = self.encode_text(text) if isinstance(text, Tokens) else text
        maps = images if isinstance(images, list) else self.encode_image(images, rngs=rngs)
        words = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(maps[0]), *leaf.shape[1:])), words)
        masks = [_resized(pixel_mask, level) for level in maps]
        levels = levels_of(masks)
        around = Surroundings(
            levels,
            self._positions(masks),
            levels.centres()[:, :, None] * levels.ratios[:, None],
            words.mask,
            words.blocks,
            sine(words.positions, self.config.hidden_dim, TEXT_TEMPERATURE).astype(self.dtype),
        )
        image = jnp.concatenate([level.reshape(len(level), -1, level.shape[-1]) for level in maps], axis=1)

        def run(layers: list[EncoderLayer], features: tuple[Array, Array], keys: list[Any]) -> tuple[Any, list[Any]]:
            inputs = (*features, around)
            features = rematerialise(EncoderLayer.__call__, layers[0], inputs, keys[0], when=self.config.remat)
            return features, [features]

        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.config.encoder_layers)
        _, encoded = self.encoder.scan(run, (image, words.features), keys)
        before = Scene(image, words.features, words.mask, levels)
        return [before, *(Scene(image, text, words.mask, levels) for image, text in zip(*encoded, strict=True))]

    def _positions(self, masks: list[Bool[Array, "batch _rows _columns"]]) -> Float[Array, "batch positions features"]:
        """Sine encodings of y and x, counted over valid positions, and the embedding of the level."""
        encoded = []
        for level, mask in enumerate(masks):
            counts = [jnp.cumsum(mask, axis=axis, dtype=jnp.float32) for axis in (1, 2)]
            y, x = counts[0] / (counts[0][:, -1:] + 1e-6), counts[1] / (counts[1][:, :, -1:] + 1e-6)
            both = [sine(values, self.config.hidden_dim // 2, IMAGE_TEMPERATURE) for values in (y, x)]
            flat = jnp.concatenate(both, axis=-1).reshape(len(mask), -1, self.config.hidden_dim)
            encoded.append((flat + self.level_embedding[level]).astype(self.dtype))
        return jnp.concatenate(encoded, axis=1)


def _resized(
    mask: Bool[Array, "batch height width"] | None, level: Float[Array, "batch rows columns features"]
) -> Bool[Array, "batch rows columns"]:
    """A pixel mask at a map's resolution: the nearest pixel at or before each position."""
    if mask is None:
        return jnp.ones(level.shape[:3], bool)
    rows, columns = (np.arange(new) * old // new for new, old in zip(level.shape[1:3], mask.shape[1:], strict=True))
    return mask[:, rows][:, :, columns]
