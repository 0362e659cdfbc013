"""SAM 2's image model through files on disk: every published layout computes what PyTorch does, from maps to masks."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from published import save_torch
from safetensors.torch import load_file, save_file

from cast_jax.convert.command import convert, main
from cast_jax.convert.engine import place
from cast_jax.convert.models import MODELS, check_facts, described_config, model_config, parameter_shapes
from cast_jax.convert.sam2 import RULES, facts, reference, reference_stages
from cast_jax.convert.sources import open_checkpoint
from cast_jax.convert.verify import verify
from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.export import load_weights
from cast_jax.models.functional import Functional
from cast_jax.models.teacher.sam2 import ImageFeatures, Sam2

# One layer of each kind; windows of 6 do not fit the maps of 96 x 160 pixels.
CHANGES = {
    "encoder": {
        "embed_dim": 8, "num_heads": 1, "depths": [1, 1, 2, 1], "window_sizes": [4, 6, 8, 3], "global_blocks": [3],
        "position_size": [3, 4],
    },
    "features": 16,
    "mask_decoder": {"num_heads": 2, "ffn_dim": 24, "iou_hidden_dim": 12, "stability_threshold": 0.85},
    "prompts_per_block": 2,
}  # fmt: skip
CONFIG = model_config("sam2_image_s", {}, CHANGES)
HEIGHT = WIDTH = 64  # of what Hugging Face's model can do by itself: squares
SIDES = {"stride4": 16, "stride8": 8, "stride16": 4}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """No tensor is zero or constant, not even where training starts from such; norms keep their signal."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        matrix = model.shared_image_embedding.positional_embedding.normal_()
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(matrix)
    return model.eval()


def image_model() -> torch.nn.Module:
    return randomised(reference(CONFIG))


def video_model() -> torch.nn.Module:
    """Its memory included, and the image model's weights."""
    image = reference(CONFIG).config
    sizes = {
        f"memory_{name}": 16
        for name in ("attention_hidden_size", "attention_feed_forward_hidden_size", "encoder_hidden_size",
                     "encoder_output_channels", "fuser_embed_dim", "fuser_intermediate_dim")
    }  # fmt: skip
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    drop = {"model_type"}
    given = {
        part: {key: value for key, value in getattr(image, part).to_dict().items() if key not in drop} for part in parts
    }
    given["vision_config"] = image.vision_config
    model = randomised(transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**given, **sizes)))
    missing, unexpected = model.load_state_dict(image_model().state_dict(), strict=False)
    assert unexpected == []
    assert missing != []
    return model


