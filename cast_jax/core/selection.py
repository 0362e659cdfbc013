"""Counting and choosing along rows, without sorting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt16, UInt32


def running_count(flags: Bool[Array, "rows n"]) -> Int[Array, "rows n"]:
    """Cumulative sum of flags along rows, by counting the bits of packed words."""
    rows, n = flags.shape
    position = jnp.arange(32, dtype=jnp.uint32)
    words = _packed(flags)
    earlier = np.triu(np.ones((words.shape[1],) * 2, np.float32), 1)
    before = jax.lax.population_count(words).astype(jnp.float32) @ earlier  # at most 32 each: exact at any precision
    inside = jax.lax.population_count(words[..., None] & ((jnp.uint32(2) << position) - 1))
    return (before[..., None].astype(jnp.int32) + inside.astype(jnp.int32)).reshape(rows, -1)[:, :n]


def nearest_to_zero(values: Float[Array, "rows n"], count: int) -> Int[Array, "rows count"]:
    """Where the ``count`` values of least magnitude of each row lie, in no order.

    Magnitudes are compared to the 8 bits that bfloat16 keeps; of equal ones the first are taken. NaN are the largest.
    The threshold is found bit by bit: a quarter of the time of ``jax.lax.top_k`` on a CPU, and no sort on a GPU.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.uint32)
    magnitude = (bits >> 16).astype(jnp.uint16)  # in the order of the values

    def narrow(step: Int[Array, ""], threshold: UInt16[Array, "rows"]) -> UInt16[Array, "rows"]:
        trial = threshold | (1 << (14 - step)).astype(jnp.uint16)
        return jnp.where(_count(magnitude < trial[:, None]) < count, trial, threshold)

    threshold = jax.lax.fori_loop(0, 15, narrow, jnp.zeros(len(values), jnp.uint16))
    # Only loops read the magnitudes: XLA would compute them again wherever else they were used.
    up_to = jax.lax.map(lambda limit: _packed(magnitude < limit[:, None]), jnp.stack([threshold, threshold + 1]))
    words = jnp.concatenate([up_to[0], up_to[1] & ~up_to[0]], axis=1)  # first those below the threshold
    return _places(words, count) % (32 * up_to.shape[2])


def take(array: Shaped[Array, "n *shape"], where: Int[Array, "*places"]) -> Shaped[Array, "*places *shape"]:
    """``array[where]`` of places that are real: indexing compiles a choice for those that count from the end, too."""
    return jnp.asarray(array).at[where.astype(jnp.uint32)].get(mode="promise_in_bounds")


def take_rows(array: Shaped[Array, "rows n *shape"], where: Int[Array, "rows k"]) -> Shaped[Array, "rows k *shape"]:
    """What stands at places of each row, ``array[i, where[i]]``; they must be real."""
    rows, n = array.shape[:2]
    first = jnp.arange(rows, dtype=jnp.int32)[:, None] * n
    return take(array.reshape(rows * n, *array.shape[2:]), first + where)


def _places(words: UInt32[Array, "rows words"], count: int) -> Int[Array, "rows count"]:
    """Where the first ``count`` set bits of each row lie; there must be as many."""
    number = jax.lax.population_count(words).astype(jnp.int32)
    before = jnp.cumsum(number, axis=1) - number
    slots = jnp.arange(count, dtype=jnp.int32)
    steps = words.shape[1].bit_length()

    def search(step: Int[Array, ""], word: Int[Array, "rows count"]) -> Int[Array, "rows count"]:
        further = word + (1 << (steps - 1 - step))
        there = jnp.minimum(further, words.shape[1] - 1)
        return jnp.where((further == there) & (take_rows(before, there) <= slots), further, word)

    word = jax.lax.fori_loop(0, steps, search, jnp.zeros((len(words), count), jnp.int32))
    return word * 32 + _nth_bit(take_rows(words, word), slots - take_rows(before, word))


def _packed(flags: Bool[Array, "rows n"]) -> UInt32[Array, "rows words"]:
    """32 flags a word, from the lowest bit on."""
    rows, n = flags.shape
    bits = jnp.pad(flags, ((0, 0), (0, -n % 32))).reshape(rows, -1, 32)
    return jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _count(flags: Bool[Array, "rows n"]) -> Int[Array, "rows"]:
    """How many are set, in sums of 32: of more XLA makes passes through memory on a CPU."""
    counts = flags.astype(jnp.int32)
    while counts.shape[1] > 1:
        counts = jnp.pad(counts, ((0, 0), (0, -counts.shape[1] % 32))).reshape(len(flags), -1, 32).sum(axis=-1)
    return counts[:, 0]


def _nth_bit(words: UInt32[Array, "*shape"], n: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Where the set bit lies before which ``n`` are set: by halves."""
    place = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        lower = jax.lax.population_count(words & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = n >= lower
        n, place = jnp.where(above, n - lower, n), jnp.where(above, place + half, place)
        words = jnp.where(above, words >> half, words)
    return place
