"""ResNet-50 and -101 with bottleneck blocks (He et al., 2016; "v1.5": the stride on the 3x3 convolution).

Batch normalisation is frozen, as detectors do: one trainable scale and shift a channel, into which a checkpoint's
running statistics are folded.
"""

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

EXPANSION = 4  # a block's outputs in units of its inner width


@dataclasses.dataclass(frozen=True)
class BottleneckResNetConfig:
    """Four stages at strides 4, 8, 16 and 32.

    Attributes:
      width: channels of the stem and inner width of the first stage; it doubles from stage to stage.
      depths: blocks of each stage.
      remat: what the gradient computes again: "none", or whole "blocks", which saves memory.
    """

    width: int = 64
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    remat: str = "none"

    def __post_init__(self) -> None:
        check_choices(self, remat=("none", "blocks"))
        if len(self.depths) != 4:
            raise UserError(f"depths must have four values, one a stage, got {self.depths}")
        check_ranges(self, width="[1, 65536]", depths="[1, 1024]")

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
        return tuple(EXPANSION * self.width * 2**stage for stage in range(self.depth))

    @property
    def pyramid(self) -> bool:
        """Each map is half the size of the one before."""
        return True


def resnet50() -> BottleneckResNetConfig:
    """ResNet-50, 23.5 M parameters without its classifier."""
    return BottleneckResNetConfig()


def resnet101() -> BottleneckResNetConfig:
    """ResNet-101, 42.5 M parameters without its classifier."""
    return BottleneckResNetConfig(depths=(3, 4, 23, 3))


class ChannelAffine(nnx.Module):
    """``x * scale + shift`` by channel: batch normalisation with its statistics folded in."""

    def __init__(self, features: int, *, dtype):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.shift = nnx.Param(jnp.zeros((features,)))
        self.dtype = dtype

    def __call__(self, features: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        return features * self.scale[...].astype(self.dtype) + self.shift[...].astype(self.dtype)


class Stem(nnx.Module):
    """A 7x7 convolution of stride 2, then a 3x3 maximum of stride 2; both padded as PyTorch does."""

    def __init__(self, features: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (7, 7, 3, features)))
        self.norm = ChannelAffine(features, dtype=dtype)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch rows columns channels"]:
        features = jax.lax.conv_general_dilated(
            images.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (2, 2),
            ((3, 3), (3, 3)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nnx.max_pool(jax.nn.relu(self.norm(features)), (3, 3), (2, 2), ((1, 1), (1, 1)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; ``stride`` is the 3x3 one's."""

    def __init__(self, in_features: int, width: int, stride: int, *, dtype, rngs: nnx.Rngs):
        out_features = EXPANSION * width
        pointwise = lambda inputs, outputs: Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)
        norm = lambda features: ChannelAffine(features, dtype=dtype)
        self.conv1, self.norm1 = pointwise(in_features, width), norm(width)
        self.conv2 = Conv3x3(width, width, stride=stride, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = norm(width)
        self.conv3, self.norm3 = pointwise(width, out_features), norm(out_features)
        self.changes = stride > 1 or in_features != out_features
        if self.changes:
            self.shortcut, self.shortcut_norm = pointwise(in_features, out_features), norm(out_features)
        self.stride = stride

    def __call__(
        self, features: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch new_height new_width out_features"]:
        changed = jax.nn.relu(self.norm1(self.conv1(features)))
        changed = jax.nn.relu(self.norm2(self.conv2(changed)))
        changed = self.norm3(self.conv3(changed))
        if self.changes:
            features = self.shortcut_norm(self.shortcut(features[:, :: self.stride, :: self.stride]))
        return jax.nn.relu(changed + features)


class BottleneckResNet(nnx.Module):
    """The encoder."""

    def __init__(self, config: BottleneckResNetConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.stem = Stem(config.width, dtype=dtype, rngs=rngs)
        stages, inputs = [], config.width
        for stage, depth in enumerate(config.depths):
            blocks, width = [], config.width * 2**stage
            for number in range(depth):
                blocks.append(Bottleneck(inputs, width, 2 if stage and not number else 1, dtype=dtype, rngs=rngs))
                inputs = EXPANSION * width
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
        stages = self.intermediates(images)
        return [stages[f"maps/{layer}"] for layer in layers]

    def intermediates(self, images: Float[Array, "batch height width 3"]) -> dict[str, Array]:
        """The stem's result, every block's and every stage's, by name."""
        features = self.stem(images)
        found = {"embedding": features}
        for number, stage in enumerate(self.stages):
            for block in stage:
                features = rematerialise(Bottleneck.__call__, block, features, when=self.config.remat == "blocks")
                found[f"blocks/{len(found) - 1 - number}"] = features
            found[f"maps/{number}"] = features
        return found
