"""The folder of a run: made where it can be written to, held to one configuration, and what lies where in it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cast_jax.core import distributed
from cast_jax.core.config import differences, to_json
from cast_jax.core.errors import UserError
from cast_jax.core.files import TEMPORARY, make_folder, read_json, writing_to

HOW_BATCHES_COME = ("num_threads", "num_workers", "prefetch")  # the same ones for any of these


def make_workdir(workdir: Path) -> None:
    """Makes the folder of a run.

    Raises:
      UserError: it cannot be made, or not be written to; or it is not one folder that all processes share.
    """
    make_folder(workdir, "--workdir")
    with (
        writing_to(workdir, "--workdir"),
        tempfile.NamedTemporaryFile(dir=workdir, prefix=".shared-", suffix=TEMPORARY) as probe,
    ):
        seen = (workdir / distributed.agreed(Path(probe.name).name)).exists()
        everywhere = all(distributed.gather(seen))
    distributed.barrier()  # the first process goes on to clear what looks like these files
    if not everywhere:
        raise UserError(f"--workdir {workdir} must be one folder that all processes of the run share")


def require_same(config: Mapping[str, Any], workdir: Path) -> None:
    """Refuses a workdir with results of another configuration; steps that have not begun may have changed.

    Raises:
      UserError: listing the differences.
    """
    path = workdir / "config.json"
    patterns = ("*/checkpoints/*", "*/exported/*", "pseudo_labels/*")
    begun = {found.relative_to(workdir).parts[0] for pattern in patterns for found in workdir.glob(pattern)}
    looked_at = not begun and (workdir / "zero_shot" / "done.json").exists()
    if not path.exists() or not (begun or looked_at):
        return
    new = _settled(to_json(config), begun)
    try:
        stored = _settled(read_json(path), begun)
        if looked_at:
            stored, new = _of_zero_shot(stored), _of_zero_shot(new)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not the configuration of a run ({error}); use another --workdir") from error
    if lines := differences(stored, new):
        listed = "\n  ".join(lines[:20])
        raise UserError(
            f"{workdir} was made with another configuration; use another --workdir, or delete the steps' folders there "
            f"that it concerns, and those of all steps after them. It differs in\n  {listed}"
        )


def _settled(config: Mapping[str, Any], begun: set[str]) -> dict[str, Any]:
    """What results depend on: not the step that is asked for, the machine, and what is only looked at.

    Nor what only decides how fast they come, in how much memory, and how often it is said and saved.
    """
    free = {"step", "pipeline", "file", "runtime", "mesh", "distributed", "evaluate", "profile"}
    free |= set() if "audit" in begun else {"audit"}
    begun = begun | ({"finetune"} if "audit" in begun else set())
    steps = {
        name: {
            **step,
            "data": _without(step["data"], *HOW_BATCHES_COME),
            "train": _without(step["train"], "log_every", "save_every", "keep", "tensorboard"),
        }
        for name, step in config["steps"].items()
        if name in begun
    }
    data = {**config["data"], "loader": _without(config["data"].get("loader", {}), *HOW_BATCHES_COME)}
    model = {
        role: {part: rest for part, value in spec.items() if (rest := _without(value, "remat")) != {}}
        for role, spec in config["model"].items()
    }
    return _without(config, *free) | {"steps": steps, "data": data, "model": model}


def _of_zero_shot(settled: Mapping[str, Any]) -> dict[str, Any]:
    """What figures depend on for which nothing was trained."""
    teachers = {part: {"teacher": settled[part].get("teacher")} for part in ("model", "init")}
    return {"data": settled["data"], **teachers}


def _without(values: Any, *names: str) -> Any:
    """A mapping without some of its keys; anything else as it is."""
    return {key: value for key, value in values.items() if key not in names} if isinstance(values, Mapping) else values


def result(workdir: Path, name: str) -> Path:
    """What a finished step leaves last: its weights, or the statistics of its pseudo-labels."""
    if name.startswith("pseudo_label/"):
        return workdir / "pseudo_labels" / name.partition("/")[2] / "stats.json"
    return workdir / name / "exported" / "last.safetensors"
