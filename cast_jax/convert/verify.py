"""The converted weights against Hugging Face's PyTorch modules on the same checkpoint, stage by stage."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cast_jax.convert.engine import Origin, place, plan
from cast_jax.convert.models import family_of, parameter_shapes
from cast_jax.convert.sources import Checkpoint, open_checkpoint
from cast_jax.core.errors import UserError
from cast_jax.export import load_weights
from cast_jax.models.functional import Functional

_DESCRIBED = "does its config.json describe these weights?"


@dataclasses.dataclass(frozen=True)
class Stage:
    """The errors of one intermediate result; ``relative`` is the absolute one over the largest value."""

    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.absolute <= self.tolerance  # False for NaN


def verify(config: Any, source: Path, weights: Path, patches: tuple[int, int] | None = None) -> list[Stage]:
    """Runs both models on the same random inputs, images of ``patches`` (rows, columns) patches; a few if None.

    A Hugging Face folder of the same model is opened by ``from_pretrained``; other files fill the same modules by name,
    in PyTorch's own layouts. Where conventions differ, ours follows the reference (``Family.comparable``).

    The family's tolerances are for values whose standard deviation is at most one; of larger ones (unnormalised maps),
    times that, since rounding errors grow with the values.

    Raises:
      UserError: torch is not installed, or the files cannot be read.
    """
    check_installed()
    import torch

    family = family_of(config)
    config = family.comparable(config)
    inputs = family.inputs(config, patches)
    try:
        with torch.no_grad():
            expected = family.reference_stages(_reference(config, source), config, inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source}: Hugging Face's model cannot use it ({reason}); {_DESCRIBED}") from error
    params, _, _ = load_weights(weights)
    ours = Functional(lambda rngs: family.module(config, rngs=rngs))
    with jax.default_matmul_precision("highest"):
        computed = jax.jit(ours.apply)(params, *inputs)
    if expected.keys() != computed.keys():
        raise UserError(f"{source}: Hugging Face's model has {len(expected)} stages, not {len(computed)}; {_DESCRIBED}")
    return [
        _compare(name, np.asarray(computed[name]), value, family.TOLERANCES[name.partition("/")[0]])
        for name, value in expected.items()
    ]


def check_installed() -> None:
    """Raises :class:`UserError` unless the libraries are there that the reference needs."""
    for library in ("torch", "transformers"):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UserError(f"--verify needs {library}: pip install 'cast_jax[convert]'") from error


def format_stages(stages: list[Stage]) -> str:
    """A table, one line a stage."""
    lines = [f"{'stage':<24}{'max abs error':>14}{'relative':>12}{'tolerance':>11}"]
    for stage in stages:
        verdict = "" if stage.passed else "  FAILED"
        errors = f"{stage.absolute:>14.2e}{stage.relative:>12.2e}{stage.tolerance:>11.1e}"
        lines.append(f"{stage.name:<24}{errors}{verdict}")
    return "\n".join(lines)


def _compare(name: str, computed: np.ndarray, expected: np.ndarray, tolerance: float) -> Stage:
    error = float(np.abs(computed - expected).max())
    tolerance *= max(1.0, float(expected.std()))
    return Stage(name, error, error / max(float(np.abs(expected).max()), 1e-12), tolerance)


def _reference(config: Any, source: Path) -> Any:
    """The PyTorch model with the checkpoint's weights."""
    import torch

    checkpoint, family = open_checkpoint(source), family_of(config)
    with torch.device("meta"):
        described = family.reference(config)
    if source.is_dir() and checkpoint.config.get("model_type") == described.config.model_type:
        return type(described).from_pretrained(source, dtype=torch.float32).eval()
    model = family.reference(config)
    _fill(model, checkpoint, config)
    return model.eval()


def _fill(model: Any, checkpoint: Checkpoint, config: Any) -> None:
    """Copies the checkpoint's tensors to the keys of ``model`` for the same parameters, layouts untouched."""
    import torch

    family = family_of(config)
    prepared, rules = family.prepared(checkpoint, config), family.rules(config)
    origins = plan(prepared, rules, parameter_shapes(config), "model")
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            name, _, member = key.rpartition(".")
            if f"{name}.running_var" in model.state_dict():  # a batch norm, which ours has folded: found by its name
                folded = next(iter(place([f"{name}.scale"], rules).origins))
                theirs = f"{origins[folded].key.removesuffix('.scale')}.{member}"
                values = checkpoint.read(theirs) if theirs in checkpoint.shapes else np.zeros(parameter.shape)
            else:
                targets = [target for target in place([key], rules).origins if target in origins]
                parts = [_tensor(prepared, origins[target]) for target in targets]
                if not parts:  # what is ignored, or another name of a module that is shared
                    continue
                values = np.concatenate(parts)
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))


def _tensor(checkpoint: Checkpoint, origin: Origin) -> np.ndarray:
    return origin.slice(checkpoint.read(origin.key))
