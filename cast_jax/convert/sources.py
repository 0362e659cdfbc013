"""Checkpoints as they are published: Hugging Face folders, ``.safetensors`` files, PyTorch's ``.pth``."""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json

# What training programs wrap around the weights, unwrapped in this order (DINOv2 training: "teacher"; UniMatch-V2 and
# SAM2: "model"; OpenMMLab and Lightning: "state_dict").
WRAPPERS = ("state_dict", "model", "teacher")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A source's tensors by key: shapes and dtypes at once, the values (as float32) one at a time."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str], np.ndarray]
    config: dict[str, Any]  # of the Hugging Face folder; else empty


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face folder (sharded or not), a ``.safetensors`` file or a ``.pth``; reads no values yet.

    ``PREFIXES`` that all keys share are left out.

    Raises:
      UserError: no such file, a folder without weights, a damaged file, a pickle that holds more than tensors, shards
        that are missing, lie outside the folder or share keys.
    """
    return _without_prefixes(_open(path))


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        config = _json(path / "config.json") if (path / "config.json").exists() else {}
        return _open_folder(path, config)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        described = path.parent / "config.json"  # of the folder that this is the only file of
        config = _json(described) if path.name == "model.safetensors" and described.exists() else {}
        return _open_safetensors(path, [path], config)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _open_torch(path)
    raise UserError(f"{path}: not a folder, a .safetensors or a .pth file")


def _open_folder(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """One file or an index of shards; links are followed, since that is how Hugging Face's cache stores them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _open_safetensors(folder, [single], config)
    if not index.exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt"))
        instead = f"; give {' or '.join(pickles)} by its name" if pickles else ""
        raise UserError(f"{folder}: neither {single.name} nor {index.name} in this folder{instead}")
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: no weight_map from keys to files")
    files = sorted(set(names.values()))
    if bad := [name for name in files if re.search(r"[/\\]", name) or not name.endswith(".safetensors")]:
        raise UserError(f"{index}: a shard must be a .safetensors file in the same folder, not {', '.join(bad)}")
    if lost := [name for name in files if not (folder / name).exists()]:
        raise UserError(f"{index}: missing {', '.join(lost)}")
    checkpoint = _open_safetensors(folder, [folder / name for name in files], config)
    if absent := [key for key in names if key not in checkpoint.shapes]:
        raise UserError(f"{index}: in no shard: {', '.join(absent[:5])}")
    return checkpoint


def _open_safetensors(path: Path, files: list[Path], config: dict[str, Any]) -> Checkpoint:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    places: dict[str, tuple[Path, Any]] = {}
    twice: list[str] = []
    for name in files:
        try:
            file = safe_open(name, "numpy")
            for key in file.keys():  # noqa: SIM118 (no mapping)
                twice += [f"{key} ({places[key][0].name}, {name.name})"] if key in places else []
                places[key] = name, file
                shapes[key] = tuple(file.get_slice(key).get_shape())
                dtypes[key] = file.get_slice(key).get_dtype()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name}: not a readable safetensors file: {error}") from error
    if twice:
        raise UserError(f"{path}: keys in more than one shard: {', '.join(twice[:5])}")
    return Checkpoint(path, shapes, dtypes, lambda key: _as_float32(places[key][1].get_tensor(key)), config)


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float32 else array.astype(np.float32)


def _open_torch(path: Path) -> Checkpoint:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading PyTorch files needs torch: pip install 'cast_jax[convert]'") from error
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to switch this protection off.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {found[1]}" if found else "it is no pickle of tensors"
        raise UserError(f"{path}: refused; weights hold tensors and nothing to run, but {reason}") from error
    except Exception as error:  # damaged pickles and archives fail in more ways than can be listed
        reason = str(error).partition("\n")[0].partition(". ")[0]
        told = f": {reason}" if " " in reason else ""  # of a text file Python only says which character it met
        raise UserError(f"{path}: not a readable PyTorch file{told}; is it whole?") from error
    tensors = unwrap(content, path)
    plain = lambda value: isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
    if others := [key for key, value in tensors.items() if not plain(value)]:
        raise UserError(f"{path}: no weights: {', '.join(map(str, others[:5]))} is no tensor, or a sparse or empty one")
    return Checkpoint(
        path,
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()},
        lambda key: tensors[key].detach().float().numpy(),
        {},
    )


