"""Swin's keys: Hugging Face's in three forms, Microsoft's official release and its object detection.

Sources: the key table of Hugging Face's ``convert_swin_timm_to_pytorch.py`` and the modules of Microsoft's
``swin_transformer.py`` (``layers.0.blocks.0.attn.qkv.weight``; for detection with ``norm0`` to ``norm3`` and below
``backbone.``); the files that ``SwinModel``, ``SwinForImageClassification`` and ``SwinBackbone`` write. Those keep the
names of version 4 (``attention.self.query``; the backbone's without ``swin.``), although the modules of version 5 have
others (``attention.q_proj``).

Classifiers end with one norm, which is not a map's; it is ignored, as are the masks and indices that are functions of
the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cast_jax.convert.engine import Rule, affine, ignore, place
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.swin import EPSILON, PATCH, SwinConfig

_OFFICIAL = r"(?:backbone\.)?"
_HUGGING_FACE = r"(?:\w+\.)?"
_BLOCK = rf"{_OFFICIAL}layers\.(\d)\.blocks\.(\d+)"
_LAYER = rf"{_HUGGING_FACE}encoder\.layers\.(\d)\.blocks\.(\d+)"
_OURS = r"encoder/stages/\1/\2"

OFFICIAL: tuple[Rule, ...] = (
    *affine(rf"{_OFFICIAL}patch_embed\.proj", "encoder/patch_embedding", "convolution"),
    *affine(rf"{_OFFICIAL}patch_embed\.norm", "encoder/embedding_norm", "same", "scale"),
    *affine(rf"{_BLOCK}\.norm([12])", rf"{_OURS}/norm\3", "same", "scale"),
    Rule(rf"{_BLOCK}\.attn\.relative_position_bias_table", f"{_OURS}/attention/position_bias"),
    Rule(
        rf"{_BLOCK}\.attn\.qkv\.weight",
        tuple(f"{_OURS}/attention/{name}/kernel" for name in ("query", "key", "value")),
        "linear",
    ),
    Rule(rf"{_BLOCK}\.attn\.qkv\.bias", tuple(f"{_OURS}/attention/{name}/bias" for name in ("query", "key", "value"))),
    *affine(rf"{_BLOCK}\.attn\.proj", f"{_OURS}/attention/out", "linear"),
    *affine(rf"{_BLOCK}\.mlp\.(fc[12])", rf"{_OURS}/\3", "linear"),
    Rule(rf"{_OFFICIAL}layers\.(\d)\.downsample\.reduction\.weight", r"encoder/merging/\1/reduction/kernel", "linear"),
    *affine(rf"{_OFFICIAL}layers\.(\d)\.downsample\.norm", r"encoder/merging/\1/norm", "same", "scale"),
    *affine(rf"{_OFFICIAL}norm([0-3])", r"encoder/output_norms/\1", "same", "scale"),
    *ignore(rf"{_BLOCK}\.(attn_mask|attn\.relative_position_index)", r"norm\.(weight|bias)"),
)

HUGGING_FACE: tuple[Rule, ...] = (
    *affine(rf"{_HUGGING_FACE}embeddings\.patch_embeddings\.projection", "encoder/patch_embedding", "convolution"),
    *affine(rf"{_HUGGING_FACE}embeddings\.norm", "encoder/embedding_norm", "same", "scale"),
    *affine(rf"{_LAYER}\.layernorm_before", f"{_OURS}/norm1", "same", "scale"),
    *affine(rf"{_LAYER}\.layernorm_after", f"{_OURS}/norm2", "same", "scale"),
    Rule(
        rf"{_LAYER}\.attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
        f"{_OURS}/attention/position_bias",
    ),
    *affine(rf"{_LAYER}\.attention\.self\.(query|key|value)", rf"{_OURS}/attention/\3", "linear"),
    *affine(rf"{_LAYER}\.attention\.output\.dense", f"{_OURS}/attention/out", "linear"),
    *(
        rule
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
        for rule in affine(rf"{_LAYER}\.attention\.{theirs}_proj", f"{_OURS}/attention/{ours}", "linear")
    ),
    *affine(rf"{_LAYER}\.(?:intermediate\.dense|mlp\.fc1)", f"{_OURS}/fc1", "linear"),
    *affine(rf"{_LAYER}\.(?:output\.dense|mlp\.fc2)", f"{_OURS}/fc2", "linear"),
    Rule(
        rf"{_HUGGING_FACE}encoder\.layers\.(\d)\.downsample\.reduction\.weight",
        r"encoder/merging/\1/reduction/kernel",
        "linear",
    ),
    *affine(rf"{_HUGGING_FACE}encoder\.layers\.(\d)\.downsample\.norm", r"encoder/merging/\1/norm", "same", "scale"),
    *(
        rule
        for stage in range(4)
        for rule in affine(
            rf"{_HUGGING_FACE}hidden_states_norms\.stage{stage + 1}", f"encoder/output_norms/{stage}", "same", "scale"
        )
    ),
    *ignore(
        rf"{_LAYER}\.attention\.(self|relative_position_bias)\.relative_position_index",
        rf"{_HUGGING_FACE}layernorm\.(weight|bias)",
        rf"{_HUGGING_FACE}embeddings\.mask_token",
    ),
)

RULES: tuple[Rule, ...] = (*OFFICIAL, *HUGGING_FACE)

# What else such files hold: classification, masked image modelling, detection.
HEADS: tuple[Rule, ...] = ignore(r"(head|classifier|decoder|neck|rpn_head|roi_head)\..*")


def prepared(checkpoint: Checkpoint) -> Checkpoint:
    """The file as it is."""
    return checkpoint


def found(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The window's side, of which a bias table has (2 side - 1)^2 rows, and the stages with a norm of their own."""
    origins = place(shapes, RULES).origins
    tables = [shapes[of[0].key] for target, of in origins.items() if target.endswith("/position_bias")]
    if not tables or len(tables[0]) != 2:
        return {}
    return {
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        "learned_norms": tuple(stage for stage in range(4) if f"encoder/output_norms/{stage}/scale" in origins),
    }


