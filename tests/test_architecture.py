"""The import law: a room of the house knows only the rooms below it, and no sibling."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import cast_jax
import configs

PACKAGE = Path(cast_jax.__file__).parent

# From the front door down. Rooms of one floor are siblings.
FLOORS = (
    ("main",),
    ("pipeline",),
    ("preflight",),
    ("settings", "workdir"),
    ("convert", "predict_command"),
    ("trainer", "predict", "labelling", "provenance", "report", "export", "check_data"),
    ("recipes",),
    ("models", "losses", "contrastive", "data", "evaluation", "visualize"),
    ("core",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """``cast_jax.data.sources.coco`` is in ``data``."""
    return module.split(".")[1]


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "cast_jax.")
    return [module.name for module in found if module.name != "cast_jax.main"] + ["cast_jax.main"]


def path_of(module: str) -> Path:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(path: Path) -> list[str]:
    """The modules that a file imports, anywhere in it; of ``from package import module``, the module."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            packages = [f"{node.module}.{alias.name}" for alias in node.names]
            names += packages if node.module in ("cast_jax", "configs") else [node.module]
    return names


def allowed(room: str, other: str) -> bool:
    return room == other or LEVEL[room] < LEVEL[other]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in modules()} <= set(LEVEL)


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    inner = [name for name in imports(path_of(module)) if name.split(".")[0] in ("cast_jax", "configs", "tests")]
    faults = [name for name in inner if not name.startswith("cast_jax.") or not allowed(room_of(module), room_of(name))]
    assert faults == []


def test_the_law_can_be_broken(tmp_path):
    """What this file looks for is seen, in each form that an import can take."""
    file = tmp_path / "file.py"
    lines = (
        "import cast_jax.trainer",
        "def f():",
        "    from cast_jax import pipeline",
        "from cast_jax.core.rules import x",
    )
    file.write_text("\n".join(lines))
    assert sorted(imports(file)) == ["cast_jax.core.rules", "cast_jax.pipeline", "cast_jax.trainer"]
    assert not allowed("models", "data")
    assert not allowed("core", "models")
    assert not allowed("trainer", "predict")
    assert allowed("recipes", "losses")
    assert allowed("convert", "export")
    assert not allowed("models", "convert")


@pytest.mark.parametrize("module", modules())
def test_every_module_imports(module):
    importlib.import_module(module)


@pytest.mark.parametrize("path", sorted(Path(configs.__path__[0]).glob("*.py")), ids=lambda path: path.stem)
def test_configurations_are_pure_data(path):
    allowed_names = {"ml_collections", "ml_collections.config_dict", "configs.common"}
    assert set(imports(path)) - allowed_names == set()


def test_every_name_is_defined():
    """Linters take the axes in jaxtyping's strings for undefined names, so they are told not to look; here they do."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", "."]
    found = json.loads(subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False).stdout)
    undefined = []
    for fault in found:
        at = (fault["location"]["row"], fault["location"]["column"] - 1)
        with tokenize.open(fault["filename"]) as file:
            strings = [t for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.STRING]
        if not any(string.start <= at < string.end for string in strings):
            undefined.append(f"{fault['filename']}:{at[0]}: {fault['message']}")
    assert undefined == []
