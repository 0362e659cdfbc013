"""Draws negatives for groups of anchors and contrasts them, on one device or on several that share their candidates.

The loss is a scalar, so its gradient is known in the forward pass, up to one factor: each group's gradient is taken at
once and added up in place, and nothing of a group outlives its turn. Automatic differentiation would save or redo each
group's draws, and would add a gradient of the size of all candidates once per group.

What devices exchange are pools of proposals and their gradients (:mod:`cast_jax.contrastive.pools`); neither grows with
the pixels. All random numbers belong to images and groups, none to devices, so that the loss is the same (up to the
order of sums) on any number of devices.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.fused_map import normalise
from cast_jax.contrastive.groups import (
    Turns,
    group_numbers,
    groups_together,
    in_groups,
    number_of_groups,
    out_of_groups,
)
from cast_jax.contrastive.peers import ALONE, Peers
from cast_jax.contrastive.pools import Known, Pools, add_to_candidates, flatten, make_pools, read_candidates
from cast_jax.contrastive.samplers import draw_rows, mixture_proposals
from cast_jax.contrastive.scores import CandidateMap, candidate_map
from cast_jax.core import target
from cast_jax.core.loops import over_flagged
from cast_jax.core.selection import take

_COLD = 0.025  # temperatures below, where exp((-1 - 1) / temperature) nears the least number of float32
_ROWS = 8  # anchors of a device that a row sampler serves at a time: what it holds grows with rows × candidates


class Anchors(NamedTuple):
    """What the sampler and the diagnostics know of the anchors that share one set of candidates."""

    g_hat: Float[Array, "images anchors dim"]
    own: Int[Array, "images anchors"]
    """The anchor's position among the candidates, or -1."""
    valid: Bool[Array, "images anchors"]
    regions: Int[Array, "images anchors"]
    """The instance that the pixel lies on, unique in the batch; negative if unknown."""
    on_instance: Bool[Array, "images anchors"]
    image: Int[Array, "images"]
    """The image's number in the batch of all devices, to which its random numbers belong."""


class CandidatePixels(NamedTuple):
    """What the sampler and the diagnostics know of the candidates."""

    g_hat: Float[Array, "images pixels dim"]
    """Zero where a pixel is not valid; else fewer proposals would be accepted."""
    valid: Bool[Array, "images pixels"]
    regions: Int[Array, "images pixels"]
    position: Int[Array, "images pixels"]
    """A number that no other candidate has, on any device."""


class Sums(NamedTuple):
    """Sums over the anchors of what is reported; every one a scalar of the default float type."""

    loss: Float[Array, ""]
    anchors: Float[Array, ""]
    accepted: Float[Array, ""]
    proposed: Float[Array, ""]
    short: Float[Array, ""]
    requested: Float[Array, ""]
    false_negatives: Float[Array, ""]
    known_negatives: Float[Array, ""]
    margin: Float[Array, ""]
    margin_pairs: Float[Array, ""]
    effective: Float[Array, ""]
    effective_anchors: Float[Array, ""]


def _no_sums() -> Sums:
    return Sums(*([jnp.zeros(())] * len(Sums._fields)))


def _add(first, second):
    return jax.tree.map(jnp.add, first, second)


def anchor_losses(
    config: ContrastiveConfig,
    positive: Float[Array, "anchors"],
    negative: Float[Array, "anchors slots"],
    taken: Bool[Array, "anchors slots"],
) -> Float[Array, "anchors"]:
    """NT-Xent or the hinge loss of each anchor, from cosine similarities; only ``taken`` slots are negatives."""
    if config.loss == "hinge":
        violation = jnp.maximum(config.margin + negative - positive[:, None], 0.0)
        return jnp.sum(jnp.where(taken, violation, 0.0), axis=-1) / config.num_negatives
    positive = positive / config.temperature
    negative = jnp.where(taken, negative / config.temperature, -jnp.inf)
    shift = jnp.full_like(positive, 1 / config.temperature)  # no cosine is larger, so that none has to be looked for
    if config.temperature < _COLD:
        shift = jax.lax.stop_gradient(jnp.maximum(positive, jnp.max(negative, axis=-1)))
    total = jnp.exp(positive - shift) + jnp.sum(jnp.exp(negative - shift[:, None]), axis=-1)
    return jnp.log(total) + shift - positive


