"""What can be converted: the encoders, with or without their DPT neck, under the names that the student gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from cast_jax.convert import dinov2 as dinov2_keys
from cast_jax.convert import dpt as dpt_keys
from cast_jax.convert.engine import Rule, Shapes
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.config import build
from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_b, dinov2_l, dinov2_s
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.functional import Functional


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """An encoder, and the neck that was trained with it, fed by the maps after ``encoder_layers`` (0-based)."""

    encoder: DinoV2Config
    decoder: DptConfig | None = None
    encoder_layers: tuple[int, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Source keys to parameters; what is left out is ignored by name."""
        return (*dinov2_keys.RULES, *(dpt_keys.RULES if self.decoder else dinov2_keys.HEADS))


class Pretrained(nnx.Module):
    """The parts of a student that published weights fill, under the student's names."""

    def __init__(self, config: PretrainedConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = DinoV2(config.encoder, rngs=rngs)
        if config.decoder:
            self.decoder = Dpt(config.encoder.embed_dim, config.decoder, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Array]:
        """Every intermediate stage by name: tokens before and after each block (normed), the neck's maps."""
        encoder = self.encoder
        layers = range(encoder.config.depth)
        stages = {"encoder/embedding": encoder._embed(images)}
        stages |= zip((f"encoder/blocks/{n}" for n in layers), encoder.tokens(images, layers=layers), strict=True)
        if self.config.decoder:
            prefix, grid = 1 + encoder.config.num_register_tokens, encoder.grid(*images.shape[1:3])
            tokens = [stages[f"encoder/blocks/{layer}"][:, prefix:] for layer in self.config.encoder_layers]
            finest, coarser = self.decoder([level.reshape(level.shape[0], *grid, -1) for level in tokens])
            stages |= {f"decoder/fusion/{n}": level for n, level in enumerate([*coarser, finest])}
        return stages


def _dpt(encoder: DinoV2Config, features: int, out_channels: Sequence[int], layers: Sequence[int]) -> PretrainedConfig:
    widths = tuple(out_channels)
    return PretrainedConfig(encoder, DptConfig(features, widths, finest_scale=8), tuple(layers))  # type: ignore[arg-type]


def _dinov2_g() -> DinoV2Config:
    return DinoV2Config(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu")


# The necks' sizes and layers are those of Depth-Anything-V2 and UniMatch-V2.
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "dinov2_s": lambda: PretrainedConfig(dinov2_s()),
    "dinov2_b": lambda: PretrainedConfig(dinov2_b()),
    "dinov2_l": lambda: PretrainedConfig(dinov2_l()),
    "dinov2_g": lambda: PretrainedConfig(_dinov2_g()),
    "dinov2_dpt_s": lambda: _dpt(dinov2_s(), 64, (48, 96, 192, 384), (2, 5, 8, 11)),
    "dinov2_dpt_b": lambda: _dpt(dinov2_b(), 128, (96, 192, 384, 768), (2, 5, 8, 11)),
    "dinov2_dpt_l": lambda: _dpt(dinov2_l(), 256, (256, 512, 1024, 1024), (4, 11, 17, 23)),
}


def pretrained_config(name: str, checkpoint: Checkpoint, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The sizes of ``name`` with ``changes`` ({"encoder": {"depth": 3}}), and what the file itself decides.

    That is the number of registers and, by the file's origin, how the position embedding is resized.

    Raises:
      UserError: an unknown name, part or field; sizes that cannot be.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; known: {', '.join(MODELS)}")
    named, changes = MODELS[name](), dict(changes or {})
    registers = dinov2_keys.register_tokens(checkpoint.shapes)
    origin = dinov2_keys.positions(dinov2_keys.hugging_face(checkpoint.shapes), registers)
    found = {"num_register_tokens": registers, **origin}
    parts: dict[str, Any] = {
        "encoder": build(
            DinoV2Config, {**vars(named.encoder), **found, **changes.pop("encoder", {})}, "--config encoder"
        )
    }
    if named.decoder and "decoder" in changes:
        parts["decoder"] = build(DptConfig, {**vars(named.decoder), **changes.pop("decoder")}, "--config decoder")
    return build(PretrainedConfig, {**vars(named), **changes, **parts}, "--config")


def parameter_shapes(config: PretrainedConfig) -> Shapes:
    """The shape of every parameter by name, without allocating any."""
    abstract = Functional(lambda rngs: Pretrained(config, rngs=rngs)).abstract()
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}


def relatives(name: str, checkpoint: Checkpoint) -> dict[str, Shapes]:
    """The parameters of the other models of the file's width, among which a wrong variant is recognised."""
    width = next((shape[-1] for key, shape in checkpoint.shapes.items() if key.endswith("cls_token")), None)
    registers = dinov2_keys.register_tokens(checkpoint.shapes)
    found = {}
    for other, make in MODELS.items():
        if other != name and (config := make()).encoder.embed_dim == width:
            encoder = dataclasses.replace(config.encoder, num_register_tokens=registers)
            found[other] = parameter_shapes(dataclasses.replace(config, encoder=encoder))
    return found


def check_facts(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Holds what no tensor's shape shows against the folder's ``config.json``; absent keys are at their defaults.

    Raises:
      UserError: listing what differs.
    """
    if not checkpoint.config:
        return
    given = checkpoint.config.get("backbone_config") or checkpoint.config
    facts = {
        "num_attention_heads": (given.get("num_attention_heads", 12), config.encoder.num_heads),
        "hidden_act": (given.get("hidden_act", "gelu"), "gelu"),
        "layer_norm_eps": (given.get("layer_norm_eps", 1e-6), 1e-6),
    }
    if config.decoder and (indices := given.get("out_indices")):
        facts["out_indices"] = list(indices), [layer + 1 for layer in config.encoder_layers]
    faults = [f"{key} is {theirs}, not {ours}" for key, (theirs, ours) in facts.items() if theirs != ours]
    if faults:
        raise UserError(f"{checkpoint.path / 'config.json'}: another model than the one asked for: {'; '.join(faults)}")
