"""SAM 2's mask decoder (Ravi et al., 2024): a two-way transformer between prompts and image, and the heads on it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_ranges
from cast_jax.models.convolution import PatchExpansion
from cast_jax.models.layers import LayerNorm, Linear
from cast_jax.models.windows import attend_within

EPSILON = 1e-5  # of the two-way transformer's layer normalisations
UPSCALE_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Sam2MaskDecoderConfig:
    """Sizes of the decoder.

    Attributes:
      num_layers, num_heads, ffn_dim: of the two-way transformer.
      downsample: by how much attention between prompts and image is narrower than the features.
      num_multimasks: masks for one ambiguous prompt, beside the single one.
      iou_hidden_dim: of the head that predicts each mask's IoU.
      stability_delta, stability_threshold: a single mask is stable if the share of its pixels above delta among those
        above -delta reaches the threshold; else the best of the multiple masks takes its place.
    """

    num_layers: int = 2
    num_heads: int = 8
    ffn_dim: int = 2048
    downsample: int = 2
    num_multimasks: int = 3
    iou_hidden_dim: int = 256
    stability_delta: float = 0.05
    stability_threshold: float = 0.98

    def __post_init__(self) -> None:
        sizes = ("num_layers", "num_heads", "ffn_dim", "downsample", "num_multimasks", "iou_hidden_dim")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 65536]"), stability_delta="[0, inf)")
        check_ranges(self, stability_threshold="[0, 1]")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks by prompt; all float32.

    Attributes:
      logits: a pixel belongs to the mask where positive, at a quarter of the image's size.
      iou: the predicted IoU of each mask with what it shows, in (0, 1).
      object_logits: whether there is an object at all.
    """

    logits: Float[Array, "batch prompts masks height/4 width/4"]
    iou: Float[Array, "batch prompts masks"]
    object_logits: Float[Array, "batch prompts"]


