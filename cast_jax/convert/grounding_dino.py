"""Grounding DINO and MM-Grounding-DINO: what their files say, and Hugging Face's modules for comparison.

The rules are in ``grounding_dino_rules``. mmdetection counts the first stage's heads as one more layer's and the
projections that halve a map for themselves, and orders a patch merging's channels as ``torch.nn.Unfold`` does;
``prepared`` mends that.
"""

from __future__ import annotations

import dataclasses
import re
import unittest.mock
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cast_jax.convert import swin
from cast_jax.convert.engine import Rule
from cast_jax.convert.grounding_dino_rules import FIRST_STAGE, HUGGING_FACE, MMDETECTION
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.teacher.bert import EPSILON as BERT_EPSILON
from cast_jax.models.teacher.grounding_dino import IMAGE_TEMPERATURE, GroundingDino
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig
from cast_jax.models.teacher.grounding_dino_layers import EPSILON
from cast_jax.models.teacher.text import MAX_TOKENS, Tokens, tokens_of

# Largest absolute error in float32 (design/porting.md), by the first part of a result's name.
TOLERANCES = {"text": 5e-5, "encoder": 1e-4, "logits": 5e-5, "boxes": 1e-5, "queries": 1e-4}
PATCHES = (6, 9)  # of the compared images: not square, and with more positions than there are queries
WORDS = (101, 1000, 1001, 1012, 1002, 1012, 1003, 1004, 1005, 1012, 102)  # three phrases, in any vocabulary


