"""``cast-convert MODEL SOURCE DESTINATION``: published PyTorch weights for ``config.init``.

SOURCE is a Hugging Face folder, a .safetensors file or a .pth. DESTINATION becomes a folder with model.safetensors,
config.json and classes.json (empty), which a run starts from with

    --config.init.student=DESTINATION        (and start_parts ("encoder",), or ("encoder", "decoder") with a neck)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cast_jax.convert.engine import converted, plan, write_tensors
from cast_jax.convert.models import (
    MODELS,
    check_facts,
    family_of,
    known_model,
    model_config,
    parameter_shapes,
    relatives,
    stored_shapes,
)
from cast_jax.convert.sources import open_checkpoint
from cast_jax.convert.verify import check_installed, format_stages, verify
from cast_jax.core.config import to_json
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json, write_json

WEIGHTS = "model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def convert(
    name: str,
    source: Path,
    destination: Path,
    changes: Mapping[str, Any] | None = None,
    called: Path | None = None,
) -> Any:
    """Converts, and says so (of the destination as ``called``); returns the model's configuration.

    Memory stays below the checkpoint's size, and nothing appears in ``destination`` unless all went well.

    Raises:
      UserError: an unreadable source, or one that does not make the model (see ``engine.plan``), or whose
        ``config.json`` describes another; a destination that is a file, or the source's own folder.
    """
    check_destination(name, source, destination)
    named, given = known_model(name), open_checkpoint(source)
    family = family_of(named)
    checkpoint = family.prepared(given, named)
    decided = family.found(checkpoint.shapes, named)
    config = model_config(name, decided, changes)
    shapes = parameter_shapes(config)
    origins = plan(checkpoint, family.rules(config), shapes, name, lambda: relatives(name, given))
    check_facts(config, checkpoint)
    described = {
        "model": to_json(dataclasses.asdict(config)),
        "converted": {
            "name": name,
            "source": str(source),
            "keys": family.layout(checkpoint.shapes, config),
            "decided": decided,
            "dtypes": sorted({checkpoint.dtypes[origin.key] for origin in origins.values()}),
        },
    }

    def describe() -> None:
        write_json(destination / "config.json", described)
        write_json(destination / "classes.json", [])

    existed = destination.exists()
    try:
        write_tensors(destination / WEIGHTS, stored_shapes(config), converted(checkpoint, origins), before=describe)
    except BaseException:
        if not existed and destination.is_dir() and not any(destination.iterdir()):
            destination.rmdir()
        raise
    used = {origin.key for origin in origins.values()}
    left = Counter(key.partition(".")[0] for key in checkpoint.shapes if key not in used)
    listed = ", ".join(f"{count} of {first}" for first, count in left.items())
    written = (called or destination) / WEIGHTS
    print(f"{name}: {len(shapes)} parameters from {source} in {written}; keys ignored: {listed or 'none'}")
    if narrow := [dtype for dtype in described["converted"]["dtypes"] if dtype.lower() not in ("f32", "float32")]:
        print(f"converted to float32 from {', '.join(narrow)}")
    return config


def check_destination(name: str, source: Path, destination: Path) -> None:
    """Raises :class:`UserError` for a destination that is a file, or that holds the source or other weights.

    Weights of the same model, converted before, are replaced.
    """
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination}: the destination is a file; name a folder")
    if destination.resolve() in (source.resolve(), source.resolve().parent, source.parent.resolve()):
        raise UserError(f"{destination}: the destination holds the source; name another folder")
    description = destination / "config.json"
    if description.exists() or any(file.suffix in WEIGHT_SUFFIXES for file in destination.glob("*")):
        held = _converted_name(description) or "another origin"
        if held != name:
            raise UserError(f"{destination} holds weights of {held}; delete it, or name another folder")


def _converted_name(description: Path) -> str | None:
    """The model whose conversion a config.json describes; None if it describes none."""
    try:
        return read_json(description)["converted"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what the user can mend ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="cast-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("destination", metavar="DESTINATION", type=Path)
    parser.add_argument("--verify", action="store_true", help="compare every stage with PyTorch's (needs torch)")
    parser.add_argument(
        "--config", metavar="KEY=VALUE", action="append", default=[], help="other sizes, e.g. encoder.depth=3"
    )
    options = parser.parse_args(arguments)
    try:
        changes = parse_changes(options.config)
        if options.verify:
            _verified(options.model, options.source, options.destination, changes)
        else:
            convert(options.model, options.source, options.destination, changes)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def _verified(name: str, source: Path, destination: Path, changes: Mapping[str, Any]) -> None:
    """Converts into a folder beside the destination, whose files go there only if every stage passes."""
    check_installed()
    check_destination(name, source, destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as folder:
        config = convert(name, source, Path(folder), changes, called=destination)
        stages = verify(config, source, Path(folder) / WEIGHTS)
        print(format_stages(stages))
        if failed := [stage.name for stage in stages if not stage.passed]:
            raise UserError(f"beyond the tolerance, nothing written: {', '.join(failed)}")
        destination.mkdir(exist_ok=True)
        for file in ("classes.json", "config.json", WEIGHTS):  # the weights last: a reader who finds them finds all
            (Path(folder) / file).replace(destination / file)
    print(f"all {len(stages)} stages agree with PyTorch's: {destination / WEIGHTS}")


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """``["encoder.depth=3"]`` as ``{"encoder": {"depth": 3}}``; values are JSON, or else text.

    Raises:
      UserError: no ``=``, or a key that is both a part and a value.
    """
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        *parents, leaf = key.split(".")
        node = changes
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not equals or not all(key.split(".")) or not isinstance(node, dict):
            raise UserError(f"--config {pair}: must be like encoder.depth=3")
        try:
            node[leaf] = json.loads(text)
        except ValueError:
            node[leaf] = text
    return changes