def fold_batch_norms(checkpoint: Checkpoint, epsilon: float = 1e-5) -> Checkpoint:
    """A view in which each batch norm is ``<name>.scale`` and ``<name>.shift``, computed in float64 when they are read.

    ``(x - mean) / sqrt(variance + epsilon) * weight + bias = x * scale + shift``. ``num_batches_tracked``, which files
    from before PyTorch 0.4.1 lack, is left out.

    Raises:
      UserError: a batch norm lacks one of its tensors, or they differ in length; while reading, a variance that
        is negative or NaN.
    """
    found = (re.fullmatch(r"(.+)\.(running_mean|running_var|num_batches_tracked)", key) for key in checkpoint.shapes)
    names = dict.fromkeys(match[1] for match in found if match)
    members = {name: [f"{name}.{member}" for member in BATCH_NORM] for name in names}
    for name, keys in members.items():
        if lost := [key for key in keys if key not in checkpoint.shapes]:
            raise UserError(f"{checkpoint.path}: the batch norm {name} lacks {', '.join(lost)}")
        if len({checkpoint.shapes[key] for key in keys}) > 1:
            raise UserError(f"{checkpoint.path}: the tensors of the batch norm {name} differ in length")
    folded = {f"{name}.{part}": name for name in names for part in ("scale", "shift")}
    gone = {key for keys in members.values() for key in keys} | {f"{name}.num_batches_tracked" for name in names}

    def read(key: str) -> np.ndarray:
        if key not in folded:
            return checkpoint.read(key)
        weight, bias, mean, variance = (checkpoint.read(member).astype(np.float64) for member in members[folded[key]])
        if not (variance >= 0).all():
            raise UserError(f"{checkpoint.path}: {folded[key]}.running_var is negative or NaN somewhere")
        scale = weight / np.sqrt(variance + epsilon)
        return _as_float32(scale if key.endswith(".scale") else bias - mean * scale)

    def view(values: dict[str, T]) -> dict[str, T]:
        kept = {key: value for key, value in values.items() if key not in gone}
        return kept | {key: values[f"{name}.weight"] for key, name in folded.items()}

    dtypes = dict(checkpoint.dtypes)
    for name, keys in members.items():  # a folded tensor is no more a float than the least of what it is made from
        dtypes[f"{name}.weight"] = min((dtypes[key] for key in keys), key=lambda dtype: "f" in dtype.lower())
    return dataclasses.replace(checkpoint, shapes=view(checkpoint.shapes), dtypes=view(dtypes), read=read)


def unwrap(content: Any, path: Path) -> dict[str, Any]:
    """The weights inside ``WRAPPERS``.

    Raises:
      UserError: there is no mapping with keys.
    """
    while isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: no weights in it, but a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _without_prefixes(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the ``PREFIXES`` that all of its keys begin with."""
    kept = re.compile(f"(?:{'|'.join(map(re.escape, PREFIXES))})*")
    prefixes = {kept.match(key)[0] for key in checkpoint.shapes}  # type: ignore[index]
    if len(prefixes) != 1 or not (prefix := prefixes.pop()):
        return checkpoint
    strip = lambda values: {key.removeprefix(prefix): value for key, value in values.items()}
    shapes, dtypes = strip(checkpoint.shapes), strip(checkpoint.dtypes)
    return dataclasses.replace(checkpoint, shapes=shapes, dtypes=dtypes, read=lambda key: checkpoint.read(prefix + key))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value
