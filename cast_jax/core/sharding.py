"""One mesh, ``data`` x ``fsdp``, for one device or many: parameters by rules, batches over both axes.

Models carry no annotations. A table of (pattern, spec) says how each parameter lies on the mesh: a spec is a tuple of
axis names (or None) per dimension, or "auto": the largest dimension that ``fsdp`` divides, small arrays replicated.
Layers of a stack go by their own names, ``encoder/blocks/0/mlp/fc1/kernel``, and their own shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from cast_jax.core import target
from cast_jax.core.errors import UserError
from cast_jax.core.rules import is_stacked, layer_names, match_rules, named_leaves, unnamed

AXES = ("data", "fsdp")
RULES: tuple[tuple[str, Any], ...] = ((".*", "auto"),)
SMALL = 2**14  # elements: below it, gathering a shard costs more than the memory it saves


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``{"data": -1, "fsdp": 1}``; one axis may be -1, which stands for all remaining devices.

    The devices of a process lie beside each other: they share its part of a batch, and ``fsdp`` stays within a machine
    where it can.
    """
    sizes = {"data": -1, "fsdp": 1} | dict(shape or {})
    devices = sorted(target.devices() if devices is None else devices, key=lambda device: device.process_index)
    if unknown := set(sizes) - set(AXES):
        raise UserError(f"mesh: unknown axes {sorted(unknown)}; known: {', '.join(AXES)}")
    free = [axis for axis in AXES if sizes[axis] == -1]
    fixed = int(np.prod([sizes[axis] for axis in AXES if sizes[axis] != -1]))
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"mesh {sizes} does not fit {len(devices)} devices; at most one axis is -1, the others divide: set "
            "config.mesh (which no checkpoint depends on), or hide some of the devices (CUDA_VISIBLE_DEVICES=0,1)"
        )
    shape_ = [len(devices) // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES]
    return Mesh(np.asarray(devices).reshape(shape_), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]] = RULES) -> Any:
    """A sharding for each leaf of ``params`` (arrays or shapes), in its structure. Every leaf must match a rule."""
    named = named_leaves(params)
    layers = {name: layer_names(name, leaf.shape) for name, leaf in named.items()}
    specs = match_rules(rules, [layer for own in layers.values() for layer in own], "sharding.rules")

    def spec(name: str, leaf: Any) -> PartitionSpec:
        if not is_stacked(name):
            return _spec(name, leaf.shape, specs[name], mesh)
        # The axis of layers stays whole: a loop over them needs one at a time.
        of_layers = {_spec(layer, leaf.shape[1:], specs[layer], mesh) for layer in layers[name]}
        if len(of_layers) > 1:
            raise UserError(f"sharding.rules: the layers of {name} are one array and must be split alike")
        own = of_layers.pop()
        return PartitionSpec(None, *own) if own else own

    return unnamed({name: NamedSharding(mesh, spec(name, leaf)) for name, leaf in named.items()}, params)


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree whose leaves mirror parameters (moments by path); anything else is replicated.

    A leaf mirrors the parameter whose path ends its own path, if the shapes agree.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    known = named_leaves(shardings)

    def find(name: str, leaf: Any) -> NamedSharding:
        parts = name.split("/")
        suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
        match = next((suffix for suffix in suffixes if shapes.get(suffix) == leaf.shape), None)
        return replicated(mesh) if match is None else known[match]

    return unnamed({name: find(name, leaf) for name, leaf in named_leaves(tree).items()}, tree)


def shard_params(params: Any, shardings: Any) -> Any:
    """Places copies of ``params`` (host or device arrays) on the mesh; the result may be donated.

    The copy matters: a plain ``device_put`` may hand back the very buffers it was given.
    """
    placed = place(params, shardings)
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.copy(), tree), out_shardings=shardings)(placed)


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays, which every process has whole, on a mesh; ``shardings`` is one for all, or a tree like ``tree``."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: NamedSharding) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda: leaf, out_shardings=sharding)()
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places ``tree`` whole on every device."""
    return place(tree, replicated(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over all devices, along the first dimension."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch on the mesh, split along the first dimension of each leaf.

    A batch that already lies there is passed through. Raises :class:`UserError` where devices do not divide the batch.
    """
    sharding, leaves = batch_sharding(mesh), jax.tree.leaves(batch)
    if all(isinstance(leaf, jax.Array) and leaf.sharding == sharding for leaf in leaves):
        return batch
    for leaf in leaves:
        check_batch_size(leaf.shape[0], len(mesh.local_devices))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # in one call: a third of the host time of one call a leaf
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def own_rows(tree: Any) -> Any:
    """This process's rows of arrays that lie as :func:`batch_sharding` says, as host arrays."""

    def rows(leaf: Array) -> np.ndarray:
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, tree)


