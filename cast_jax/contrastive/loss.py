"""The pixel-wise contrastive loss with instance-aware, debiased negatives (the paper's section 3.2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cast_jax.contrastive.bank import Bank
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.contrast import Anchors, CandidatePixels, Sums, contrast
from cast_jax.contrastive.fused_map import normalise_finite
from cast_jax.contrastive.peers import ALONE, Peers
from cast_jax.core.selection import take_rows

_ELSEWHERE = jnp.iinfo(jnp.int32).max  # the region of a bank's pixels: no anchor's

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def choose_anchors(
    keys: PRNGKeyArray, valid: Bool[Array, "batch pixels"], num_anchors: int | None
) -> tuple[Int[Array, "batch anchors"] | None, Bool[Array, "batch anchors"]]:
    """A random subset of each image's valid pixels, without replacement, and which of the positions are real.

    An image with fewer valid pixels than asked for gives them all. None takes every pixel, in order, and so needs no
    positions. One key an image.
    """
    pixels = valid.shape[1]
    if num_anchors is None or num_anchors >= pixels:
        return None, valid
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (pixels,)))(keys)
    rank = jnp.where(valid, uniform, -1.0)
    position = jax.lax.top_k(rank, num_anchors)[1].astype(jnp.int32)
    return position, take_rows(valid, position)


def unique_regions(instance_ids: Int[Array, "batch pixels"], peers: Peers = ALONE) -> Int[Array, "batch pixels"]:
    """Ids that no two images share; -1 stays -1 (unknown). Each image's background (0) is a region of its own."""
    batch = instance_ids.shape[0]
    images = peers.number * batch + jnp.arange(batch, dtype=jnp.int32)[:, None]
    apart = images * (peers.max(jnp.max(instance_ids, initial=0)).astype(jnp.int32) + 1) + instance_ids
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
    peers: Peers = ALONE,
) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
    """NT-Xent over pixels, against negatives drawn in proportion to the debias score ``d(p, r) = 1 - <ĝ_p, ĝ_r>``::

        s⁺_p   = <z^w_p, z^s_p> / τ
        s⁻_p,k = <z^w_p, z^s_n(p,k)> / τ,   n(p,k) ~ Categorical(r ↦ d(p,r) / Σ_r' d(p,r')),   k = 1..K
        loss   = Σ_p  log(exp s⁺_p + Σ_k exp s⁻_p,k) - s⁺_p

    What the theory predicts (the paper's proposition 3.1): let a drawn negative lie on another instance than its anchor
    with probability at least α. One gradient step then grows the expected margin between instances,
    ``E[<z, z⁺> - <z, z⁻>]``, in proportion to the step size, to α and to the weight that the loss puts on the negatives
    (K terms, scaled by 1/τ), even where pseudo-labels are wrong. The metrics measure 1 - α and the margin.

    The pixels are the strong view's. No gradient flows through ``g``, ``valid`` or the draws. Embeddings need not be
    normalised (reading them bilinearly shortens them); computed in float32 or wider, but for the negatives' products
    and their gradients', which are of bfloat16 on accelerators. Every anchor counts alike.

    Args:
        z_weak: the weak view's embeddings, read at the strong pixels' counterparts: the anchors.
        z_strong: the strong view's embeddings: the keys.
        g: pseudo probabilities of the pixels, normalised or not. Pixels where they are not finite take no part.
        valid: pixels that exist in both views; others are neither anchors nor candidates.
        instance_ids: per image: > 0 an instance, 0 background (a region of its own), -1 unknown.
        bank: the candidates of ``scope="bank"``, constants. While nothing is in it there is nothing to contrast. Its
            pixels count as other regions than any anchor's: it does not know when an image comes again.
        peers: inside ``jax.shard_map``, the devices that hold the other parts of the batch. All results are of the
            whole batch, and the same as on one device up to the order of sums. Keys and bank are the same everywhere.

    Raises:
        ValueError: an array is of another shape than it must be, or ``scope`` is "bank" and there is no ``bank``, or
            the other way round. Outside of ``jax.jit`` also an array that is not finite, by name.

    Returns:
        The sum of the loss over the anchors, the number of anchors, and metrics as pairs (sum, count). With nothing to
        contrast (fewer than two valid pixels, or a map that tells no pixels apart) sum and count are 0.

        - ``contrastive/false_negative_rate``: drawn negatives on the anchor's own instance; over anchors on an instance
          and negatives whose region is known. Only with ``instance_ids``, like the margin.
        - ``contrastive/effective_negatives``: of K draws of an anchor, the effective number of distinct ones,
          ``(Σ c)² / Σ c²`` over how often each is drawn; of one anchor a group and of short rows. Few where a map is
          skewed.
        - ``contrastive/margin``: mean over drawn pairs of different regions of ``<z, z⁺> - <z, z⁻>``, same anchors.
        - ``contrastive/acceptance_rate``, ``contrastive/short_rows``: of proposals, and of anchors that the pool did
          not serve (they were served by an exact slower way). Only with ``mixture_proposals``.
        - ``contrastive/nonfinite``: pixels left out because their pseudo probability is not finite.
    """
    _check_shapes(z_weak, z_strong=z_strong, g=g, valid=valid, instance_ids=instance_ids)
    if (config.scope == "bank") != (bank is not None):
        raise ValueError(f"scope {config.scope!r} {'has no' if bank is not None else 'needs a'} bank")
    _check_finite(z_weak=z_weak, z_strong=z_strong, g=g)
    g = jax.lax.stop_gradient(g)
    g_hat, finite = normalise_finite(g, valid)
    usable = valid & finite
    regions = jnp.full(valid.shape, -1, jnp.int32) if instance_ids is None else unique_regions(instance_ids, peers)
    on_instance = jnp.zeros(valid.shape, bool) if instance_ids is None else instance_ids > 0

    batch, pixels = valid.shape
    image = peers.number * batch + jnp.arange(batch, dtype=jnp.int32)
    position = image[:, None] * pixels + jnp.arange(pixels, dtype=jnp.int32)
    directions = 2 if config.symmetric else 1
    anchor_key, *set_keys = jax.random.split(key, 1 + directions)
    anchor_keys = jax.vmap(jax.random.fold_in, (None, 0))(anchor_key, image)
    chosen, real = choose_anchors(anchor_keys, usable, config.num_anchors)
    of_anchors = (lambda array: array) if chosen is None else functools.partial(take_rows, where=chosen)
    own = of_anchors(position if bank is None else jnp.full_like(position, -1))
    anchors = Anchors(of_anchors(g_hat), own, real, of_anchors(regions), of_anchors(on_instance), image)
    candidates = CandidatePixels(g_hat, usable, regions, position)
    if bank is not None:
        size = bank.valid.shape[0]
        elsewhere = jnp.full((1, size), _ELSEWHERE)
        candidates = CandidatePixels(bank.g_hat[None], bank.valid[None], elsewhere, jnp.arange(size)[None])

    # Sets of candidates, one a direction; with scope "image" one an image and direction, numbered from 0 in each.
    keys = jnp.stack(set_keys)
    z_keys = jnp.stack([z_strong, z_weak][:directions])
    if bank is not None:
        z_keys = jnp.stack([jax.lax.stop_gradient(bank.z)[None]] * directions)
    z_anchors, z_positives = (
        jnp.stack([of_anchors(z) for z in pair[:directions]]) for pair in ([z_weak, z_strong], [z_strong, z_weak])
    )
    shared = jax.tree.map(lambda array: jnp.broadcast_to(array, (directions, *array.shape)), (anchors, candidates))
    operands = (z_anchors, z_positives, z_keys, *shared)
    sharing, num_images = (peers if config.scope == "batch" else ALONE), peers.count * batch
    if config.scope == "image":
        keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, image))(keys).reshape(-1)
        operands = jax.tree.map(lambda array: array.reshape(directions * batch, 1, *array.shape[2:]), operands)
        num_images = 1
    sums = peers.sum(contrast(config, sharing, num_images, keys, *operands))
    nonfinite = peers.sum(jnp.sum(~finite, dtype=jnp.float32))
    finite_pixels = (nonfinite, jnp.asarray(peers.count * finite.size, jnp.float32))
    metrics = _metrics(config, sums, instance_ids is not None) | {"contrastive/nonfinite": finite_pixels}
    return sums.loss, jax.lax.stop_gradient(sums.anchors), metrics


