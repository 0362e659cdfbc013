"""The detector's keys: Hugging Face's (Grounding DINO and MM-Grounding-DINO) and mmdetection's (MM-Grounding-DINO).

Sources: the files that ``MMGroundingDinoForObjectDetection`` and ``GroundingDinoForObjectDetection`` write; the modules
of mmdetection 3.3 (``grounding_dino.py``, ``grounding_dino_layers.py``, ``vlfuse_helper.py``, ``swin.py``) and the key
table of Hugging Face's ``convert_mm_grounding_dino_to_hf.py``.

Hugging Face's files hold the heads of all decoder layers, or the first alone if it serves all; the decoder's copies of
them are ignored. Of mmdetection's, the names are those that ``grounding_dino.prepared`` gives; the embedding of its
denoising queries, which only its training uses, is ignored.
"""

from __future__ import annotations

import dataclasses

from cast_jax.convert import swin
from cast_jax.convert.engine import Rule, affine, ignore

_QKV = ("query", "key", "value")
FIRST_STAGE = "first_stage"  # what ``prepared`` calls the index of the heads of mmdetection's first stage


def _linear(source: str, target: str, **names: str) -> tuple[Rule, ...]:
    """Linear layers below ``source``, our names to theirs."""
    pairs = ((rf"{source}\.{theirs}", f"{target}/{ours}") for ours, theirs in names.items())
    return tuple(rule for pair in pairs for rule in affine(*pair, "linear"))


def _norms(source: str, target: str, **names: str) -> tuple[Rule, ...]:
    """Normalisations below ``source``, our names to theirs."""
    pairs = ((rf"{source}\.{theirs}", f"{target}/{ours}") for ours, theirs in names.items())
    return tuple(rule for pair in pairs for rule in affine(*pair, "same", "scale"))


def _bert(source: str) -> tuple[Rule, ...]:
    layer, ours = rf"{source}\.encoder\.layer\.(\d+)", r"bert/blocks/\1"
    tables = {"word": "tokens", "position": "positions", "token_type": "segments"}
    return (
        *(Rule(rf"{source}\.embeddings\.{a}_embeddings\.weight", f"bert/{b}/embedding") for a, b in tables.items()),
        *_norms(source, "bert", embedding_norm=r"embeddings\.LayerNorm"),
        *_linear(rf"{layer}\.attention\.self", ours, query="query", key="key", value="value"),
        *_linear(layer, ours, out=r"attention\.output\.dense", fc1=r"intermediate\.dense", fc2=r"output\.dense"),
        *_norms(layer, ours, attention_norm=r"attention\.output\.LayerNorm", output_norm=r"output\.LayerNorm"),
        *ignore(rf"{source}\.embeddings\.position_ids"),
    )


def _deformable(source: str, target: str) -> tuple[Rule, ...]:
    names = {"offsets": "sampling_offsets", "weights": "attention_weights", "value": "value_proj", "out": "output_proj"}
    return _linear(source, target, **names)


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    """Hugging Face's."""
    return _linear(source, target, query="query", key="key", value="value", out="out_proj")


def _joint_attention(source: str, target: str) -> tuple[Rule, ...]:
    """``torch.nn.MultiheadAttention``: queries, keys and values are one matrix."""
    return (
        Rule(rf"{source}\.attn\.in_proj_weight", tuple(f"{target}/{name}/kernel" for name in _QKV), "linear"),
        Rule(rf"{source}\.attn\.in_proj_bias", tuple(f"{target}/{name}/bias" for name in _QKV)),
        *_linear(rf"{source}\.attn", target, out="out_proj"),
    )


def _fusion(source: str, target: str, image: str, text: str) -> tuple[Rule, ...]:
    """``image`` and ``text`` are their names for the two."""
    return (
        *_linear(rf"{source}\.attn", target, image_query=f"{image}_proj", text_key=f"{text}_proj"),
        *_linear(rf"{source}\.attn", target, image_value=f"values_{image}_proj", text_value=f"values_{text}_proj"),
        *_linear(rf"{source}\.attn", target, image_out=f"out_{image}_proj", text_out=f"out_{text}_proj"),
        *_norms(source, target, image_norm=f"layer_norm_{image}", text_norm=f"layer_norm_{text}"),
    )


def _perceptron(source: str, target: str) -> tuple[Rule, ...]:
    """mmdetection's: a sequence of three linear layers with ReLUs between them."""
    return _linear(source, f"{target}/layers", **{"0": "0", "1": "2", "2": "4"})


def _swin_of_hugging_face(source: str) -> tuple[Rule, ...]:
    def moved(rule: Rule) -> Rule:
        targets = tuple(target.replace("encoder/", "backbone/", 1) for target in rule.targets)
        return dataclasses.replace(rule, source=source + rule.source, target=targets)

    return tuple(map(moved, swin.HUGGING_FACE))


