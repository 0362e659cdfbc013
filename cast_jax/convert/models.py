"""What can be converted: the encoders, with or without their DPT neck, under the names that the student gives them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from cast_jax.convert import dpt as dpt_keys
from cast_jax.convert.engine import Rule, Shapes, place
from cast_jax.convert.networks import NETWORKS, Network
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.config import build, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.models.dinov2 import DinoV2Config, dinov2_b, dinov2_l, dinov2_s
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.parts import ENCODERS, MODULES, EncoderConfig


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

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Source keys to parameters; what is left out is ignored by name."""
        return (*self.network.RULES, *(dpt_keys.RULES if self.decoder else self.network.HEADS))


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


def _dpt(encoder: DinoV2Config, features: int, out_channels: Sequence[int], layers: Sequence[int]) -> PretrainedConfig:
    widths = tuple(out_channels)
    return PretrainedConfig(encoder, DptConfig(features, widths, finest_scale=8), tuple(layers))  # type: ignore[arg-type]


def _encoder(name: str) -> PretrainedConfig:
    return PretrainedConfig(ENCODERS[name]())


def _dinov2_g() -> DinoV2Config:
    return DinoV2Config(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu")


# The necks' sizes and layers are those of Depth-Anything-V2 and UniMatch-V2.
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: functools.partial(_encoder, name) for name in ENCODERS},
    "dinov2_g": lambda: PretrainedConfig(_dinov2_g()),
    "dinov2_dpt_s": lambda: _dpt(dinov2_s(), 64, (48, 96, 192, 384), (2, 5, 8, 11)),
    "dinov2_dpt_b": lambda: _dpt(dinov2_b(), 128, (96, 192, 384, 768), (2, 5, 8, 11)),
    "dinov2_dpt_l": lambda: _dpt(dinov2_l(), 256, (256, 512, 1024, 1024), (4, 11, 17, 23)),
}


def pretrained_config(name: str, checkpoint: Checkpoint, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The sizes of ``name`` with ``changes`` ({"encoder": {"depth": 3}}), and what the file itself decides.

    That is, for example, the number of registers and, by the file's origin, how a position embedding is resized.

    Raises:
      UserError: an unknown name, part or field; sizes that cannot be.
    """
    named, changes = known_model(name), dict(changes or {})
    for part in ("encoder", "decoder"):
        if part in changes and not (isinstance(changes[part], Mapping) and getattr(named, part)):
            absent = f"{name} has no {part}" if not getattr(named, part) else f"give its fields, --config={part}.…=…"
            raise UserError(f"--config {part}={changes[part]}: {absent}")
    encoder = {**vars(named.encoder), **named.network.found(checkpoint.shapes), **changes.pop("encoder", {})}
    parts: dict[str, Any] = {"encoder": build(type(named.encoder), encoder, "--config encoder")}
    if named.decoder and "decoder" in changes:
        parts["decoder"] = build(DptConfig, {**vars(named.decoder), **changes.pop("decoder")}, "--config decoder")
    return build(PretrainedConfig, {**vars(named), **changes, **parts}, "--config")


def known_model(name: str) -> PretrainedConfig:
    """The sizes of ``name``.

    Raises:
      UserError: listing the known names.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; known: {', '.join(MODELS)}")
    return MODELS[name]()


def parameter_shapes(config: PretrainedConfig) -> Shapes:
    """The shape of every parameter by name, without allocating any."""
    abstract = Functional(lambda rngs: Pretrained(config, rngs=rngs)).abstract()
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}


def relatives(name: str, checkpoint: Checkpoint) -> dict[str, Shapes]:
    """The parameters of the other models that the file could be, among which a wrong variant is recognised.

    Describing one takes seconds: only those are whose keys the file has, in the width of their first map.
    """
    found = {}
    for other, make in MODELS.items():
        config = make()
        if other != name and config.encoder.map_widths[0] in _widths(config, checkpoint):
            encoder = dataclasses.replace(config.encoder, **config.network.found(checkpoint.shapes))
            found[other] = parameter_shapes(dataclasses.replace(config, encoder=encoder))
    return found


def _widths(config: PretrainedConfig, checkpoint: Checkpoint) -> set[int]:
    """The lengths of the file's vectors (biases, norms) under the names that the model gives them."""
    placement = place(checkpoint.shapes, config.rules)
    shapes = [placement.shape(target, checkpoint.shapes) for target in placement.origins]
    return {shape[0] for shape in shapes if shape is not None and len(shape) == 1}


def check_facts(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Holds what no tensor's shape shows against the folder's ``config.json``; absent keys are at their defaults.

    Raises:
      UserError: listing what differs.
    """
    if not checkpoint.config:
        return
    try:
        facts = config.network.facts(checkpoint.config, config.encoder)
        indices = (checkpoint.config.get("backbone_config") or checkpoint.config).get("out_indices")
        if config.decoder and indices:
            facts["out_indices"] = list(indices), [layer + 1 for layer in config.encoder_layers]
    except (AttributeError, TypeError) as error:
        raise UserError(f"{checkpoint.path}: its config.json is not as Hugging Face writes it: {error}") from error
    faults = [f"{key} is {theirs!r}, not {ours!r}" for key, (theirs, ours) in facts.items() if theirs != ours]
    if faults:
        raise UserError(f"{checkpoint.path / 'config.json'}: another model than the one asked for: {'; '.join(faults)}")
