"""The converted weights against Hugging Face's PyTorch modules on the same checkpoint, stage by stage."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cast_jax.convert import dpt
from cast_jax.convert.engine import Origin, place, plan
from cast_jax.convert.models import Pretrained, PretrainedConfig, parameter_shapes
from cast_jax.convert.sources import Checkpoint, open_checkpoint
from cast_jax.core.errors import UserError
from cast_jax.export import load_weights
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.functional import Functional

# Largest absolute error in float32 (design/porting.md), for values whose standard deviation is at most one; of larger
# ones (unnormalised maps), times that, since rounding errors grow with the values.
TOLERANCES = {"encoder": 5e-5, "decoder": 5e-4}
# The compared images, in patches: not square, not the grid of a position embedding, no multiple of a window.
PATCHES = {False: (7, 10), True: (3, 5)}  # of a plain ViT, of a pyramid, whose patches are larger
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


def verify(
    config: PretrainedConfig, source: Path, weights: Path, patches: tuple[int, int] | None = None
) -> list[Stage]:
    """Runs both models on the same random image of ``patches`` (rows, columns) patches; ``PATCHES`` if None.

    A Hugging Face folder of the encoder alone is opened by ``from_pretrained``; other files fill the same modules by
    name, in PyTorch's own layouts. DINOv2's positions are resized as Hugging Face does, since that is what the
    reference computes; the official convention has its own test.

    Raises:
      UserError: torch is not installed, or the files cannot be read.
    """
    check_installed()
    import torch

    if isinstance(config.encoder, DinoV2Config):
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, position_offset=0.0))
    rows, columns = patches or PATCHES[config.encoder.pyramid]
    side = config.encoder.patch_size
    images = np.random.default_rng(0).normal(size=(1, rows * side, columns * side, 3)).astype(np.float32)
    try:
        with torch.no_grad():
            model = _reference(config, source)
            expected = _reference_stages(model, config, torch.from_numpy(images).permute(0, 3, 1, 2))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{source}: Hugging Face's model cannot use it ({reason}); {_DESCRIBED}") from error
    params, _, _ = load_weights(weights)
    ours = Functional(lambda rngs: Pretrained(config, rngs=rngs))
    with jax.default_matmul_precision("highest"):
        computed = jax.jit(ours.apply)(params, images)
    if expected.keys() != computed.keys():
        raise UserError(f"{source}: Hugging Face's model has {len(expected)} stages, not {len(computed)}; {_DESCRIBED}")
    return [
        _compare(name, np.asarray(computed[name]), value, TOLERANCES[name.partition("/")[0]])
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


def _reference(config: PretrainedConfig, source: Path) -> Any:
    """The PyTorch model with the checkpoint's weights."""
    import torch

    checkpoint, network = open_checkpoint(source), config.network
    if config.decoder and isinstance(config.encoder, DinoV2Config):
        model = dpt.reference(config.encoder, config.decoder, config.encoder_layers)
    else:
        model = network.reference(config.encoder)
    if source.is_dir() and checkpoint.config.get("model_type") == model.config.model_type:
        return type(model).from_pretrained(source, dtype=torch.float32).eval()
    _fill(model, checkpoint, config)
    return model.eval()


def _fill(model: Any, checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Copies the checkpoint's tensors to the keys of ``model`` for the same parameters, layouts untouched."""
    import torch

    origins = plan(config.network.prepared(checkpoint), config.rules, parameter_shapes(config), "model")
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            name, _, member = key.rpartition(".")
            if f"{name}.running_var" in model.state_dict():  # a batch norm, which ours has folded: found by its name
                folded = next(iter(place([f"{name}.scale"], config.rules).origins))
                theirs = f"{origins[folded].key.removesuffix('.scale')}.{member}"
                values = checkpoint.read(theirs) if theirs in checkpoint.shapes else np.zeros(parameter.shape)
            else:
                parts = [_tensor(checkpoint, origins[target]) for target in place([key], config.rules).origins]
                if not parts:  # what is ignored
                    continue
                values = np.concatenate(parts)
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))


def _tensor(checkpoint: Checkpoint, origin: Origin) -> np.ndarray:
    return origin.slice(checkpoint.read(origin.key))


def _reference_stages(model: Any, config: PretrainedConfig, images: Any) -> Mapping[str, np.ndarray]:
    encoder = config.network.reference_stages(getattr(model, "backbone", model) if config.decoder else model, images)
    stages = {f"encoder/{name}": value for name, value in encoder.items()}
    if config.decoder:
        tokens = [encoder[f"blocks/{layer}"] for layer in config.encoder_layers]
        patch = config.encoder.patch_size
        fused = dpt.reference_stages(model, tokens, (images.shape[2] // patch, images.shape[3] // patch))
        stages |= {f"decoder/{name}": value for name, value in fused.items()}
    return stages
