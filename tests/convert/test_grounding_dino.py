"""The detector through files on disk: every published layout computes what PyTorch does, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import resource
import time

import jax
import numpy as np
import pytest
import torch
from published import in_stacks, layers_of, save_torch, scaled

from cast_jax.convert import command
from cast_jax.convert.command import main
from cast_jax.convert.engine import converted, place, plan
from cast_jax.convert.grounding_dino import (
    TOLERANCES,
    facts,
    found,
    inputs,
    layout,
    module,
    prepared,
    reference,
    reference_stages,
    rules,
)
from cast_jax.convert.models import MODELS, described_config, family_of, known_model
from cast_jax.convert.sources import open_checkpoint
from cast_jax.convert.verify import _reference
from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.export import load_weights
from cast_jax.models.functional import Functional, count_parameters
from cast_jax.models.hiera import HieraConfig
from cast_jax.models.swin import SwinConfig
from cast_jax.models.teacher import chunks
from cast_jax.models.teacher.bert import BertConfig
from cast_jax.models.teacher.grounding_dino_config import (
    GROUNDING_DINO,
    GroundingDinoConfig,
    grounding_dino_b,
    grounding_dino_t,
    mm_grounding_dino_b,
    mm_grounding_dino_l,
    mm_grounding_dino_t,
)
from cast_jax.models.teacher.grounding_dino_layers import MASKED_LOGIT
from cast_jax.models.teacher.sam2_mask_decoder import Sam2MaskDecoderConfig
from cast_jax.models.teacher.text import tokens_of

SWIN = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=3, learned_norms=(1, 2, 3))
BERT = BertConfig(vocab_size=1040, hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=24, max_positions=16)
CONFIG = GroundingDinoConfig(
    SWIN, BERT, num_levels=5, hidden_dim=32, num_heads=4, num_points=2, encoder_layers=2, encoder_ffn_dim=48,
    decoder_layers=2, decoder_ffn_dim=40, num_queries=9,
)  # fmt: skip
PLAIN = dataclasses.replace(
    CONFIG, backbone=dataclasses.replace(SWIN, learned_norms=(0, 1, 2, 3)), encoder_layers=1, num_points=4,
    scaled_logits=False, shared_boxes=True, shared_logits=True,
)  # fmt: skip
# Prompts of different lengths, the second with a question mark and words that no mark ends.
TOKENS = tokens_of(
    np.array([[101, 200, 201, 1012, 202, 1012, 102, 0, 0, 0], [101, 300, 1029, 302, 303, 304, 1012, 305, 306, 102]])
)

# mmdetection's modules by Hugging Face's: one for the whole model, or one for each layer "{}".
SWIN_KEYS = "model.backbone.conv_encoder.model"
BERT_KEYS = "language_model.language_backbone.body.model"
ENCODER_KEYS, DECODER_KEYS = "model.encoder.layers.{}", "model.decoder.layers.{}"
MODULES = {
    f"{SWIN_KEYS}.embeddings.patch_embeddings.projection": "backbone.patch_embed.projection",
    f"{SWIN_KEYS}.embeddings.norm": "backbone.patch_embed.norm",
    "model.text_projection": "text_feat_map",
    "model.enc_output": "memory_trans_fc",
    "model.enc_output_norm": "memory_trans_norm",
    "model.decoder.layer_norm": "decoder.norm",
    "model.decoder.reference_points_head.layers.{}": "decoder.ref_point_head.layers.{}",
    f"{ENCODER_KEYS}.fusion_layer.layer_norm_vision": "encoder.fusion_layers.{}.layer_norm_v",
    f"{ENCODER_KEYS}.fusion_layer.layer_norm_text": "encoder.fusion_layers.{}.layer_norm_l",
    **{
        f"{ENCODER_KEYS}.fusion_layer.attn.{part}{theirs}_proj": f"encoder.fusion_layers.{{}}.attn.{part}{ours}_proj"
        for part in ("", "values_", "out_")
        for theirs, ours in (("vision", "v"), ("text", "l"))
    },
    f"{ENCODER_KEYS}.text_enhancer_layer.layer_norm_before": "encoder.text_layers.{}.norms.0",
    f"{ENCODER_KEYS}.text_enhancer_layer.fc1": "encoder.text_layers.{}.ffn.layers.0.0",
    f"{ENCODER_KEYS}.text_enhancer_layer.fc2": "encoder.text_layers.{}.ffn.layers.1",
    f"{ENCODER_KEYS}.text_enhancer_layer.layer_norm_after": "encoder.text_layers.{}.norms.1",
    f"{ENCODER_KEYS}.deformable_layer.self_attn_layer_norm": "encoder.layers.{}.norms.0",
    f"{ENCODER_KEYS}.deformable_layer.fc1": "encoder.layers.{}.ffn.layers.0.0",
    f"{ENCODER_KEYS}.deformable_layer.fc2": "encoder.layers.{}.ffn.layers.1",
    f"{ENCODER_KEYS}.deformable_layer.final_layer_norm": "encoder.layers.{}.norms.1",
    f"{DECODER_KEYS}.self_attn_layer_norm": "decoder.layers.{}.norms.0",
    f"{DECODER_KEYS}.encoder_attn_text_layer_norm": "decoder.layers.{}.norms.1",
    f"{DECODER_KEYS}.encoder_attn_layer_norm": "decoder.layers.{}.norms.2",
    f"{DECODER_KEYS}.fc1": "decoder.layers.{}.ffn.layers.0.0",
    f"{DECODER_KEYS}.fc2": "decoder.layers.{}.ffn.layers.1",
    f"{DECODER_KEYS}.final_layer_norm": "decoder.layers.{}.norms.3",
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in (
            (f"{ENCODER_KEYS}.deformable_layer.self_attn", "encoder.layers.{}.self_attn"),
            (f"{DECODER_KEYS}.encoder_attn", "decoder.layers.{}.cross_attn"),
        )
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    },
}
JOINT_ATTENTION = {
    f"{ENCODER_KEYS}.text_enhancer_layer.self_attn": "encoder.text_layers.{}.self_attn.attn",
    f"{DECODER_KEYS}.self_attn": "decoder.layers.{}.self_attn.attn",
    f"{DECODER_KEYS}.encoder_attn_text": "decoder.layers.{}.cross_attn_text.attn",
}


@functools.cache
def network(config: GroundingDinoConfig) -> Functional:
    return Functional(lambda rngs: module(config, rngs=rngs))


def hugging_face(config: GroundingDinoConfig = CONFIG) -> torch.nn.Module:
    """A tiny model in which no tensor is zero or constant."""
    return scaled(reference(config))


def convert(source, config: GroundingDinoConfig = CONFIG):
    """The parameters by name, and the configuration with what the file decides."""
    checkpoint = prepared(open_checkpoint(source), config)
    config = dataclasses.replace(config, **found(checkpoint.shapes, config))
    wanted = layers_of(network(config).abstract())
    origins = plan(checkpoint, rules(config), wanted, "detector")
    if checkpoint.config:
        assert all(theirs == ours for theirs, ours in facts(checkpoint.config, config).values())
    return dict(zip(origins, converted(checkpoint, origins), strict=True)), config


def compare(converted_file, theirs: torch.nn.Module, given) -> dict[str, float]:
    """The largest error of every stage, and the share of positions that both would have chosen themselves."""
    arrays, config = converted_file
    model = network(config)
    with torch.no_grad():
        expected = reference_stages(theirs, config, given)
    computed = jax.jit(model.apply)(in_stacks(arrays, model.abstract()), *given)
    assert computed.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        assert computed[name].shape == value.shape
        padding = np.isneginf(value)
        assert np.all(np.asarray(computed[name])[padding] == MASKED_LOGIT)
        errors[name] = float(np.abs(np.asarray(computed[name]) - value)[~padding].max())
    assert max(errors.values()) > 0  # two computations
    best = lambda scores: np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, : config.num_queries]
    chosen = zip(best(computed["logits/positions"]), best(expected["logits/positions"]), strict=True)
    agreement = np.mean([len(np.intersect1d(*both)) / config.num_queries for both in chosen])
    return errors | {"agreement": float(agreement)}


def check(converted_file, theirs: torch.nn.Module, given, agreement: float = 1.0) -> dict[str, float]:
    errors = compare(converted_file, theirs, given)
    for name, error in errors.items():
        if name != "agreement":
            assert error < TOLERANCES[name.partition("/")[0]], (name, error)
    assert errors["agreement"] >= agreement  # ranks of equal scores may swap
    return errors


def same(ours, others) -> bool:
    return ours.keys() == others.keys() and all(np.array_equal(ours[name], others[name]) for name in ours)


def test_mm_grounding_dino(tmp_path, monkeypatch):
    """Padded images that are not square; five levels, of which two are made; a prompt for each image; in chunks."""
    monkeypatch.setattr(chunks, "CHUNK", 100)  # of 512 positions: six of 86, so four too many
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    keys = open_checkpoint(tmp_path).shapes
    assert layout(keys, CONFIG) == "hugging_face"
    assert any("attention.self.query" in key for key in keys)
    assert {"bbox_embed.1.layers.2.weight", "class_embed.1.bias"} <= keys.keys()
    images, pixel_mask, _, indices = inputs(CONFIG, (4, 6))
    check(convert(tmp_path), theirs, (images, pixel_mask, TOKENS, indices))


def test_plain_grounding_dino(tmp_path):
    """One head for all layers, logits neither scaled nor biased, the backbone's finest map; one prompt for all.

    No map has but two positions: a norm over them would divide by their difference, and rounding errors of either
    network could be twenty times as large.
    """
    theirs = hugging_face(PLAIN)
    theirs.save_pretrained(tmp_path)
    keys = open_checkpoint(tmp_path).shapes
    assert "bbox_embed.0.layers.2.weight" in keys
    assert "bbox_embed.1.layers.2.weight" not in keys
    arrays, config = convert(tmp_path, dataclasses.replace(PLAIN, shared_boxes=False))
    assert config == PLAIN
    check((arrays, config), theirs, inputs(PLAIN, (3, 4)))


def test_the_file_decides_what_is_shared(tmp_path):
    """Whatever its config.json says: by Hugging Face's defaults, which published files lack, heads would be shared."""
    hugging_face().save_pretrained(tmp_path / "apart")
    described = tmp_path / "apart" / "config.json"
    described.write_text(
        re.sub(r'"decoder_(bbox|cls)_embed_share": false', r'"decoder_\1_embed_share": true', described.read_text())
    )
    assert convert(tmp_path / "apart", dataclasses.replace(CONFIG, shared_boxes=True, shared_logits=True))[1] == CONFIG
    shared = dataclasses.replace(CONFIG, shared_boxes=True, shared_logits=True)
    hugging_face(shared).save_pretrained(tmp_path / "shared")
    assert convert(tmp_path / "shared")[1] == shared


