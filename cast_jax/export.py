"""A trained segmenter as portable files: ``<name>.safetensors`` with ``config.json`` and ``classes.json`` beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cast_jax.core.annotations import Category
from cast_jax.core.distributed import is_first
from cast_jax.core.errors import UserError
from cast_jax.core.files import atomic_write, read_json, write_json
from cast_jax.core.rules import is_stacked, layer_names, named_leaves
from cast_jax.core.sharding import whole
from cast_jax.models.functional import Params

_DIGEST = "cast_jax sha256"  # of names and numbers, in a file's metadata


def save_weights(path: Path, params: Params, model: dict[str, Any], categories: Sequence[Category]) -> None:
    """Writes parameters under their path names (``encoder/blocks/each/...``); config.json holds the model's sizes.

    The weights come last, so that a reader who finds them finds what belongs to them. All processes of a run take part,
    the first one writes.
    """
    arrays = {name: whole(leaf) for name, leaf in named_leaves(params).items()}
    if not is_first():
        return
    write_json(path.parent / "config.json", model)
    write_json(path.parent / "classes.json", [{"id": category.id, "name": category.name} for category in categories])
    # One entry: safetensors writes several in any order.
    atomic_write(path, save(arrays, metadata={_DIGEST: _digest(arrays)}))


def load_weights(path: Path | str) -> tuple[Params, dict[str, Any], tuple[Category, ...]]:
    """Reads what :func:`save_weights` wrote: nested parameters, the model's configuration, the classes.

    Raises:
      UserError: a missing or damaged file, naming it.
    """
    return _load(Path(path), _read_arrays)


def load_shapes(path: Path) -> tuple[Params, dict[str, Any], tuple[Category, ...]]:
    """As :func:`load_weights`, but of the parameters only the shapes, from the file's header (as float32).

    Raises:
      UserError: a missing or damaged file, naming it.
    """
    return _load(path, _read_shapes)


def _read_arrays(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        known = (file.metadata() or {}).get(_DIGEST)  # which earlier files lack
    if known and known != _digest(arrays):
        raise ValueError("its numbers are not those that were written; delete it, and its run exports it again")
    return arrays


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read_shapes(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in shapes.items()}


def _load(path: Path, read: Callable[[Path], dict[str, Any]]) -> tuple[Params, dict[str, Any], tuple[Category, ...]]:
    if path.is_dir():
        found = product(path)
        raise UserError(f"{path}: is a folder; name the file" + (f", such as {found}" if found else ""))
    try:
        arrays = read(path)
        model = read_json(path.parent / "config.json")
        classes = read_json(path.parent / "classes.json")
        categories = tuple(Category(entry["id"], entry["name"]) for entry in classes)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable export of weights with config.json and classes.json: {error}"
        ) from error
    params: Params = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return params, model, categories


def product(folder: Path) -> Path | None:
    """The export that a run's folder, or one inside it, is there for: refine's, else distill's, else the newest.

    Of one step the last weights come before the best. None if there is no export.
    """

    def rank(path: Path) -> tuple[bool, bool, bool, int]:
        step = path.parent.parent.name
        return step == "refine", step == "distill", path.stem == "last", path.stat().st_mtime_ns

    exports = (path for path in folder.rglob("*.safetensors") if (path.parent / "classes.json").exists())
    return max(filter(Path.is_file, exports), key=rank, default=None)


def merge_weights(fresh: Params, loaded: Params, parts: Sequence[str], where: str) -> Params:
    """``fresh`` with the subtrees of ``parts`` (path prefixes; empty for everything) taken from ``loaded``.

    ``loaded`` may hold the layers of a stack one by one, as files did before there were stacks.

    Raises:
      UserError: a part has no parameters, or one of them is missing, left over or of another shape; lists all of them.
    """
    wanted = named_leaves(fresh)
    given = _with_stacks(named_leaves(loaded), wanted)
    chosen = lambda name: not parts or any(_within(name, part) for part in parts)
    faults = [f"no parameters under {part}" for part in parts if not any(_within(name, part) for name in wanted)]
    faults += [f"missing {name}" for name in wanted if chosen(name) and name not in given]
    faults += [f"unexpected {name}" for name in given if chosen(name) and name not in wanted]
    faults += [
        f"{name} has shape {given[name].shape}, not {wanted[name].shape}"
        for name in wanted
        if chosen(name) and name in given and given[name].shape != wanted[name].shape
    ]
    if faults:
        listed = "\n  ".join(faults[:20]) + ("" if len(faults) <= 20 else f"\n  and {len(faults) - 20} more")
        raise UserError(f"{where}: the weights do not fit the model:\n  {listed}")
    return jax.tree.map_with_path(
        lambda path, leaf: given[name] if chosen(name := "/".join(key.key for key in path)) else leaf, fresh
    )


def _with_stacks(given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """``given``, from a file in which layers are one by one, with the stacks that are ``wanted``."""
    given = dict(given)
    for name in filter(is_stacked, wanted):
        layers = layer_names(name, wanted[name].shape)
        shapes = {given[layer].shape for layer in layers if layer in given}
        if name in given or len(shapes) != 1 or not given.keys() >= set(layers):
            continue
        arrays = [given.pop(layer) for layer in layers]
        described = isinstance(arrays[0], jax.ShapeDtypeStruct)
        shape = (len(arrays), *shapes.pop())
        given[name] = jax.ShapeDtypeStruct(shape, arrays[0].dtype) if described else np.stack(arrays)
    return given


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def weights_hash(path: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
