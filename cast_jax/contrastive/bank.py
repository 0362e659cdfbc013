"""A memory bank of past pixels as candidates for negatives: the paper's "10k bank" instead of the mini-batch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.fused_map import normalise


class Bank(NamedTuple):
    """A ring of pixels, oldest overwritten first. Entries that were never written are not valid."""

    z: Float[Array, "size embedding"]
    g_hat: Float[Array, "size dim"]
    valid: Bool[Array, "size"]
    next: Int[Array, ""]
    """Where the next entry goes."""


class Entries(NamedTuple):
    """Pixels on their way into the bank."""

    z: Float[Array, "new embedding"]
    g_hat: Float[Array, "new dim"]
    valid: Bool[Array, "new"]


def empty_bank(config: ContrastiveConfig, embedding: int, dim: int) -> Bank:
    """A bank of ``config.bank_size`` entries, none of them written; ``dim`` is the pseudo probabilities'."""
    size = config.bank_size
    return Bank(jnp.zeros((size, embedding)), jnp.zeros((size, dim)), jnp.zeros(size, bool), jnp.zeros((), jnp.int32))


def choose_entries(
    key: PRNGKeyArray,
    config: ContrastiveConfig,
    *,
    z: Float[Array, "batch pixels embedding"],
    g: Float[Array, "batch pixels dim"],
    valid: Bool[Array, "batch pixels"],
) -> Entries:
    """``config.bank_new`` random valid pixels of the whole batch, without gradient; all of them if there are fewer."""
    z, g = (jax.lax.stop_gradient(array).reshape(valid.size, array.shape[-1]) for array in (z, g))
    usable = valid.reshape(-1) & jnp.all(jnp.isfinite(g), axis=-1)
    rank = jnp.where(usable, jax.random.uniform(key, usable.shape), -1.0)
    chosen = jax.lax.top_k(rank, min(config.bank_new, len(rank)))[1]
    usable = usable[chosen]
    return Entries(normalise(z[chosen]), normalise(jnp.where(usable[:, None], g[chosen], 0.0)), usable)


def push(bank: Bank, entries: Entries) -> Bank:
    """Writes the valid entries over the oldest ones of the bank."""
    size = len(bank.valid)
    order = jnp.cumsum(entries.valid) - 1
    position = jnp.where(entries.valid, (bank.next + order) % size, size)  # beyond the end: not written
    write = lambda array, values: array.at[position].set(values.astype(array.dtype), mode="drop")
    return Bank(
        write(bank.z, entries.z),
        write(bank.g_hat, entries.g_hat),
        write(bank.valid, entries.valid),
        ((bank.next + jnp.sum(entries.valid)) % size).astype(jnp.int32),
    )
