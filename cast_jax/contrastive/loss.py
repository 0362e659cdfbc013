"""The pixel-wise contrastive loss with instance-aware, debiased negatives (the paper's section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.bank import Bank
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.contrast import Anchors, CandidatePixels, Sums, contrast
from cast_jax.contrastive.fused_map import normalise

_ELSEWHERE = jnp.iinfo(jnp.int32).max  # the region of a bank's pixels: no anchor's

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def choose_anchors(
    key: PRNGKeyArray, valid: Bool[Array, "batch pixels"], num_anchors: int | None
) -> tuple[Int[Array, "batch anchors"], Bool[Array, "batch anchors"]]:
    """A random subset of each image's valid pixels, without replacement, and which of the positions are real.

    An image with fewer valid pixels than asked for gives them all. None takes every pixel, in order.
    """
    batch, pixels = valid.shape
    if num_anchors is None or num_anchors >= pixels:
        return jnp.broadcast_to(jnp.arange(pixels, dtype=jnp.int32), valid.shape), valid
    rank = jnp.where(valid, jax.random.uniform(key, (batch, pixels)), -1.0)
    position = jax.lax.top_k(rank, num_anchors)[1].astype(jnp.int32)
    return position, jnp.take_along_axis(valid, position, axis=1)


def unique_regions(instance_ids: Int[Array, "batch pixels"]) -> Int[Array, "batch pixels"]:
    """Ids that no two images share; -1 stays -1 (unknown). Each image's background (0) is a region of its own."""
    images = jnp.arange(instance_ids.shape[0], dtype=jnp.int32)[:, None]
    apart = images * (jnp.max(instance_ids, initial=0).astype(jnp.int32) + 1) + instance_ids
    return jnp.where(instance_ids < 0, -1, apart)


