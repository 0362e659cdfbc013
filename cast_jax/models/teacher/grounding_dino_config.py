"""The sizes of Grounding DINO and MM-Grounding-DINO as they were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cast_jax.core.config import check_ranges
from cast_jax.core.errors import UserError
from cast_jax.models.swin import SwinConfig, swin_b, swin_l, swin_t
from cast_jax.models.teacher.bert import BertConfig

GROUPS = 32  # of the normalisation after the input projections


@dataclasses.dataclass(frozen=True)
class GroundingDinoConfig:
    """Sizes of the detector; the defaults are MM-Grounding-DINO-T.

    Attributes:
      backbone: the image encoder; the detector sees its normalised maps.
      bert: the text encoder.
      num_levels: maps that the detector sees; those that the backbone lacks are made from its coarsest one.
      hidden_dim, num_heads, num_points: of attention in both encoder and decoder; fusion and text have half the heads.
      encoder_layers, encoder_ffn_dim, decoder_layers, decoder_ffn_dim: of the transformers.
      num_queries: proposals that are refined.
      scaled_logits: whether similarities are scaled and biased, as in MM-Grounding-DINO.
      shared_boxes, shared_logits: whether one head serves all decoder layers.
      fusion_drop_path: rate of the fusion's two branches in training.
      remat: whether encoder and decoder layers are computed again in the gradient, which saves memory.
    """

    backbone: SwinConfig = dataclasses.field(default_factory=lambda: swin_t(learned_norms=(1, 2, 3)))
    bert: BertConfig = dataclasses.field(default_factory=BertConfig)
    num_levels: int = 4
    hidden_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    num_queries: int = 900
    scaled_logits: bool = True
    shared_boxes: bool = False
    shared_logits: bool = False
    fusion_drop_path: float = 0.0
    remat: bool = False

    def __post_init__(self) -> None:
        sizes = ("encoder_ffn_dim", "decoder_ffn_dim", "num_queries", "num_heads", "num_points")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 65536]"), hidden_dim="[32, 65536]")
        check_ranges(self, encoder_layers="[1, 1024]", decoder_layers="[1, 1024]")
        check_ranges(self, fusion_drop_path="[0, 1)", num_levels=f"[{max(len(self.stages), 1)}, 8]")
        if self.hidden_dim % GROUPS or self.num_heads % 2 or self.hidden_dim % self.num_heads:
            raise UserError(
                f"hidden_dim {self.hidden_dim} must be a multiple of {GROUPS} and of num_heads, an even one"
            )
        if self.encoder_ffn_dim % self.num_heads:
            raise UserError(f"num_heads {self.num_heads} must divide encoder_ffn_dim {self.encoder_ffn_dim}")
        if not self.stages:
            raise UserError("backbone.learned_norms must name the stages that the detector sees")

    @property
    def stages(self) -> tuple[int, ...]:
        """The backbone's stages (0-based) that the detector sees."""
        return tuple(sorted(self.backbone.learned_norms))

    def level_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(rows, columns) of the maps of an image, fine to coarse."""
        sizes = [(height // (4 * 2**stage), width // (4 * 2**stage)) for stage in self.stages]
        while len(sizes) < self.num_levels:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return sizes


def mm_grounding_dino_t(**changes: Any) -> GroundingDinoConfig:
    """MM-Grounding-DINO with Swin-T, 173 M parameters."""
    return GroundingDinoConfig(**changes)


def mm_grounding_dino_b(**changes: Any) -> GroundingDinoConfig:
    """MM-Grounding-DINO with Swin-B, 233 M parameters."""
    return GroundingDinoConfig(**{"backbone": swin_b(window_size=12, learned_norms=(1, 2, 3))} | changes)


def mm_grounding_dino_l(**changes: Any) -> GroundingDinoConfig:
    """MM-Grounding-DINO with Swin-L and five levels, 343 M parameters: the paper's teacher."""
    sizes: dict[str, Any] = {"backbone": swin_l(), "num_levels": 5}
    return GroundingDinoConfig(**sizes | changes)


# Of Grounding DINO, where it differs from MM-Grounding-DINO.
_PLAIN: dict[str, Any] = {"scaled_logits": False, "shared_boxes": True, "shared_logits": True}


def grounding_dino_t(**changes: Any) -> GroundingDinoConfig:
    """Grounding DINO with Swin-T, 172 M parameters."""
    return mm_grounding_dino_t(**_PLAIN | changes)


def grounding_dino_b(**changes: Any) -> GroundingDinoConfig:
    """Grounding DINO with Swin-B, 232 M parameters."""
    return mm_grounding_dino_b(**_PLAIN | changes)


GROUNDING_DINO: dict[str, Callable[..., GroundingDinoConfig]] = {
    make.__name__: make
    for make in (mm_grounding_dino_t, mm_grounding_dino_b, mm_grounding_dino_l, grounding_dino_t, grounding_dino_b)
}