def facts(given: Mapping[str, Any], config: SwinConfig) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults."""
    del config
    given = given.get("backbone_config") or given
    return {
        "hidden_act": (given.get("hidden_act", "gelu"), "gelu"),
        "layer_norm_eps": (given.get("layer_norm_eps", 1e-5), EPSILON),
    }


def layout(keys: Iterable[str]) -> str:
    """``hugging_face`` or ``official``."""
    return "hugging_face" if any("patch_embeddings.projection" in key for key in keys) else "official"


def sizes(config: SwinConfig) -> dict[str, Any]:
    """The arguments of Hugging Face's configuration."""
    stages = [f"stage{stage + 1}" for stage in sorted(config.learned_norms)]
    return {
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size,
        **({"out_features": stages} if stages else {}),
    }


def reference(config: SwinConfig) -> Any:
    """Hugging Face's PyTorch module: the one that normalises its maps, if any of them has a norm of its own."""
    import transformers

    described = transformers.SwinConfig(**sizes(config))
    if config.learned_norms:
        return transformers.SwinBackbone(described)
    return transformers.SwinModel(described, add_pooling_layer=False)


def reference_stages(model: Any, images: Any) -> dict[str, np.ndarray]:
    """The embedded patches, every block's result and every stage's map, through its norm if it has one.

    ``always_partition`` as in ``SwinBackbone.forward``: the windows stay whole and move, however small the map is.
    """
    import torch

    norms = model.hidden_states_norms if hasattr(model, "hidden_states_norms") else {}
    model = getattr(model, "swin", model)
    size = (images.shape[2] // PATCH, images.shape[3] // PATCH)
    nhwc = lambda tokens: tokens.reshape(len(images), *size, -1).numpy()
    features, _ = model.embeddings(images)
    stages, number = {"embedding": nhwc(features)}, 0
    for stage, layer in enumerate(model.encoder.layers):
        for block in layer.blocks:
            features = block(features, size, always_partition=True)[0]
            stages[f"blocks/{number}"] = nhwc(features)
            number += 1
        name, width = f"stage{stage + 1}", features.shape[-1:]
        normed = norms[name](features) if name in norms else torch.nn.functional.layer_norm(features, width)
        stages[f"maps/{stage}"] = nhwc(normed)
        if layer.downsample is not None:
            features, size = layer.downsample(features, size), (size[0] // 2, size[1] // 2)
    return stages
