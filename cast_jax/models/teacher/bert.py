"""BERT's encoder (Devlin et al., 2018) for prompts of many phrases, which do not see each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.attention import attend
from cast_jax.models.layers import LayerNorm, Linear, gelu, rematerialise
from cast_jax.models.stack import Stack

EPSILON = 1e-12  # of every layer normalisation


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of the encoder; the defaults are ``bert-base-uncased``.

    Attributes:
      vocab_size: rows of the token table.
      hidden_dim, num_layers, num_heads, ffn_dim: of the transformer blocks.
      max_positions: rows of the position table.
      remat: whether blocks are computed again in the gradient, which saves memory.
    """

    vocab_size: int = 30522
    hidden_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    max_positions: int = 512
    remat: bool = False

    def __post_init__(self) -> None:
        sizes = ("hidden_dim", "num_layers", "num_heads", "ffn_dim", "max_positions")
        check_ranges(self, vocab_size="[1, 10000000]", **dict.fromkeys(sizes, "[1, 65536]"))
        if self.hidden_dim % self.num_heads:
            raise UserError(f"num_heads {self.num_heads} must divide hidden_dim {self.hidden_dim}")


class Block(nnx.Module):
    """A transformer block with its norms after the residual connections."""

    def __init__(self, config: BertConfig, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        linear = lambda i, o: Linear(i, o, dtype=dtype, kernel_init=init, rngs=rngs)
        norm = lambda: LayerNorm(config.hidden_dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(config.hidden_dim, config.hidden_dim) for _ in range(4))
        self.attention_norm, self.output_norm = norm(), norm()
        self.fc1, self.fc2 = linear(config.hidden_dim, config.ffn_dim), linear(config.ffn_dim, config.hidden_dim)
        self.num_heads = config.num_heads

    def __call__(
        self, inputs: tuple[Float[Array, "batch tokens features"], Bool[Array, "batch tokens tokens"]], key: None
    ) -> Float[Array, "batch tokens features"]:
        """``inputs`` are the tokens and which of them each may see."""
        del key  # no dropout: the detector is trained without
        tokens, blocks = inputs
        split = lambda values: values.reshape(*values.shape[:2], self.num_heads, -1)
        heads = split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))
        attended = attend(*heads, blocks[:, None]).reshape(tokens.shape)
        tokens = self.attention_norm(tokens + self.out(attended))
        return self.output_norm(tokens + self.fc2(gelu(self.fc1(tokens))))


class Bert(nnx.Module):
    """The encoder, without a pooler. Parameters are float32; activations and results are ``dtype``."""

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        table = lambda rows: nnx.Embed(rows, config.hidden_dim, dtype=dtype, embedding_init=init, rngs=rngs)
        self.tokens, self.positions = table(config.vocab_size), table(config.max_positions)
        self.segments = table(2)  # of which prompts only use the first
        self.embedding_norm = LayerNorm(config.hidden_dim, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.blocks = Stack(functools.partial(Block, config, dtype=dtype), config.num_layers, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        blocks: Bool[Array, "batch tokens tokens"],
    ) -> Float[Array, "batch tokens features"]:
        """Encodes tokens at their ``positions``, each seeing those that ``blocks`` allows."""
        features = self.tokens(ids) + self.segments(jnp.zeros_like(ids)) + self.positions(positions)
        features = self.embedding_norm(features)

        def run(layers: list[Block], features: Array, _: Any) -> tuple[Array, list[None]]:
            inputs = (features, blocks)
            return rematerialise(Block.__call__, layers[0], inputs, None, when=self.config.remat), [None]

        return self.blocks.scan(run, features)[0]
