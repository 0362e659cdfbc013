"""SAM 2's prompt encoder (Kirillov et al., 2023): points and boxes become tokens, masks a map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cast_jax.core.geometry import pixel_centres
from cast_jax.models.convolution import PatchEmbedding
from cast_jax.models.layers import LayerNorm, Linear, gelu

# Labels of points. 0 to 3, the rows of the table of kinds: background, object, a box's first corner, its last.
NOT_A_POINT = -1  # no point, and said so
PADDING = -10  # a token of zeros
CORNERS = (2, 3)
EPSILON = 1e-6  # of the layer normalisations of masks


class MaskEmbedding(nnx.Module):
    """Two convolutions that halve a mask, each with norm and GELU, and a projection."""

    def __init__(self, hidden: int, features: int, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "rngs": rngs}
        # Of four channels that nearly agree, the fast variance is rounding errors alone.
        norm = lambda width: LayerNorm(width, epsilon=EPSILON, **options)
        self.conv1, self.norm1 = PatchEmbedding(1, hidden // 4, 2, **options), norm(hidden // 4)
        self.conv2, self.norm2 = PatchEmbedding(hidden // 4, hidden, 2, **options), norm(hidden)
        self.project = Linear(hidden, features, **options)

    def __call__(self, masks: Float[Array, "batch rows columns 1"]) -> Float[Array, "batch rows/4 columns/4 features"]:
        halved = gelu(self.norm1(self.conv1(masks)))
        return self.project(gelu(self.norm2(self.conv2(halved))))


class PromptEncoder(nnx.Module):
    """Parameters are float32; tokens and positions are float32 (angles need it), mask maps ``dtype``.

    ``fourier``, the random frequencies, is a buffer in PyTorch and no parameter there. Here it is one, so that it is
    stored and loaded with all others, but no gradient reaches it; nor does weight decay, which by default is the
    kernels' alone.
    """

    def __init__(self, features: int, mask_hidden: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))
        self.fourier = draw(2, features // 2)
        self.kinds = draw(4, features)
        self.not_a_point = draw(features)
        self.no_mask = draw(features)
        self.mask_embedding = MaskEmbedding(mask_hidden, features, dtype=dtype, rngs=rngs)

    def tokens(
        self,
        size: tuple[int, int],
        boxes: Float[Array, "batch prompts 4"] | None = None,
        points: Float[Array, "batch prompts points 2"] | None = None,
        labels: Int[Array, "batch prompts points"] | None = None,
    ) -> Float[Array, "batch prompts tokens features"]:
        """The points, the boxes' two corners and one that is none, of images of ``size`` = (height, width) pixels.

        Boxes are (x1, y1, x2, y2), points (x, y), in pixels. SAM 2 adds half a pixel to either.
        """
        given = [(points, labels)] if points is not None and labels is not None else []
        if boxes is not None:
            corners = boxes.reshape(*boxes.shape[:2], 2, 2)
            given.append((corners, jnp.broadcast_to(jnp.array(CORNERS), corners.shape[:3])))
        lead = given[0][0].shape[:2]
        given.append((jnp.zeros((*lead, 1, 2)), jnp.full((*lead, 1), NOT_A_POINT)))
        located, kinds = (jnp.concatenate(values, axis=2) for values in zip(*given, strict=True))
        tokens = self.positions((located.astype(jnp.float32) + 0.5) / jnp.array(size[::-1], jnp.float32))
        kind = kinds[..., None]
        tokens = jnp.where(kind == NOT_A_POINT, self.not_a_point[...], jnp.where(kind == PADDING, 0.0, tokens))
        return tokens + jnp.where(kind >= 0, self.kinds[...][jnp.maximum(kinds, 0)], 0.0)

    def grid(self, rows: int, columns: int) -> Float[Array, "rows columns features"]:
        """The positions of a map's cells."""
        centres = pixel_centres(rows, columns)[:, ::-1] / jnp.array([columns, rows])
        return self.positions(centres).reshape(rows, columns, -1)

    def positions(self, located: Float[Array, "*batch 2"]) -> Float[Array, "*batch features"]:
        """Fourier features of (x, y); the image's sides are 0 and 1 (Tancik et al., 2020)."""
        frequencies = jax.lax.stop_gradient(self.fourier[...])
        x, y = (2 * located[..., axis, None] - 1 for axis in range(2))
        angles = 2 * jnp.pi * (x * frequencies[0] + y * frequencies[1])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def dense(
        self, masks: Float[Array, "batch prompts 4*rows 4*columns"] | None
    ) -> Float[Array, "#batch #prompts #rows #columns features"]:
        """What is added to the image's map: the embedded masks (logits), or what stands for none."""
        if masks is None:
            return self.no_mask[...][None, None, None, None]
        embedded = self.mask_embedding(masks.reshape(-1, *masks.shape[2:], 1))
        return embedded.reshape(*masks.shape[:2], *embedded.shape[1:])
