"""Draws negatives for groups of anchors and contrasts them, with memory that does not grow with the number of groups.

The loss is a scalar, so its gradient is known in the forward pass, up to one factor: each group's gradient is taken at
once and added up in place, and nothing of a group outlives its turn. Automatic differentiation would save or redo each
group's draws, and would add a gradient of the size of all candidates once per group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.samplers import (
    ROW_SAMPLERS,
    Proposals,
    SharedDraws,
    mixture_proposals,
    prepare_proposals,
)
from cast_jax.contrastive.scores import CandidateMap, candidate_map

_ROWS = 8  # anchors that a row sampler serves at a time: what it holds grows with rows × candidates


class Anchors(NamedTuple):
    """What the sampler and the diagnostics know of the anchors of one set of candidates."""

    g_hat: Float[Array, "anchors dim"]
    own: Int[Array, "anchors"]
    """Position among the candidates, or -1."""
    valid: Bool[Array, "anchors"]
    regions: Int[Array, "anchors"]
    """The instance that the pixel lies on, unique in the batch; negative if unknown."""
    on_instance: Bool[Array, "anchors"]


class CandidatePixels(NamedTuple):
    """What the sampler and the diagnostics know of the candidates."""

    g_hat: Float[Array, "candidates dim"]
    valid: Bool[Array, "candidates"]
    regions: Int[Array, "candidates"]


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
    shift = jax.lax.stop_gradient(jnp.maximum(positive, jnp.max(negative, axis=-1)))
    total = jnp.exp(positive - shift) + jnp.sum(jnp.exp(negative - shift[:, None]), axis=-1)
    return jnp.log(total) + shift - positive


def _contrast_rows(config, z_anchors, z_positives, z_negatives, taken, anchors, regions):
    """Loss, diagnostics and gradients of some anchors against shared [slots, E] or own [anchors, K, E] negatives."""

    def total_loss(z_anchors, z_positives, z_negatives):
        positive = jnp.sum(z_anchors * z_positives, axis=-1)
        subscripts = "ae,se->as" if z_negatives.ndim == 2 else "ae,ase->as"
        negative = jnp.einsum(subscripts, z_anchors, z_negatives)
        losses = anchor_losses(config, positive, negative, taken)
        return jnp.sum(jnp.where(anchors.valid, losses, 0.0)), (positive, negative)

    graded = jax.value_and_grad(total_loss, argnums=(0, 1, 2), has_aux=True)
    (loss, (positive, negative)), gradients = graded(z_anchors, z_positives, z_negatives)

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


def _prepare(config: ContrastiveConfig, candidates: CandidateMap) -> Proposals | CandidateMap:
    return prepare_proposals(candidates, config.sampling_score) if config.sampler == "mixture_proposals" else candidates


def _draw_shared(config, key, anchors: Anchors, prepared) -> tuple[SharedDraws | None, Bool[Array, "anchors"]]:
    """The pool of a group, if the sampler has one, and which anchors a row sampler must serve."""
    if config.sampler != "mixture_proposals":
        return None, anchors.valid
    shared = mixture_proposals(
        key,
        anchors.g_hat,
        anchors.own,
        prepared,
        score=config.sampling_score,
        num_negatives=config.num_negatives,
        slots=config.num_slots,
    )
    return shared, anchors.valid & (shared.accepted < config.num_negatives)


def _draw_rows(config, key, anchors: Anchors, candidates: CandidateMap):
    sampler = ROW_SAMPLERS.get(config.sampler, ROW_SAMPLERS["inverse_cdf"])
    return sampler(
        key,
        anchors.g_hat,
        anchors.own,
        candidates,
        score=config.sampling_score,
        num_negatives=config.num_negatives,
    )


def _for_flagged_rows(flagged: Bool[Array, "anchors"], body, state):
    """``state = body(block, rows, real, state)`` over blocks of the flagged rows; nothing is done if there are none."""
    order = jnp.argsort(~flagged, stable=True)
    count = jnp.sum(flagged)

    def step(carry):
        block, state = carry
        position = block * _ROWS + jnp.arange(_ROWS)
        rows = order[jnp.minimum(position, order.shape[0] - 1)]
        return block + 1, body(block, rows, position < count, state)

    return jax.lax.while_loop(lambda carry: carry[0] * _ROWS < count, step, (jnp.zeros((), jnp.int32), state))[1]


def _contrast_group(config, prepared, pixels: CandidatePixels, z_candidates, carry, group):
    sums, d_candidates = carry
    key, z_anchors, z_positives, anchors = group
    candidates = prepared.candidates if isinstance(prepared, Proposals) else prepared
    shared_key, row_key = jax.random.split(key)
    shared, by_row = _draw_shared(config, shared_key, anchors, prepared)
    d_anchors, d_positives = jnp.zeros_like(z_anchors), jnp.zeros_like(z_positives)
    if shared is not None:
        own = anchors._replace(valid=anchors.valid & ~by_row)
        regions, z_pool = pixels.regions[shared.pool], z_candidates[shared.pool]
        more, (d_anchors, d_positives, d_pool) = _contrast_rows(
            config, z_anchors, z_positives, z_pool, shared.taken, own, regions
        )
        d_candidates = d_candidates.at[shared.pool].add(d_pool)
        accepted = jnp.sum(jnp.where(anchors.valid, shared.accepted, 0), dtype=float)
        requested = jnp.sum(anchors.valid, dtype=float)
        short = jnp.sum(by_row, dtype=float)
        sums = _add(sums, more)
        sums = sums._replace(
            accepted=sums.accepted + accepted,
            proposed=sums.proposed + requested * config.num_slots,
            short=sums.short + short,
            requested=sums.requested + requested,
        )

    def serve(block, rows, real, state):
        sums, d_anchors, d_positives, d_candidates = state
        some = jax.tree.map(lambda leaf: leaf[rows], anchors)
        drawn, drawable = _draw_rows(config, jax.random.fold_in(row_key, block), some, candidates)
        some = some._replace(valid=some.valid & real & drawable)
        more, (d_a, d_p, d_n) = _contrast_rows(
            config,
            z_anchors[rows],
            z_positives[rows],
            z_candidates[drawn],
            jnp.ones(drawn.shape, bool),
            some,
            pixels.regions[drawn],
        )
        d_anchors, d_positives = d_anchors.at[rows].add(d_a), d_positives.at[rows].add(d_p)
        return _add(sums, more), d_anchors, d_positives, d_candidates.at[drawn].add(d_n)

    state = (sums, d_anchors, d_positives, d_candidates)
    sums, d_anchors, d_positives, d_candidates = _for_flagged_rows(by_row, serve, state)
    return (sums, d_candidates), (d_anchors, d_positives)


def _grouped(config: ContrastiveConfig, arrays):
    """Pads the anchors with invalid ones (zeros) and splits them into groups."""
    total = jax.tree.leaves(arrays)[0].shape[0]
    size = min(config.group_size, total)
    groups = -(-total // size)

    def split(array):
        padded = jnp.pad(array, [(0, groups * size - total)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(groups, size, *array.shape[1:])

    return jax.tree.map(split, arrays), groups


def _contrast_set(config, key, z_anchors, z_positives, z_candidates, anchors: Anchors, pixels: CandidatePixels):
    prepared = _prepare(config, candidate_map(pixels.g_hat, pixels.valid))
    (z_a, z_p, grouped), groups = _grouped(config, (z_anchors, z_positives, anchors))
    step = functools.partial(_contrast_group, config, prepared, pixels, z_candidates)
    carry = (_no_sums(), jnp.zeros_like(z_candidates))
    (sums, d_candidates), gradients = jax.lax.scan(step, carry, (jax.random.split(key, groups), z_a, z_p, grouped))
    d_anchors, d_positives = (d.reshape(-1, d.shape[-1])[: z_anchors.shape[0]] for d in gradients)
    return sums, (d_anchors, d_positives, d_candidates)


def _contrast_sets(config, keys, z_anchors, z_positives, z_candidates, anchors, pixels):
    operands = (keys, z_anchors, z_positives, z_candidates, anchors, pixels)
    sums, gradients = jax.lax.map(lambda one: _contrast_set(config, *one), operands)
    return jax.tree.map(functools.partial(jnp.sum, axis=0), sums), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contrast(
    config: ContrastiveConfig,
    keys: PRNGKeyArray,
    z_anchors: Float[Array, "sets anchors embedding"],
    z_positives: Float[Array, "sets anchors embedding"],
    z_candidates: Float[Array, "sets candidates embedding"],
    anchors: Anchors,
    pixels: CandidatePixels,
) -> Sums:
    """Sums of loss and diagnostics over sets of candidates, each with its own anchors (one set, or one per image).

    All arrays of ``anchors`` and ``pixels`` have a leading axis of sets. Only ``Sums.loss`` is differentiable, and only
    by reverse mode, with respect to the three arrays of embeddings.
    """
    return _contrast_sets(config, keys, z_anchors, z_positives, z_candidates, anchors, pixels)[0]


def _contrast_forward(config, *operands):
    return _contrast_sets(config, *operands)


def _contrast_backward(config, gradients, cotangent: Sums):
    scaled = jax.tree.map(lambda gradient: (cotangent.loss * gradient).astype(gradient.dtype), gradients)
    return None, *scaled, None, None


contrast.defvjp(_contrast_forward, _contrast_backward)


def draw_negatives(
    key: PRNGKeyArray, config: ContrastiveConfig, anchors: Anchors, pixels: CandidatePixels
) -> tuple[Int[Array, "anchors negatives"], Bool[Array, "anchors"]]:
    """The negatives themselves, as positions among the candidates: what ``contrast`` uses for the same key.

    For inspection and tests; the loss never forms this array. The flags tell which anchors have negatives.
    """
    candidates = candidate_map(pixels.g_hat, pixels.valid)
    prepared = _prepare(config, candidates)
    grouped, groups = _grouped(config, anchors)

    def one(operands):
        key, anchors = operands
        shared_key, row_key = jax.random.split(key)
        shared, by_row = _draw_shared(config, shared_key, anchors, prepared)
        drawn = jnp.zeros((anchors.own.shape[0], config.num_negatives), jnp.int32)
        if shared is not None:
            first = jnp.argsort(~shared.taken, axis=-1, stable=True)[:, : config.num_negatives]
            drawn = drawn.at[:, : first.shape[1]].set(shared.pool[first])

        def serve(block, rows, real, state):
            drawn, drawable = state
            some = jax.tree.map(lambda leaf: leaf[rows], anchors)
            found, possible = _draw_rows(config, jax.random.fold_in(row_key, block), some, candidates)
            rows = jnp.where(real, rows, drawn.shape[0])
            return drawn.at[rows].set(found, mode="drop"), drawable.at[rows].set(possible, mode="drop")

        return _for_flagged_rows(by_row, serve, (drawn, anchors.valid))

    drawn, drawable = jax.lax.map(one, (jax.random.split(key, groups), grouped))
    total = anchors.own.shape[0]
    return drawn.reshape(-1, config.num_negatives)[:total], drawable.reshape(-1)[:total]
