"""Swin Transformer (Liu et al., 2021): attention within windows that move by half a window from block to block.

As detectors run it (and Hugging Face's ``SwinBackbone``): maps of any size are padded to whole windows, and every
second block moves its windows even where the map is no larger than one. Classifiers (``SwinModel``, Microsoft's
release) do not move them there: at the resolution that they were trained for their last stage differs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.convolution import PatchEmbedding
from cast_jax.models.layers import REMAT, LayerNorm, Linear, drop_path, rematerialise
from cast_jax.models.stack import Stack
from cast_jax.models.windows import attend_within, from_windows, to_windows

PATCH = 4  # pixels along a side of what the first stage calls a position
MLP_RATIO = 4
MASKED = -100.0  # added to the logits of positions that were not neighbours before the windows moved
EPSILON = 1e-5  # of every layer normalisation


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Four stages at strides 4, 8, 16 and 32.

    Attributes:
      embed_dim: channels of the first stage; they double from stage to stage.
      depths: blocks of each stage.
      num_heads: attention heads of each stage.
      window_size: positions along a side of a window.
      learned_norms: the stages (0-based) whose map is normalised with a learned scale and bias. The others' maps are
        normalised without: classifiers have no such norms, and their residual sums, which grow with depth, would reach
        the decoder as they are. Nothing is lost, since the decoder begins with a linear layer.
      drop_path: rate of the last block; it grows linearly from 0 in the first.
      remat: what the gradient computes again, see :data:`cast_jax.models.layers.REMAT`.
    """

    embed_dim: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 7
    learned_norms: tuple[int, ...] = (0, 1, 2, 3)
    drop_path: float = 0.0
    remat: str = "none"

    def __post_init__(self) -> None:
        check_choices(self, remat=REMAT)
        for name in ("depths", "num_heads"):
            if len(getattr(self, name)) != 4:
                raise UserError(f"{name} must have four values, one a stage, got {getattr(self, name)}")
        check_ranges(self, embed_dim="[1, 65536]", depths="[1, 1024]", num_heads="[1, 65536]", window_size="[1, 1024]")
        check_ranges(self, learned_norms="[0, 3]", drop_path="[0, 1)")
        if any(width % heads for width, heads in zip(self.map_widths, self.num_heads, strict=True)):
            raise UserError(f"num_heads {self.num_heads} must divide the stages' channels {self.map_widths}")

    @property
    def depth(self) -> int:
        """How many maps there are to choose from: one a stage."""
        return len(self.depths)

    @property
    def patch_size(self) -> int:
        """Image sides must be multiples of this, the coarsest stride."""
        return 32

    @property
    def stride(self) -> int:
        """Pixels between the positions of the third map, the decoder's unit."""
        return 16

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(self.embed_dim * 2**stage for stage in range(self.depth))

    @property
    def pyramid(self) -> bool:
        """Each map is half the size of the one before."""
        return True


def swin_t(**changes: Any) -> SwinConfig:
    """Swin-T, 28 M parameters."""
    return SwinConfig(**changes)


def swin_s(**changes: Any) -> SwinConfig:
    """Swin-S, 49 M parameters."""
    return SwinConfig(**{"depths": (2, 2, 18, 2)} | changes)


def swin_b(**changes: Any) -> SwinConfig:
    """Swin-B, 87 M parameters; windows of 7 (224 pixels; the weights trained at 384 have 12)."""
    sizes: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return SwinConfig(**sizes | changes)


def swin_l(**changes: Any) -> SwinConfig:
    """Swin-L, 195 M parameters; windows of 12 (384 pixels; the weights trained at 224 have 7)."""
    sizes: dict[str, Any] = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
    return SwinConfig(**sizes | {"window_size": 12} | changes)


