"""The student: encoder, DPT or FPN decoder, masked-attention transformer decoder.

The small teachers of the demo and of data without a foundation model are larger members of the same family.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.config import check_ranges
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.layers import Linear
from cast_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig
from cast_jax.models.parts import MODULES, DecoderConfig, EncoderConfig
from cast_jax.models.segmenter import Prediction


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The three parts, and which of the encoder's maps (0-based blocks or stages) feed the decoder, shallow to deep."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    mask_decoder: MaskDecoderConfig
    encoder_layers: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        check_ranges(self, encoder_layers=f"[0, {self.encoder.depth})")

    @property
    def patch_size(self) -> int:
        """Image sides must be multiples of this."""
        return self.encoder.patch_size

    @property
    def feature_dim(self) -> int:
        """Channels of the pixel features."""
        return self.decoder.features

    def pixel_map(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the finest map, which masks and pixel features have."""
        rows, columns = (round(side * self.decoder.finest_scale / self.encoder.stride) for side in image_size)
        return rows, columns

    def queries(self, image_size: tuple[int, int]) -> int:
        """How many instances can be predicted in an image."""
        decoder = self.mask_decoder
        if not decoder.query_stride:
            return decoder.num_queries
        return math.prod(max(round(side / decoder.query_stride), 1) for side in self.pixel_map(image_size))


class Student(nnx.Module):
    """Images in [0, 1] to a :class:`Prediction`; masks and features at the decoder's finest resolution."""

    def __init__(self, config: StudentConfig, num_classes: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        encoder, decoder = MODULES[type(config.encoder)], MODULES[type(config.decoder)]
        self.encoder = encoder(config.encoder, dtype=dtype, rngs=rngs)
        widths = tuple(config.encoder.map_widths[layer] for layer in config.encoder_layers)
        self.decoder = decoder(widths, config.decoder, pyramid=config.encoder.pyramid, dtype=dtype, rngs=rngs)
        self.mask_decoder = MaskDecoder(
            config.mask_decoder, config.decoder.features, num_classes, dtype=dtype, rngs=rngs
        )

    def __call__(self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None) -> Prediction:
        with jax.named_scope("encoder"):
            images = (images - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)
            maps = self.encoder(images.astype(self.dtype), layers=self.config.encoder_layers, rngs=rngs)
        with jax.named_scope("decoder"):
            finest, coarser = self.decoder(maps)
        with jax.named_scope("mask_decoder"):
            decoded = self.mask_decoder(finest, coarser, rngs=rngs)
            mask_logits = decoded.last_masks()
        return Prediction(
            mask_logits=mask_logits,
            class_logits=decoded.class_logits[:, -1],
            pixel_features=finest.astype(jnp.float32),
            layers=decoded,
        )


class ProjectionHead(nnx.Module):
    """Two-layer MLP to L2-normalised pixel embeddings (the paper's section 3.2)."""

    def __init__(self, feature_dim: int, embedding_dim: int = 128, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.hidden = Linear(feature_dim, embedding_dim, dtype=dtype, rngs=rngs)
        self.out = Linear(embedding_dim, embedding_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, features: Float[Array, "*batch channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*batch embedding"]:
        """Embeddings of unit length, float32. There is no dropout; ``rngs`` is part of the common call."""
        embedding = self.out(nnx.relu(self.hidden(features))).astype(jnp.float32)
        return embedding / jnp.sqrt(jnp.sum(embedding**2, axis=-1, keepdims=True) + 1e-12)
