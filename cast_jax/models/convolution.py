"""Convolutions whose naive forms are slow on some backend, each with the parameters of its plain counterpart."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def conv3x3(
    in_features: int,
    out_features: int,
    *,
    stride: int = 1,
    use_bias: bool = True,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 3x3 convolution padded by one pixel on every side, as ``torch.nn.Conv2d(..., 3, stride, padding=1)``."""
    return nnx.Conv(
        in_features,
        out_features,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel size: one matrix product over flattened patches.

    ``kernel`` is [patch, patch, in, out], the layout of ``nnx.Conv``.
    """

    def __init__(
        self, in_features: int, out_features: int, patch: int, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs
    ):
        shape = (patch, patch, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, images: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch rows columns out_features"]:
        patch, _, channels, features = self.kernel.shape
        batch, height, width, _ = images.shape
        patches = images.astype(self.dtype).reshape(batch, height // patch, patch, width // patch, patch, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)
        kernel = self.kernel[...].astype(self.dtype).reshape(-1, features)
        return patches @ kernel + self.bias[...].astype(self.dtype)


class PatchExpansion(nnx.Module):
    """A transposed convolution whose stride is its kernel size: every pixel becomes a block of factor x factor pixels.

    ``kernel`` is [factor, factor, in, out] = ``torch.nn.ConvTranspose2d.weight.permute(2, 3, 0, 1)``, without a flip.
    """

    def __init__(
        self, in_features: int, out_features: int, factor: int, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs
    ):
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0, 1))
        self.kernel = nnx.Param(init(rngs.params(), (factor, factor, in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, features: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch new_height new_width out_features"]:
        factor, _, _, out_features = self.kernel.shape
        batch, height, width, _ = features.shape
        kernel = self.kernel[...].astype(self.dtype)
        blocks = jnp.einsum("bhwi,yxio->bhywxo", features.astype(self.dtype), kernel)
        return blocks.reshape(batch, factor * height, factor * width, out_features) + self.bias[...].astype(self.dtype)
