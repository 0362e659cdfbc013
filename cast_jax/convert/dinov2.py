"""DINOv2's keys: the official release (with Depth-Anything-V2 and UniMatch-V2, which embed it) and Hugging Face.

Sources: the key tables of Hugging Face's ``convert_dinov2_to_hf.py`` (official: ``blocks.0.attn.qkv.weight``,
``blocks.0.ls1.gamma``, ...) and the files that ``Dinov2Model.save_pretrained`` writes, which keep the names of
version 4 (``attention.attention.query``) although the modules of version 5 have others (``attention.q_proj``).
"""

from __future__ import annotations

from collections.abc import Iterable

from cast_jax.convert.engine import Rule, affine, ignore

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


def hugging_face(keys: Iterable[str]) -> bool:
    """Whether the file has Hugging Face's names rather than the official release's."""
    return any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in keys)


def register_tokens(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of registers in the file: 0 or 4 in what is published."""
    found = [shape[-2] for key, shape in shapes.items() if key.endswith("register_tokens") and len(shape) >= 2]
    return found[0] if found else 0


def positions(hugging_face: bool, registers: int) -> dict[str, float | bool]:
    """How the release resizes its position embedding (design/porting.md), as fields of ``DinoV2Config``.

    The official code scales by (n + 0.1) / grid, Hugging Face by size; with registers both by size, antialiased.
    """
    return {
        "position_offset": 0.0 if hugging_face or registers else 0.1,
        "position_antialias": registers > 0,
    }
