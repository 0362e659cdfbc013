"""Which file of rules belongs to which encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from cast_jax.convert import dinov2, hiera, resnet, swin
from cast_jax.convert.engine import Rule
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.bottleneck import BottleneckResNetConfig
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.hiera import HieraConfig
from cast_jax.models.swin import SwinConfig

Shapes = Mapping[str, tuple[int, ...]]


class Network(Protocol):
    """What a module of this package says of one network."""

    @property
    def RULES(self) -> tuple[Rule, ...]:  # noqa: N802 (a module's constant)
        """Source keys of every published layout to parameters."""

    @property
    def HEADS(self) -> tuple[Rule, ...]:  # noqa: N802
        """What else such files hold, ignored."""

    def prepared(self, checkpoint: Checkpoint) -> Checkpoint:
        """The file as the rules want it."""

    def found(self, shapes: Shapes) -> dict[str, Any]:
        """Fields of the configuration that the file itself decides."""

    def facts(self, given: Mapping[str, Any], config: Any) -> dict[str, tuple[Any, Any]]:
        """What no tensor's shape shows: (theirs, ours) by name, theirs from a Hugging Face ``config.json``."""

    def layout(self, keys: Iterable[str]) -> str:
        """``hugging_face``, or the name of the other layout."""

    def reference(self, config: Any) -> Any:
        """Hugging Face's PyTorch module of the same sizes; needs torch and transformers."""

    def reference_stages(self, model: Any, images: Any) -> dict[str, np.ndarray]:
        """PyTorch's intermediate results, named and laid out as our module's ``intermediates``."""


NETWORKS: dict[type, Network] = {
    DinoV2Config: dinov2,
    BottleneckResNetConfig: resnet,
    SwinConfig: swin,
    HieraConfig: hiera,
}