def whole(leaf: Array | np.ndarray) -> np.ndarray:
    """A host copy of an array, even one spread over several processes, which then must all ask for it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def batch_axes() -> tuple[str, ...]:
    """The axes over which batches are split, within ``jax.set_mesh`` of more than one device; else none."""
    mesh = jax.sharding.get_abstract_mesh()
    return AXES if not mesh.empty and mesh.size > 1 else ()


def gathered(tree: Any) -> Any:
    """Arrays whole on every device, for as long as they are needed; of one device as they are.

    Within a loop this must be said: XLA would else leave a layer's parameters split, and exchange activations instead.
    """
    return jax.lax.with_sharding_constraint(tree, PartitionSpec()) if batch_axes() else tree


def of_own_images(function: Callable[[Any, Any], Any], shared: Any, images: Any) -> Any:
    """``function(shared, images)``, on each device of its own images, where these divide.

    What it makes of parameters for every pixel of a map then stays where it is: only the parameters are gathered, and
    only their gradients are added up over devices, not the map's.
    """
    axes = batch_axes()
    if not axes or len(jax.tree.leaves(images)[0]) % jax.sharding.get_abstract_mesh().size:
        return function(gathered(shared), images)
    specs = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[1], check_vma=False)(shared, images)


def on_one_cpu() -> bool:
    """Whether to compute as is fast on a CPU: image by image, which on a mesh would gather all images everywhere."""
    return target.backend() == "cpu" and not batch_axes()


def over_images(of_image: Callable[..., Any], *operands: Any) -> Any:
    """``of_image`` of each image of the operands: on one CPU one after another, elsewhere side by side.

    What one image needs stays in a CPU's cache; what all need together goes through memory at every operation.
    """
    if on_one_cpu():
        return jax.lax.map(lambda operands: of_image(*operands), operands)
    return jax.vmap(of_image)(*operands)


def join_batches(trees: Sequence[Any]) -> Any:
    """Concatenates batches, image by image in turn (by the ratio of their sizes) rather than one after the other.

    On several devices each one's parts then come to lie beside each other, so that nothing moves between them; and the
    order is the same on any number of devices that divides all sizes. ``split_batches`` undoes it.
    """
    turns = math.gcd(*(jax.tree.leaves(tree)[0].shape[0] for tree in trees))

    def join(*leaves: Array) -> Array:
        joined = jnp.concatenate([leaf.reshape(turns, -1, *leaf.shape[1:]) for leaf in leaves], axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *trees)


def split_batches(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """The batches of the given sizes that ``join_batches`` put together."""
    return [_cut(tree, sizes, start, start + 1) for start in range(len(sizes))]


def take_batches(tree: Any, sizes: Sequence[int], which: Sequence[int]) -> Any:
    """Of the batches that ``join_batches`` put together those numbered ``which``, joined by themselves.

    Where they lie beside each other that is a slice, and nothing where they are all: compilers do not see that pieces
    are put together as they were.
    """
    first, after = which[0], which[0] + len(which)
    if list(which) == list(range(first, after)) and math.gcd(*sizes[first:after]) == math.gcd(*sizes):
        return _cut(tree, sizes, first, after)
    return join_batches([_cut(tree, sizes, number, number + 1) for number in which])


def _cut(tree: Any, sizes: Sequence[int], first: int, after: int) -> Any:
    """Neighbours among joined batches, in turns as they are."""
    turns = math.gcd(*sizes)
    stops = [size // turns for size in accumulate(sizes, initial=0)]

    def cut(leaf: Array) -> Array:
        piece = leaf.reshape(turns, -1, *leaf.shape[1:])[:, stops[first] : stops[after]]
        return piece.reshape(-1, *leaf.shape[1:])

    return tree if (first, after) == (0, len(sizes)) else jax.tree.map(cut, tree)


def micro_batches(batch: Any, count: int, mesh: Mesh) -> Any:
    """The leaves as ``[count, batch / count, ...]``: micro-batch i has every ``count``-th image from the i-th on.

    So all devices hold equal parts of each, nothing moves between them, and any number of devices makes the same
    micro-batches. Raises :class:`UserError` where the batch cannot be split so.
    """

    def split(leaf: Array) -> Array:
        check_batch_size(leaf.shape[0], mesh.size, count)
        parts = jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, AXES)))

    return jax.tree.map(split, batch)


def check_batch_size(size: int, devices: int, accumulate: int = 1) -> None:
    """Raises :class:`UserError` with the nearest workable sizes if a batch cannot be split.

    It is split over ``devices``, and there into ``accumulate`` micro-batches.
    """
    parts = devices * accumulate
    if size % parts:
        below, above = size // parts * parts, -(-size // parts) * parts
        workable = " or ".join(str(number) for number in (below, above) if number)
        each = "" if accumulate == 1 else f" and there into {accumulate} micro-batches (train.accumulate)"
        raise UserError(
            f"a batch of {size} cannot be split over {devices} devices{each}; the nearest batch sizes that can: "
            f"{workable}. Or hide some of the devices (CUDA_VISIBLE_DEVICES=0,1)"
        )


def _spec(name: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> PartitionSpec:
    if isinstance(spec, str):
        if spec != "auto":
            raise UserError(f"sharding.rules: {spec!r} for {name}; write a tuple of axis names, or 'auto'")
        return _automatic(shape, mesh.shape["fsdp"])
    if len(spec) > len(shape):
        raise UserError(f"sharding.rules: {name} has shape {shape}, but its spec {tuple(spec)} has more dimensions")
    for size, axes in zip(shape, spec, strict=False):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        if unknown := set(axes) - set(AXES):
            raise UserError(f"sharding.rules: {name}: unknown axes {sorted(unknown)}; known: {', '.join(AXES)}")
        if size % (parts := int(np.prod([mesh.shape[axis] for axis in axes]))):
            raise UserError(f"sharding.rules: {name}: {parts} devices do not divide dimension {size} of {shape}")
    return PartitionSpec(*spec)


def _automatic(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    workable = [dimension for dimension, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not workable or np.prod(shape) < SMALL:
        return PartitionSpec()
    largest = max(workable, key=lambda dimension: shape[dimension])
    return PartitionSpec(*(None,) * largest, "fsdp")