_LAYER, _OURS = r"model\.encoder\.layers\.(\d+)", r"encoder/\1"
_DECODER, _OUR_DECODER = r"model\.decoder\.layers\.(\d+)", r"decoder/layers/\1"

HUGGING_FACE: tuple[Rule, ...] = (
    *_swin_of_hugging_face(r"model\.backbone\.conv_encoder\.model\."),
    *_bert(r"model\.text_backbone"),
    *affine(r"model\.text_projection", "text_projection", "linear"),
    *affine(r"model\.input_proj_vision\.(\d+)\.0", r"input_projections/\1/convolution", "convolution"),
    *affine(r"model\.input_proj_vision\.(\d+)\.1", r"input_projections/\1/norm", "same", "scale"),
    Rule(r"model\.level_embed", "level_embedding"),
    *_fusion(rf"{_LAYER}\.fusion_layer", f"{_OURS}/fusion", "vision", "text"),
    Rule(rf"{_LAYER}\.fusion_layer\.vision_param", f"{_OURS}/fusion/image_scale/gamma"),
    Rule(rf"{_LAYER}\.fusion_layer\.text_param", f"{_OURS}/fusion/text_scale/gamma"),
    *_attention(rf"{_LAYER}\.text_enhancer_layer\.self_attn", f"{_OURS}/text_attention"),
    *_norms(rf"{_LAYER}\.text_enhancer_layer", _OURS, text_norm="layer_norm_before"),
    *_linear(rf"{_LAYER}\.text_enhancer_layer", f"{_OURS}/text_ffn", fc1="fc1", fc2="fc2"),
    *_norms(rf"{_LAYER}\.text_enhancer_layer", f"{_OURS}/text_ffn", norm="layer_norm_after"),
    *_deformable(rf"{_LAYER}\.deformable_layer\.self_attn", f"{_OURS}/image_attention"),
    *_norms(rf"{_LAYER}\.deformable_layer", _OURS, image_norm="self_attn_layer_norm"),
    *_linear(rf"{_LAYER}\.deformable_layer", f"{_OURS}/image_ffn", fc1="fc1", fc2="fc2"),
    *_norms(rf"{_LAYER}\.deformable_layer", f"{_OURS}/image_ffn", norm="final_layer_norm"),
    *_linear("model", "selection", linear="enc_output"),
    *_norms("model", "selection", norm="enc_output_norm"),
    *affine(r"model\.encoder_output_bbox_embed\.layers\.(\d)", r"selection/box_head/layers/\1", "linear"),
    Rule(r"model\.encoder_output_class_embed\.bias", "selection/class_head/bias"),
    Rule(r"model\.query_position_embeddings\.weight", "decoder/queries"),
    *affine(r"model\.decoder\.reference_points_head\.layers\.(\d)", r"decoder/position_head/layers/\1", "linear"),
    *_attention(rf"{_DECODER}\.self_attn", f"{_OUR_DECODER}/self_attention"),
    *_attention(rf"{_DECODER}\.encoder_attn_text", f"{_OUR_DECODER}/text_attention"),
    *_deformable(rf"{_DECODER}\.encoder_attn", f"{_OUR_DECODER}/image_attention"),
    *_norms(_DECODER, _OUR_DECODER, self_norm="self_attn_layer_norm", text_norm="encoder_attn_text_layer_norm"),
    *_norms(_DECODER, _OUR_DECODER, image_norm="encoder_attn_layer_norm"),
    *_linear(_DECODER, f"{_OUR_DECODER}/ffn", fc1="fc1", fc2="fc2"),
    *_norms(_DECODER, f"{_OUR_DECODER}/ffn", norm="final_layer_norm"),
    *_norms(r"model\.decoder", "decoder", norm="layer_norm"),
    *affine(r"bbox_embed\.(\d+)\.layers\.(\d)", r"decoder/box_heads/\1/layers/\2", "linear"),
    Rule(r"class_embed\.(\d+)\.bias", r"decoder/class_heads/\1/bias"),
    *ignore(r"model\.decoder\.(bbox|class)_embed\..*"),
)

_STAGE, _OUR_STAGE = r"backbone\.stages\.(\d)", r"backbone/stages/\1"
_BLOCK, _OUR_BLOCK = rf"{_STAGE}\.blocks\.(\d+)", rf"{_OUR_STAGE}/\2"
_FUSIONS = r"encoder\.fusion_layers\.(\d+)"

