"""DINOv2's keys: the official release (with Depth-Anything-V2 and UniMatch-V2, which embed it) and Hugging Face.

Sources: the key tables of Hugging Face's ``convert_dinov2_to_hf.py`` (official: ``blocks.0.attn.qkv.weight``,
``blocks.0.ls1.gamma``, ...) and the files that ``Dinov2Model.save_pretrained`` writes, which keep the names of
version 4 (``attention.attention.query``) although the modules of version 5 have others (``attention.q_proj``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cast_jax.convert.engine import Rule, affine, ignore
from cast_jax.convert.sources import Checkpoint
from cast_jax.models.dinov2 import DinoV2Config

_BLOCK = r"(?:\w+\.)?blocks\.(?:\d+\.)?(\d+)"  # training checkpoints group the blocks: blocks.<group>.<number>
_LAYER = r"(?:\w+\.)?encoder\.layer\.(\d+)"
_OURS = r"encoder/blocks/\1"

OFFICIAL: tuple[Rule, ...] = (
    Rule(r"(?:backbone\.|pretrained\.)?cls_token", "encoder/class_token", "unbatched"),
    Rule(r"(?:backbone\.|pretrained\.)?mask_token", "encoder/mask_token"),
    Rule(r"(?:backbone\.|pretrained\.)?register_tokens", "encoder/register_tokens", "unbatched"),
    Rule(r"(?:backbone\.|pretrained\.)?pos_embed", "encoder/position_embedding", "unbatched"),
    *affine(r"(?:backbone\.|pretrained\.)?patch_embed\.proj", "encoder/patch_embedding", "convolution"),
    *affine(r"(?:backbone\.|pretrained\.)?norm", "encoder/norm", "same", "scale"),
    *affine(rf"{_BLOCK}\.norm1", f"{_OURS}/norm1", "same", "scale"),
    *affine(rf"{_BLOCK}\.norm2", f"{_OURS}/norm2", "same", "scale"),
    Rule(rf"{_BLOCK}\.ls([12])\.gamma", rf"{_OURS}/layer_scale\2/gamma"),
    Rule(
        rf"{_BLOCK}\.attn\.qkv\.weight",
        tuple(f"{_OURS}/attention/{name}/kernel" for name in ("query", "key", "value")),
        "linear",
    ),
    Rule(rf"{_BLOCK}\.attn\.qkv\.bias", tuple(f"{_OURS}/attention/{name}/bias" for name in ("query", "key", "value"))),
    *affine(rf"{_BLOCK}\.attn\.proj", f"{_OURS}/attention/out", "linear"),
    *affine(rf"{_BLOCK}\.mlp\.(fc[12])", rf"{_OURS}/mlp/\2", "linear"),
    Rule(rf"{_BLOCK}\.mlp\.w12\.weight", (f"{_OURS}/mlp/gate/kernel", f"{_OURS}/mlp/up/kernel"), "linear"),
    Rule(rf"{_BLOCK}\.mlp\.w12\.bias", (f"{_OURS}/mlp/gate/bias", f"{_OURS}/mlp/up/bias")),
    *affine(rf"{_BLOCK}\.mlp\.w3", f"{_OURS}/mlp/down", "linear"),
)

HUGGING_FACE: tuple[Rule, ...] = (
    Rule(r"(?:\w+\.)?embeddings\.cls_token", "encoder/class_token", "unbatched"),
    Rule(r"(?:\w+\.)?embeddings\.mask_token", "encoder/mask_token"),
    Rule(r"(?:\w+\.)?embeddings\.register_tokens", "encoder/register_tokens", "unbatched"),
    Rule(r"(?:\w+\.)?embeddings\.position_embeddings", "encoder/position_embedding", "unbatched"),
    *affine(r"(?:\w+\.)?embeddings\.patch_embeddings\.projection", "encoder/patch_embedding", "convolution"),
    *affine(r"(?:\w+\.)?layernorm", "encoder/norm", "same", "scale"),
    *affine(rf"{_LAYER}\.norm1", f"{_OURS}/norm1", "same", "scale"),
    *affine(rf"{_LAYER}\.norm2", f"{_OURS}/norm2", "same", "scale"),
    Rule(rf"{_LAYER}\.layer_scale([12])\.lambda1", rf"{_OURS}/layer_scale\2/gamma"),
    *affine(rf"{_LAYER}\.attention\.attention\.(query|key|value)", rf"{_OURS}/attention/\2", "linear"),
    *(
        rule
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
        for rule in affine(rf"{_LAYER}\.attention\.{theirs}_proj", f"{_OURS}/attention/{ours}", "linear")
    ),
    *affine(rf"{_LAYER}\.attention\.output\.dense", f"{_OURS}/attention/out", "linear"),
    *affine(rf"{_LAYER}\.mlp\.(fc[12])", rf"{_OURS}/mlp/\2", "linear"),
    Rule(rf"{_LAYER}\.mlp\.weights_in\.weight", (f"{_OURS}/mlp/gate/kernel", f"{_OURS}/mlp/up/kernel"), "linear"),
    Rule(rf"{_LAYER}\.mlp\.weights_in\.bias", (f"{_OURS}/mlp/gate/bias", f"{_OURS}/mlp/up/bias")),
    *affine(rf"{_LAYER}\.mlp\.weights_out", f"{_OURS}/mlp/down", "linear"),
    *affine(rf"{_LAYER}\.mlp\.(gate|up|down)_proj", rf"{_OURS}/mlp/\2", "linear"),
)

# What else such files hold: pretraining, classification, depth and segmentation heads.
HEADS: tuple[Rule, ...] = ignore(r"(dino_head|ibot_head|depth_head|head|neck|classifier)\..*")

RULES: tuple[Rule, ...] = (*OFFICIAL, *HUGGING_FACE)


def prepared(checkpoint: Checkpoint) -> Checkpoint:
    """The file as it is."""
    return checkpoint


def layout(keys: Iterable[str]) -> str:
    """``hugging_face`` or ``official``."""
    return (
        "hugging_face"
        if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in keys)
        else "official"
    )


def found(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The number of registers and, by the file's origin, how the position embedding is resized (design/porting.md).

    The official code scales by (n + 0.1) / grid, Hugging Face by size; with registers both by size, antialiased.
    """
    tokens = [shape[-2] for key, shape in shapes.items() if key.endswith("register_tokens") and len(shape) >= 2]
    registers = tokens[0] if tokens else 0  # 0 or 4 in what is published
    by_size = layout(shapes) == "hugging_face" or registers
    return {
        "num_register_tokens": registers,
        "position_offset": 0.0 if by_size else 0.1,
        "position_antialias": registers > 0,
    }