def _wide(z):
    """At least float32, in which gradients add up."""
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def product_dtype(dtype: Any) -> Any:
    """What similarities are multiplied in: bfloat16 on accelerators, where they are added up in ``dtype``."""
    return dtype if target.backend() == "cpu" else jnp.bfloat16


def _multiplied(subscripts: str, *factors: Array) -> Array:
    dtype = factors[0].dtype
    narrow = [factor.astype(product_dtype(dtype)) for factor in factors]
    return jnp.einsum(subscripts, *narrow, preferred_element_type=dtype)


@jax.custom_vjp
def similarities(
    z_anchors: Float[Array, "anchors embedding"],
    z_negatives: Float[Array, "slots embedding"] | Float[Array, "anchors slots embedding"],
) -> Float[Array, "anchors slots"]:
    """Products of anchors with shared negatives, or with their own, in :func:`product_dtype`; the gradients' too."""
    return _multiplied("ae,se->as" if z_negatives.ndim == 2 else "ae,ase->as", z_anchors, z_negatives)


def _similarities_backward(factors, gradient):
    z_anchors, z_negatives = factors
    of_negatives = "se" if z_negatives.ndim == 2 else "ase"
    return (
        _multiplied(f"as,{of_negatives}->ae", gradient, z_negatives),
        _multiplied(f"as,ae->{of_negatives}", gradient, z_anchors),
    )


similarities.defvjp(lambda *factors: (similarities(*factors), factors), _similarities_backward)


def _contrast_rows(config, z_anchors, z_positives, z_negatives, taken, anchors, regions):
    """Loss, diagnostics and gradients of some anchors against shared [slots, E] or own [anchors, K, E] negatives.

    Embeddings are normalised here, where they are used: most pixels are neither anchors nor negatives.
    """

    def total_loss(z_anchors, z_positives, z_negatives):
        z_anchors, z_positives, z_negatives = map(normalise, (z_anchors, z_positives, z_negatives))
        positive = jnp.sum(z_anchors * z_positives, axis=-1)
        negative = similarities(z_anchors, z_negatives)
        losses = anchor_losses(config, positive, negative, taken)
        return jnp.sum(jnp.where(anchors.valid, losses, 0.0)), (positive, negative)

    graded = jax.value_and_grad(total_loss, argnums=(0, 1, 2), has_aux=True)
    # Masked pixels may hold anything, NaN too, which a loss that does not count would hand to the pool's gradient.
    z_anchors, z_positives = (jnp.where(anchors.valid[:, None], _wide(z), 0.0) for z in (z_anchors, z_positives))
    (loss, (positive, negative)), gradients = graded(z_anchors, z_positives, _wide(z_negatives))

    regions = jnp.broadcast_to(regions, taken.shape)
    known = taken & (regions >= 0) & (anchors.valid & anchors.on_instance)[:, None]
    same = regions == anchors.regions[:, None]
    apart = known & ~same
    sums = _no_sums()._replace(
        loss=loss.astype(float),
        anchors=jnp.sum(anchors.valid, dtype=float),
        false_negatives=jnp.sum(known & same, dtype=float),
        known_negatives=jnp.sum(known, dtype=float),
        margin=jnp.sum(jnp.where(apart, positive[:, None] - negative, 0.0), dtype=float),
        margin_pairs=jnp.sum(apart, dtype=float),
    )
    return sums, gradients


def effective_number(positions: Int[Array, "slots"], taken: Bool[Array, "slots"]) -> Float[Array, ""]:
    """The effective number of distinct ones among those taken: (Σ c)² / Σ c² over how often, c, each occurs."""
    slots = jnp.arange(positions.shape[0])
    beyond = jnp.iinfo(positions.dtype).max
    ordered = jnp.sort(jnp.where(taken, positions, beyond))
    start = jax.lax.cummax(jnp.where(ordered != jnp.pad(ordered[:-1], (1, 0)), slots, 0))
    odd = jnp.where(ordered < beyond, 2 * (slots - start) + 1, 0)  # the first c odd numbers add up to c²
    count, squares = jnp.sum(taken, dtype=float), jnp.sum(odd, dtype=float)  # squares of integers would overflow
    return jnp.where(count > 0, count**2 / jnp.maximum(squares, 1.0), 0.0)