def contrastive_loss(
    key: PRNGKeyArray,
    config: ContrastiveConfig,
    *,
    z_weak: Float[Array, "batch pixels embedding"],
    z_strong: Float[Array, "batch pixels embedding"],
    g: Float[Array, "batch pixels dim"],
    valid: Bool[Array, "batch pixels"],
    instance_ids: Int[Array, "batch pixels"] | None = None,
    bank: Bank | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """NT-Xent over pixels, against negatives drawn in proportion to the debias score ``d(p, r) = 1 - <ĝ_p, ĝ_r>``::

        s⁺_p   = <z^w_p, z^s_p> / τ
        s⁻_p,k = <z^w_p, z^s_n(p,k)> / τ,   n(p,k) ~ Categorical(r ↦ d(p,r) / Σ_r' d(p,r')),   k = 1..K
        loss   = Σ_p  log(exp s⁺_p + Σ_k exp s⁻_p,k) - s⁺_p

    What the theory predicts (the paper's proposition 3.1): let a drawn negative lie on another instance than its anchor
    with probability at least α. One gradient step then grows the expected margin between instances,
    ``E[<z, z⁺> - <z, z⁻>]``, in proportion to the step size, to α and to the weight that the loss puts on the negatives
    (K terms, scaled by 1/τ), even where pseudo-labels are wrong. The metrics measure 1 - α and the margin.

    The pixels are the strong view's. No gradient flows through ``g``, ``valid`` or the draws. Embeddings are normalised
    here (reading them bilinearly shortens them); computed in float32 or wider. Every anchor counts alike.

    Args:
        z_weak: the weak view's embeddings, read at the strong pixels' counterparts: the anchors.
        z_strong: the strong view's embeddings: the keys.
        g: pseudo probabilities of the pixels, normalised or not. Pixels where they are not finite take no part.
        valid: pixels that exist in both views; others are neither anchors nor candidates.
        instance_ids: per image: > 0 an instance, 0 background (a region of its own), -1 unknown.
        bank: the candidates of ``scope="bank"``, constants. While nothing is in it there is nothing to contrast. Its
            pixels count as other regions than any anchor's: it does not know when an image comes again.

    Raises:
        ValueError: ``scope`` is "bank" and there is no ``bank``, or the other way round.

    Returns:
        The sum of the loss over the anchors, the number of anchors, and metrics as pairs (sum, count). With nothing to
        contrast (fewer than two valid pixels, or a map that tells no pixels apart) sum and count are 0.

        - ``contrastive/false_negative_rate``: drawn negatives on the anchor's own instance; over anchors on an instance
          and negatives whose region is known. Only with ``instance_ids``, like the margin.
        - ``contrastive/margin``: mean over drawn pairs of different regions of ``<z, z⁺> - <z, z⁻>``, same anchors.
        - ``contrastive/acceptance_rate``, ``contrastive/short_rows``: of proposals, and of anchors that the pool did
          not serve (they were served by an exact slower way). Only with ``mixture_proposals``.
        - ``contrastive/nonfinite``: pixels left out because their pseudo probability is not finite.
    """
    if (config.scope == "bank") != (bank is not None):
        raise ValueError(f"scope {config.scope!r} {'has no' if bank is not None else 'needs a'} bank")
    g = jax.lax.stop_gradient(g)
    z_weak, z_strong = normalise(z_weak), normalise(z_strong)
    finite = jnp.all(jnp.isfinite(g), axis=-1)
    g_hat = normalise(jnp.where(finite[..., None], g, 0.0))
    usable = valid & finite
    regions = jnp.full(valid.shape, -1, jnp.int32) if instance_ids is None else unique_regions(instance_ids)
    on_instance = jnp.zeros(valid.shape, bool) if instance_ids is None else instance_ids > 0

    anchor_key, sampling_key = jax.random.split(key)
    position, real = choose_anchors(anchor_key, usable, config.num_anchors)
    pick = jax.vmap(lambda array, position: array[position])
    batch, pixels = valid.shape
    offset = 0 if config.scope == "image" else jnp.arange(batch, dtype=jnp.int32)[:, None] * pixels
    own = position + offset if bank is None else jnp.full_like(position, -1)
    known = (pick(regions, position), pick(on_instance, position))
    anchors = Anchors(pick(g_hat, position), own, real, *known)
    candidates = CandidatePixels(g_hat, usable, regions)
    if bank is not None:
        elsewhere = jnp.full(bank.valid.shape, _ELSEWHERE)
        candidates = CandidatePixels(bank.g_hat[None], bank.valid[None], elsewhere[None])

    # Sets of candidates: one per image or one in all, and as many again for the other direction.
    directions = 2 if config.symmetric else 1
    sets = directions * (batch if config.scope == "image" else 1)
    z_keys = jnp.stack([z_strong, z_weak][:directions])
    if bank is not None:
        z_keys = jnp.stack([jax.lax.stop_gradient(bank.z)[None]] * directions)
    z_anchors, z_positives = (
        jnp.stack([pick(z, position) for z in pair[:directions]]) for pair in ([z_weak, z_strong], [z_strong, z_weak])
    )
    shared = jax.tree.map(lambda array: jnp.broadcast_to(array, (directions, *array.shape)), (anchors, candidates))
    operands = (z_anchors, z_positives, z_keys, *shared)
    by_set = jax.tree.map(lambda array: array.reshape(sets, -1, *array.shape[3:]), operands)
    sums = contrast(config, jax.random.split(sampling_key, sets), *by_set)
    return sums.loss, jax.lax.stop_gradient(sums.anchors), _metrics(config, sums, finite, instance_ids is not None)


def _metrics(config: ContrastiveConfig, sums: Sums, finite: Bool[Array, "batch pixels"], labelled: bool) -> Metrics:
    sums = jax.lax.stop_gradient(sums)
    nonfinite = jnp.sum(~finite, dtype=jnp.float32)
    metrics = {"contrastive/nonfinite": (nonfinite, jnp.asarray(finite.size, jnp.float32))}
    if labelled:
        metrics["contrastive/false_negative_rate"] = (sums.false_negatives, sums.known_negatives)
        metrics["contrastive/margin"] = (sums.margin, sums.margin_pairs)
    if config.sampler == "mixture_proposals":
        metrics["contrastive/acceptance_rate"] = (sums.accepted, sums.proposed)
        metrics["contrastive/short_rows"] = (sums.short, sums.requested)
    return metrics