def _check_shapes(z_weak: Array, **others: Array | None) -> None:
    if z_weak.ndim != 3:
        raise ValueError(f"z_weak has shape {z_weak.shape}, not [batch, pixels, embedding]; an image's pixels in a row")
    for name, array in others.items():
        if array is None:
            continue
        wanted = z_weak.shape if name == "z_strong" else z_weak.shape[:2]
        given = array.shape[:2] if name == "g" and array.ndim == 3 else array.shape
        if given != wanted:
            raise ValueError(f"{name} has shape {array.shape}, which does not fit z_weak's {z_weak.shape}")
        kind = {"valid": jnp.bool_, "instance_ids": jnp.integer}.get(name)
        if kind is not None and not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} is of {array.dtype}; it must be {kind.__name__}")


def _check_finite(**arrays: Array) -> None:
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array, np.float32)).all():
            raise ValueError(f"{name} is not finite everywhere")


def _metrics(config: ContrastiveConfig, sums: Sums, labelled: bool) -> Metrics:
    sums = jax.lax.stop_gradient(sums)
    metrics = {"contrastive/effective_negatives": (sums.effective, sums.effective_anchors)}
    if labelled:
        metrics["contrastive/false_negative_rate"] = (sums.false_negatives, sums.known_negatives)
        metrics["contrastive/margin"] = (sums.margin, sums.margin_pairs)
    if config.sampler == "mixture_proposals":
        metrics["contrastive/acceptance_rate"] = (sums.accepted, sums.proposed)
        metrics["contrastive/short_rows"] = (sums.short, sums.requested)
    return metrics