def _with_effective(sums: Sums, positions, taken, valid) -> Sums:
    """``sums`` with the effective number of negatives of these anchors."""
    positions = jnp.broadcast_to(positions, taken.shape)
    effective = jnp.where(valid, jax.vmap(effective_number)(positions, taken), 0.0)
    return sums._replace(effective=jnp.sum(effective, dtype=float), effective_anchors=jnp.sum(valid, dtype=float))


def _propose(config, key, numbers, anchors: Anchors, pool: Known, masses, centre):
    """The negatives that these groups, whose anchors stand in a row, accept in the pool that they share."""
    size = len(anchors.own) // len(numbers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    coins = jax.vmap(lambda key: jax.random.uniform(key, (size, 1, config.num_slots)))(keys)
    return mixture_proposals(
        flatten(coins),
        anchors.g_hat - centre,
        anchors.own,
        pool.g_hat - centre,
        pool.position,
        masses,
        score=config.sampling_score,
        num_negatives=config.num_negatives,
    )


def _contrast_groups(config, key, z_anchors, z_positives, anchors: Anchors, pools: Pools, centre, known: Known):
    """All groups against their pools: sums, gradients, and who stays short.

    The gradients are the anchors', the positives', and the exchanged pools' or else the candidates'.
    """
    numbers = group_numbers(config, anchors.image, anchors.own.shape[1])
    grouped = in_groups(config, (z_anchors, z_positives, anchors._replace(image=jnp.zeros_like(anchors.own))))
    size, embedding = grouped[0].shape[1:]
    turns = Turns.plan(len(numbers), pools.number, groups_together(config, size, embedding))

    def contrast_pool(numbers, groups):
        z_anchors, z_positives, anchors = jax.tree.map(flatten, groups)
        which = numbers[0] % pools.number
        pool = pools.read(which, known)
        shared = _propose(config, key, numbers, anchors, pool, pools.masses, centre)
        served = anchors.valid & (shared.accepted >= config.num_negatives)
        more, (d_anchors, d_positives, d_pool) = _contrast_rows(
            config, z_anchors, z_positives, pool.z, shared.taken, anchors._replace(valid=served), pool.regions
        )
        requested = jnp.sum(anchors.valid, dtype=float)
        more = more._replace(
            accepted=jnp.sum(jnp.where(anchors.valid, shared.accepted, 0), dtype=float),
            proposed=requested * config.num_slots,
            short=jnp.sum(anchors.valid & ~served, dtype=float),
            requested=requested,
        )
        # Of one anchor a group: it is costly.
        more = _with_effective(more, pool.position[None], shared.taken[::size], served[::size])
        by_group = lambda array: array.reshape(len(numbers), size, *array.shape[1:])
        return which, more, d_pool, jax.tree.map(by_group, (d_anchors, d_positives, anchors.valid & ~served))

    def step(carry, turn):
        sums, d_negatives = carry
        if turns.pools == 1:  # a map over one of them would be compiled to more kernels
            axis = (lambda array: array[None], lambda array: array[0])
            enter, leave = axis if turns.alone else axis[::-1]
            which, more, d_pool, by_group = contrast_pool(*jax.tree.map(enter, turn))
            by_group = jax.tree.map(leave, by_group)
        else:
            which, more, d_pool, by_group = jax.vmap(contrast_pool)(*turn)
            more = jax.tree.map(lambda each: jnp.sum(each, axis=0), more)
        return (_add(sums, more), pools.add(which, d_pool, d_negatives)), by_group

    d_negatives = jnp.zeros_like(_wide(known.z if pools.exchanged is None else pools.exchanged.z))
    (sums, d_negatives), by_turn = jax.lax.scan(step, (_no_sums(), d_negatives), turns.split((numbers, grouped)))
    d_anchors, d_positives, short = out_of_groups(turns.join(by_turn), anchors.own.shape)
    return sums, (d_anchors, d_positives, d_negatives), short