def official(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official release's keys: what Hugging Face's are called there."""
    names = (
        (r"^vision_encoder\.backbone", "image_encoder.trunk"),
        (r"^vision_encoder\.neck\.convs\.(\d)", r"image_encoder.neck.convs.\1.conv"),
        (r"^no_memory_embedding", "no_mem_embed"),
        (r"^shared_image_embedding\.positional_embedding",
         "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"^(prompt_encoder|mask_decoder)", r"sam_\1"),
        (r"patch_embed\.projection", "patch_embed.proj"),
        (r"mask_embed\.conv1", "mask_downscaling.0"),
        (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
        (r"mask_embed\.conv2", "mask_downscaling.3"),
        (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
        (r"mask_embed\.conv3", "mask_downscaling.6"),
        (r"upscale_conv1", "output_upscaling.0"),
        (r"upscale_layer_norm", "output_upscaling.1"),
        (r"upscale_conv2", "output_upscaling.3"),
        (r"layer_norm_final_attn", "norm_final_attn"),
        (r"layer_norm(\d)", r"norm\1"),
        (r"o_proj", "out_proj"),
        (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
        (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"),
        (r"proj_out", "layers.1"),
        (r"proj_in", "layers.0"),
    )  # fmt: skip
    renamed = {}
    for key, tensor in weights.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    del renamed["sam_prompt_encoder.shared_embedding.positional_embedding"]
    table = renamed.pop("sam_prompt_encoder.point_embed.weight")
    renamed |= {f"sam_prompt_encoder.point_embeddings.{n}.weight": row[None] for n, row in enumerate(table)}
    present = {  # from the official modules
        "image_encoder.trunk.blocks.1.mlp.layers.1.weight", "image_encoder.neck.convs.3.conv.bias", "no_mem_embed",
        "sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight",
        "sam_mask_decoder.transformer.layers.0.mlp.layers.1.bias", "sam_mask_decoder.transformer.norm_final_attn.bias",
        "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight", "sam_mask_decoder.conv_s1.weight",
        "sam_mask_decoder.iou_prediction_head.layers.1.weight", "sam_mask_decoder.pred_obj_score_head.layers.2.bias",
        "sam_mask_decoder.transformer.layers.0.norm4.weight", "sam_mask_decoder.obj_score_token.weight",
        "sam_prompt_encoder.mask_downscaling.6.bias", "sam_prompt_encoder.not_a_point_embed.weight",
    }  # fmt: skip
    assert present <= renamed.keys()
    others = ("maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial", "mask_downsample.weight",
              "memory_attention.layers.0.norm1.weight", "memory_encoder.out_proj.weight", "obj_ptr_tpos_proj.weight",
              "obj_ptr_proj.layers.0.weight")  # fmt: skip
    return renamed | {key: torch.zeros(2) for key in others}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(The folder that Hugging Face writes, the converted weights)."""
    folder = tmp_path_factory.mktemp("sam2")
    image_model().save_pretrained(folder / "source")
    convert("sam2_image_s", folder / "source", folder / "converted", CHANGES)
    return folder / "source", folder / "converted" / "model.safetensors"


def same(one, other) -> bool:
    ours, others = load_file(one), load_file(other)
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def test_every_result_is_pytorch_s(saved):
    source, weights = saved
    config = described_config(load_weights(weights)[1])
    assert config == CONFIG
    stages = verify(config, source, weights)
    maps = ["stride4", "stride8", "stride16"]
    names = [f"encoder/maps/{n}" for n in range(4)] + [f"neck/{name}" for name in maps]
    names += [f"prompts/{name}" for name in ("boxes", "points", "masks")]
    names += [f"{result}/{name}" for name in ("boxes", "all") for result in ("masks", "iou", "object")]
    assert [stage.name for stage in stages] == names
    assert [stage for stage in stages if not stage.passed] == []
    assert max(stage.relative for stage in stages) < 1e-5
    assert min(stage.absolute for stage in stages) > 0  # two computations


def test_the_official_layout_makes_the_same_weights(tmp_path, saved, capsys):
    source = save_torch(tmp_path / "x.pt", {"model": official(image_model().state_dict())})
    flags = [f"--config={key}={json.dumps(value)}" for key, value in CHANGES.items() if not isinstance(value, dict)]
    flags += [
        f"--config={part}.{key}={json.dumps(value)}"
        for part, values in CHANGES.items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    main(["sam2_image_s", str(source), str(tmp_path / "out"), "--verify", *flags])
    ignored = capsys.readouterr().out.split("keys ignored: ")[1].split("\n")[0]
    assert len(ignored.split(", ")) == 9
    assert "1 of memory_attention" in ignored
    assert load_weights(tmp_path / "out/model.safetensors")[1]["converted"]["keys"] == "official"
    assert same(tmp_path / "out/model.safetensors", saved[1])


def test_the_video_model_makes_the_same_weights(tmp_path, saved):
    """Its memory is ignored by name; one of its keys under another name is not."""
    model = video_model()
    model.save_pretrained(tmp_path / "video")
    convert("sam2_image_s", tmp_path / "video", tmp_path / "out", CHANGES)
    assert same(tmp_path / "out/model.safetensors", saved[1])
    weights = dict(model.state_dict()) | {"memory_decoder.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"unexpected +memory_decoder\.weight"):
        convert("sam2_image_s", save_torch(tmp_path / "x.pt", weights), tmp_path / "again", CHANGES)


class Decoder(Sam2):
    """The model from its features on."""

    def __call__(self, features, *, rngs: nnx.Rngs | None = None, **prompts):
        return self.decode(features, **prompts)


DECODER = Functional(lambda rngs: Decoder(CONFIG, rngs=rngs))


def squares(model: torch.nn.Module) -> torch.nn.Module:
    """Tells Hugging Face's model the size of its images."""
    encoder = model.prompt_encoder
    encoder.input_image_size, encoder.image_embedding_size, encoder.mask_input_size = 64, (4, 4), (16, 16)
    return model


def given_features():
    """Two images' features, and as PyTorch wants them, before its own projections."""
    random = np.random.default_rng(1)
    maps = {name: random.normal(size=(2, side, side, 16)).astype(np.float32) for name, side in SIDES.items()}
    return ImageFeatures(**maps), [torch.from_numpy(level).permute(0, 3, 1, 2) for level in maps.values()]


def hugging_face_decodes(model, maps, **prompts):
    """(logits, IoU, object logits) by Hugging Face's whole forward pass."""
    stride4, stride8, stride16 = maps
    decoder = model.mask_decoder
    projected = [decoder.conv_s0(stride4), decoder.conv_s1(stride8), stride16]
    found = model(image_embeddings=projected, **prompts)
    return found.pred_masks, found.iou_scores, found.object_score_logits[..., 0]


def test_masks_are_chosen_as_by_hugging_face(saved):
    """Two images with three boxes each, decoded two at a time; points of every kind; a mask of another size alone."""
    random = np.random.default_rng(2)
    boxes = np.sort(random.uniform(size=(2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype(np.float32) * 64
    points = random.uniform(size=(2, 1, 4, 2)).astype(np.float32) * 64
    labels = np.array([[[1, 0, -1, -10]], [[2, 3, 1, -10]]])
    masks = random.normal(size=(2, 1, 40, 40)).astype(np.float32) * 4
    features, maps = given_features()

    def ours(params):
        decode = lambda **prompts: DECODER.apply(params, features, **prompts)
        return (
            decode(boxes=boxes),
            decode(points=points, labels=labels, boxes=boxes[:, :1], multimask=True),
            decode(masks=masks),
        )

    model, tensor = squares(image_model()), torch.from_numpy
    with torch.no_grad():
        theirs = [
            hugging_face_decodes(model, maps, input_boxes=tensor(boxes), multimask_output=False),
            hugging_face_decodes(
                model, maps, input_points=tensor(points), input_labels=tensor(labels), input_boxes=tensor(boxes[:, :1])
            ),
            hugging_face_decodes(model, maps, input_masks=tensor(masks), multimask_output=False),
        ]
        model.mask_decoder.dynamic_multimask_via_stability = False
        single = hugging_face_decodes(model, maps, input_boxes=tensor(boxes), multimask_output=False)[0]
    replaced = (single != theirs[0][0]).flatten(2).any(dim=2)
    assert replaced.any()
    assert not replaced.all()
    for decoded, expected in zip(jax.jit(ours)(load_weights(saved[1])[0]), theirs, strict=True):
        for value, tolerance in ((decoded.logits, 1e-5), (decoded.iou, 1e-6), (decoded.object_logits, 1e-5)):
            (result, *expected) = expected
            assert result.std() > 1e-3
            np.testing.assert_allclose(value, result, atol=tolerance)


def test_gradients_are_pytorch_s(saved):
    """Of the mask decoder and the prompt encoder, through blocks that are computed again: all masks, all prompts."""
    random = np.random.default_rng(3)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    boxes = np.sort(random.uniform(size=(2, 3, 2, 2)), axis=2).reshape(2, 3, 4).astype(np.float32) * 64
    points, labels = boxes[..., None, :2] + 3, np.array([[[1], [0], [-1]]] * 2)
    masks = np.repeat(4 * draw(2, 1, 16, 16), 3, axis=1)
    # Three masks by boxes and points, the single one by boxes and masks; what each result counts in the loss.
    calls = {
        True: (
            {"boxes": boxes, "points": points, "labels": labels},
            (draw(2, 3, 3, 16, 16), draw(2, 3, 3), draw(2, 3)),
        ),
        False: ({"boxes": boxes, "masks": masks}, (draw(2, 3, 1, 16, 16), draw(2, 3, 1), draw(2, 3))),
    }
    features, maps = given_features()

    def loss(params, features):
        total = 0.0
        for multimask, (prompts, factors) in calls.items():
            found = DECODER.apply(params, features, **prompts, multimask=multimask, train=True)
            results = found.logits, found.iou, found.object_logits
            total += sum((result * factor).sum() for result, factor in zip(results, factors, strict=True))
        return total

    params = load_weights(saved[1])[0]
    value, (ours, our_features) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, features)

    model, maps = squares(image_model()).train(), [level.requires_grad_() for level in maps]
    total = torch.zeros(())
    for multimask, (prompts, factors) in calls.items():
        given = {f"input_{name}": torch.from_numpy(prompt) for name, prompt in prompts.items()}
        if "input_masks" in given:  # there one for all prompts of an image
            given["input_masks"] = given["input_masks"][:, :1]
        found = hugging_face_decodes(model, maps, **given, multimask_output=multimask)
        total = total + sum(
            (result * torch.from_numpy(factor)).sum() for result, factor in zip(found, factors, strict=True)
        )
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-4)
    close = lambda found, expected, name: np.testing.assert_allclose(
        found, expected, atol=2e-5 * max(np.abs(expected).max(), 1.0), err_msg=name
    )
    for name, level in zip(SIDES, maps, strict=True):
        close(getattr(our_features, name), level.grad.permute(0, 2, 3, 1).numpy(), name)
    theirs = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    ours = named_leaves(ours)
    compared = place(theirs, RULES).origins
    for target, origins in compared.items():
        expected = origins[0].convert(theirs[origins[0].key].numpy())
        assert np.abs(expected).max() > 1e-3 or target.endswith("key/bias"), target  # which a softmax does not see
        close(ours[target], expected, target)
    rest = {name for name in ours if name not in compared and name.startswith(("prompt_encoder/", "mask_decoder/"))}
    assert rest == {"prompt_encoder/fourier"}
    assert not np.any(ours["prompt_encoder/fourier"])  # a constant


def test_the_reference_computes_as_hugging_face():
    """Its steps are those of the model's own forward pass, but for squares."""
    from cast_jax.convert.sam2 import inputs

    model = squares(image_model())
    images, boxes, points, labels, masks = inputs(CONFIG, (2, 2))
    model.backbone_feature_sizes = [[16, 16], [8, 8], [4, 4]]
    with torch.no_grad():
        theirs = model(
            pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2), input_boxes=torch.from_numpy(boxes),
            multimask_output=True,
        )  # fmt: skip
        ours = reference_stages(model, CONFIG, (images, boxes, points, labels, masks))
    np.testing.assert_allclose(ours["masks/boxes"][:, :, 1:], theirs.pred_masks, atol=1e-5)
    np.testing.assert_allclose(ours["iou/boxes"][:, :, 1:], theirs.iou_scores, atol=1e-6)
    np.testing.assert_allclose(ours["object/boxes"], theirs.object_score_logits[..., 0], atol=1e-6)
    np.testing.assert_allclose(ours["neck/stride16"], theirs.image_embeddings[2].permute(0, 2, 3, 1), atol=1e-5)


def test_other_models_are_recognised(tmp_path, saved, monkeypatch):
    """Another size, the trunk alone, a detector, and SAM 2 given for something else."""
    other = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, depths=(1, 1, 3, 1)))
    monkeypatch.setattr("cast_jax.convert.models.MODELS", {"small": lambda: CONFIG, "large": lambda: other})
    with pytest.raises(UserError, match="by its shapes this is a small; you asked for large"):
        convert("large", saved[0], tmp_path / "out")
    weights = load_file(saved[0] / "model.safetensors")
    trunk = {key: value for key, value in weights.items() if key.startswith("vision_encoder.backbone.")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    with pytest.raises(UserError, match=r"do not make a small:\n +missing +mask_decoder/(?s:.*)and \d+ more"):
        convert("small", tmp_path / "trunk.safetensors", tmp_path / "out")

    detector = tmp_path / "detector"
    detector.mkdir()
    keys = ("model.backbone.conv_encoder.model.encoder.layers.0.blocks.0.attention.o_proj.weight",
            "model.text_backbone.embeddings.word_embeddings.weight", "model.decoder.bbox_embed.0.layers.0.weight",
            "model.encoder.layers.0.fusion_layer.vision_param")  # fmt: skip
    save_file({key: torch.zeros(8, 8) for key in keys}, detector / "model.safetensors")
    (detector / "config.json").write_text('{"model_type": "mm-grounding-dino"}')
    with pytest.raises(UserError, match=r"do not make a small(?s:.*)model_type 'mm-grounding-dino'") as caught:
        convert("small", detector, tmp_path / "out")
    assert all(key in str(caught.value) for key in keys)
    monkeypatch.setattr("cast_jax.convert.models.MODELS", {"small": lambda: CONFIG, "dinov2_s": MODELS["dinov2_s"]})
    with pytest.raises(UserError, match="by its shapes this is a small; you asked for dinov2_s") as caught:
        convert("dinov2_s", saved[0], tmp_path / "out")
    assert "its config.json says model_type 'sam2'" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_fourier_matrix(tmp_path):
    """Hugging Face's file holds it twice, or, of older versions, once."""
    weights = image_model().state_dict()
    del weights["prompt_encoder.shared_embedding.positional_embedding"]
    convert("sam2_image_s", save_torch(tmp_path / "x.pt", weights), tmp_path / "out", CHANGES)
    weights["prompt_encoder.shared_embedding.positional_embedding"] = torch.zeros(2, 8)
    with pytest.raises(UserError, match=r"positional_embedding and .*positional_embedding differ"):
        convert("sam2_image_s", save_torch(tmp_path / "y.pt", weights), tmp_path / "again", CHANGES)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mask_decoder_config", {"num_attention_heads": 4}, r"mask_decoder_config\.num_attention_heads is 4, not 2"),
        ("mask_decoder_config", {"attention_downsample_rate": 1}, "attention_downsample_rate is 1, not 2"),
        ("mask_decoder_config", {"dynamic_multimask_via_stability": False}, "via_stability is False, not True"),
        ("mask_decoder_config", {"dynamic_multimask_stability_delta": 0.1}, r"stability_delta is 0\.1, not 0\.05"),
        ("mask_decoder_config", {"dynamic_multimask_stability_thresh": 0.9}, r"stability_thresh is 0\.9, not 0\.85"),
        ("prompt_encoder_config", {"patch_size": 8}, r"prompt_encoder_config\.patch_size is 8, not 16"),
        ("prompt_encoder_config", {"hidden_act": "relu"}, "hidden_act is 'relu', not 'gelu'"),
        ("prompt_encoder_config", {"layer_norm_eps": 1e-3}, r"layer_norm_eps is 0\.001, not 1e-06"),
        ("vision_config", {"fpn_top_down_levels": [1, 2, 3]}, r"fpn_top_down_levels is \[1, 2, 3\], not \[2, 3\]"),
        ("vision_config", {"num_feature_levels": 4}, "num_feature_levels is 4, not 3"),
        ("vision_config", {"backbone_config": {"global_attention_blocks": []}}, r"global_attention_blocks is \[\]"),
    ],
)
def test_descriptions_are_held_against_the_model(saved, part, change, message):
    checkpoint = open_checkpoint(saved[0])
    check_facts(CONFIG, checkpoint)
    described = checkpoint.config | {part: checkpoint.config[part] | change}
    with pytest.raises(UserError, match=message):
        check_facts(CONFIG, dataclasses.replace(checkpoint, config=described))