def mmdetection(folder) -> dict[str, torch.Tensor]:
    """The keys of mmdetection's modules for a tiny model, which is also written to ``folder`` by Hugging Face."""
    hugging_face().save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    left = {key: torch.from_numpy(np.array(checkpoint.read(key))) for key in checkpoint.shapes}
    weights: dict[str, torch.Tensor] = {}

    def move(theirs: str, ours: str) -> None:
        for member in ("weight", "bias"):
            if f"{theirs}.{member}" in left:
                weights[f"{ours}.{member}"] = left.pop(f"{theirs}.{member}")

    def join(theirs: str, names: tuple[str, ...], ours: str, mark: str) -> None:
        for member in ("weight", "bias"):
            weights[f"{ours}{mark}{member}"] = torch.cat([left.pop(f"{theirs}.{name}.{member}") for name in names])

    for theirs, ours in MODULES.items():
        for layer in range(2):
            move(theirs.format(layer), ours.format(layer))
    for theirs, ours in JOINT_ATTENTION.items():
        for layer in range(2):
            join(theirs.format(layer), ("query", "key", "value"), ours.format(layer), ".in_proj_")
            move(f"{theirs}.out_proj".format(layer), f"{ours}.out_proj".format(layer))
    for layer in range(2):
        for theirs, ours in (("vision_param", "gamma_v"), ("text_param", "gamma_l")):
            fusion = f"{ENCODER_KEYS}.fusion_layer.{theirs}".format(layer)
            weights[f"encoder.fusion_layers.{layer}.{ours}"] = left.pop(fusion)
    for stage, depth in enumerate(SWIN.depths):
        theirs, ours = f"{SWIN_KEYS}.encoder.layers.{stage}", f"backbone.stages.{stage}"
        for block in (f"blocks.{number}" for number in range(depth)):
            move(f"{theirs}.{block}.layernorm_before", f"{ours}.{block}.norm1")
            move(f"{theirs}.{block}.layernorm_after", f"{ours}.{block}.norm2")
            attention, w_msa = f"{theirs}.{block}.attention", f"{ours}.{block}.attn.w_msa"
            join(f"{attention}.self", ("query", "key", "value"), w_msa, ".qkv.")
            move(f"{attention}.output.dense", f"{w_msa}.proj")
            table = "relative_position_bias_table"
            weights[f"{w_msa}.{table}"] = left.pop(f"{attention}.self.{table}")
            weights[f"{w_msa}.relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
            move(f"{theirs}.{block}.intermediate.dense", f"{ours}.{block}.ffn.layers.0.0")
            move(f"{theirs}.{block}.output.dense", f"{ours}.{block}.ffn.layers.1")
        for member in ("norm.weight", "norm.bias", "reduction.weight") if stage < 3 else ():
            merging = left.pop(f"{theirs}.downsample.{member}")
            weights[f"{ours}.downsample.{member}"] = merging[..., unfold_order(merging.shape[-1] // 4)]
        move(f"{SWIN_KEYS}.hidden_states_norms.stage{stage + 1}", f"backbone.norm{stage}")
    for level in range(5):
        ours = f"neck.convs.{level}" if level < 3 else f"neck.extra_convs.{level - 3}"
        move(f"model.input_proj_vision.{level}.0", f"{ours}.conv")
        move(f"model.input_proj_vision.{level}.1", f"{ours}.gn")
    for head, (boxes, logits) in enumerate(
        [*((f"bbox_embed.{layer}", f"class_embed.{layer}") for layer in range(2)),
         ("model.encoder_output_bbox_embed", "model.encoder_output_class_embed")]
    ):  # fmt: skip
        weights[f"bbox_head.cls_branches.{head}.bias"] = left.pop(f"{logits}.bias").reshape(1)
        for layer in range(3):  # a sequence with ReLUs in between
            move(f"{boxes}.layers.{layer}", f"bbox_head.reg_branches.{head}.{2 * layer}")
    weights["level_embed"] = left.pop("model.level_embed")
    weights["query_embedding.weight"] = left.pop("model.query_position_embeddings.weight")
    for key in [key for key in left if key.startswith("model.text_backbone.")]:
        weights[key.replace("model.text_backbone", BERT_KEYS)] = left.pop(key)
    assert left.keys() == {f"{SWIN_KEYS}.swin.layernorm.weight", f"{SWIN_KEYS}.swin.layernorm.bias"}
    weights["dn_query_generator.label_embedding.weight"] = torch.zeros(256, 32)
    return weights


def unfold_order(channels: int) -> torch.Tensor:
    """The place in Hugging Face's patch merging of each channel of ``torch.nn.Unfold``, found by running both."""
    patch = torch.arange(channels * 4.0).reshape(1, channels, 2, 2)
    unfolded = torch.nn.functional.unfold(patch, 2, stride=2).flatten().tolist()
    corners = [patch[:, :, row, column] for column in (0, 1) for row in (0, 1)]
    place_of = {value: place for place, value in enumerate(torch.cat(corners, dim=1).flatten().tolist())}
    return torch.tensor([place_of[value] for value in unfolded])


def test_mmdetection(tmp_path):
    """Joint matrices, moved indices, another order of channels: the same weights as of Hugging Face's file."""
    weights = mmdetection(tmp_path / "saved")
    source = save_torch(tmp_path / "x.pth", {"meta": {"epoch": 1}, "state_dict": weights})
    assert layout(open_checkpoint(source).shapes, CONFIG) == "mmdetection"
    arrays, config = convert(source)
    assert config == CONFIG
    assert same(arrays, convert(tmp_path / "saved")[0])


# What --config must say so that MODEL has these sizes.
def as_changes(config: GroundingDinoConfig) -> dict:
    return {
        key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for key, value in vars(config).items()
    }


CHANGES = as_changes(CONFIG)
FLAGS = [
    f"--config={part}.{name}={json.dumps(value)}"
    if isinstance(values, dict)
    else f"--config={part}={json.dumps(value)}"
    for part, values in CHANGES.items()
    for name, value in (values.items() if isinstance(values, dict) else [("", values)])
]


def test_the_command(tmp_path, capsys):
    """Both layouts by the model's name, each held against PyTorch stage by stage; the second in half precision."""
    weights = mmdetection(tmp_path / "saved")
    main(["mm_grounding_dino_l", str(tmp_path / "saved"), str(tmp_path / "one"), "--verify", *FLAGS])
    assert "all 11 stages agree with PyTorch's" in capsys.readouterr().out
    source = save_torch(tmp_path / "x.pth", {"state_dict": {key: value.half() for key, value in weights.items()}})
    main(["mm_grounding_dino_l", str(source), str(tmp_path / "other"), "--verify", *FLAGS])
    printed = capsys.readouterr().out
    assert "all 11 stages agree with PyTorch's" in printed
    assert "1 of dn_query_generator" in printed
    one, other = (load_weights(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert (one[1]["converted"]["keys"], other[1]["converted"]["keys"]) == ("hugging_face", "mmdetection")
    assert described_config(other[1]) == CONFIG
    for (name, array), (again, rounded) in zip(*(named_leaves(file[0]).items() for file in (one, other)), strict=True):
        assert name == again
        np.testing.assert_allclose(array, rounded, rtol=2**-10, atol=2**-24)


def test_shared_heads_without_a_description(tmp_path):
    """A file alone fills Hugging Face's module tensor by tensor: one head has several names there."""
    theirs = hugging_face(PLAIN)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    filled = _reference(PLAIN, tmp_path / "model.safetensors").state_dict()
    unused = f"{SWIN_KEYS}.swin.layernorm"
    wrong = [key for key, value in theirs.state_dict().items() if not torch.equal(filled[key], value)]
    assert [key for key in wrong if not key.startswith(unused)] == []


def test_detector_and_sam2_are_told_apart(tmp_path, monkeypatch):
    """Each given for the other, in every published layout of the detector."""
    sam2 = dataclasses.replace(
        MODELS["sam2_image_t"](),
        encoder=HieraConfig(
            embed_dim=8, depths=(1, 1, 2, 1), window_sizes=(4, 4, 4, 4), global_blocks=(3,), normalised_maps=False
        ),
        features=16,
        mask_decoder=Sam2MaskDecoderConfig(num_heads=2, ffn_dim=24, iou_hidden_dim=12),
    )  # fmt: skip
    monkeypatch.setattr("cast_jax.convert.models.MODELS", {"detector": lambda: CONFIG, "sam2": lambda: sam2})
    source = save_torch(tmp_path / "x.pth", {"state_dict": mmdetection(tmp_path / "detector")})
    for given in (tmp_path / "detector", source):
        with pytest.raises(UserError, match="by its shapes this is a detector; you asked for sam2"):
            command.convert("sam2", given, tmp_path / "out")
    family_of(sam2).reference(sam2).save_pretrained(tmp_path / "sam2")
    with pytest.raises(UserError, match="by its shapes this is a sam2; you asked for detector") as caught:
        command.convert("detector", tmp_path / "sam2", tmp_path / "out")
    assert "its config.json says model_type 'sam2'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_published_models_are_known():
    assert {name for name in MODELS if "dino_" in name} == set(GROUNDING_DINO)
    assert all(known_model(name) == make() for name, make in GROUNDING_DINO.items())
    with pytest.raises(UserError, match="mm_grounding_dino_l"):
        known_model("grounding_dino_l")


def test_other_weights_are_refused(tmp_path):
    """A file without the detector's keys, and one that lacks some of them."""
    weights = mmdetection(tmp_path / "saved")
    with pytest.raises(UserError, match=r"missing +backbone/embedding_norm/bias"):
        convert(save_torch(tmp_path / "sam.pt", {"model": {"sam_mask_decoder.iou_token.weight": torch.zeros(1, 8)}}))
    del weights["encoder.fusion_layers.1.gamma_l"]
    with pytest.raises(UserError, match=r"missing +encoder/1/fusion/text_scale/gamma"):
        convert(save_torch(tmp_path / "x.pth", weights))


def test_configurations_are_held_against_ours():
    assert all(theirs == ours for theirs, ours in facts({}, mm_grounding_dino_t()).values())
    described = reference(dataclasses.replace(PLAIN, num_heads=8, num_points=3)).config.to_dict()
    differing = {name for name, (theirs, ours) in facts(described, CONFIG).items() if theirs != ours}
    assert differing == {
        "model_type", "encoder_attention_heads", "decoder_attention_heads", "encoder_n_points", "decoder_n_points",
    }  # fmt: skip


def test_the_reference_has_the_parameters():
    """By the names of version 5, which are another set than the file's."""
    placement = place(reference(CONFIG).state_dict(), rules(CONFIG))
    assert placement.unmatched == []
    assert placement.origins.keys() == layers_of(network(CONFIG).abstract()).keys()


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (mm_grounding_dino_l, 343_055_703),  # design/porting.md
        pytest.param(mm_grounding_dino_t, 172_971_264, marks=pytest.mark.full),
        pytest.param(mm_grounding_dino_b, 233_209_344, marks=pytest.mark.full),
        pytest.param(grounding_dino_t, 172_249_090, marks=pytest.mark.full),
        pytest.param(grounding_dino_b, 232_488_000, marks=pytest.mark.full),
    ],
)
def test_full_size_parameters(make, count):
    """As many as PyTorch's, but for the backbone's last norm, which is unused there."""
    config = make()
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in reference(config).parameters())
    params = network(config).abstract()
    unused = 2 * config.backbone.map_widths[-1]
    assert (theirs, count_parameters(params)) == (count, count - unused)
    if make is mm_grounding_dino_l:
        decoder = {name: part for name, part in params["decoder"].items() if name not in ("queries", "box_heads")}
        parts = {"backbone": 195_204_276 - unused, "bert": 108_891_648, "encoder": 22_053_696,
                 "input_projections": 4_280_064, "text_projection": 196_864}  # fmt: skip
        assert {name: count_parameters(params[name]) for name in parts} == parts
        assert count_parameters(decoder) == 11_202_886
        assert count_parameters([params["decoder"]["box_heads"], params["selection"]["box_head"]]) == 928_284
        assert count_parameters(params["decoder"]["queries"]) == 230_400


@pytest.mark.full
def test_full_size(tmp_path):
    """The paper's detector, through a file on disk: ``-m full -s`` prints its errors, time and memory."""
    started = time.monotonic()
    config = mm_grounding_dino_l()
    theirs = hugging_face(config)
    theirs.save_pretrained(tmp_path)
    images, pixel_mask, tokens, indices = inputs(config, (12, 12))
    given = images[:1], pixel_mask[:1], tokens, indices[:1]
    errors = check(convert(tmp_path, config), theirs, given, agreement=0.99)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nmm_grounding_dino_l, 384 x 384: {time.monotonic() - started:.0f} s, {memory:.1f} GiB")
    for name, error in errors.items():
        print(f"| {name} | {error:.1e} |")
