"""DINOv2 vision transformer (Oquab et al., 2023), with registers (Darcet et al., 2024) if asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.core import target
from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.resize import apply_matrices, interpolation_matrix
from cast_jax.core.sharding import of_own_images
from cast_jax.models.attention import attend
from cast_jax.models.convolution import PatchEmbedding
from cast_jax.models.layers import REMAT, LayerNorm, LayerScale, Linear, drop_path, dropout, gelu, rematerialise
from cast_jax.models.stack import Stack

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DinoV2Config:
    """The sizes of an encoder, and how its position embedding meets other image sizes.

    The position embedding is learned on a ``position_grid`` x ``position_grid`` grid and resized bicubically. The
    official release, Depth-Anything-V2 and UniMatch-V2 use offset 0.1 without antialiasing; Hugging Face's
    ``Dinov2Model`` offset 0 without; releases with registers offset 0 with antialiasing. They differ by up to 0.6.

    ``remat`` is what the gradient computes again, see :data:`cast_jax.models.layers.REMAT`.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 14
    mlp_ratio: float = 4.0
    num_register_tokens: int = 0
    position_grid: int = 37
    position_offset: float = 0.1
    position_antialias: bool = False
    layer_scale: float = 1.0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: str = "none"

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size", "position_grid")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 65536]"), num_register_tokens="[0, 65536]")
        check_ranges(self, mlp_ratio="(0, 64]", position_offset="[0, 1)", layer_scale="(-inf, inf)")
        check_ranges(self, drop_path="[0, 1)", dropout="[0, 1)")
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        check_choices(self, ffn=("mlp", "swiglu"), remat=REMAT)

    @property
    def map_widths(self) -> tuple[int, ...]:
        """Channels of each block's map."""
        return (self.embed_dim,) * self.depth

    @property
    def stride(self) -> int:
        """Pixels between the positions of the map that the neck takes as its unit."""
        return self.patch_size

    @property
    def pyramid(self) -> bool:
        """All maps have the patch grid's size."""
        return False


def dinov2_s(**changes: Any) -> DinoV2Config:
    """ViT-S/14, 22 M parameters."""
    return _config(embed_dim=384, depth=12, num_heads=6, **changes)


def dinov2_b(**changes: Any) -> DinoV2Config:
    """ViT-B/14, 87 M parameters."""
    return _config(embed_dim=768, depth=12, num_heads=12, **changes)


def dinov2_l(**changes: Any) -> DinoV2Config:
    """ViT-L/14, 304 M parameters."""
    return _config(embed_dim=1024, depth=24, num_heads=16, **changes)


