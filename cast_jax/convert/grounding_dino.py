"""Grounding DINO and MM-Grounding-DINO: what their files say, and Hugging Face's modules for comparison.

The rules are in ``grounding_dino_rules``. mmdetection counts the first stage's heads as one more layer's and the
projections that halve a map for themselves, and orders a patch merging's channels as ``torch.nn.Unfold`` does;
``prepared`` mends that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cast_jax.convert import swin
from cast_jax.convert.engine import Rule
from cast_jax.convert.grounding_dino_rules import FIRST_STAGE, HUGGING_FACE, MMDETECTION
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.teacher.bert import EPSILON as BERT_EPSILON
from cast_jax.models.teacher.grounding_dino import IMAGE_TEMPERATURE
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig
from cast_jax.models.teacher.grounding_dino_layers import EPSILON
from cast_jax.models.teacher.text import MAX_TOKENS, Tokens, tokens_of

RULES: tuple[Rule, ...] = (*HUGGING_FACE, *MMDETECTION)

# The files hold nothing else.
HEADS: tuple[Rule, ...] = ()

# Largest absolute errors of the stages in float32, by the beginning of their names (design/porting.md).
TOLERANCES = {"text": 5e-5, "encoder": 1e-4, "proposals/class_logits": 5e-5, "proposals/boxes": 1e-5,
              "decoder/class_logits": 5e-5, "decoder/boxes": 1e-5, "queries": 1e-4}  # fmt: skip

# Three phrases, in rows that every vocabulary with the marks has.
PROMPT: Tokens = tokens_of(np.array([[101, 1000, 1001, 1012, 1002, 1012, 1003, 1004, 1005, 1012, 102]]))


def prepared(checkpoint: Checkpoint) -> Checkpoint:
    """mmdetection's indices and channels as the rules want them; other files as they are."""
    if layout(checkpoint.shapes) == "hugging_face":
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


def found(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Whether one head serves all decoder layers; the flags in a ``config.json`` are not to be trusted there."""

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


def layout(keys: Iterable[str]) -> str:
    """``hugging_face`` or ``mmdetection``."""
    return "hugging_face" if any(key.startswith("model.backbone.conv_encoder.") for key in keys) else "mmdetection"


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
        "backbone_config": swin.reference(config.backbone).config,
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


def reference_stages(
    model: Any, images: Any, tokens: Tokens = PROMPT, pixel_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """PyTorch's results by the names of ``GroundingDino.intermediates``; the choice of positions is among them.

    The first stage's class logits are those of the chosen positions and of the encoded text, which the choice is made
    by, not the ones that Hugging Face computes for its loss.
    """
    import torch

    broadcast = lambda array: torch.from_numpy(np.broadcast_to(array, (len(images), *array.shape[1:])).copy())
    ids, mask = broadcast(np.asarray(tokens.ids)).long(), broadcast(np.asarray(tokens.mask))
    results = model.model(
        pixel_values=images,
        input_ids=ids,
        attention_mask=mask.long(),
        pixel_mask=None if pixel_mask is None else torch.from_numpy(pixel_mask).long(),
        output_hidden_states=True,
        return_dict=True,
    )
    indices = torch.topk(results.enc_outputs_class.max(-1)[0], model.config.num_queries, dim=1)[1]
    length = ids.shape[1]
    chosen = torch.gather(
        results.enc_outputs_class, 1, indices[..., None].expand(-1, -1, results.enc_outputs_class.shape[-1])
    )
    image, text = results.encoder_vision_hidden_states, results.encoder_text_hidden_states
    stages = {"text": text[0]}
    for number in range(1, len(image)):
        stages[f"encoder/{number - 1}/image"], stages[f"encoder/{number - 1}/text"] = image[number], text[number]
    stages |= {
        "proposals/indices": indices,
        "proposals/class_logits": chosen[..., :length],
        "proposals/boxes": results.init_reference_points,
    }
    queries = results.intermediate_hidden_states
    boxes = torch.cat([results.init_reference_points[:, None], results.intermediate_reference_points[:, :-1]], dim=1)
    logits, predicted = [], []
    for number in range(queries.shape[1]):
        logits.append(model.class_embed[number](queries[:, number], text[-1], mask)[..., :length])
        corrections = model.bbox_embed[number](queries[:, number])
        predicted.append((corrections + torch.special.logit(boxes[:, number], eps=EPSILON)).sigmoid())
    stages |= {"decoder/class_logits": torch.stack(logits), "decoder/boxes": torch.stack(predicted)}
    return {name: value.numpy() for name, value in (stages | {"queries": queries[:, -1]}).items()}
