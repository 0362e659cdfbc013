"""A feature pyramid network (Lin et al., 2017): the plainest way from four encoder maps to one fine map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_ranges
from cast_jax.core.resize import resize
from cast_jax.models.convolution import Conv3x3
from cast_jax.models.layers import Linear

SCALES = (4, 2, 1, 0.5)  # of the levels, fine to coarse, in units of the third map


@dataclasses.dataclass(frozen=True)
class FpnConfig:
    """The width of all levels; as DPT-S's, so that both decoders feed the mask decoder alike (chosen)."""

    features: int = 64

    def __post_init__(self) -> None:
        check_ranges(self, features="[1, 65536]")

    @property
    def finest_scale(self) -> int:
        """The finest result's resolution in units of the third map."""
        return SCALES[0]  # type: ignore[return-value]


class Fpn(nnx.Module):
    """The decoder. Parameters are ``param_dtype``; activations and results are ``dtype``.

    Maps of one size (a plain ViT's) are resized to the pyramid's: a 1x1 convolution and a resize commute.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        config: FpnConfig,
        *,
        pyramid: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """``in_features``: of each map. ``pyramid`` is not needed: the maps' sizes show it."""
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.lateral = nnx.List([Linear(width, config.features, **options) for width in in_features])
        self.smooth = nnx.List([Conv3x3(config.features, config.features, **options) for _ in in_features])

    def __call__(
        self, maps: Sequence[Float[Array, "batch _rows _columns _dim"]]
    ) -> tuple[Float[Array, "batch height width channels"], list[Float[Array, "batch _height _width channels"]]]:
        """Fuses four maps, fine to coarse.

        Returns the finest level, at 4 times the third map's size, and the coarser ones at 0.5, 1 and 2 times.
        """
        if len(maps) != len(self.lateral):
            raise ValueError(f"the decoder fuses {len(self.lateral)} encoder maps, got {len(maps)}")
        rows, columns = maps[2].shape[1:3]
        levels: list[Array] = []
        above = None
        for level, scale in reversed(list(enumerate(SCALES))):
            size = (max(int(rows * scale), 1), max(int(columns * scale), 1))
            running = resize(self.lateral[level](maps[level]), size)
            above = running if above is None else running + resize(above, size)
            levels.append(self.smooth[level](above))
        return levels[-1], levels[:-1]