def test_absent_values_are_hugging_face_s_defaults():
    found = facts({}, MODELS["sam2_image_t"]())
    assert all(theirs == ours for theirs, ours in found.values())


@pytest.mark.parametrize(
    ("name", "trunk", "total"),
    [
        ("sam2_image_l", 212_149_296, 216_924_865),  # design/porting.md
        pytest.param("sam2_image_t", 26_849_472, 0, marks=pytest.mark.full),
        pytest.param("sam2_image_s", 33_947_328, 0, marks=pytest.mark.full),
        pytest.param("sam2_image_b_plus", 68_675_712, 0, marks=pytest.mark.full),
    ],
)
def test_published_sizes(name, trunk, total):
    """Hugging Face's parameters and ours, one by one and counted; it counts the Fourier matrix among its buffers."""
    config = MODELS[name]()
    with torch.device("meta"):
        model = reference(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    placement = place(shapes, RULES)
    ours = parameter_shapes(config)
    assert placement.unmatched == []
    assert {target: placement.shape(target, shapes) for target in placement.origins} == ours
    counts: dict[str, int] = {}
    for parameter, shape in ours.items():
        part = "fourier" if parameter == "prompt_encoder/fourier" else parameter.partition("/")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(shape))
    neck = 256 * sum(config.encoder.map_widths) + 4 * 256
    assert counts == {
        "encoder": trunk, "neck": neck, "no_memory": 256, "fourier": 256, "prompt_encoder": 6_220,
        "mask_decoder": 4_215_109,
    }  # fmt: skip
    assert sum(counts.values()) - 256 == sum(parameter.numel() for parameter in model.parameters()) == total
