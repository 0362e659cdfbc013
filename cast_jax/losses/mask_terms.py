"""Cross-entropy and dice of masks: of given ones, or of matched queries' where there are instances.

Slots of instances are mostly padding, and a mask takes more memory than anything else of its query. So the masks of
matched queries are formed of one image's block of slots at a time, and of blocks without an instance not at all. How
many turns that takes is known only when the program runs, and such loops have no gradient by themselves: it is given
here. Points are kept, those of all slots; masks are formed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from cast_jax.core.decoded import mask_logits
from cast_jax.core.loops import over_flagged
from cast_jax.core.sharding import batch_axes, on_one_cpu
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.points import read_at, uncertain_points

_SLOTS = 20  # of a block, at most

Terms = tuple[Float[Array, "*masks"], Float[Array, "*masks"]]


class MaskTargets(NamedTuple):
    """What masks are compared with: at points of the input's resolution, or whole, at the logits', shares of pixels."""

    masks: Bool[Array, "*images instances height width"] | Float[Array, "*images instances h w"]
    ignore: Bool[Array, "*images height width"] | Float[Array, "*images h w"]

    def block(self, image: Array, start: Array, size: int) -> MaskTargets:
        """Some instances of one image."""
        return MaskTargets(jax.lax.dynamic_slice_in_dim(self.masks[image], start, size), self.ignore[image])


def number_of_blocks(slots: int) -> int:
    """In how many blocks an image's slots of instances are compared."""
    return -(-slots // _SLOTS)


def mask_terms(
    key: PRNGKeyArray, logits: Float[Array, "instances h w"], targets: MaskTargets, config: CriterionConfig
) -> Terms:
    """Cross-entropy and dice of one image's masks, one for each instance; padding's too."""
    return _terms_at(_points(key, logits, config), logits, targets)


def matched_mask_terms(
    keys: PRNGKeyArray,
    embeddings: Float[Array, "images layers instances dim"],
    features: Float[Array, "images h w dim"],
    valid: Bool[Array, "images instances"],
    targets: MaskTargets,
    config: CriterionConfig,
) -> Terms:
    """The same of the masks ``embeddings`` x ``features``, in each layer; anything where ``valid`` is False.

    Each device compares its own images, where they divide. Features of an image without an instance are not looked at,
    be they finite or not.

    Args:
      keys: ``[images, layers, number_of_blocks(instances)]``.
      embeddings: of the query that each instance is matched with.
      features, valid, targets, config: see ``set_criterion``.

    Returns:
      Two arrays ``[images, layers, instances]``.
    """
    slots, number = valid.shape[1], keys.shape[2]
    pad = lambda array, axis: jnp.pad(array, [(0, -slots % number if a == axis else 0) for a in range(array.ndim)])
    targets = targets._replace(masks=pad(targets.masks, 1))
    operands = (keys, pad(embeddings, 2), features, pad(valid, 1), targets)
    of_device = functools.partial(_matched, config)
    axes = batch_axes()
    if axes and len(valid) % jax.sharding.get_abstract_mesh().size == 0:
        images = PartitionSpec(axes)
        of_device = jax.shard_map(of_device, in_specs=images, out_specs=images, check_vma=False)
    bce, dice = of_device(*operands)
    return bce[..., :slots], dice[..., :slots]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matched(config: CriterionConfig, *operands: Any) -> Terms:
    return _matched_forward(config, *operands)[0]


def _matched_forward(config, keys, embeddings, features, valid, targets: MaskTargets):
    shape, size = embeddings.shape[:3], valid.shape[1] // keys.shape[2]
    nothing = jnp.zeros(shape, jnp.float32)
    points = jnp.zeros((*shape, config.num_points or 0), jnp.uint32)

    def compare(image, block, state):
        some, at = targets.block(image, block * size, size), (image, jnp.uint32(0), block * size)
        logits = _product(_block(embeddings, at, size), features[image])

        def of_layer(key, logits):
            points = _points(key, logits, config)
            return *_terms_at(points, logits, some), points

        found = _over_layers(of_layer, keys[image, :, block], logits)
        return jax.tree.map(lambda all, part: _write(all, part, at), state, found)

    bce, dice, points = _over_blocks(valid, keys.shape[2], compare, (nothing, nothing, points))
    return (bce, dice), (keys, embeddings, features, valid, targets, points)


def _matched_backward(config, kept, gradients: Terms):
    keys, embeddings, features, valid, targets, points = kept
    size = valid.shape[1] // keys.shape[2]

    def compare(image, block, state):
        to_embeddings, to_features = state
        some, at = targets.block(image, block * size, size), (image, jnp.uint32(0), block * size)
        logits, through_product = jax.vjp(_product, _block(embeddings, at, size), features[image])

        def of_layer(points, logits, *gradients):
            return jax.vjp(lambda logits: _terms_at(points, logits, some), logits)[1](gradients)[0]

        given = (_block(array, at, size) for array in (points, *gradients))
        to_logits = _over_layers(of_layer, next(given), logits, *given)
        of_embeddings, of_features = through_product(to_logits)
        return _write(to_embeddings, of_embeddings, at), to_features.at[image].add(of_features.astype(jnp.float32))

    nothing = (jnp.zeros_like(embeddings), jnp.zeros(features.shape, jnp.float32))
    to_embeddings, to_features = _over_blocks(valid, keys.shape[2], compare, nothing)
    return None, to_embeddings, to_features.astype(features.dtype), None, None


_matched.defvjp(_matched_forward, _matched_backward)


def _over_blocks(valid: Bool[Array, "images slots"], number: int, body: Callable[..., Any], state: Any) -> Any:
    """``state = body(image, block, state)`` over the blocks in which there is an instance."""
    flagged = jnp.any(valid.reshape(-1, valid.shape[1] // number), axis=1)
    split = lambda row: (row // number, row % number)
    # A signed number might count from the end, which costs a choice wherever it tells a place.
    return over_flagged(flagged, lambda rows, _, state: body(*split(rows[0].astype(jnp.uint32)), state), state)


def _over_layers(of_layer: Callable[..., Any], *operands: Array) -> Any:
    """On one CPU one after another, where they stay in its cache; elsewhere side by side."""
    if on_one_cpu():
        return jax.lax.map(lambda operands: of_layer(*operands), operands)
    return jax.vmap(of_layer)(*operands)


_product = functools.partial(mask_logits, "lid,hwd->lihw")


def _block(array: Array, at: tuple[Any, ...], size: int) -> Array:
    """``[layers, size, ...]`` of ``[images, layers, slots, ...]``."""
    _, layers, _, *shape = array.shape
    return jax.lax.dynamic_slice(array, _corner(at, array), (1, layers, size, *shape))[0]


def _write(array: Array, block: Array, at: tuple[Any, ...]) -> Array:
    return jax.lax.dynamic_update_slice(array, block[None], _corner(at, array))


def _corner(at: tuple[Any, ...], array: Array) -> tuple[Any, ...]:
    return *at, *([jnp.uint32(0)] * (array.ndim - len(at)))


def _points(key: PRNGKeyArray, logits: Array, config: CriterionConfig) -> UInt32[Array, "instances points"]:
    """Where one image's masks are compared; nothing where that is everywhere."""
    if config.num_points is None:
        return jnp.zeros((len(logits), 0), jnp.uint32)
    return uncertain_points(key, jax.lax.stop_gradient(logits), config)


@jax.checkpoint  # reading again costs less than keeping what was read
def _terms_at(points: Array, logits: Array, targets: MaskTargets) -> Terms:
    if not points.size:
        flat = lambda maps: maps.reshape(len(maps), -1)
        return _bce_and_dice(flat(logits), flat(targets.masks), 1.0 - flat(targets.ignore[None]))
    ignored = read_at(points.reshape(1, -1), targets.ignore[None]).reshape(points.shape)
    return _bce_and_dice(read_at(points, logits), read_at(points, targets.masks), 1.0 - ignored)


def _bce_and_dice(logits, labels, care) -> tuple[Array, Array]:
    """Of each row of logits: cross-entropy and dice, where ``care`` is 1 (of each row, or of all)."""
    care = jnp.broadcast_to(care, logits.shape)
    cross_entropy = jax.nn.softplus(logits) - logits * labels
    bce = jnp.sum(cross_entropy * care, -1) / jnp.maximum(jnp.sum(care, -1), 1.0)
    probability = jax.nn.sigmoid(logits) * care
    overlap = 2.0 * jnp.sum(probability * labels, -1)
    return bce, 1.0 - (overlap + 1.0) / (jnp.sum(probability, -1) + jnp.sum(labels * care, -1) + 1.0)