def _draw_rows(config, peers: Peers, key, anchors: Anchors, rows, candidates: CandidateMap, pixels: CandidatePixels):
    """The negatives of all peers' ``rows`` (of the flattened anchors), and which of the rows have any."""
    per_image = anchors.own.shape[1]
    numbers = take(anchors.image, rows // per_image) * per_image + rows % per_image
    g_hat, own = (take(flatten(array), rows) for array in (anchors.g_hat, anchors.own))
    g_hat, own, numbers = peers.gather((g_hat, own, numbers))
    return draw_rows(
        "categorical" if config.sampler == "categorical" else "inverse_cdf",
        jax.vmap(jax.random.fold_in, (None, 0))(key, numbers),
        g_hat,
        own,
        candidates,
        pixels.position,
        score=config.sampling_score,
        num_negatives=config.num_negatives,
        peers=peers,
    )


def _contrast_short(config, peers, key, z, anchors, candidates, pixels, flagged, state):
    """Serves the flagged anchors from all their candidates. ``state``: sums, and gradients of the embeddings ``z``."""
    z_anchors, z_positives, z_candidates = z
    flat = jax.tree.map(flatten, anchors._replace(image=anchors.own))
    z_a, z_p = flatten(z_anchors), flatten(z_positives)

    def serve(rows, real, state):
        sums, d_anchors, d_positives, d_candidates = state
        drawn, drawable = _draw_rows(config, peers, key, anchors, rows, candidates, pixels)
        known = (z_candidates, pixels.regions, pixels.position)
        z_negatives, regions, position = peers.sum_and_split(read_candidates(known, drawn))
        some = jax.tree.map(lambda leaf: take(leaf, rows), flat)
        drawable = drawable.reshape(-1, _ROWS)[peers.number]
        some = some._replace(valid=some.valid & real & drawable)
        taken = jnp.ones(position.shape, bool)
        more, (d_a, d_p, d_n) = _contrast_rows(
            config, take(z_a, rows), take(z_p, rows), z_negatives, taken, some, regions
        )
        more = _with_effective(more, position, taken, some.valid)
        d_anchors, d_positives = d_anchors.at[rows].add(d_a), d_positives.at[rows].add(d_p)
        return _add(sums, more), d_anchors, d_positives, add_to_candidates(d_candidates, drawn, peers.gather(d_n))

    return over_flagged(flagged.reshape(-1), serve, state, _ROWS, peers.max)


def _contrast_set(config, peers, num_images, key, z_anchors, z_positives, z_candidates, anchors: Anchors, pixels):
    candidates = candidate_map(pixels.g_hat, pixels.valid, peers)
    pool_key, coin_key, row_key = jax.random.split(key, 3)
    sums, flagged = _no_sums(), anchors.valid
    d_anchors, d_positives, d_candidates = (jnp.zeros_like(_wide(z)) for z in (z_anchors, z_positives, z_candidates))
    if config.sampler == "mixture_proposals":
        number = min(num_images * number_of_groups(config, anchors.own.shape[1]), config.max_pools)
        known = Known(pixels.g_hat, z_candidates, pixels.regions, pixels.position)
        pools = make_pools(config, peers, pool_key, number, candidates, known)
        sums, (d_anchors, d_positives, d_candidates), flagged = _contrast_groups(
            config, coin_key, z_anchors, z_positives, anchors, pools, candidates.centre, known
        )
        if pools.exchanged is not None:
            d_candidates = add_to_candidates(jnp.zeros_like(_wide(z_candidates)), pools.drawn, peers.sum(d_candidates))
    state = (sums, flatten(d_anchors), flatten(d_positives), d_candidates)
    sums, d_anchors, d_positives, d_candidates = _contrast_short(
        config, peers, row_key, (z_anchors, z_positives, z_candidates), anchors, candidates, pixels, flagged, state
    )
    return sums, (
        d_anchors.reshape(z_anchors.shape).astype(z_anchors.dtype),
        d_positives.reshape(z_positives.shape).astype(z_positives.dtype),
        d_candidates.astype(z_candidates.dtype),
    )


def _contrast_sets(config, peers, num_images, keys, *operands):
    one = functools.partial(_contrast_set, config, peers, num_images)
    sums, gradients = jax.lax.map(lambda operands: one(*operands), (keys, *operands))
    return jax.tree.map(functools.partial(jnp.sum, axis=0), sums), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def contrast(
    config: ContrastiveConfig,
    peers: Peers,
    num_images: int,
    keys: PRNGKeyArray,
    z_anchors: Float[Array, "sets images anchors embedding"],
    z_positives: Float[Array, "sets images anchors embedding"],
    z_candidates: Float[Array, "sets images pixels embedding"],
    anchors: Anchors,
    pixels: CandidatePixels,
) -> Sums:
    """This device's sums of loss and diagnostics over sets of candidates, each with its own anchors.

    All arrays of ``anchors`` and ``pixels`` have a leading axis of sets. Only ``Sums.loss`` is differentiable, and only
    by reverse mode, with respect to the three arrays of embeddings. The gradient is that of the sum of all peers'
    losses.

    Args:
        peers: the devices over which the candidates are spread; ``ALONE`` if all of them are here.
        num_images: with anchors, in a set, over all devices.
    """
    return _contrast_sets(config, peers, num_images, keys, z_anchors, z_positives, z_candidates, anchors, pixels)[0]


def _contrast_forward(config, peers, num_images, *operands):
    return _contrast_sets(config, peers, num_images, *operands)


def _contrast_backward(config, peers, num_images, gradients, cotangent: Sums):
    scaled = jax.tree.map(lambda gradient: (cotangent.loss * gradient).astype(gradient.dtype), gradients)
    return None, *scaled, None, None


contrast.defvjp(_contrast_forward, _contrast_backward)


def draw_negatives(
    key: PRNGKeyArray,
    config: ContrastiveConfig,
    anchors: Anchors,
    pixels: CandidatePixels,
    peers: Peers = ALONE,
) -> tuple[Int[Array, "images anchors negatives"], Bool[Array, "images anchors"]]:
    """The positions of the negatives themselves: what ``contrast`` uses for the same key, of one set.

    For inspection and tests; the loss never forms this array. The flags tell which anchors have negatives.
    """
    images, per_image = anchors.own.shape
    candidates = candidate_map(pixels.g_hat, pixels.valid, peers)
    pool_key, coin_key, row_key = jax.random.split(key, 3)
    found, flagged = jnp.zeros((images * per_image, config.num_negatives), jnp.int32), anchors.valid
    if config.sampler == "mixture_proposals":
        number = min(peers.count * images * number_of_groups(config, per_image), config.max_pools)
        nothing = jnp.zeros((*pixels.valid.shape, 0))
        known = Known(pixels.g_hat, nothing, pixels.regions, pixels.position)
        pools = make_pools(config, peers, pool_key, number, candidates, known)

        def propose(group):
            number, anchors = group
            pool = pools.read(number % pools.number, known)
            shared = _propose(config, coin_key, number[None], anchors, pool, pools.masses, candidates.centre)
            first = jnp.argsort(~shared.taken, axis=-1, stable=True)[:, : config.num_negatives]
            short = config.num_negatives - first.shape[1]
            return jnp.pad(pool.position[first], ((0, 0), (0, short))), shared.accepted >= config.num_negatives

        grouped = in_groups(config, anchors._replace(image=jnp.zeros_like(anchors.own)))
        by_group = jax.lax.map(propose, (group_numbers(config, anchors.image, per_image), grouped))
        found, served = out_of_groups(by_group, anchors.own.shape)
        found, flagged = found.reshape(images * per_image, -1), anchors.valid & ~served

    def serve(rows, real, state):
        found, drawable = state
        drawn, possible = _draw_rows(config, peers, row_key, anchors, rows, candidates, pixels)
        position = peers.sum_and_split(read_candidates(pixels.position, drawn))
        rows = jnp.where(real, rows, found.shape[0])
        possible = possible.reshape(-1, _ROWS)[peers.number]
        return found.at[rows].set(position, mode="drop"), drawable.at[rows].set(possible, mode="drop")

    state = (found, anchors.valid.reshape(-1))
    found, drawable = over_flagged(flagged.reshape(-1), serve, state, _ROWS, peers.max)
    return found.reshape(images, per_image, -1), drawable.reshape(images, per_image)
