"""SAM 2's image encoder: the official release's keys and Hugging Face's.

Sources: the modules of the official ``hieradet.py``, whose keys are below ``image_encoder.trunk.`` of the file's
``model``; Hugging Face's ``modeling_sam2.py``, where the trunk is ``vision_encoder.backbone``. SAM 2 and 2.1 are alike
here. The pyramid, the prompt encoder, the mask decoder and the memory are other networks; their keys are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cast_jax.convert.engine import Rule, affine, ignore
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.hiera import EPSILON, MLP_RATIO, PATCH, HieraConfig

_TRUNK = r"(?:(?:image_encoder\.)?trunk\.|(?:vision_encoder\.)?backbone\.)?"
_BLOCK = rf"{_TRUNK}blocks\.(\d+)"
_OURS = r"encoder/blocks/\1"
_QKV = ("query", "key", "value")

RULES: tuple[Rule, ...] = (
    *affine(rf"{_TRUNK}patch_embed\.proj(?:ection)?", "encoder/patch_embedding", "convolution"),
    Rule(rf"{_TRUNK}pos_embed", "encoder/position", "map"),
    Rule(rf"{_TRUNK}pos_embed_window", "encoder/window_position", "map"),
    *affine(rf"{_BLOCK}\.(?:layer_)?norm([12])", rf"{_OURS}/norm\2", "same", "scale"),
    Rule(rf"{_BLOCK}\.attn\.qkv\.weight", tuple(f"{_OURS}/{name}/kernel" for name in _QKV), "linear"),
    Rule(rf"{_BLOCK}\.attn\.qkv\.bias", tuple(f"{_OURS}/{name}/bias" for name in _QKV)),
    *affine(rf"{_BLOCK}\.attn\.proj", f"{_OURS}/out", "linear"),
    *affine(rf"{_BLOCK}\.mlp\.(?:layers\.0|proj_in)", f"{_OURS}/fc1", "linear"),
    *affine(rf"{_BLOCK}\.mlp\.(?:layers\.1|proj_out)", f"{_OURS}/fc2", "linear"),
    *affine(rf"{_BLOCK}\.proj", f"{_OURS}/shortcut", "linear"),
)

# The video model's memory, as the official release and Hugging Face call it.
MEMORY: tuple[Rule, ...] = ignore(
    r"(memory_attention|memory_encoder|mask_downsample|obj_ptr_(tpos_)?proj|object_pointer_proj)\..*",
    r"temporal_positional_encoding_projection_layer\..*",
    r"maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial",
    r"no_memory_positional_encoding|no_object_pointer",
    r"memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter",
)

# The rest of SAM 2.
HEADS: tuple[Rule, ...] = (
    *MEMORY,
    *ignore(
        r"(image_encoder\.|vision_encoder\.)?neck\..*",
        r"(sam_)?(prompt_encoder|mask_decoder)\..*",
        r"shared_image_embedding\..*|no_mem_embed|no_memory_embedding",
    ),
)


def prepared(checkpoint: Checkpoint) -> Checkpoint:
    """The file as it is."""
    return checkpoint


def found(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Nothing: the sizes are the name's."""
    del shapes
    return {}


def facts(given: Mapping[str, Any], config: HieraConfig) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults, which are the tiny model's."""
    for part in ("vision_config", "backbone_config"):
        given = given.get(part) or given
    heads = [config.num_heads * 2**stage for stage in range(config.depth)]
    ours: dict[str, tuple[Any, Any]] = {  # Hugging Face's default, ours
        "window_size_per_stage": ([8, 4, 14, 7], list(config.window_sizes)),
        "global_attention_blocks": ([5, 7, 9], list(config.global_blocks)),
        "num_attention_heads_per_stage": ([1, 2, 4, 8], heads),
        "patch_stride": ([PATCH] * 2, [PATCH] * 2),
        "patch_padding": ([3, 3], [3, 3]),
        "query_stride": ([2, 2], [2, 2]),
        "num_query_pool_stages": (3, 3),
        "hidden_act": ("gelu", "gelu"),
        "layer_norm_eps": (1e-6, EPSILON),
    }
    stated = {name: value for name, value in given.items() if value is not None}
    return {name: (stated.get(name, default), value) for name, (default, value) in ours.items()}


def layout(keys: Iterable[str]) -> str:
    """``hugging_face`` or ``official``."""
    return "hugging_face" if any(key.endswith("patch_embed.projection.weight") for key in keys) else "official"


def sizes(config: HieraConfig) -> dict[str, Any]:
    """The arguments of Hugging Face's configuration."""
    return {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "window_positional_embedding_background_size": list(config.position_size),
        "blocks_per_stage": list(config.depths),
        "embed_dim_per_stage": list(config.map_widths),
        "num_attention_heads_per_stage": [config.num_heads * 2**stage for stage in range(config.depth)],
        "window_size_per_stage": list(config.window_sizes),
        "global_attention_blocks": list(config.global_blocks),
        "mlp_ratio": float(MLP_RATIO),
    }


def reference(config: HieraConfig) -> Any:
    """Hugging Face's PyTorch module."""
    import transformers

    return transformers.Sam2HieraDetModel(transformers.Sam2HieraDetConfig(**sizes(config)))


def reference_stages(model: Any, images: Any) -> dict[str, np.ndarray]:
    """The patches with their positions, every block's result and every stage's, normalised over its channels."""
    import torch

    model = getattr(getattr(model, "vision_encoder", model), "backbone", model)
    features = model.patch_embed(images)
    features = features + model._get_pos_embed(features.shape[1:3])
    stages = {"embedding": features.numpy()}
    for number, block in enumerate(model.blocks):
        features = block(features)
        stages[f"blocks/{number}"] = features.numpy()
        if number in model.stage_ends:
            normed = torch.nn.functional.layer_norm(features, features.shape[-1:], eps=EPSILON)
            stages[f"maps/{model.stage_ends.index(number)}"] = normed.numpy()
    return stages
