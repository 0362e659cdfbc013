"""Hiera (Ryali et al., 2023) as SAM 2 runs it: the image encoder's trunk, without the pyramid that follows there.

Attention is within windows but for a few blocks that see the whole map. The first block of a stage halves its map: its
queries are the largest of each 2 x 2 positions, and its windows still have the size of the stage before.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.resize import resize
from cast_jax.core.sharding import of_own_images
from cast_jax.models.attention import attend
from cast_jax.models.layers import REMAT, LayerNorm, Linear, drop_path, gelu, rematerialise
from cast_jax.models.windows import attend_within, from_windows, to_windows

PATCH = 4  # pixels between the positions of the first stage
MLP_RATIO = 4
EPSILON = 1e-6  # of every layer normalisation


@dataclasses.dataclass(frozen=True)
class HieraConfig:
    """Four stages at strides 4, 8, 16 and 32.

    Attributes:
      embed_dim, num_heads: channels and attention heads of the first stage; both double from stage to stage.
      depths: blocks of each stage.
      window_sizes: positions along a side of each stage's windows.
      global_blocks: the blocks (0-based, counted through all stages) that attend over the whole map.
      position_size: sides of the learned position embedding that is resized to the map, in positions.
      normalised_maps: whether the maps, sums of many residuals, come normalised (without a learned scale: the trunk has
        none). The student's decoder, which begins with a linear layer, wants them so; SAM 2's own pyramid does not.
      drop_path: rate of the last block; it grows linearly from 0 in the first.
      remat: what the gradient computes again, see :data:`cast_jax.models.layers.REMAT`.
    """

    embed_dim: int = 96
    num_heads: int = 1
    depths: tuple[int, int, int, int] = (1, 2, 11, 2)
    window_sizes: tuple[int, int, int, int] = (8, 4, 14, 7)
    global_blocks: tuple[int, ...] = (7, 10, 13)
    position_size: tuple[int, int] = (7, 7)
    normalised_maps: bool = True
    drop_path: float = 0.0
    remat: str = "none"

    def __post_init__(self) -> None:
        check_choices(self, remat=REMAT)
        for name in ("depths", "window_sizes"):
            if len(getattr(self, name)) != 4:
                raise UserError(f"{name} must have four values, one a stage, got {getattr(self, name)}")
        check_ranges(self, embed_dim="[1, 65536]", num_heads="[1, 65536]", depths="[1, 1024]")
        check_ranges(self, window_sizes="[1, 1024]", position_size="[1, 65536]", drop_path="[0, 1)")
        check_ranges(self, global_blocks=f"[0, {sum(self.depths) - 1}]")
        if self.embed_dim % self.num_heads:
            raise UserError(f"num_heads {self.num_heads} must divide embed_dim {self.embed_dim}")
        if self.patch_size % (PATCH * self.window_sizes[0]):
            raise UserError(f"window_sizes {self.window_sizes}: the first must divide {self.patch_size // PATCH}")
        if halving := set(self.first_blocks[1:]) & set(self.global_blocks):
            raise UserError(f"global_blocks {self.global_blocks} must not have {sorted(halving)}: they halve the map")
        if any(size % 2 for size in self.window_sizes[:-1]):
            raise UserError(f"window_sizes {self.window_sizes} must be even, to be halved, but for the last")

    @property
    def first_blocks(self) -> tuple[int, ...]:
        """The number of each stage's first block."""
        return tuple(sum(self.depths[:stage]) for stage in range(self.depth))

    def stage_of(self, block: int) -> int:
        """The stage (0-based) of a block."""
        return sum(block >= first for first in self.first_blocks) - 1

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


def sam2_t(**changes: Any) -> HieraConfig:
    """SAM 2's tiny trunk, 27 M parameters."""
    return HieraConfig(**{"depths": (1, 2, 7, 2), "global_blocks": (5, 7, 9)} | changes)


def sam2_s(**changes: Any) -> HieraConfig:
    """SAM 2's small trunk, 34 M parameters."""
    return HieraConfig(**changes)


def sam2_b_plus(**changes: Any) -> HieraConfig:
    """SAM 2's base+ trunk, 69 M parameters."""
    sizes: dict[str, Any] = {"embed_dim": 112, "num_heads": 2, "depths": (2, 3, 16, 3), "position_size": (14, 14)}
    return HieraConfig(**sizes | {"global_blocks": (12, 16, 20)} | changes)


def sam2_l(**changes: Any) -> HieraConfig:
    """SAM 2's large trunk, 212 M parameters."""
    sizes: dict[str, Any] = {"embed_dim": 144, "num_heads": 2, "depths": (2, 6, 36, 4), "window_sizes": (8, 4, 16, 8)}
    return HieraConfig(**sizes | {"global_blocks": (23, 33, 43)} | changes)


