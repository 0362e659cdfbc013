"""Small pieces of the detector: sine encodings of numbers, attention, perceptrons, the class logits of tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cast_jax.models.attention import attend
from cast_jax.models.layers import LayerNorm, Linear

EPSILON = 1e-5  # of every normalisation
MASKED_LOGIT = -1e4  # the class logit of a padding token: probability zero, and finite for the losses


def sine(values: Float[Array, "*shape"], features: int, temperature: float) -> Float[Array, "*shape features"]:
    """Sine and cosine, interleaved, of ``2 pi values`` at wavelengths from 1 to nearly ``temperature``."""
    wavelength = temperature ** (2 * (jnp.arange(features) // 2) / features)
    angle = 2 * math.pi * values[..., None].astype(jnp.float32) / wavelength
    return jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1).reshape(angle.shape)


def logit(probability: Float[Array, "*shape"], epsilon: float = EPSILON) -> Float[Array, "*shape"]:
    """The inverse of the sigmoid, of probabilities clipped to ``[epsilon, 1 - epsilon]``."""
    probability = jnp.clip(probability, epsilon, 1 - epsilon)
    return jnp.log(probability / (1 - probability))


def layer_norm(features: int, *, dtype, rngs: nnx.Rngs) -> LayerNorm:
    """A layer normalisation with the detector's epsilon."""
    return LayerNorm(features, epsilon=EPSILON, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention of queries to keys and values."""

    def __init__(self, features: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        linear = lambda: Linear(features, features, dtype=dtype, kernel_init=init, rngs=rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.num_heads = num_heads

    def __call__(
        self,
        query: Float[Array, "batch queries features"],
        key: Float[Array, "batch keys features"],
        value: Float[Array, "batch keys features"],
        mask: Bool[Array, "batch queries keys"] | None = None,
    ) -> Float[Array, "batch queries features"]:
        """``mask`` is True where a query may look."""
        split = lambda values: values.reshape(*values.shape[:2], self.num_heads, -1)
        heads = split(self.query(query)), split(self.key(key)), split(self.value(value))
        return self.out(attend(*heads, None if mask is None else mask[:, None]).reshape(query.shape))


class FeedForward(nnx.Module):
    """Two linear layers with a ReLU between them, a residual connection and a norm after it."""

    def __init__(self, features: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, features, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(features, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        return self.norm(tokens + self.fc2(jax.nn.relu(self.fc1(tokens))))


class Perceptron(nnx.Module):
    """Linear layers of the given widths with ReLUs between them, in float32: what they compute are coordinates."""

    def __init__(self, *widths: int, last_init=None, rngs: nnx.Rngs):
        inits = [nnx.initializers.lecun_normal()] * len(widths[2:])
        inits.append(last_init or nnx.initializers.lecun_normal())
        shapes = zip(widths[:-1], widths[1:], inits, strict=True)
        layers = [Linear(i, o, dtype=jnp.float32, kernel_init=init, rngs=rngs) for i, o, init in shapes]
        self.layers = nnx.List(layers)

    def __call__(self, values: Float[Array, "*shape features"]) -> Float[Array, "*shape results"]:
        for layer in self.layers[:-1]:
            values = jax.nn.relu(layer(values))
        return self.layers[-1](values)


def box_head(features: int, *, rngs: nnx.Rngs) -> Perceptron:
    """Corrections of (x, y, width, height) logits; zero at first."""
    return Perceptron(features, features, features, 4, last_init=nnx.initializers.zeros_init(), rngs=rngs)


class TokenLogits(nnx.Module):
    """The similarity of queries and text tokens; MM-Grounding-DINO scales it and adds a learned bias."""

    def __init__(self, scaled: bool):
        self.scaled = scaled
        if scaled:
            self.bias = nnx.Param(jnp.full((), -math.log((1 - 0.01) / 0.01)))  # a probability of 0.01

    def __call__(
        self,
        queries: Float[Array, "batch queries features"],
        tokens: Float[Array, "batch tokens features"],
        mask: Bool[Array, "batch tokens"],
    ) -> Float[Array, "batch queries tokens"]:
        """float32; ``MASKED_LOGIT`` where ``mask`` is False."""
        logits = jnp.einsum("bqd,btd->bqt", queries, tokens, preferred_element_type=jnp.float32)
        if self.scaled:
            logits = logits / math.sqrt(queries.shape[-1]) + self.bias[...]
        return jnp.where(mask[:, None], logits, MASKED_LOGIT)
