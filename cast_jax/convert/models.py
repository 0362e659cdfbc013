"""What can be converted, by name: encoders with or without their DPT neck, and whole models.

Models of one configuration class are a family. A module of this package says what is particular to it
(:class:`Family`); everything else treats all families alike. A new one needs such a module, a line in ``FAMILIES`` and
its names in ``MODELS``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from flax import nnx

from cast_jax.convert import encoders, grounding_dino, sam2
from cast_jax.convert.encoders import PretrainedConfig
from cast_jax.convert.engine import Rule, Shapes, likeness, place, placed_shapes
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.config import build
from cast_jax.core.errors import UserError
from cast_jax.core.rules import layer_shapes, named_leaves
from cast_jax.models.dinov2 import DinoV2Config, dinov2_b, dinov2_l, dinov2_s
from cast_jax.models.dpt import DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.parts import ENCODERS
from cast_jax.models.teacher.grounding_dino_config import GROUNDING_DINO, GroundingDinoConfig
from cast_jax.models.teacher.sam2 import SAM2, Sam2Config

Config = TypeVar("Config")


class Family(Protocol):
    """What a module of this package says of the models of one configuration class."""

    @property
    def TOLERANCES(self) -> Mapping[str, float]:  # noqa: N802 (a module's constant)
        """Largest absolute error in float32 by the first part of a result's name (see ``verify.verify``)."""

    def module(self, config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
        """The network, whose call on ``inputs`` returns all intermediate results that are compared, by name."""

    def rules(self, config: Any) -> tuple[Rule, ...]:
        """Source keys of every published layout to parameters; what is left out is ignored by name."""

    def prepared(self, checkpoint: Checkpoint, config: Any) -> Checkpoint:
        """The file as the rules want it."""

    def found(self, shapes: Mapping[str, tuple[int, ...]], config: Any) -> dict[str, Any]:
        """Fields of the configuration, nested, that the file itself decides."""

    def facts(self, given: Mapping[str, Any], config: Any) -> dict[str, tuple[Any, Any]]:
        """What no tensor's shape shows: (theirs, ours) by name, theirs from a Hugging Face ``config.json``."""

    def layout(self, keys: Iterable[str], config: Any) -> str:
        """``hugging_face``, or the name of the other layout."""

    def width(self, config: Any) -> int:
        """The length that some vector (bias, norm) of such a model has, and few of its siblings' have."""

    def comparable(self, config: Any) -> Any:
        """The configuration that computes what the reference does, where conventions differ."""

    def inputs(self, config: Any, patches: tuple[int, int] | None) -> tuple[np.ndarray, ...]:
        """Random inputs, of images with ``patches`` (rows, columns) patches (None: a few)."""

    def reference(self, config: Any) -> Any:
        """Hugging Face's PyTorch module of the same sizes; needs torch and transformers."""

    def reference_stages(self, model: Any, config: Any, inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """PyTorch's intermediate results, named and laid out as those of ``module``."""


FAMILIES: dict[type, Family] = {PretrainedConfig: encoders, Sam2Config: sam2, GroundingDinoConfig: grounding_dino}


def family_of(config: Any) -> Family:
    """The family of a configuration."""
    return FAMILIES[type(config)]


def _dpt(encoder: DinoV2Config, features: int, out_channels: Sequence[int], layers: Sequence[int]) -> PretrainedConfig:
    widths = tuple(out_channels)
    return PretrainedConfig(encoder, DptConfig(features, widths, finest_scale=8), tuple(layers))  # type: ignore[arg-type]


def _encoder(name: str) -> PretrainedConfig:
    return PretrainedConfig(ENCODERS[name]())


def _dinov2_g() -> DinoV2Config:
    return DinoV2Config(embed_dim=1536, depth=40, num_heads=24, ffn="swiglu")


# The necks' sizes and layers are those of Depth-Anything-V2 and UniMatch-V2.
MODELS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(_encoder, name) for name in ENCODERS},
    "dinov2_g": lambda: PretrainedConfig(_dinov2_g()),
    "dinov2_dpt_s": lambda: _dpt(dinov2_s(), 64, (48, 96, 192, 384), (2, 5, 8, 11)),
    "dinov2_dpt_b": lambda: _dpt(dinov2_b(), 128, (96, 192, 384, 768), (2, 5, 8, 11)),
    "dinov2_dpt_l": lambda: _dpt(dinov2_l(), 256, (256, 512, 1024, 1024), (4, 11, 17, 23)),
    **SAM2,
    **GROUNDING_DINO,
}