class Block(nnx.Module):
    """A pre-norm transformer block; ``window`` 0 is the whole map, one that ``halves`` makes its map half as large."""

    def __init__(
        self,
        in_features: int,
        features: int,
        num_heads: int,
        window: int,
        halves: bool,
        drop_path: float,
        remat: str,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.norm1 = LayerNorm(in_features, epsilon=EPSILON, **options)
        self.query, self.key, self.value = (Linear(in_features, features, **options) for _ in range(3))
        self.out = Linear(features, features, **options)
        self.norm2 = LayerNorm(features, epsilon=EPSILON, **options)
        self.fc1 = Linear(features, MLP_RATIO * features, **options)
        self.fc2 = Linear(MLP_RATIO * features, features, **options)
        if halves:
            self.shortcut = Linear(in_features, features, **options)
        self.num_heads, self.window, self.halves = num_heads, window, halves
        self.drop_path, self.remat = drop_path, remat

    def __call__(
        self, features: Float[Array, "batch rows columns in_features"], key: Array | None
    ) -> Float[Array, "batch new_rows new_columns features"]:
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        normed = self.norm1(features)
        kept = largest(self.shortcut(normed)) if self.halves else features
        mixed = self._attend_within(normed, *kept.shape[1:3]) if self.window else self._attend(normed)
        features = kept + drop_path(self.out(mixed), self.drop_path, keys[0])
        again = functools.partial(rematerialise, when=self.remat == "elementwise")
        hidden = again(lambda self, x: self.fc1(self.norm2(x)), self, features)
        branch = again(lambda self, x: self.fc2(gelu(x)), self, hidden)
        return features + drop_path(branch, self.drop_path, keys[1])

    def _attend_within(self, normed: Array, rows: int, columns: int) -> Array:
        """Attention within windows; the padding, zeros before the projections, takes part in it."""
        windows = to_windows(normed, self.window)
        query = self.query(windows)
        if self.halves:
            batch, count, _, features = query.shape
            pooled = largest(query.reshape(-1, self.window, self.window, features))
            query = pooled.reshape(batch, count, -1, features)
        mixed = attend_within(query, self.key(windows), self.value(windows), self.num_heads)
        return from_windows(mixed, rows, columns)

    def _attend(self, normed: Array) -> Array:
        def split(values: Array) -> Array:
            return values.reshape(len(values), -1, self.num_heads, values.shape[-1] // self.num_heads)

        mixed = attend(split(self.query(normed)), split(self.key(normed)), split(self.value(normed)))
        return mixed.reshape(normed.shape)


def largest(maps: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch half_rows half_columns channels"]:
    """The largest value of each 2 x 2 positions; of an odd side the last position is left out."""
    return nnx.max_pool(maps, (2, 2), (2, 2))


class Hiera(nnx.Module):
    """The encoder. Parameters are float32; activations and results are ``dtype``."""

    def __init__(self, config: HieraConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"dtype": dtype, "rngs": rngs}
        self.patch_embedding = nnx.Conv(3, config.embed_dim, (7, 7), strides=PATCH, padding=3, **options)
        init, side = nnx.initializers.truncated_normal(0.02), config.window_sizes[0]
        self.position = nnx.Param(init(rngs.params(), (*config.position_size, config.embed_dim)))
        self.window_position = nnx.Param(init(rngs.params(), (side, side, config.embed_dim)))
        rates = np.linspace(0.0, config.drop_path, sum(config.depths)).tolist()
        blocks, width = [], config.embed_dim
        for number, rate in enumerate(rates):
            stage = config.stage_of(number)
            halves = number in config.first_blocks[1:]
            window = 0 if number in config.global_blocks else config.window_sizes[stage - halves]
            features = config.map_widths[stage]
            heads = config.num_heads * 2**stage
            blocks.append(Block(width, features, heads, window, halves, rate, config.remat, **options))
            width = features
        self.blocks = nnx.List(blocks)
        self.dtype = dtype

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        layers: tuple[int, ...] = (0, 1, 2, 3),
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _height _width _channels"]]:
        """The maps of the stages ``layers`` (0-based, fine to coarse); ``rngs`` switches drop path on.

        Raises ValueError for sizes that are no multiple of the patch size.
        """
        found = self.intermediates(images, rngs=rngs)
        return [found[f"maps/{layer}"] for layer in layers]

    def intermediates(
        self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Array]:
        """The patches with their positions, every block's result and every stage's map, by name."""
        height, width, patch = *images.shape[1:3], self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"image sizes must be multiples of the patch size {patch}, got {height}x{width}")
        features = self.patch_embedding(images.astype(self.dtype))
        add = lambda tables, features: features + _positions(*tables, *features.shape[1:3]).astype(self.dtype)
        features = of_own_images(add, (self.position[...], self.window_position[...]), features)
        found = {"embedding": features}
        for number, block in enumerate(self.blocks):
            key = None if rngs is None else rngs.dropout()
            features = rematerialise(Block.__call__, block, features, key, when=self.config.remat == "blocks")
            found[f"blocks/{number}"] = features
            if number + 1 in (*self.config.first_blocks, len(self.blocks)):
                level = normalise(features) if self.config.normalised_maps else features
                found[f"maps/{self.config.stage_of(number)}"] = level
        return found


def _positions(
    whole: Float[Array, "_ _ channels"], window: Float[Array, "_ _ channels"], rows: int, columns: int
) -> Float[Array, "rows columns channels"]:
    """The embedding of the whole map, resized (PyTorch's bicubic), and that of a window, repeated."""
    tiled = jnp.tile(window, (rows // len(window), columns // len(window), 1))
    return resize(whole[None], (rows, columns), method="bicubic")[0] + tiled


def normalise(features: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """Zero mean and unit variance over the channels, in float32."""
    return jax.nn.standardize(features.astype(jnp.float32), epsilon=EPSILON).astype(features.dtype)
