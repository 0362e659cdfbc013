"""SAM 2's image model (Ravi et al., 2024): an image is encoded once, then prompts become masks. No video memory.

SAM 2 and SAM 2.1 are alike here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.resize import resize
from cast_jax.models import hiera
from cast_jax.models.hiera import Hiera, HieraConfig
from cast_jax.models.layers import Linear
from cast_jax.models.teacher.sam2_mask_decoder import Masks, Sam2MaskDecoder, Sam2MaskDecoderConfig, choose
from cast_jax.models.teacher.sam2_prompt import NOT_A_POINT, PromptEncoder


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Sizes of the image model.

    Attributes:
      encoder: the trunk; its maps come as they are (``normalised_maps=False``).
      features: channels of the pyramid, the prompts and the mask decoder.
      mask_hidden: of the embedding of mask prompts.
      mask_decoder: the rest.
      prompts_per_block: how many prompts an image are decoded at once, which bounds the memory; 0 for all.
    """

    encoder: HieraConfig
    features: int = 256
    mask_hidden: int = 16
    mask_decoder: Sam2MaskDecoderConfig = dataclasses.field(default_factory=Sam2MaskDecoderConfig)
    prompts_per_block: int = 8

    def __post_init__(self) -> None:
        check_ranges(self, features="[8, 65536]", mask_hidden="[4, 65536]", prompts_per_block="[0, 65536]")
        if self.encoder.normalised_maps:
            raise UserError("encoder.normalised_maps must be off: SAM 2's pyramid takes the trunk's maps as they are")
        if self.mask_hidden % 4:
            raise UserError(f"mask_hidden {self.mask_hidden} must be a multiple of 4")
        heads = self.mask_decoder.num_heads * self.mask_decoder.downsample
        if self.features % 8 or self.features % heads:
            raise UserError(f"features {self.features} must be a multiple of 8 and of num_heads * downsample = {heads}")


def _sized(encoder: HieraConfig, changes: dict[str, Any]) -> Sam2Config:
    return Sam2Config(**{"encoder": dataclasses.replace(encoder, normalised_maps=False)} | changes)


def sam2_image_t(**changes: Any) -> Sam2Config:
    """SAM 2's tiny image model, 31 M parameters."""
    return _sized(hiera.sam2_t(), changes)


def sam2_image_s(**changes: Any) -> Sam2Config:
    """SAM 2's small image model, 39 M parameters."""
    return _sized(hiera.sam2_s(), changes)


def sam2_image_b_plus(**changes: Any) -> Sam2Config:
    """SAM 2's base+ image model, 73 M parameters."""
    return _sized(hiera.sam2_b_plus(), changes)


def sam2_image_l(**changes: Any) -> Sam2Config:
    """SAM 2's large image model, 217 M parameters: the paper's."""
    return _sized(hiera.sam2_l(), changes)


