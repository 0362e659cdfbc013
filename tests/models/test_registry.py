"""Named models, single changes to them, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cast_jax.core.errors import UserError
from cast_jax.models.parts import DECODERS, ENCODERS
from cast_jax.models.registry import SEGMENTERS, build_segmenter, segmenter_config
from cast_jax.models.student import StudentConfig


@pytest.mark.parametrize("name", [name for name in SEGMENTERS if isinstance(SEGMENTERS[name](), StudentConfig)])
def test_every_named_student_feeds_its_neck_from_its_own_blocks(name):
    config = segmenter_config({"name": name})
    assert list(config.encoder_layers) == sorted(set(config.encoder_layers))
    assert config.encoder_layers[-1] == config.encoder.depth - 1
    assert config.mask_decoder.hidden_dim % config.mask_decoder.num_heads == 0
    assert config.patch_size == config.encoder.patch_size


def test_single_changes():
    spec = {"name": "student_tiny", "encoder": {"depth": 6}, "decoder": {"out_channels": [8, 8, 8, 8]}}
    config = segmenter_config({**spec, "encoder_layers": [0, 2, 3, 5]})
    assert (config.encoder.depth, config.encoder.embed_dim) == (6, 64)
    assert config.decoder.out_channels == (8, 8, 8, 8)
    assert config.encoder_layers == (0, 2, 3, 5)
    assert segmenter_config({"name": "student_tiny"}).encoder.depth == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "student_xl"}, r"model\.name 'student_xl' is unknown; known: student_s, student_l"),
        ({}, r"model\.name None is unknown"),
        ({"name": "student_s", "neck": {}}, "model: unknown key neck; known: encoder, decoder, mask_decoder"),
        ({"name": "student_s", "patch_size": 14}, "model: unknown key patch_size"),
        ({"name": "student_s", "encoder": {"width": 3}}, r"model\.encoder: unknown key width; known: embed_dim, depth"),
        ({"name": "student_s", "encoder": 3}, r"model\.encoder is 3"),
        ({"name": "student_s", "encoder_layers": {"a": 1}}, r"model\.encoder_layers is {'a': 1}"),
        ({"name": "student_s", "encoder": {"embed_dim": 383}}, r"model\.encoder\.embed_dim 383 must be a multiple"),
        ({"name": "student_s", "encoder": {"depth": 0}}, r"model\.encoder\.depth is 0; it must lie in \[1, "),
        ({"name": "student_s", "encoder": {"depth": "12"}}, r"model\.encoder\.depth is '12'; it must be of type int"),
        ({"name": "student_s", "encoder": {"depth": 6}}, r"encoder_layers is \(2, 5, 8, 11\); it must lie in \[0, 6\)"),
        ({"name": "student_s", "encoder": {"num_heads": 0}}, r"model\.encoder\.num_heads is 0"),
        ({"name": "student_s", "encoder": {"dropout": 1.0}}, r"model\.encoder\.dropout is 1\.0"),
        ({"name": "student_s", "decoder": {"features": -8}}, r"model\.decoder\.features is -8"),
        ({"name": "student_s", "decoder": {"out_channels": (8, 8)}}, r"model\.decoder\.out_channels is \(8, 8\)"),
        ({"name": "student_s", "mask_decoder": {"num_heads": 7}}, r"mask_decoder\.hidden_dim 384 must be a multiple"),
        ({"name": "student_s", "mask_decoder": {"hidden_dim": 6, "num_heads": 2}}, "hidden_dim 6 must be a multiple"),
        ({"name": "student_s", "mask_decoder": {"num_levels": 4}}, r"num_levels is 4; it must lie in \[1, 3\]"),
        (
            {"name": "student_s", "encoder": {"name": "vgg"}},
            r"model\.encoder\.name 'vgg' is unknown; known: dinov2_s, ",
        ),
        ({"name": "student_s", "decoder": {"name": "unet"}}, r"decoder\.name 'unet' is unknown; known: dpt, fpn"),
        ({"name": "student_s", "encoder": {"name": "resnet50", "depth": 2}}, r"model\.encoder: unknown key depth"),
    ],
)
def test_what_is_unknown_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        segmenter_config(spec)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("dinov2_s", "fpn"), ("resnet50", "dpt"), ("resnet50", "fpn"), ("swin_t", "dpt"), ("sam2_s", "fpn")],
)
def test_named_parts_make_a_student(encoder, decoder):
    """Full size, shapes only."""
    spec = {"name": "student_s", "encoder": {"name": encoder}, "decoder": {"name": decoder}}
    config = segmenter_config(spec)
    height, width = 2 * config.patch_size, 3 * config.patch_size
    model = build_segmenter(spec, "abcdefgh", (height, width))
    images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    prediction = jax.eval_shape(model.apply, model.abstract(), images)
    assert prediction.pixel_features.shape == (1, *config.pixel_map((height, width)), config.feature_dim)
    assert prediction.mask_logits.shape[2:] == prediction.pixel_features.shape[1:3]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_named_encoder_feeds_a_decoder(encoder):
    config = segmenter_config({"name": "student_s", "encoder": {"name": encoder}})
    assert len(config.encoder_layers) == 4
    assert config.encoder_layers[-1] == config.encoder.depth - 1
    assert set(DECODERS) == {"dpt", "fpn"}


def test_another_encoder_brings_its_own_maps():
    layers = lambda **spec: segmenter_config({"name": "student_s", **spec}).encoder_layers
    assert layers(encoder={"name": "resnet50"}) == (0, 1, 2, 3)
    assert layers(encoder={"name": "dinov2_l"}) == (4, 11, 17, 23)
    assert layers(encoder={"name": "dinov2_l"}, encoder_layers=(2, 5, 8, 23)) == (2, 5, 8, 23)
    assert layers(decoder={"name": "fpn", "features": 32}) == (2, 5, 8, 11)


def test_one_model_is_described_once():
    build = lambda classes, size: build_segmenter({"name": "student_tiny"}, classes, size)
    assert build("abc", (64, 64)) is build("abc", (32, 128))
    assert build("abc", (64, 64)) is not build("abcd", (64, 64))


def test_image_sides_are_multiples_of_the_patch():
    message = r"\(512, 1036\) must be multiples of the model's patch size 14; the nearest is \(518, 1036\)"
    with pytest.raises(UserError, match=message):
        build_segmenter({"name": "student_s"}, "abcdefgh", (512, 1036))