class WindowAttention(nnx.Module):
    """Multi-head self-attention within each window, with a learned bias for each offset between two positions."""

    def __init__(self, features: int, num_heads: int, window: int, *, dtype, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(features, features, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        init = nnx.initializers.truncated_normal(0.02)
        self.position_bias = nnx.Param(init(rngs.params(), ((2 * window - 1) ** 2, num_heads)))
        self.num_heads, self.window = num_heads, window

    def __call__(
        self,
        windows: Float[Array, "batch windows positions channels"],
        regions: Int[Array, "windows positions"] | None = None,
    ) -> Float[Array, "batch windows positions channels"]:
        """``regions`` numbers the positions of each window: those of other regions are masked."""
        added = self.position_bias[...][offsets(self.window)].transpose(2, 0, 1)[None]
        if regions is not None:
            apart = regions[:, None, :, None] != regions[:, None, None, :]
            added = added + jnp.where(apart, MASKED, 0.0)
        query, key, value = self.query(windows), self.key(windows), self.value(windows)
        return self.out(attend_within(query, key, value, self.num_heads, added))


def offsets(window: int) -> Int[np.ndarray, "positions positions"]:
    """The row of the bias table for each query and key: their vertical offset, then their horizontal one."""
    y, x = np.divmod(np.arange(window**2), window)
    vertical, horizontal = (c[:, None] - c[None, :] + window - 1 for c in (y, x))
    return vertical * (2 * window - 1) + horizontal


def moved_regions(rows: int, columns: int, window: int, shift: int) -> Int[Array, "windows positions"]:
    """Which positions of each window were neighbours before the map was rolled by ``shift``: those of equal number."""

    def along(length: int) -> Array:
        position = jnp.arange(length)  # no numpy constant: compared pairwise it would become a large one
        return (position >= length - window).astype(jnp.int32) + (position >= length - shift)

    regions = 3 * along(rows)[:, None] + along(columns)
    return to_windows(regions[None, :, :, None], window)[0, :, :, 0]


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        window: int,
        remat: str,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = LayerNorm(features, epsilon=EPSILON, **options)
        self.attention = WindowAttention(features, num_heads, window, **options)
        self.norm2 = LayerNorm(features, epsilon=EPSILON, **options)
        self.fc1 = Linear(features, MLP_RATIO * features, **options)
        self.fc2 = Linear(MLP_RATIO * features, features, **options)
        self.window, self.remat = window, remat

    def __call__(
        self,
        features: Float[Array, "batch rows columns channels"],
        key: Array | None,
        rate: float | Float[Array, ""],
        *,
        shift: int,
    ) -> Float[Array, "batch rows columns channels"]:
        """``shift`` is how far the windows have moved down and right, ``rate`` that of drop path."""
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        features = features + drop_path(self._attend(self.norm1(features), shift), rate, keys[0])
        again = functools.partial(rematerialise, when=self.remat == "elementwise")
        hidden = again(lambda self, x: self.fc1(self.norm2(x)), self, features)
        branch = again(lambda self, x: self.fc2(jax.nn.gelu(x, approximate=False)), self, hidden)
        return features + drop_path(branch, rate, keys[1])

    def _attend(self, features: Array, shift: int) -> Array:
        """Attention within windows; the padding, zeros at the bottom and right, takes part in it."""
        height, width = features.shape[1:3]
        if not shift:
            return from_windows(self.attention(to_windows(features, self.window)), height, width)
        padded = jnp.pad(features, ((0, 0), (0, -height % self.window), (0, -width % self.window), (0, 0)))
        rows, columns = padded.shape[1:3]
        rolled = jnp.roll(padded, (-shift, -shift), axis=(1, 2))
        regions = moved_regions(rows, columns, self.window, shift)
        mixed = from_windows(self.attention(to_windows(rolled, self.window), regions), rows, columns)
        return jnp.roll(mixed, (shift, shift), axis=(1, 2))[:, :height, :width]


class PatchMerging(nnx.Module):
    """Halves a map: the four positions of each 2 x 2 patch, column by column, become two times as many channels."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * features, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.reduction = Linear(4 * features, 2 * features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch half_rows half_columns double_channels"]:
        batch, rows, columns, channels = features.shape
        patches = features.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(patches.reshape(batch, rows // 2, columns // 2, 4 * channels)))


class Swin(nnx.Module):
    """The encoder. Parameters are float32; activations and results are ``dtype``."""

    def __init__(self, config: SwinConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"dtype": dtype, "rngs": rngs}
        self.patch_embedding = PatchEmbedding(3, config.embed_dim, PATCH, **options)
        self.embedding_norm = LayerNorm(config.embed_dim, epsilon=EPSILON, **options)
        stages, norms = [], []
        for stage, (width, depth) in enumerate(zip(config.map_widths, config.depths, strict=True)):
            sizes = width, config.num_heads[stage], config.window_size, config.remat
            stages.append(Stack(functools.partial(Block, *sizes, dtype=dtype), depth, rngs=rngs))
            learned = stage in config.learned_norms
            norms.append(LayerNorm(width, epsilon=EPSILON, use_scale=learned, use_bias=learned, **options))
        self.stages, self.output_norms = nnx.List(stages), nnx.List(norms)
        self.merging = nnx.List([PatchMerging(width, **options) for width in config.map_widths[:-1]])

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        layers: tuple[int, ...] = (0, 1, 2, 3),
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _height _width _channels"]]:
        """The maps of the stages ``layers`` (0-based, fine to coarse), normalised; ``rngs`` switches drop path on.

        Raises ValueError for sizes that are no multiple of the patch size.
        """
        found = self.intermediates(images, rngs=rngs)
        return [found[f"maps/{layer}"] for layer in layers]

    def intermediates(
        self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Array]:
        """The embedded patches, every block's result and every stage's normalised map, by name."""
        height, width, patch = *images.shape[1:3], self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"image sizes must be multiples of the patch size {patch}, got {height}x{width}")
        features = self.embedding_norm(self.patch_embedding(images))
        found = {"embedding": features}
        rates = jnp.linspace(0.0, self.config.drop_path, sum(self.config.depths))
        first = 0
        for stage, blocks in enumerate(self.stages):
            keys = None if rngs is None else jax.random.split(rngs.dropout(), blocks.count)
            given = rates[first : first + blocks.count] if self.config.drop_path else None, keys
            features, results = blocks.scan(self._run, features, given, together=2)
            found |= {f"blocks/{first + number}": result for number, result in enumerate(results)}
            first += blocks.count
            found[f"maps/{stage}"] = self.output_norms[stage](features)
            if stage < len(self.merging):
                features = self.merging[stage](features)
        return found

    def _run(self, blocks: list[Block], features: Array, given: list[Any]) -> tuple[Array, list[Array]]:
        """A block whose windows lie at the map's corner, and one whose windows have moved by half their side."""
        found = []
        for number, (block, (rate, key)) in enumerate(zip(blocks, given, strict=True)):
            run = functools.partial(Block.__call__, shift=self.config.window_size // 2 * number)
            rate = 0.0 if rate is None else rate
            features = rematerialise(run, block, features, key, rate, when=self.config.remat == "blocks")
            found.append(features)
        return features, found