SAM2: dict[str, Callable[..., Sam2Config]] = {
    make.__name__: make for make in (sam2_image_t, sam2_image_s, sam2_image_b_plus, sam2_image_l)
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """The pyramid of an image of height x width pixels; what is computed once, however many prompts follow.

    Attributes:
      stride4: before the mask decoder's projection; what the contrastive head reads.
      stride8: likewise.
      stride16: with the embedding that stands for "no memory of earlier frames".
    """

    stride4: Float[Array, "batch height/4 width/4 features"]
    stride8: Float[Array, "batch height/8 width/8 features"]
    stride16: Float[Array, "batch height/16 width/16 features"]


class Neck(nnx.Module):
    """A pyramid whose top-down path reaches stride 16 only: the finer maps are plain projections of the trunk's."""

    def __init__(self, widths: Sequence[int], features: int, *, dtype, rngs: nnx.Rngs):
        self.lateral = nnx.List([Linear(width, features, dtype=dtype, rngs=rngs) for width in widths])

    def __call__(self, maps: Sequence[Float[Array, "batch _rows _columns _width"]]) -> list[Array]:
        """The maps at strides 4, 8 and 16, from those at 4, 8, 16 and 32."""
        stride4, stride8, stride16, stride32 = (
            lateral(level) for lateral, level in zip(self.lateral, maps, strict=True)
        )
        nearest = stride32.repeat(2, axis=1).repeat(2, axis=2)
        return [stride4, stride8, stride16 + nearest]


class Sam2(nnx.Module):
    """The model. Parameters are float32; activations and features are ``dtype``, masks and scores float32.

    Images are RGB with ImageNet's mean and deviation taken out; their sides are multiples of 32, any multiple: the
    position embeddings follow.
    """

    def __init__(self, config: Sam2Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.encoder = Hiera(config.encoder, **options)
        self.neck = Neck(config.encoder.map_widths, config.features, **options)
        self.no_memory = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (config.features,)))
        self.prompt_encoder = PromptEncoder(config.features, config.mask_hidden, **options)
        self.mask_decoder = Sam2MaskDecoder(config.features, config.mask_decoder, **options)
        self.config, self.dtype = config, dtype

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None, **prompts: Any
    ) -> Masks:
        """:meth:`encode` and :meth:`decode` in one."""
        return self.decode(self.encode(images, rngs=rngs), **prompts)

    def encode(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> ImageFeatures:
        """The pyramid; ``rngs`` switches the trunk's drop path on. ValueError for sides that are no multiples of 32."""
        return self.pyramid(self.encoder(images, rngs=rngs))

    def pyramid(self, maps: Sequence[Float[Array, "batch _rows _columns _width"]]) -> ImageFeatures:
        """What the trunk's four maps, fine to coarse, become."""
        stride4, stride8, stride16 = self.neck(maps)
        return ImageFeatures(stride4, stride8, stride16 + self.no_memory[...].astype(self.dtype))

    def decode(
        self,
        features: ImageFeatures,
        *,
        boxes: Float[Array, "batch prompts 4"] | None = None,
        points: Float[Array, "batch prompts points 2"] | None = None,
        labels: Int[Array, "batch prompts points"] | None = None,
        masks: Float[Array, "batch prompts _rows _columns"] | None = None,
        multimask: bool = False,
        train: bool = False,
    ) -> Masks:
        """Masks for prompts, ``prompts_per_block`` at a time; what a gradient needs of a block is computed again.

        Args:
          features: of the images, from :meth:`encode`.
          boxes: (x1, y1, x2, y2) in pixels of the encoded images.
          points: (x, y) in the same pixels. A prompt may have a box, points and a mask together.
          labels: 1 for points on the object, 0 beside it, -1 for no point, -10 for padding (a token of zeros).
          masks: logits of a mask for each prompt, resized to a quarter of the image where they are not.
          multimask: the masks for an ambiguous prompt instead of a single one.
          train: the single mask even where it is not stable (see ``choose``).

        Raises:
          ValueError: no prompt at all, points without labels, or prompts that differ in number.
        """
        given = {"boxes": boxes, "points": points, "labels": labels, "masks": masks}
        prompts = {name: value for name, value in given.items() if value is not None}
        if not prompts or ("points" in prompts) != ("labels" in prompts):
            raise ValueError(f"prompts must be boxes, points with labels, or masks; got {', '.join(prompts) or 'none'}")
        if len({value.shape[:2] for value in prompts.values()}) > 1:
            shapes = {name: value.shape for name, value in prompts.items()}
            raise ValueError(f"prompts must agree in their first two sides, images and prompts; got {shapes}")
        if prompts.keys() == {"masks"}:  # as in video: an empty point, beside the one that every prompt has
            lead = prompts["masks"].shape[:2]
            prompts |= {"points": jnp.zeros((*lead, 1, 2)), "labels": jnp.full((*lead, 1), NOT_A_POINT)}
        image = self._of_images(features)

        def run(prompts: dict[str, Array]) -> Masks:
            decoded = self._decode(image, **prompts)
            return choose(decoded, self.config.mask_decoder, multimask=multimask, train=train)

        return _in_blocks(run, prompts, self.config.prompts_per_block)

    def _of_images(self, features: ImageFeatures) -> tuple[Array, Array, Array, Array]:
        """What the mask decoder needs of the images, whatever the prompts: the map, its positions, the finer maps."""
        return (
            features.stride16,
            self.prompt_encoder.grid(*features.stride16.shape[1:3]),
            self.mask_decoder.project8(features.stride8),
            self.mask_decoder.project4(features.stride4),
        )

    def _decode(
        self, image: tuple[Array, Array, Array, Array], *, masks: Array | None = None, **prompts: Array
    ) -> Masks:
        """All masks, the single one and the others."""
        stride16, positions, stride8, stride4 = image
        rows, columns = stride4.shape[1:3]
        tokens = self.prompt_encoder.tokens((4 * rows, 4 * columns), **prompts)
        if masks is not None and masks.shape[2:] != (rows, columns):
            channels_last = masks.transpose(0, 2, 3, 1)
            masks = resize(channels_last, (rows, columns), antialias=True).transpose(0, 3, 1, 2)
        dense = self.prompt_encoder.dense(masks).astype(self.dtype)
        return self.mask_decoder(stride16[:, None] + dense, positions, stride8, stride4, tokens)


def _in_blocks(run: Callable[[dict[str, Array]], Masks], prompts: dict[str, Array], size: int) -> Masks:
    """``run`` on ``size`` prompts (the second axis) at a time, the last block filled up; on all if ``size`` is 0."""
    number = next(iter(prompts.values())).shape[1]
    if not size or number <= size:
        return run(prompts)
    blocks = -(-number // size)

    def split(values: Array) -> Array:
        padded = jnp.pad(values, [(0, 0), (0, blocks * size - number)] + [(0, 0)] * (values.ndim - 2))
        return jnp.moveaxis(padded.reshape(len(values), blocks, size, *values.shape[2:]), 1, 0)

    def join(values: Array) -> Array:
        joined = jnp.moveaxis(values, 0, 1)
        return joined.reshape(len(joined), blocks * size, *values.shape[3:])[:, :number]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(run), jax.tree.map(split, prompts)))