def tiny(**changes: Any) -> DinoV2Config:
    """A small encoder for demonstrations and tests: trains from scratch in minutes on two CPU cores."""
    sizes = {"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 8, "position_grid": 16, "position_offset": 0.0}
    return DinoV2Config(**sizes | changes)


def _config(**fields: Any) -> DinoV2Config:
    if fields.get("num_register_tokens", 0):  # the released weights with registers were trained with this resize
        fields = {"position_offset": 0.0, "position_antialias": True} | fields
    return DinoV2Config(**fields)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: DinoV2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(config.embed_dim, config.embed_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.num_heads = config.num_heads

    def project(self, tokens: Float[Array, "batch tokens dim"]) -> tuple[Float[Array, "batch tokens heads width"], ...]:
        """Queries, keys and values."""
        split = lambda values: values.reshape(*values.shape[:2], self.num_heads, -1)
        return split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))

    def mix(self, *projected: Float[Array, "batch tokens heads width"]) -> Float[Array, "batch tokens dim"]:
        """Attention between what :meth:`project` returns."""
        mixed = attend(*projected)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: DinoV2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = Linear(hidden, config.embed_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def expand(self, tokens: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens hidden"]:
        """To the hidden width, before the activation."""
        return self.fc1(tokens)

    def contract(self, hidden: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens dim"]:
        """The activation, and back."""
        return self.fc2(gelu(hidden))


class SwiGlu(nnx.Module):
    """The gated feed-forward layer of the giant DINOv2; two thirds as wide as the MLP, in multiples of 8."""

    def __init__(self, config: DinoV2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        hidden = (int(int(config.embed_dim * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.gate = Linear(config.embed_dim, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.up = Linear(config.embed_dim, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = Linear(hidden, config.embed_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def expand(self, tokens: Float[Array, "batch tokens dim"]) -> tuple[Float[Array, "batch tokens hidden"], ...]:
        """Gate and values, before the activation."""
        return self.gate(tokens), self.up(tokens)

    def contract(self, hidden: tuple[Float[Array, "batch tokens hidden"], ...]) -> Float[Array, "batch tokens dim"]:
        """The gated values, and back."""
        gate, values = hidden
        return self.down(jax.nn.silu(gate) * values)


class Block(nnx.Module):
    """A pre-norm transformer block with layer scale; both branches share the dropout and drop-path rates."""

    def __init__(self, config: DinoV2Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        scale = {"init": config.layer_scale, **options}
        self.norm1 = LayerNorm(config.embed_dim, epsilon=1e-6, **options, rngs=rngs)
        self.attention = Attention(config, **options, rngs=rngs)
        self.layer_scale1 = LayerScale(config.embed_dim, **scale)
        self.norm2 = LayerNorm(config.embed_dim, epsilon=1e-6, **options, rngs=rngs)
        self.mlp = (Mlp if config.ffn == "mlp" else SwiGlu)(config, **options, rngs=rngs)
        self.layer_scale2 = LayerScale(config.embed_dim, **scale)
        self.dropout, self.drop_path, self.remat = config.dropout, config.drop_path, config.remat

    def __call__(self, tokens: Float[Array, "batch tokens dim"], key: Array | None) -> Float[Array, "batch tokens dim"]:
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        again = functools.partial(rematerialise, when=self.remat == "elementwise")
        branch = self.attention.mix(*again(lambda self, x: self.attention.project(self.norm1(x)), self, tokens))
        tokens = tokens + drop_path(self.layer_scale1(dropout(branch, self.dropout, keys[0])), self.drop_path, keys[1])
        hidden = again(lambda self, x: self.mlp.expand(self.norm2(x)), self, tokens)
        branch = again(lambda self, x: self.mlp.contract(x), self, hidden)
        return tokens + drop_path(self.layer_scale2(dropout(branch, self.dropout, keys[2])), self.drop_path, keys[3])


class DinoV2(nnx.Module):
    """The encoder. Parameters are ``param_dtype``; activations and results are ``dtype``."""

    def __init__(self, config: DinoV2Config, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype

        def embedding(rows: int) -> nnx.Param:
            init = nnx.initializers.truncated_normal(0.02)
            return nnx.Param(init(rngs.params(), (rows, config.embed_dim), param_dtype))

        self.patch_embedding = PatchEmbedding(3, config.embed_dim, config.patch_size, **options, rngs=rngs)
        self.class_token = embedding(1)
        # Used only by DINOv2's own pretraining; kept so that checkpoints map one to one and can be written back.
        self.mask_token = nnx.Param(jnp.zeros((1, config.embed_dim), param_dtype))
        if config.num_register_tokens:
            self.register_tokens = embedding(config.num_register_tokens)
        self.position_embedding = embedding(1 + config.position_grid**2)
        self.blocks = Stack(functools.partial(Block, config, **options), config.depth, rngs=rngs)
        self.norm = LayerNorm(config.embed_dim, epsilon=1e-6, **options, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, layers: Sequence[int], rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "batch rows columns dim"]]:
        """The patch maps after the chosen blocks (0-based), each through the final norm; see ``tokens``."""
        rows, columns = self.grid(*images.shape[1:3])
        prefix = 1 + self.config.num_register_tokens
        return [
            tokens[:, prefix:].reshape(tokens.shape[0], rows, columns, -1)
            for tokens in self.tokens(images, layers=layers, rngs=rngs)
        ]

    def tokens(
        self, images: Float[Array, "batch height width 3"], *, layers: Sequence[int], rngs: nnx.Rngs | None = None
    ) -> list[Float[Array, "batch tokens dim"]]:
        """Class, register and patch tokens after the chosen blocks (0-based), each through the final norm.

        ``images`` are normalised with ``IMAGE_MEAN`` and ``IMAGE_STD``; blocks after the last chosen one do not run.
        ``rngs`` switches dropout and drop path on. Raises ValueError for sizes that are no multiple of the patch size
        and for layers that do not exist.
        """
        if not layers or not all(0 <= layer < self.config.depth for layer in layers):
            raise ValueError(f"layers must be block numbers from 0 to {self.config.depth - 1}, got {tuple(layers)}")

        def run(blocks: list[Block], carry: tuple[Array, Array], given: list[Any]) -> tuple[Any, list[None]]:
            (tokens, kept), ((slot, key),) = carry, given
            tokens = rematerialise(Block.__call__, blocks[0], tokens, key, when=self.config.remat == "blocks")
            return (tokens, jax.lax.dynamic_update_index_in_dim(kept, tokens, slot, 0)), [None]

        depth, chosen = max(layers) + 1, sorted(set(layers))
        # What is kept is carried from block to block, those of no interest in one last place.
        slots = [chosen.index(layer) if layer in chosen else len(chosen) for layer in range(depth)]
        keys = None if rngs is None else jax.random.split(rngs.dropout(), depth)
        tokens = self._embed(images)
        kept = jnp.zeros((len(chosen) + 1, *tokens.shape), tokens.dtype)
        # What a GPU's loop keeps for the gradient it copies into arrays of all turns, and out of them again.
        unrolled = target.backend() == "gpu" and self.config.remat != "blocks"
        (_, kept), _ = self.blocks.scan(run, (tokens, kept), (jnp.array(slots), keys), layers=depth, unrolled=unrolled)
        normed = self.norm(kept[:-1])
        return [normed[chosen.index(layer)] for layer in layers]

    def intermediates(self, images: Float[Array, "batch height width 3"]) -> dict[str, Array]:
        """All tokens before the blocks and, normed, after each, by name."""
        numbers = range(self.config.depth)
        blocks = zip((f"blocks/{n}" for n in numbers), self.tokens(images, layers=numbers), strict=True)
        return {"embedding": self._embed(images), **dict(blocks)}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (rows, columns) of an image size."""
        patch = self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"image sizes must be multiples of the patch size {patch}, got {height}x{width}")
        return height // patch, width // patch

    def _embed(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens dim"]:
        grid = self.grid(*images.shape[1:3])
        add = lambda table, patches: patches + self._patch_positions(table, grid).astype(self.dtype)
        patches = of_own_images(add, self.position_embedding[...], self.patch_embedding(images))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        prefix = self.class_token[...] + self.position_embedding[...][:1]
        if self.config.num_register_tokens:
            prefix = jnp.concatenate([prefix, self.register_tokens[...]])
        prefix = jnp.broadcast_to(prefix.astype(self.dtype), (patches.shape[0], *prefix.shape))
        return jnp.concatenate([prefix, patches], axis=1)

    def _patch_positions(
        self, table: Float[Array, "positions dim"], grid: tuple[int, int]
    ) -> Float[Array, "1 rows columns dim"]:
        """The position embedding of the patches, resized in the parameters' precision."""
        config = self.config
        side = config.position_grid
        positions = table[1:].reshape(1, side, side, -1)
        if grid == (side, side):
            return positions
        matrices = (
            interpolation_matrix(
                side,
                length,
                method="bicubic",
                antialias=config.position_antialias,
                scale=(length + config.position_offset) / side,
            )
            for length in grid
        )
        return apply_matrices(positions, *matrices)
