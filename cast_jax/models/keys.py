"""The random keys of a model's fresh parameters."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray


class Keys(nnx.RngStream):
    """The keys of ``nnx.RngStream``, counted on the host.

    The original counts in an array, and looks at its sharding each time; that of a traced array takes a search through
    all that was traced before: 18 s instead of 2 to describe a model of 900 tensors.

    Attributes:
      drawn: how many were drawn. It may be set, to a traced number too.
    """

    def __init__(self, key: PRNGKeyArray, drawn: Any = 0):
        super().__init__(key, tag="params")
        self.drawn = drawn

    @classmethod
    def of(cls, rngs: nnx.Rngs) -> Keys:
        """The stream that ``rngs`` draws parameters from; of other ``rngs`` than ours a new one."""
        stream = rngs.params
        return stream if isinstance(stream, cls) else cls(stream())

    def __call__(self) -> PRNGKeyArray:
        self.drawn += 1
        return jax.random.fold_in(self.key[...], self.drawn - 1)

    def later(self, draws: Any) -> Keys:
        """The same keys from ``draws`` further on."""
        return Keys(self.key[...], self.drawn + draws)

    def as_rngs(self) -> nnx.Rngs:
        """The argument that layers take."""
        rngs = nnx.Rngs(params=self.key[...])
        rngs.params = self  # type: ignore[attr-defined]
        return rngs