class Attention(nnx.Module):
    """Multi-head attention within each prompt; what all prompts share (an axis of one) is projected once."""

    def __init__(self, features: int, inner: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        linear = lambda i, o: Linear(i, o, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (linear(features, inner) for _ in range(3))
        self.out = linear(inner, features)
        self.num_heads = num_heads

    def __call__(
        self,
        query: Float[Array, "batch #prompts queries features"],
        key: Float[Array, "batch #prompts keys features"],
        value: Float[Array, "batch #prompts keys features"],
    ) -> Float[Array, "batch prompts queries features"]:
        prompts = max(query.shape[1], key.shape[1])
        spread = lambda values: jnp.broadcast_to(values, (len(values), prompts, *values.shape[2:]))
        projected = spread(self.query(query)), spread(self.key(key)), spread(self.value(value))
        return self.out(attend_within(*projected, num_heads=self.num_heads))


class Mlp(nnx.Module):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, *widths: int, dtype, rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([Linear(i, o, dtype=dtype, rngs=rngs) for i, o in pairs])

    def __call__(self, values: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        for layer in self.layers[:-1]:
            values = jax.nn.relu(layer(values))
        return self.layers[-1](values)


class TwoWayLayer(nnx.Module):
    """Tokens read each other and the image, then the image reads the tokens. Post-norm.

    Positions are added to queries and keys, never to values; the ``first`` layer's tokens are their own positions.
    """

    def __init__(self, features: int, config: Sam2MaskDecoderConfig, first: bool, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        inner = features // config.downsample
        self.self_attention = Attention(features, features, config.num_heads, **options)
        self.tokens_to_image = Attention(features, inner, config.num_heads, **options)
        self.mlp = Mlp(features, config.ffn_dim, features, **options)
        self.image_to_tokens = Attention(features, inner, config.num_heads, **options)
        norms = (LayerNorm(features, epsilon=EPSILON, **options) for _ in range(4))
        self.norm1, self.norm2, self.norm3, self.norm4 = norms
        self.first = first

    def __call__(self, tokens: Array, image: Array, token_positions: Array, image_positions: Array):
        """Both, updated."""
        if self.first:
            tokens = self.norm1(self.self_attention(tokens, tokens, tokens))
        else:
            located = tokens + token_positions
            tokens = self.norm1(tokens + self.self_attention(located, located, tokens))
        seen = self.tokens_to_image(tokens + token_positions, image + image_positions, image)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        read = self.image_to_tokens(image + image_positions, tokens + token_positions, tokens)
        return tokens, self.norm4(image + read)


class Transformer(nnx.Module):
    """The layers, and a last look of the tokens at the image."""

    def __init__(self, features: int, config: Sam2MaskDecoderConfig, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        layers = range(config.num_layers)
        self.layers = nnx.List([TwoWayLayer(features, config, layer == 0, **options) for layer in layers])
        inner = features // config.downsample
        self.tokens_to_image = Attention(features, inner, config.num_heads, **options)
        self.norm = LayerNorm(features, epsilon=EPSILON, **options)

    def __call__(
        self,
        tokens: Float[Array, "batch prompts tokens features"],
        image: Float[Array, "batch #prompts cells features"],
        image_positions: Float[Array, "cells features"],
    ) -> tuple[Float[Array, "batch prompts tokens features"], Float[Array, "batch prompts cells features"]]:
        positions = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, positions, image_positions)
        seen = self.tokens_to_image(tokens + positions, image + image_positions, image)
        return self.norm(tokens + seen), image


class Sam2MaskDecoder(nnx.Module):
    """Prompt tokens and image features to masks. Parameters are float32; activations are ``dtype``, results float32."""

    def __init__(self, features: int, config: Sam2MaskDecoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        masks = config.num_multimasks + 1
        draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))
        self.object_token, self.iou_token, self.mask_tokens = draw(features), draw(features), draw(masks, features)
        self.transformer = Transformer(features, config, **options)
        self.project4 = Linear(features, features // 8, **options)
        self.project8 = Linear(features, features // 4, **options)
        self.expand8 = PatchExpansion(features, features // 4, 2, **options)
        self.norm8 = LayerNorm(features // 4, epsilon=UPSCALE_EPSILON, **options)
        self.expand4 = PatchExpansion(features // 4, features // 8, 2, **options)
        heads = [Mlp(features, features, features, features // 8, **options) for _ in range(masks)]
        self.mask_heads = nnx.List(heads)
        self.iou_head = Mlp(features, config.iou_hidden_dim, config.iou_hidden_dim, masks, **options)
        self.object_head = Mlp(features, features, features, 1, **options)
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        image: Float[Array, "batch #prompts rows columns features"],
        positions: Float[Array, "rows columns features"],
        stride8: Float[Array, "batch 2*rows 2*columns features/4"],
        stride4: Float[Array, "batch 4*rows 4*columns features/8"],
        prompts: Float[Array, "batch prompts tokens features"],
    ) -> Masks:
        """All masks, the single one first; ``stride8`` and ``stride4`` come from ``project8`` and ``project4``."""
        batch, number, _, features = prompts.shape
        rows, columns = image.shape[2:4]
        own = jnp.concatenate([self.object_token[...][None], self.iou_token[...][None], self.mask_tokens[...]])
        own = jnp.broadcast_to(own, (batch, number, *own.shape))
        tokens = jnp.concatenate([own, prompts.astype(own.dtype)], axis=2).astype(self.dtype)
        flat = image.reshape(*image.shape[:2], rows * columns, features)
        tokens, seen = self.transformer(tokens, flat, positions.reshape(rows * columns, features).astype(self.dtype))

        finer = self.expand8(seen.reshape(batch * number, rows, columns, features))
        finer = jax.nn.gelu(self.norm8(_add(finer, stride8)), approximate=False)
        finest = jax.nn.gelu(_add(self.expand4(finer), stride4), approximate=False)
        finest = finest.reshape(batch, number, *finest.shape[1:])
        kernels = jnp.stack([head(tokens[:, :, 2 + n]) for n, head in enumerate(self.mask_heads)], axis=2)
        logits = jnp.einsum("bpmc,bpyxc->bpmyx", kernels, finest, preferred_element_type=jnp.float32)
        return Masks(
            logits=logits,
            iou=jax.nn.sigmoid(self.iou_head(tokens[:, :, 1]).astype(jnp.float32)),
            object_logits=self.object_head(tokens[:, :, 0])[..., 0].astype(jnp.float32),
        )


def _add(
    prompted: Float[Array, "batch*prompts rows columns features"], image: Float[Array, "batch rows columns features"]
) -> Float[Array, "batch*prompts rows columns features"]:
    """Adds an image's map to each of its prompts'."""
    by_image = prompted.reshape(len(image), -1, *image.shape[1:])
    return (by_image + image[:, None]).reshape(prompted.shape)


def choose(masks: Masks, config: Sam2MaskDecoderConfig, *, multimask: bool, train: bool) -> Masks:
    """The masks that are asked for: all but the single one if ``multimask``, else one.

    That is the single one in training. Otherwise, where it is not stable, the one of the others with the largest
    predicted IoU (Ravi et al., 2024, appendix; ``dynamic_multimask_via_stability``).
    """
    single, others = (
        dataclasses.replace(masks, logits=masks.logits[:, :, part], iou=masks.iou[:, :, part])
        for part in (slice(0, 1), slice(1, None))
    )
    if multimask or train:
        return others if multimask else single
    inside, around = (
        jnp.sum(single.logits > limit, axis=(-2, -1)) for limit in (config.stability_delta, -config.stability_delta)
    )
    stable = jnp.where(around > 0, inside / jnp.maximum(around, 1), 1.0) >= config.stability_threshold
    best = jnp.argmax(others.iou, axis=-1, keepdims=True)
    return dataclasses.replace(
        masks,
        logits=jnp.where(
            stable[..., None, None],
            single.logits,
            jnp.take_along_axis(others.logits, best[..., None, None], axis=2),
        ),
        iou=jnp.where(stable, single.iou, jnp.take_along_axis(others.iou, best, axis=2)),
    )
