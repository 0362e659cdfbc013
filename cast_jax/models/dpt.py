"""The DPT neck (Ranftl et al., 2021) of Depth-Anything-V2 and UniMatch-V2: four encoder maps become one fine map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.resize import resize
from cast_jax.models.convolution import Conv3x3, PatchExpansion
from cast_jax.models.layers import Linear


@dataclasses.dataclass(frozen=True)
class DptConfig:
    """The widths of a neck; the defaults are DPT-S.

    ``finest_scale`` is the resolution of the finest result in units of the third map (of a ViT: the patch grid): 8 is
    the published ``path_1``, 4 leaves out its last upsampling, which a mask decoder does not need.
    """

    features: int = 64
    out_channels: tuple[int, int, int, int] = (48, 96, 192, 384)
    finest_scale: int = 4

    def __post_init__(self) -> None:
        if len(self.out_channels) != 4:
            raise UserError(f"out_channels must have four widths, fine to coarse, got {self.out_channels}")
        check_ranges(self, features="[1, 65536]", out_channels="[1, 65536]")
        check_choices(self, finest_scale=(4, 8))


class Reassemble(nnx.Module):
    """Projects an encoder map and brings it to ``scale`` times the patch grid (4, 2, 1 or 0.5)."""

    def __init__(self, in_features: int, out_features: int, scale: float, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.project = Linear(in_features, out_features, **options)
        if scale > 1:
            self.expand = PatchExpansion(out_features, out_features, int(scale), **options)
        elif scale < 1:
            self.reduce = Conv3x3(out_features, out_features, stride=int(1 / scale), **options)
        self.scale = scale

    def __call__(self, features: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch height width channels"]:
        projected = self.project(features)
        if self.scale > 1:
            return self.expand(projected)
        return self.reduce(projected) if self.scale < 1 else projected


class ResidualConvUnit(nnx.Module):
    """Two pre-activated 3x3 convolutions around a residual connection."""

    def __init__(self, features: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.conv1 = Conv3x3(features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv2 = Conv3x3(features, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, features: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        return features + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(features))))


class Fusion(nnx.Module):
    """A RefineNet block (Lin et al., 2017): adds a finer map to the running one, refines, projects and upsamples."""

    def __init__(self, features: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        # The coarsest block has no second input: its first unit idles, as in the published checkpoints.
        self.unit1 = ResidualConvUnit(features, **options)
        self.unit2 = ResidualConvUnit(features, **options)
        self.project = Linear(features, features, **options)

    def __call__(
        self,
        running: Float[Array, "batch height width channels"],
        finer: Float[Array, "batch height width channels"] | None,
        size: tuple[int, int],
    ) -> Float[Array, "batch new_height new_width channels"]:
        if finer is not None:
            running = running + self.unit1(finer)
        # Projected before the upsampling, at a quarter the cost: they commute because a resize's weights sum to one.
        return resize(self.project(self.unit2(running)), size, align_corners=True)


class Dpt(nnx.Module):
    """The neck. Parameters are ``param_dtype``; activations and results are ``dtype``."""

    def __init__(
        self,
        in_features: int | Sequence[int],
        config: DptConfig | None = None,
        *,
        pyramid: bool = False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """``in_features``: of each map, or of all. A ``pyramid``'s maps come at 4, 2, 1 and 0.5 times the third."""
        config = config or DptConfig()
        in_features = (in_features,) * 4 if isinstance(in_features, int) else tuple(in_features)
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        shapes = zip(in_features, config.out_channels, (1,) * 4 if pyramid else (4, 2, 1, 0.5), strict=True)
        self.reassemble = nnx.List([Reassemble(*shape, **options) for shape in shapes])
        self.adapt = nnx.List([Conv3x3(w, config.features, use_bias=False, **options) for w in config.out_channels])
        self.fusion = nnx.List([Fusion(config.features, **options) for _ in config.out_channels])  # coarse to fine

    def __call__(
        self, maps: Sequence[Float[Array, "batch rows columns dim"]]
    ) -> tuple[Float[Array, "batch height width channels"], list[Float[Array, "batch _height _width channels"]]]:
        """Fuses four maps, ordered from the shallowest encoder block to the deepest.

        Returns the finest map, at ``finest_scale`` times the third one's size, and the coarser fused ones at 1, 2 and
        4 times.
        """
        if len(maps) != 4:
            raise ValueError(f"the neck fuses four encoder maps, got {len(maps)}")
        rows, columns = maps[2].shape[1:3]
        levels = [
            adapt(reassemble(level)) for level, reassemble, adapt in zip(maps, self.reassemble, self.adapt, strict=True)
        ]
        running, fused = None, []
        for fusion, level, scale in zip(
            self.fusion, reversed(levels), (1, 2, 4, self.config.finest_scale), strict=True
        ):
            size = (scale * rows, scale * columns)
            running = fusion(level, None, size) if running is None else fusion(running, level, size)
            fused.append(running)
        return fused[-1], fused[:-1]
