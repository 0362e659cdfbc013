"""What a step is made from: written down when it begins, and held against what there is when it goes on, or is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from cast_jax.core import distributed
from cast_jax.core.config import differences
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json, write_json

logger = logging.getLogger(__name__)

Made = Mapping[str, Mapping[str, str]]
"""By kind (the names of :data:`KINDS`) what is used, each with what tells it from another of its name: a hash."""

KINDS = {"weights": "weights to start from", "pseudo_labels": "pseudo-labels", "images": "images or labels"}


def record(step: Path, made_from: Made) -> None:
    """Writes ``<kind>.json`` of each kind in a step's folder; once the step has a checkpoint, these stay.

    Raises:
      UserError: it has one, and was trained on other pseudo-labels so far. Of other weights, which its checkpoint has
        taken the place of, and of other images a warning tells. Or the processes of a run would use different ones.
    """
    distributed.require_same(f"what {step} is made from", made_from)
    begun = any(step.glob("checkpoints/*"))
    for kind, used in made_from.items():
        path = step / f"{kind}.json"
        if not (begun and path.exists()):
            if distributed.is_first():
                write_json(path, used)
        elif lines := _differences(path, used):
            began, listed = f"{step} began with other {KINDS[kind]}", "\n  ".join(lines)
            if kind == "pseudo_labels":
                raise UserError(f"{began}; delete it to train on these. They differ in\n  {listed}")
            logger.warning("%s, and goes on all the same; delete it to begin anew. They differ in\n  %s", began, listed)


def warn_of_others(step: Path, made_from: Made) -> None:
    """Of a finished step, where what it was made from is another by now."""
    for kind, used in made_from.items():
        path = step / f"{kind}.json"
        if path.exists() and _differences(path, used):
            logger.warning(
                "%s was made from other %s than there are now; to make it from these delete its folder and those of "
                "the steps that start from it",
                *(step, KINDS[kind]),
            )


def _differences(path: Path, used: Mapping[str, str]) -> list[str]:
    known = read_json(path)
    return differences({name: known.get(name, value) for name, value in used.items()}, used, path.stem)
