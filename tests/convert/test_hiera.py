"""SAM 2's image encoder through files on disk: every published layout computes what PyTorch does, stage by stage."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
import transformers
from published import randomised, save_torch
from safetensors.torch import load_file

from cast_jax.convert.command import convert
from cast_jax.convert.hiera import facts, layout, reference, reference_stages
from cast_jax.convert.sources import open_checkpoint
from cast_jax.convert.verify import verify
from cast_jax.core.errors import UserError
from cast_jax.models.functional import Functional, count_parameters
from cast_jax.models.hiera import Hiera, HieraConfig, sam2_b_plus, sam2_l, sam2_s, sam2_t

# Windows of 6 do not fit the maps of 96 x 160 pixels: there is padding, in a block that halves too.
CHANGES = {
    "encoder": {
        "embed_dim": 8, "num_heads": 2, "depths": [1, 2, 3, 2], "window_sizes": [4, 6, 8, 3], "global_blocks": [4, 7],
        "position_size": [3, 4],
    }
}  # fmt: skip
CONFIG = HieraConfig(
    **{name: tuple(value) if isinstance(value, list) else value for name, value in CHANGES["encoder"].items()}
)
TRUNK = "vision_encoder.backbone."


def sam2(memory: bool = False) -> torch.nn.Module:
    """All of a tiny SAM 2, in which no tensor is zero or constant."""
    vision = transformers.Sam2VisionConfig(
        backbone_config=reference(CONFIG).config.to_dict(), backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16
    )
    small = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16}
    parts = {
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": 16, "mask_input_channels": 16},
        "mask_decoder_config": {**small, "iou_head_hidden_dim": 16, "num_hidden_layers": 1},
    }
    if not memory:
        return randomised(transformers.Sam2Model(transformers.Sam2Config(**parts)))
    memory_sizes = {
        f"memory_{name}": 16
        for name in ("attention_hidden_size", "attention_feed_forward_hidden_size", "encoder_hidden_size",
                     "encoder_output_channels", "fuser_embed_dim", "fuser_intermediate_dim")
    }  # fmt: skip
    return randomised(transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**parts, **memory_sizes)))


def official(trunk: dict[str, torch.Tensor], prefix: str = "image_encoder.trunk.") -> dict[str, torch.Tensor]:
    """The keys of the official ``hieradet.py``, and some of its file's other networks."""
    names = (
        (r"patch_embed\.projection", "patch_embed.proj"),
        (r"layer_norm([12])", r"norm\1"),
        (r"mlp\.proj_in", "mlp.layers.0"),
        (r"mlp\.proj_out", "mlp.layers.1"),
    )
    weights = {}
    for key, tensor in trunk.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        weights[prefix + key] = tensor
    if prefix:
        others = ("image_encoder.neck.convs.0.conv.weight", "sam_mask_decoder.iou_token.weight", "maskmem_tpos_enc",
                  "memory_attention.layers.0.norm1.weight", "memory_encoder.mask_downsampler.encoder.0.weight",
                  "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "no_mem_embed", "no_obj_ptr",
                  "obj_ptr_proj.layers.0.weight", "obj_ptr_tpos_proj.weight", "mask_downsample.weight",
                  "no_mem_pos_enc", "no_obj_embed_spatial")  # fmt: skip
        weights |= {key: torch.zeros(2) for key in others}
    return weights


def trunk_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key.removeprefix(TRUNK): tensor for key, tensor in model.state_dict().items() if key.startswith(TRUNK)}


def check(source, destination) -> dict[str, torch.Tensor]:
    """Converts, verifies every stage and gives back what was written."""
    config = convert("sam2_s", source, destination, CHANGES)
    assert config.encoder == CONFIG
    stages = verify(config, source, destination / "model.safetensors")
    names = (
        "embedding blocks/0 maps/0 blocks/1 blocks/2 maps/1 blocks/3 blocks/4 blocks/5 maps/2 blocks/6 blocks/7 maps/3"
    )
    assert [stage.name.removeprefix("encoder/") for stage in stages] == names.split()
    assert [stage for stage in stages if not stage.passed] == []
    assert max(stage.relative for stage in stages) < 1e-5
    assert min(stage.absolute for stage in stages) > 0  # two computations
    return load_file(destination / "model.safetensors")


def same(ours, others) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def test_every_layout(tmp_path):
    """Hugging Face's whole model, its trunk alone and the official release's names make the same weights."""
    model = sam2()
    model.save_pretrained(tmp_path / "whole")
    assert layout(open_checkpoint(tmp_path / "whole").shapes) == "hugging_face"
    expected = check(tmp_path / "whole", tmp_path / "1")
    model.vision_encoder.backbone.save_pretrained(tmp_path / "trunk")
    assert same(check(tmp_path / "trunk", tmp_path / "2"), expected)
    weights = official(trunk_of(model))
    assert {"image_encoder.trunk.pos_embed_window", "image_encoder.trunk.blocks.3.proj.bias"} <= weights.keys()
    source = save_torch(tmp_path / "x.pt", {"model": weights})
    assert layout(open_checkpoint(source).shapes) == "official"
    assert same(check(source, tmp_path / "3"), expected)


def test_the_video_model(tmp_path):
    """Its memory is ignored by name."""
    model = sam2(memory=True)
    model.save_pretrained(tmp_path / "video")
    convert("sam2_s", tmp_path / "video", tmp_path / "out", CHANGES)
    save_torch(tmp_path / "x.pth", official(trunk_of(model)))
    convert("sam2_s", tmp_path / "x.pth", tmp_path / "again", CHANGES)
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")))


def test_the_reference_computes_as_hugging_face():
    model = randomised(reference(CONFIG))
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        ours = reference_stages(model, images)
        for block, theirs in zip((0, 2, 5, 7), model(images).intermediate_hidden_states, strict=True):
            np.testing.assert_allclose(ours[f"blocks/{block}"], theirs, atol=1e-5)


def test_a_tiny_model_is_recognised(tmp_path):
    """Tiny and small are equally wide; the blocks tell them apart."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in reference(sam2_t()).state_dict().items()}
    weights = official({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()})
    with pytest.raises(UserError, match="by its shapes this is a sam2_t; you asked for sam2_s"):
        convert("sam2_s", save_torch(tmp_path / "x.pth", weights), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configurations_are_held_against_ours(tmp_path):
    assert all(theirs == ours for theirs, ours in facts({}, sam2_t()).values())
    assert facts({"global_attention_blocks": []}, sam2_t())["global_attention_blocks"] == ([], [5, 7, 9])
    sam2().save_pretrained(tmp_path / "whole")
    changes = {"encoder": {**CHANGES["encoder"], "global_blocks": [4]}}
    with pytest.raises(UserError, match=r"global_attention_blocks is \[4, 7\], not \[4\]"):
        convert("sam2_s", tmp_path / "whole", tmp_path / "out", changes)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (sam2_s, 33_947_328),
        pytest.param(sam2_l, 212_149_296, marks=pytest.mark.full),  # design/porting.md; also in test_sam2.py
        pytest.param(sam2_t, 26_849_472, marks=pytest.mark.full),
        pytest.param(sam2_b_plus, 68_675_712, marks=pytest.mark.full),
    ],
)
def test_full_size_parameters(make, count):
    config = dataclasses.replace(make(), remat="blocks")
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in reference(config).parameters())
    ours = count_parameters(Functional(lambda rngs: Hiera(config, rngs=rngs)).abstract())
    assert (ours, theirs) == (count, count)
