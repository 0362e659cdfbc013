"""The converted weights against Hugging Face's PyTorch modules on the same checkpoint, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cast_jax.convert.dinov2 import positions
from cast_jax.convert.engine import Origin, place, plan
from cast_jax.convert.models import Pretrained, PretrainedConfig, parameter_shapes
from cast_jax.convert.sources import Checkpoint, open_checkpoint
from cast_jax.core.errors import UserError
from cast_jax.export import load_weights
from cast_jax.models.functional import Functional

# Largest absolute error in float32 (design/porting.md), for values whose standard deviation is at most one; of larger
# ones (a neck's unnormalised maps), times that, since rounding errors grow with the values.
TOLERANCES = {"encoder": 5e-5, "decoder": 5e-4}
PATCHES = (7, 10)  # the compared images, in patches: not square, and not the grid of the position embedding


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


def verify(config: PretrainedConfig, source: Path, weights: Path) -> list[Stage]:
    """Runs both models on the same random images.

    A Hugging Face folder is opened by ``from_pretrained``; other files fill the same modules by name, in PyTorch's own
    layouts. Positions are resized as Hugging Face does, since that is what the reference computes; the official
    convention has its own test.

    Raises:
      UserError: torch is not installed, or the files cannot be read.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("--verify needs torch: pip install 'cast_jax[convert]'") from error
    encoder = dataclasses.replace(config.encoder, **positions(True, config.encoder.num_register_tokens))  # type: ignore[arg-type]
    config = dataclasses.replace(config, encoder=encoder)
    side = config.encoder.patch_size
    size = (1, PATCHES[0] * side, PATCHES[1] * side, 3)
    images = np.random.default_rng(0).normal(size=size).astype(np.float32)
    with torch.no_grad():
        expected = _reference_stages(_reference(config, source), config, torch.from_numpy(images).permute(0, 3, 1, 2))
    params, _, _ = load_weights(weights)
    model = Functional(lambda rngs: Pretrained(config, rngs=rngs))
    with jax.default_matmul_precision("highest"):
        computed = jax.jit(model.apply)(params, images)
    return [_compare(name, np.asarray(computed[name]), value) for name, value in expected.items()]


def format_stages(stages: list[Stage]) -> str:
    """A table, one line a stage."""
    lines = [f"{'stage':<24}{'max abs error':>14}{'relative':>12}{'tolerance':>11}"]
    for stage in stages:
        verdict = "" if stage.passed else "  FAILED"
        errors = f"{stage.absolute:>14.2e}{stage.relative:>12.2e}{stage.tolerance:>11.1e}"
        lines.append(f"{stage.name:<24}{errors}{verdict}")
    return "\n".join(lines)


def _compare(name: str, computed: np.ndarray, expected: np.ndarray) -> Stage:
    error = float(np.abs(computed - expected).max())
    tolerance = TOLERANCES[name.partition("/")[0]] * max(1.0, float(expected.std()))
    return Stage(name, error, error / max(float(np.abs(expected).max()), 1e-12), tolerance)


def _reference(config: PretrainedConfig, source: Path) -> Any:
    """The PyTorch model with the checkpoint's weights."""
    import torch
    import transformers

    checkpoint = open_checkpoint(source)
    registers, encoder = config.encoder.num_register_tokens, config.encoder
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    if checkpoint.config.get("model_type") in ("dinov2", "dinov2_with_registers") and not config.decoder:
        return getattr(transformers, f"{name}Model").from_pretrained(source, dtype=torch.float32).eval()
    if checkpoint.config.get("model_type") == "depth_anything":
        return transformers.DepthAnythingForDepthEstimation.from_pretrained(source, dtype=torch.float32).eval()
    sizes: dict[str, Any] = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "patch_size": encoder.patch_size,
        "image_size": encoder.position_grid * encoder.patch_size,
        "mlp_ratio": int(encoder.mlp_ratio),
        "use_swiglu_ffn": encoder.ffn == "swiglu",
    }
    if registers:
        sizes["num_register_tokens"] = registers
    if not config.decoder:
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    else:
        backbone = getattr(transformers, f"{name}Config")(
            **sizes,
            out_indices=[layer + 1 for layer in config.encoder_layers],
            reshape_hidden_states=False,
            apply_layernorm=True,
        )
        neck = transformers.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=encoder.patch_size,
            reassemble_hidden_size=encoder.embed_dim,
            neck_hidden_sizes=list(config.decoder.out_channels),
            fusion_hidden_size=config.decoder.features,
        )
        model = transformers.DepthAnythingForDepthEstimation(neck)
    _fill(model, checkpoint, config)
    return model.eval()


def _fill(model: Any, checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Copies the checkpoint's tensors to the keys of ``model`` for the same parameters, layouts untouched."""
    import torch

    origins = plan(checkpoint, config.rules, parameter_shapes(config), "model")
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            parts = [_tensor(checkpoint, origins[target]) for target in place([key], config.rules).origins]
            if parts:  # none for the depth head, which is ignored
                parameter.copy_(torch.from_numpy(np.concatenate(parts).reshape(parameter.shape)))


def _tensor(checkpoint: Checkpoint, origin: Origin) -> np.ndarray:
    return origin.slice(checkpoint.read(origin.key))


def _reference_stages(model: Any, config: PretrainedConfig, images: Any) -> Mapping[str, np.ndarray]:
    backbone = getattr(model, "backbone", model)
    tokens = backbone.embeddings(images)
    stages, normed = {"encoder/embedding": tokens.numpy()}, []
    for number, layer in enumerate(backbone.encoder.layer):
        output = layer(tokens)
        tokens = output[0] if isinstance(output, tuple) else output  # transformers 4 returned a tuple
        normed.append(backbone.layernorm(tokens))
        stages[f"encoder/blocks/{number}"] = normed[-1].numpy()
    if config.decoder:
        maps = model.neck([normed[layer] for layer in config.encoder_layers], *PATCHES)
        stages |= {f"decoder/fusion/{n}": level.permute(0, 2, 3, 1).numpy() for n, level in enumerate(maps)}
    return stages