class Stages(GroundingDino):
    """The detector, returning all that is compared, at positions that are given."""

    def __call__(  # type: ignore[override]
        self,
        images: Float[Array, "batch height width 3"],
        pixel_mask: Bool[Array, "batch height width"],
        tokens: Tokens,
        indices: Int[Array, "batch queries"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> dict[str, Array]:
        del rngs
        return self.intermediates(images, self.encode_text(tokens), pixel_mask=pixel_mask, indices=indices)


def module(config: GroundingDinoConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The network, whose call on ``inputs`` returns all intermediate results."""
    return Stages(config, rngs=rngs)


def rules(config: GroundingDinoConfig) -> tuple[Rule, ...]:
    """Of every published layout."""
    del config
    return (*HUGGING_FACE, *MMDETECTION)


def prepared(checkpoint: Checkpoint, config: GroundingDinoConfig) -> Checkpoint:
    """mmdetection's indices and channels as the rules want them; other files as they are."""
    if layout(checkpoint.shapes, config) == "hugging_face":
        return checkpoint
    projections, layers = (
        len({match[1] for key in checkpoint.shapes if (match := re.match(pattern, key))})
        for pattern in (r"neck\.convs\.(\d+)\.", r"decoder\.layers\.(\d+)\.")
    )

    def renamed(key: str) -> str:
        key = re.sub(r"neck\.extra_convs\.(\d+)", lambda match: f"neck.convs.{projections + int(match[1])}", key)
        return re.sub(rf"(bbox_head\.(?:cls|reg)_branches)\.{layers}\.", rf"\1.{FIRST_STAGE}.", key)

    keys = {renamed(key): key for key in checkpoint.shapes}

    def read(name: str) -> np.ndarray:
        array = checkpoint.read(keys[name])
        return _column_by_column(array) if re.match(r"backbone\.stages\.\d\.downsample\.", name) else array

    return dataclasses.replace(
        checkpoint,
        shapes={name: checkpoint.shapes[key] for name, key in keys.items()},
        dtypes={name: checkpoint.dtypes[key] for name, key in keys.items()},
        read=read,
    )


def _column_by_column(array: np.ndarray) -> np.ndarray:
    """A patch merging's last axis, from (channel, row, column) to (column, row, channel)."""
    return array.reshape(*array.shape[:-1], -1, 2, 2).swapaxes(-1, -3).reshape(array.shape)


def found(shapes: Mapping[str, tuple[int, ...]], config: GroundingDinoConfig) -> dict[str, Any]:
    """Whether one head serves all decoder layers; the flags in a ``config.json`` are not to be trusted there."""
    del config

    def shared(pattern: str) -> bool | None:
        heads = {match[1] for key in shapes if (match := re.match(pattern, key))}
        return len(heads) == 1 if heads else None

    flags = {
        "shared_boxes": shared(r"(?:bbox_embed|bbox_head\.reg_branches)\.(\d+)\."),
        "shared_logits": shared(r"(?:class_embed|bbox_head\.cls_branches)\.(\d+)\."),
    }
    return {name: value for name, value in flags.items() if value is not None}


def facts(given: Mapping[str, Any], config: GroundingDinoConfig) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults."""
    text, backbone = given.get("text_config") or {}, given.get("backbone_config") or {}
    kind = "mm-grounding-dino" if config.scaled_logits else "grounding-dino"
    ours: dict[str, tuple[Any, Any]] = {  # Hugging Face's default, ours
        "model_type": (kind, kind),
        "encoder_attention_heads": (8, config.num_heads),
        "decoder_attention_heads": (8, config.num_heads),
        "encoder_n_points": (4, config.num_points),
        "decoder_n_points": (4, config.num_points),
        "positional_embedding_temperature": (20, IMAGE_TEMPERATURE),
        "position_embedding_type": ("sine", "sine"),
        "activation_function": ("relu", "relu"),
        "layer_norm_eps": (1e-5, EPSILON),
        "max_text_len": (256, MAX_TOKENS),
        "two_stage": (True, True),
        "embedding_init_target": (True, True),
        "two_stage_bbox_embed_share": (False, False),
    }
    differing = {name: (given.get(name, default), value) for name, (default, value) in ours.items()}
    differing |= {f"backbone_config.{name}": pair for name, pair in swin.facts(backbone, config.backbone).items()}
    heads = list(backbone.get("num_heads", [3, 6, 12, 24]))
    return differing | {
        "backbone_config.num_heads": (heads, list(config.backbone.num_heads)),
        "text_config.num_attention_heads": (text.get("num_attention_heads", 12), config.bert.num_heads),
        "text_config.hidden_act": (text.get("hidden_act", "gelu"), "gelu"),
        "text_config.layer_norm_eps": (text.get("layer_norm_eps", 1e-12), BERT_EPSILON),
    }


def layout(keys: Iterable[str], config: GroundingDinoConfig) -> str:
    """``hugging_face`` or ``mmdetection``."""
    del config
    return "hugging_face" if any(key.startswith("model.backbone.conv_encoder.") for key in keys) else "mmdetection"


def width(config: GroundingDinoConfig) -> int:
    """Channels of the backbone's first map."""
    return config.backbone.embed_dim


def comparable(config: GroundingDinoConfig) -> GroundingDinoConfig:
    """As it is."""
    return config


def inputs(config: GroundingDinoConfig, patches: tuple[int, int] | None) -> tuple[Any, ...]:
    """Two images, one of them padded; a prompt for both; positions at random, in any order."""
    random = np.random.default_rng(0)
    height, width = (side * config.backbone.patch_size for side in patches or PATCHES)
    pixel_mask = np.ones((2, height, width), bool)
    pixel_mask[1, height * 3 // 4 :] = pixel_mask[1, :, width * 4 // 5 :] = False
    images = random.normal(size=(2, height, width, 3)).astype(np.float32)
    positions = sum(rows * columns for rows, columns in config.level_sizes(height, width))
    indices = np.stack([random.permutation(positions)[: config.num_queries] for _ in images])
    return images, pixel_mask, tokens_of(np.array([WORDS])), indices


def reference(config: GroundingDinoConfig) -> Any:
    """Hugging Face's PyTorch module."""
    import transformers

    bert = transformers.BertConfig(
        vocab_size=config.bert.vocab_size,
        hidden_size=config.bert.hidden_dim,
        num_hidden_layers=config.bert.num_layers,
        num_attention_heads=config.bert.num_heads,
        intermediate_size=config.bert.ffn_dim,
        max_position_embeddings=config.bert.max_positions,
    )
    sizes: dict[str, Any] = {
        "backbone_config": transformers.SwinConfig(**swin.sizes(config.backbone)),
        "text_config": bert,
        "num_feature_levels": config.num_levels,
        "d_model": config.hidden_dim,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_n_points": config.num_points,
        "decoder_n_points": config.num_points,
        "encoder_layers": config.encoder_layers,
        "encoder_ffn_dim": config.encoder_ffn_dim,
        "decoder_layers": config.decoder_layers,
        "decoder_ffn_dim": config.decoder_ffn_dim,
        "num_queries": config.num_queries,
        "decoder_bbox_embed_share": config.shared_boxes,
    }
    if not config.scaled_logits:
        return transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig(**sizes))
    described = transformers.MMGroundingDinoConfig(**sizes, decoder_cls_embed_share=config.shared_logits)
    return transformers.MMGroundingDinoForObjectDetection(described)


def reference_stages(model: Any, config: GroundingDinoConfig, inputs: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """What :class:`Stages` returns. Hugging Face's model is made to choose the given positions.

    The first stage's class logits are those that the choice is made by, not those that Hugging Face computes for its
    loss from the text before the encoder.
    """
    import torch

    del config
    images, pixel_mask, tokens, indices = inputs
    indices = torch.from_numpy(indices)
    everywhere = lambda array: torch.from_numpy(np.broadcast_to(array, (len(images), *array.shape[1:])).copy())
    ids, mask = everywhere(tokens.ids).long(), everywhere(tokens.mask)
    with unittest.mock.patch("torch.topk", lambda values, k, dim: (values.gather(dim, indices), indices)):
        results = model.model(
            pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2),
            input_ids=ids,
            attention_mask=mask.long(),
            pixel_mask=torch.from_numpy(pixel_mask).long(),
            output_hidden_states=True,
            return_dict=True,
        )
    image, text = results.encoder_vision_hidden_states, results.encoder_text_hidden_states
    stages = {"text": text[0]}
    for number in range(1, len(image)):
        stages |= {f"encoder/{number - 1}/image": image[number], f"encoder/{number - 1}/text": text[number]}
    first_stage = results.enc_outputs_class[..., : ids.shape[1]]  # what follows is padding
    stages |= {
        "logits/positions": first_stage.max(-1)[0],
        "logits/proposals": first_stage.gather(1, indices[..., None].expand(-1, -1, ids.shape[1])),
        "boxes/proposals": results.init_reference_points,
    }
    queries = results.intermediate_hidden_states.unbind(1)
    starts = (results.init_reference_points, *results.intermediate_reference_points.unbind(1))
    logits, boxes = [], []
    for number, (features, start) in enumerate(zip(queries, starts, strict=False)):
        logits.append(model.class_embed[number](features, text[-1], mask)[..., : ids.shape[1]])
        boxes.append((model.bbox_embed[number](features) + torch.special.logit(start, eps=EPSILON)).sigmoid())
    stages |= {"logits/layers": torch.stack(logits), "boxes/layers": torch.stack(boxes), "queries": queries[-1]}
    return {name: value.numpy() for name, value in stages.items()}
