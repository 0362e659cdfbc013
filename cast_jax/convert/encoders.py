"""The family of encoders, with or without their DPT neck, under the names that the student gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cast_jax.convert import dpt
from cast_jax.convert.engine import Rule
from cast_jax.convert.networks import NETWORKS, Network
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.parts import MODULES, EncoderConfig

# Largest absolute error in float32 (design/porting.md).
TOLERANCES = {"encoder": 5e-5, "decoder": 5e-4}
# The compared images, in patches: not square, not the grid of a position embedding, no multiple of a window.
PATCHES = {False: (7, 10), True: (3, 5)}  # of a plain ViT, of a pyramid, whose patches are larger


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """An encoder, and the neck that was trained with it, fed by the maps after ``encoder_layers`` (0-based)."""

    encoder: EncoderConfig
    decoder: DptConfig | None = None
    encoder_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, encoder_layers=f"[0, {self.encoder.depth})")
        if self.decoder and (len(self.encoder_layers) != 4 or list(self.encoder_layers) != sorted(self.encoder_layers)):
            raise UserError(f"encoder_layers {self.encoder_layers} must be four maps, shallow to deep")

    @property
    def network(self) -> Network:
        """What is known of the encoder's files."""
        return NETWORKS[type(self.encoder)]


class Pretrained(nnx.Module):
    """The parts of a student that published weights fill, under the student's names."""

    def __init__(self, config: PretrainedConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = MODULES[type(config.encoder)](config.encoder, rngs=rngs)
        if config.decoder:
            self.decoder = Dpt(config.encoder.map_widths[0], config.decoder, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Array]:
        """Every intermediate result by name: the encoder's, and the neck's fused maps."""
        stages = {f"encoder/{name}": value for name, value in self.encoder.intermediates(images).items()}
        if self.config.decoder:
            finest, coarser = self.decoder(self.encoder(images, layers=self.config.encoder_layers))
            stages |= {f"decoder/fusion/{n}": level for n, level in enumerate([*coarser, finest])}
        return stages


def module(config: PretrainedConfig, *, rngs: nnx.Rngs) -> Pretrained:
    """The parts that the weights fill."""
    return Pretrained(config, rngs=rngs)


def rules(config: PretrainedConfig) -> tuple[Rule, ...]:
    """The encoder's, and the neck's or those that leave out all that is no encoder."""
    return (*config.network.RULES, *(dpt.RULES if config.decoder else config.network.HEADS))


def prepared(checkpoint: Checkpoint, config: PretrainedConfig) -> Checkpoint:
    """As the encoder's rules want it."""
    return config.network.prepared(checkpoint)


def found(shapes: Mapping[str, tuple[int, ...]], config: PretrainedConfig) -> dict[str, Any]:
    """Of the encoder: the number of registers, by the file's origin how a position embedding is resized, ..."""
    return {"encoder": config.network.found(shapes)}


def facts(given: Mapping[str, Any], config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """The encoder's, and which of its maps feed the neck."""
    facts = config.network.facts(given, config.encoder)
    indices = (given.get("backbone_config") or given).get("out_indices")
    if config.decoder and indices:
        facts["out_indices"] = list(indices), [layer + 1 for layer in config.encoder_layers]
    return facts


def layout(keys: Iterable[str], config: PretrainedConfig) -> str:
    """The encoder's."""
    return config.network.layout(keys)


def width(config: PretrainedConfig) -> int:
    """Channels of the encoder's first map."""
    return config.encoder.map_widths[0]


def comparable(config: PretrainedConfig) -> PretrainedConfig:
    """DINOv2's positions resized as Hugging Face does; the official convention has its own test."""
    if not isinstance(config.encoder, DinoV2Config):
        return config
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, position_offset=0.0))


def inputs(config: PretrainedConfig, patches: tuple[int, int] | None) -> tuple[np.ndarray]:
    """A random image."""
    rows, columns = patches or PATCHES[config.encoder.pyramid]
    side = config.encoder.patch_size
    return (np.random.default_rng(0).normal(size=(1, rows * side, columns * side, 3)).astype(np.float32),)


def reference(config: PretrainedConfig) -> Any:
    """Hugging Face's encoder, or its Depth Anything."""
    if config.decoder and isinstance(config.encoder, DinoV2Config):
        return dpt.reference(config.encoder, config.decoder, config.encoder_layers)
    return config.network.reference(config.encoder)


def reference_stages(model: Any, config: PretrainedConfig, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """What :class:`Pretrained` returns."""
    import torch

    images = torch.from_numpy(inputs[0]).permute(0, 3, 1, 2)
    encoder = config.network.reference_stages(getattr(model, "backbone", model) if config.decoder else model, images)
    stages = {f"encoder/{name}": value for name, value in encoder.items()}
    if config.decoder:
        tokens = [encoder[f"blocks/{layer}"] for layer in config.encoder_layers]
        patch = config.encoder.patch_size
        fused = dpt.reference_stages(model, tokens, (images.shape[2] // patch, images.shape[3] // patch))
        stages |= {f"decoder/{name}": value for name, value in fused.items()}
    return stages
