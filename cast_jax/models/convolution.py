"""Convolutions whose naive forms are slow on some backend, each with the parameters of its plain counterpart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core.sharding import on_one_cpu

_SMALL = 768  # pixels of a map, up to which XLA's kernel gradient takes about as long, and compiles faster


class Conv3x3(nnx.Module):
    """A 3x3 convolution padded by one pixel on every side, as ``torch.nn.Conv2d(..., 3, stride, padding=1)``.

    ``kernel`` is [3, 3, in, out], the layout of ``nnx.Conv``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int = 1,
        use_bias: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (3, 3, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.stride, self.use_bias, self.dtype = stride, use_bias, dtype

    def __call__(
        self, features: Float[Array, "batch height width in_features"]
    ) -> Float[Array, "batch new_height new_width out_features"]:
        convolved = convolve3x3(features.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)
        return convolved + self.bias[...].astype(self.dtype) if self.use_bias else convolved


def convolve3x3(
    features: Float[Array, "batch height width in_features"],
    kernel: Float[Array, "3 3 in_features out_features"],
    stride: int = 1,
) -> Float[Array, "batch new_height new_width out_features"]:
    """Convolves maps padded by one pixel; on a CPU at stride 1, if not small, with a kernel gradient of our own."""
    if stride == 1 and on_one_cpu() and features.shape[1] * features.shape[2] > _SMALL:
        return _convolve_on_cpu(features, kernel)
    return _convolve(features, kernel, stride)


def _convolve(features: Array, kernel: Array, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        features, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _convolve_on_cpu(features: Array, kernel: Array) -> Array:
    return _convolve(features, kernel)


def _kernel_gradient(features: Array, gradient: Array) -> Array:
    """The kernel's gradient, an image at a time: three (3 out x pixels) (pixels x in) products, one for each row shift.

    XLA:CPU convolves the two maps with each other instead, which takes more than twice as long. What is shifted is
    transposed before: XLA would transpose all three shifts.
    """
    height, width, in_features = features.shape[1:]
    out_features = gradient.shape[-1]

    def add_image(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        rows = jnp.pad(image[0], ((1, 1), (0, 0), (0, 0)))
        columns = jnp.pad(image[1].transpose(2, 0, 1), ((0, 0), (0, 0), (1, 1)))
        columns = jax.lax.optimization_barrier(columns)
        shifted = jnp.stack([columns[:, :, 2 - shift : 2 - shift + width] for shift in range(3)])
        shifted = shifted.reshape(3 * out_features, height * width)
        products = [
            jnp.matmul(
                shifted, rows[shift : shift + height].reshape(-1, in_features), preferred_element_type=total.dtype
            )
            for shift in range(3)
        ]
        return total + jnp.stack(products), None

    empty = jnp.zeros((3, 3 * out_features, in_features), jnp.float32)
    total = jax.lax.scan(add_image, empty, (features, gradient))[0]
    return total.reshape(3, 3, out_features, in_features).swapaxes(2, 3)


def _convolve_forward(features: Array, kernel: Array):
    return _convolve(features, kernel), (features, kernel)


def _convolve_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    features, kernel = residuals
    to_features = _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return to_features, _kernel_gradient(features, gradient).astype(kernel.dtype)


_convolve_on_cpu.defvjp(_convolve_forward, _convolve_backward)


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