MMDETECTION: tuple[Rule, ...] = (
    *affine(r"backbone\.patch_embed\.projection", "backbone/patch_embedding", "convolution"),
    *affine(r"backbone\.patch_embed\.norm", "backbone/embedding_norm", "same", "scale"),
    *_norms(_BLOCK, _OUR_BLOCK, norm1="norm1", norm2="norm2"),
    Rule(rf"{_BLOCK}\.attn\.w_msa\.relative_position_bias_table", f"{_OUR_BLOCK}/attention/position_bias"),
    Rule(rf"{_BLOCK}\.attn\.w_msa\.qkv\.weight", tuple(f"{_OUR_BLOCK}/attention/{n}/kernel" for n in _QKV), "linear"),
    Rule(rf"{_BLOCK}\.attn\.w_msa\.qkv\.bias", tuple(f"{_OUR_BLOCK}/attention/{name}/bias" for name in _QKV)),
    *_linear(rf"{_BLOCK}\.attn\.w_msa", f"{_OUR_BLOCK}/attention", out="proj"),
    *_linear(rf"{_BLOCK}\.ffn\.layers", _OUR_BLOCK, fc1=r"0\.0", fc2="1"),
    Rule(rf"{_STAGE}\.downsample\.reduction\.weight", r"backbone/merging/\1/reduction/kernel", "linear"),
    *affine(rf"{_STAGE}\.downsample\.norm", r"backbone/merging/\1/norm", "same", "scale"),
    *affine(r"backbone\.norm([0-3])", r"backbone/output_norms/\1", "same", "scale"),
    *_bert(r"language_model\.language_backbone\.body\.model"),
    *affine("text_feat_map", "text_projection", "linear"),
    *affine(r"neck\.convs\.(\d+)\.conv", r"input_projections/\1/convolution", "convolution"),
    *affine(r"neck\.convs\.(\d+)\.gn", r"input_projections/\1/norm", "same", "scale"),
    Rule("level_embed", "level_embedding"),
    *_fusion(_FUSIONS, r"encoder/\1/fusion", "v", "l"),
    Rule(rf"{_FUSIONS}\.gamma_v", r"encoder/\1/fusion/image_scale/gamma"),
    Rule(rf"{_FUSIONS}\.gamma_l", r"encoder/\1/fusion/text_scale/gamma"),
    *_joint_attention(r"encoder\.text_layers\.(\d+)\.self_attn", r"encoder/\1/text_attention"),
    *_norms(r"encoder\.text_layers\.(\d+)\.norms", r"encoder/\1", text_norm="0"),
    *_linear(r"encoder\.text_layers\.(\d+)\.ffn\.layers", r"encoder/\1/text_ffn", fc1=r"0\.0", fc2="1"),
    *_norms(r"encoder\.text_layers\.(\d+)\.norms", r"encoder/\1/text_ffn", norm="1"),
    *_deformable(r"encoder\.layers\.(\d+)\.self_attn", r"encoder/\1/image_attention"),
    *_norms(r"encoder\.layers\.(\d+)\.norms", r"encoder/\1", image_norm="0"),
    *_linear(r"encoder\.layers\.(\d+)\.ffn\.layers", r"encoder/\1/image_ffn", fc1=r"0\.0", fc2="1"),
    *_norms(r"encoder\.layers\.(\d+)\.norms", r"encoder/\1/image_ffn", norm="1"),
    *affine("memory_trans_fc", "selection/linear", "linear"),
    *affine("memory_trans_norm", "selection/norm", "same", "scale"),
    Rule(r"query_embedding\.weight", "decoder/queries"),
    *affine(r"decoder\.ref_point_head\.layers\.(\d)", r"decoder/position_head/layers/\1", "linear"),
    *_joint_attention(r"decoder\.layers\.(\d+)\.self_attn", f"{_OUR_DECODER}/self_attention"),
    *_joint_attention(r"decoder\.layers\.(\d+)\.cross_attn_text", f"{_OUR_DECODER}/text_attention"),
    *_deformable(r"decoder\.layers\.(\d+)\.cross_attn", f"{_OUR_DECODER}/image_attention"),
    *_norms(r"decoder\.layers\.(\d+)\.norms", _OUR_DECODER, self_norm="0", text_norm="1", image_norm="2"),
    *_linear(r"decoder\.layers\.(\d+)\.ffn\.layers", f"{_OUR_DECODER}/ffn", fc1=r"0\.0", fc2="1"),
    *_norms(r"decoder\.layers\.(\d+)\.norms", f"{_OUR_DECODER}/ffn", norm="3"),
    *_norms("decoder", "decoder", norm="norm"),
    *_perceptron(r"bbox_head\.reg_branches\.(\d+)", r"decoder/box_heads/\1"),
    *_perceptron(rf"bbox_head\.reg_branches\.{FIRST_STAGE}", "selection/box_head"),
    Rule(r"bbox_head\.cls_branches\.(\d+)\.bias", r"decoder/class_heads/\1/bias", "unbatched"),
    Rule(rf"bbox_head\.cls_branches\.{FIRST_STAGE}\.bias", "selection/class_head/bias", "unbatched"),
    *ignore(rf"{_BLOCK}\.attn\.w_msa\.relative_position_index", r"dn_query_generator\.label_embedding\.weight"),
)
