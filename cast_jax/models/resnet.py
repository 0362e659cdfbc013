"""ResNet (He et al., 2016): a convolutional encoder. From scratch, on few images, it learns far faster than a ViT."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.convolution import Conv3x3
from cast_jax.models.layers import Linear, rematerialise


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Basic blocks in four stages, each at half the resolution of the one before; the first at half the image's.

    Attributes:
      widths: channels of each stage.
      depths: blocks of each stage.
      groups: of the group normalisation, which unlike batch normalisation needs no large batch (Wu & He, 2018).
      remat: what the gradient computes again: "none", or whole "blocks", which saves memory.
    """

    widths: tuple[int, int, int, int] = (16, 32, 64, 96)
    depths: tuple[int, int, int, int] = (1, 2, 2, 2)
    groups: int = 8
    remat: str = "none"

    def __post_init__(self) -> None:
        check_choices(self, remat=("none", "blocks"))
        for name in ("widths", "depths"):
            if len(getattr(self, name)) != 4:
                raise UserError(f"{name} must have four values, one a stage, got {getattr(self, name)}")
        check_ranges(self, widths="[1, 65536]", depths="[1, 1024]", groups="[1, 65536]")
        if any(width % self.groups for width in self.widths):
            raise UserError(f"widths {self.widths} must be multiples of groups={self.groups}")

    @property
    def depth(self) -> int:
        """How many maps there are to choose from: one a stage."""
        return len(self.widths)

    @property
    def patch_size(self) -> int:
        """Image sides must be multiples of this, the coarsest stride."""
        return 16

    @property
    def stride(self) -> int:
        """Pixels between the positions of the third map, the neck's unit."""
        return 8

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return self.widths

    @property
    def pyramid(self) -> bool:
        """Each map is half the size of the one before."""
        return True


class Block(nnx.Module):
    """Two 3x3 convolutions around a shortcut; ``stride`` halves the map in the first."""

    def __init__(self, in_features: int, out_features: int, stride: int, groups: int, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv3x3(in_features, out_features, stride=stride, use_bias=False, **options)
        self.norm1 = nnx.GroupNorm(out_features, groups, **options)
        self.conv2 = Conv3x3(out_features, out_features, use_bias=False, **options)
        # Zero, so that a fresh block is its shortcut (Goyal et al., 2017).
        self.norm2 = nnx.GroupNorm(out_features, groups, scale_init=nnx.initializers.zeros_init(), **options)
        self.stride = stride
        self.shortcut = (
            Linear(in_features, out_features, use_bias=False, **options) if in_features != out_features else None
        )

    def __call__(
        self, features: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch new_height new_width out_features"]:
        changed = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(features)))))
        kept = features if self.stride == 1 else nnx.avg_pool(features, (2, 2), (2, 2))
        return jax.nn.relu(changed + (kept if self.shortcut is None else self.shortcut(kept)))


class ResNet(nnx.Module):
    """The encoder; maps at strides 2, 4, 8 and 16."""

    def __init__(self, config: ResNetConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        options = {"dtype": dtype, "rngs": rngs}
        self.stem = Conv3x3(3, config.widths[0], stride=2, use_bias=False, **options)
        self.norm = nnx.GroupNorm(config.widths[0], config.groups, **options)
        stages, width = [], config.widths[0]
        for number, (out, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if number and not block else 1
                blocks.append(Block(width, out, stride, config.groups, **options))
                width = out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        layers: tuple[int, ...] = (0, 1, 2, 3),
        rngs: nnx.Rngs | None = None,
    ) -> list[Float[Array, "batch _height _width _channels"]]:
        """The maps of the stages ``layers`` (0-based, fine to coarse). There is no dropout; ``rngs`` is unused."""
        features = jax.nn.relu(self.norm(self.stem(images)))
        maps = []
        for stage in self.stages:
            for block in stage:
                features = rematerialise(Block.__call__, block, features, when=self.config.remat == "blocks")
            maps.append(features)
        return [maps[layer] for layer in layers]