def known_model(name: str) -> Any:
    """The configuration of ``name``.

    Raises:
      UserError: listing the known names.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r} is unknown; known: {', '.join(MODELS)}")
    return MODELS[name]()


def model_config(name: str, decided: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Any:
    """The configuration of ``name`` with what the file has ``decided`` and ``changes`` ({"encoder": {"depth": 3}}).

    Raises:
      UserError: an unknown name, part or field; sizes that cannot be.
    """
    return _changed(known_model(name), (decided, changes or {}), name, ())


def described_config(described: Mapping[str, Any]) -> Any:
    """The configuration of converted weights, from the ``config.json`` beside them (``export.load_weights``).

    Raises:
      UserError: it describes no converted weights of a model that is known here.
    """
    name = described.get("converted", {}).get("name")
    return _changed(known_model(name), (described.get("model", {}),), name, ())


def _changed(config: Config, layers: Sequence[Mapping[str, Any]], name: str, path: tuple[str, ...]) -> Config:
    """``config`` with the nested ``layers`` of values, of which the last that has a value wins."""
    values = dict(vars(config))
    for layer in layers:
        values |= layer
    for key, part in vars(config).items():
        given = [layer[key] for layer in layers if key in layer]
        if given and part is None and isinstance(given[-1], Mapping):
            raise UserError(f"--config {key}={given[-1]}: {name} has no {key}")
        if given and dataclasses.is_dataclass(part):
            where = ".".join((*path, key))
            if not all(isinstance(value, Mapping) for value in given):
                raise UserError(f"--config {where}={given[-1]}: give its fields, --config={where}.…=…")
            values[key] = _changed(part, given, name, (*path, key))
    return build(type(config), values, " ".join(("--config", ".".join(path))).rstrip())


@functools.cache
def stored_shapes(config: Any) -> Shapes:
    """The shape of every parameter by name, without allocating any; of a large model that takes seconds."""
    abstract = Functional(lambda rngs: family_of(config).module(config, rngs=rngs)).abstract()
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}


def parameter_shapes(config: Any) -> Shapes:
    """The same with the layers of stacks one by one, as in PyTorch's files; stored, they follow one another."""
    return layer_shapes(stored_shapes(config))


def relatives(name: str, checkpoint: Checkpoint) -> dict[str, float]:
    """How much the file is like each of the other models that it could be, those of the same family first.

    Describing a model takes seconds: only those are whose keys the file has, in the model's ``width``.
    """
    alike = {}
    family = family_of(known_model(name))
    for other in sorted(MODELS, key=lambda other: family_of(known_model(other)) is not family):
        config = known_model(other)
        its = family_of(config)
        try:
            file = its.prepared(checkpoint, config)
        except UserError:  # broken in a way that says nothing of its size
            continue
        given = placed_shapes(place(file.shapes, its.rules(config)), file.shapes)
        if other != name and (its.width(config),) in given.values():
            config = model_config(other, its.found(file.shapes, config))
            alike[other] = likeness(given, parameter_shapes(config))
    return alike


def check_facts(config: Any, checkpoint: Checkpoint) -> None:
    """Holds what no tensor's shape shows against the folder's ``config.json``; absent keys are at their defaults.

    Raises:
      UserError: listing what differs.
    """
    if not checkpoint.config:
        return
    try:
        facts = family_of(config).facts(checkpoint.config, config)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{checkpoint.path}: its config.json is not as Hugging Face writes it: {error}") from error
    faults = [f"{key} is {theirs!r}, not {ours!r}" for key, (theirs, ours) in facts.items() if theirs != ours]
    if faults:
        raise UserError(f"{checkpoint.path / 'config.json'}: another model than the one asked for: {'; '.join(faults)}")
