"""A fused teacher small enough for tests, with a vocabulary of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cast_jax.models.hiera import HieraConfig
from cast_jax.models.swin import SwinConfig
from cast_jax.models.teacher.bert import BertConfig
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig
from cast_jax.models.teacher.sam2 import Sam2Config
from cast_jax.models.teacher.sam2_mask_decoder import Sam2MaskDecoderConfig

DETECTOR = GroundingDinoConfig(
    backbone=SwinConfig(
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4, learned_norms=(1, 2, 3)
    ),
    bert=BertConfig(vocab_size=1100, hidden_dim=16, num_layers=1, num_heads=2, ffn_dim=16, max_positions=64),
    hidden_dim=32,
    num_heads=2,
    num_points=2,
    encoder_layers=1,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_ffn_dim=32,
    num_queries=12,
)
SEGMENTER = Sam2Config(
    encoder=HieraConfig(
        embed_dim=8, depths=(1, 1, 2, 1), window_sizes=(4, 4, 4, 4), global_blocks=(3,), normalised_maps=False
    ),
    features=32,
    mask_hidden=8,
    mask_decoder=Sam2MaskDecoderConfig(num_heads=2, ffn_dim=16, iou_hidden_dim=16, num_layers=1),
    prompts_per_block=4,
)
WORDS = ("car", "person", "rider", "truck", "bus", "train", "motorcycle", "bicycle", "traffic", "light")


def write_vocabulary(folder: Path) -> Path:
    """A vocab.txt in which the special tokens have BERT's numbers."""
    lines = [f"[unused{number}]" for number in range(1100)]
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for number, token in special.items():
        lines[number] = token
    for number, word in enumerate(WORDS):
        lines[1040 + number] = word
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    return folder


def spec(folder: Path, **changes: Any) -> dict[str, Any]:
    """How a configuration describes it; ``folder`` holds the vocabulary."""
    return {
        "name": "grounded_sam2_t",
        "detector": dataclasses.asdict(DETECTOR),
        "segmenter": dataclasses.asdict(SEGMENTER),
        "segmenter_size": (64, 96),
        "num_queries": 6,
        "tokenizer": str(write_vocabulary(folder)),
        **changes,
    }