def facts(given: Mapping[str, Any], config: DinoV2Config) -> dict[str, tuple[Any, Any]]:
    """What no tensor's shape shows; absent keys are at Hugging Face's defaults."""
    given = given.get("backbone_config") or given
    return {
        "num_attention_heads": (given.get("num_attention_heads", 12), config.num_heads),
        "hidden_act": (given.get("hidden_act", "gelu"), "gelu"),
        "layer_norm_eps": (given.get("layer_norm_eps", 1e-6), 1e-6),
    }


def sizes(config: DinoV2Config) -> dict[str, Any]:
    """The arguments of Hugging Face's configuration."""
    registers = {"num_register_tokens": config.num_register_tokens} if config.num_register_tokens else {}
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "patch_size": config.patch_size,
        "image_size": config.position_grid * config.patch_size,
        "mlp_ratio": int(config.mlp_ratio),
        "use_swiglu_ffn": config.ffn == "swiglu",
        **registers,
    }


def reference(config: DinoV2Config) -> Any:
    """Hugging Face's PyTorch module, which resizes positions by size whatever the file's origin."""
    import transformers

    if config.num_register_tokens:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes(config)))
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes(config)))


def reference_stages(model: Any, images: Any) -> dict[str, np.ndarray]:
    """The tokens before the blocks and, normed, after each."""
    tokens = model.embeddings(images)
    stages = {"embedding": tokens.numpy()}
    for number, layer in enumerate(model.encoder.layer):
        output = layer(tokens)
        tokens = output[0] if isinstance(output, tuple) else output  # transformers 4 returned a tuple
        stages[f"blocks/{number}"] = model.layernorm(tokens).numpy()
    return stages
