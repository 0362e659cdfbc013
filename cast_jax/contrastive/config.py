"""What can be chosen about the pixel-wise contrastive loss."""

from __future__ import annotations

import dataclasses

from cast_jax.contrastive.fused_map import MAPS
from cast_jax.contrastive.samplers import SAMPLERS, number_of_slots
from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError

SCOPES = ("batch", "image", "bank")
LOSSES = ("infonce", "hinge")
SCORE_NAMES = ("d", "d_squared", "d_sqrt")


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Options of the contrastive loss; the defaults are the paper's, or chosen where the paper is silent.

    Attributes:
        num_negatives: K, draws per anchor, with replacement.
        temperature: τ.
        map: what pixels are compared by: ``fusion``, ``mask``, ``class``, or ``uniform`` (every candidate alike).
        score: ``d``, ``d_squared`` or ``d_sqrt``.
        scope: candidates are the pixels of the whole (global) ``batch``, of the anchor's own ``image``, or of past
            batches in a ``bank``.
        bank_size, bank_new: pixels in the bank, and how many (chosen) each update writes over the oldest ones.
        loss: ``infonce`` (NT-Xent) or ``hinge``.
        margin: of the hinge loss, between cosine similarities.
        symmetric: also uses strong anchors with weak keys; both directions are averaged. A ``bank`` holds keys of the
            strong view only, for either direction.
        sampler: ``mixture_proposals`` (fast), ``inverse_cdf`` or ``categorical`` (the references); all exact.
        slots: length of the pool of proposals that a group of anchors shares, a multiple of 32; None plans it.
        group_size: anchors of an image that are contrasted with a pool at a time.
        max_pools: pools drawn (and exchanged between devices) in an update; more groups than pools take turns. Fewer
            pools are cheaper, but correlate the anchors' noise.
        num_anchors: anchors per image, drawn without replacement from its valid pixels; None takes all pixels.
    """

    num_negatives: int = 256
    temperature: float = 0.2
    map: str = "fusion"
    score: str = "d"
    scope: str = "batch"
    loss: str = "infonce"
    margin: float = 0.1
    symmetric: bool = False
    sampler: str = "mixture_proposals"
    slots: int | None = None
    group_size: int = 128
    max_pools: int = 64
    num_anchors: int | None = None
    bank_size: int = 10_000
    bank_new: int = 1_000

    def __post_init__(self) -> None:
        check_choices(self, map=MAPS, score=SCORE_NAMES, scope=SCOPES, loss=LOSSES, sampler=SAMPLERS)
        # 65,536 is MoCo's queue, the most that the literature draws; a group's similarities then take 70 MB and more.
        check_ranges(self, num_negatives="[1, 65536]", slots="[32, 1048576]", group_size="[1, 65536]")
        check_ranges(self, max_pools="[1, 65536]")
        # Similarities lie in [-1, 1]: beyond these temperatures float32 tells the logits no longer apart.
        check_ranges(self, temperature="[0.001, 1000]", margin="[0, inf)", num_anchors="[1, inf)")
        check_ranges(self, bank_size="[1, 16777216]", bank_new="[1, 16777216]")
        if self.bank_new > self.bank_size:
            raise UserError(f"bank_new is {self.bank_new}; it must be at most bank_size {self.bank_size}")
        if self.slots is not None and (self.slots % 32 or self.slots < self.num_negatives):
            least = f"a multiple of 32, at least num_negatives ({self.num_negatives})"
            raise UserError(f"slots is {self.slots}; it must be {least}, or None, which plans it")

    @property
    def sampling_score(self) -> str:
        """The score that the sampler follows: a uniform map compares nothing, so d ≡ 1."""
        return "uniform" if self.map == "uniform" else self.score

    @property
    def num_slots(self) -> int:
        """Length of the shared pool, planned so that hardly a row stays short (one in a million for ``d``)."""
        return number_of_slots(self.num_negatives, self.sampling_score) if self.slots is None else self.slots
