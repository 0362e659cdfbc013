"""SAM 2's image model by itself; parity with PyTorch is in tests/convert/test_sam2.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.models.functional import Functional
from cast_jax.models.hiera import HieraConfig
from cast_jax.models.teacher.sam2 import ImageFeatures, Sam2, Sam2Config, sam2_image_l
from cast_jax.models.teacher.sam2_mask_decoder import Masks, Sam2MaskDecoderConfig, choose
from cast_jax.models.teacher.sam2_prompt import PromptEncoder

TRUNK = HieraConfig(
    embed_dim=8, depths=(1, 1, 2, 1), window_sizes=(4, 2, 4, 2), global_blocks=(3,), normalised_maps=False
)
DECODER = Sam2MaskDecoderConfig(num_layers=1, num_heads=2, ffn_dim=16, iou_hidden_dim=8)
CONFIG = Sam2Config(TRUNK, features=16, mask_decoder=DECODER)
RANDOM = np.random.default_rng(0)
SIZE = (64, 96)
IMAGES = RANDOM.normal(size=(1, *SIZE, 3)).astype(np.float32)
BOXES = np.sort(RANDOM.uniform(size=(1, 9, 2, 2)), axis=2).reshape(1, 9, 4).astype(np.float32) * 64
MASKS = RANDOM.normal(size=(1, 9, 16, 24)).astype(np.float32)


class Decoder(Sam2):
    """The model from its features on."""

    def __call__(self, features, *, rngs: nnx.Rngs | None = None, **prompts):
        return self.decode(features, **prompts)


class Encoder(Sam2):
    """The pyramid, and the maps that it is made of."""

    def __call__(self, images, *, rngs: nnx.Rngs | None = None):
        return self.encode(images, rngs=rngs), self.encoder(images)


def network(made=Sam2, dtype=jnp.float32, **changes) -> Functional:
    config = dataclasses.replace(CONFIG, **changes)
    return Functional(lambda rngs: made(config, dtype=dtype, rngs=rngs))


def random_params(model: Functional):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, leaf.dtype), model.abstract())


def features(dtype=np.float32) -> ImageFeatures:
    draw = lambda stride: RANDOM.normal(size=(1, SIZE[0] // stride, SIZE[1] // stride, 16)).astype(dtype)
    return ImageFeatures(draw(4), draw(8), draw(16))


def test_bfloat16():
    """Features and activations; parameters, masks and scores are float32. Box prompts teach all that they use."""
    whole = network(Encoder, jnp.bfloat16)
    pyramid, maps = jax.eval_shape(whole.apply, whole.abstract(), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves((pyramid, maps))} == {jnp.dtype(jnp.bfloat16)}
    model = network(Decoder, jnp.bfloat16)
    params = random_params(model)

    def loss(params, features):
        masks = model.apply(params, features, boxes=BOXES[:, :2], train=True)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(masks)), masks

    (gradient, to_features), masks = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        params, features(jnp.bfloat16)
    )
    assert (masks.logits.shape, masks.iou.shape, masks.object_logits.shape) == ((1, 2, 1, 16, 24), (1, 2, 1), (1, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, masks, gradient))} == {jnp.dtype(jnp.float32)}
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves((gradient, to_features)).items()}
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values())
    idle = {name.removeprefix("0/") for name, leaf in leaves.items() if not np.any(leaf)}
    other = ("encoder/", "neck/", "no_memory", "prompt_encoder/mask_embedding/", "mask_decoder/mask_heads/")
    assert {name for name in idle if not name.startswith(other)} == {"prompt_encoder/fourier"}


def test_blocks_change_nothing_but_the_memory():
    """Nine boxes two at a time, the last block filled up, against all at once; also their gradient."""
    given = features()
    found, memory = {}, {}
    for size in (0, 2):
        model = network(Decoder, prompts_per_block=size)

        def loss(params, boxes, model=model):
            masks = model.apply(params, given, boxes=boxes, train=True)
            return jnp.sum(masks.logits**2) + jnp.sum(masks.iou), masks

        program = jax.jit(jax.grad(loss, argnums=1, has_aux=True)).lower(random_params(model), BOXES).compile()
        found[size] = program(random_params(model), BOXES)
        memory[size] = program.memory_analysis().temp_size_in_bytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[0], found[2])
    assert memory[2] < memory[0] / 2


def test_an_image_is_encoded_at_any_size_once():
    """The pyramid's finer levels are plain projections, the third has the coarsest and the embedding added."""
    model = network(Encoder)
    params = random_params(model)
    pyramid, maps = jax.jit(model.apply)(params, IMAGES)
    lateral = [
        level @ params["neck"]["lateral"][str(n)]["kernel"] + params["neck"]["lateral"][str(n)]["bias"]
        for n, level in enumerate(maps)
    ]
    np.testing.assert_allclose(pyramid.stride4, lateral[0], atol=1e-4)
    np.testing.assert_allclose(pyramid.stride8, lateral[1], atol=1e-4)
    nearest = np.kron(lateral[3], np.ones((1, 2, 2, 1)))
    np.testing.assert_allclose(pyramid.stride16, lateral[2] + nearest + params["no_memory"], atol=1e-4)
    with pytest.raises(ValueError, match="multiples of the patch size 32, got 48x64"):
        model.apply(params, np.zeros((1, 48, 64, 3), np.float32))


class Prompts(PromptEncoder):
    """Everything that is asked of it."""

    def __call__(self, boxes, points, labels, *, rngs: nnx.Rngs | None = None):
        return self.tokens(SIZE, boxes), self.tokens(SIZE, points=points, labels=labels), self.grid(2, 3)


def test_prompts_by_hand():
    """Positions relative to a wide image, half a pixel further; the kinds of points; the token that is none."""
    model = Functional(lambda rngs: Prompts(8, 4, rngs=rngs))
    params = random_params(model)

    def at(x, y):
        angles = 2 * np.pi * np.array([2 * x - 1, 2 * y - 1]) @ np.asarray(params["fourier"])
        return np.concatenate([np.sin(angles), np.cos(angles)])

    labels = np.array([[[0, 1, 2, 3, -1, -10]]])
    points = np.tile(np.array([47.5, 15.5], np.float32), (1, 1, 6, 1))  # half across and a quarter down
    box = np.array([[[-0.5, 31.5, 95.5, 63.5]]], np.float32)
    boxes, points, grid = jax.jit(model.apply)(params, box, points, labels)
    kinds, none, zero = params["kinds"], params["not_a_point"], np.zeros(8)
    np.testing.assert_allclose(boxes[0, 0], [at(0, 0.5) + kinds[2], at(1, 1) + kinds[3], none], atol=1e-5)
    expected = [*(at(0.5, 0.25) + kinds), none, zero, none]
    np.testing.assert_allclose(points[0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(grid[1, 2], at(5 / 6, 3 / 4), atol=1e-5)


def test_the_choice_by_hand():
    """Of two prompts the first one's single mask is stable, the second's is not; an empty mask counts as stable."""
    stable, wavering, empty = [1.0, 1.0, -1.0, -1.0], [1.0, 0.01, -0.01, -1.0], [-1.0] * 4
    others = [[float(n)] * 4 for n in (5, 6, 7)]
    logits = jnp.array([[[first, *others] for first in (stable, wavering, empty)]])[..., None]
    iou = jnp.array([[[0.5, 0.1, 0.3, 0.2]] * 3])
    masks = Masks(logits, iou, jnp.zeros((1, 3)))
    config = Sam2MaskDecoderConfig()
    chosen = choose(masks, config, multimask=False, train=False)
    np.testing.assert_array_equal(chosen.logits[0, :, 0, :, 0], [stable, others[1], empty])
    np.testing.assert_allclose(chosen.iou[0, :, 0], [0.5, 0.3, 0.5])
    single = choose(masks, config, multimask=False, train=True)
    np.testing.assert_array_equal(single.logits, logits[:, :, :1])
    several = choose(masks, config, multimask=True, train=False)
    np.testing.assert_array_equal(several.logits, logits[:, :, 1:])
    np.testing.assert_array_equal(several.iou, iou[:, :, 1:])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "prompts must be boxes, points with labels, or masks; got none"),
        ({"points": BOXES[:, :, None, :2]}, "points with labels, or masks; got points"),
        ({"boxes": BOXES, "masks": MASKS[:, :2]}, r"must agree in their first two sides.* 'masks': \(1, 2, 16, 24\)"),
    ],
)
def test_prompts_that_it_refuses(prompts, message):
    model = network(Decoder)
    with pytest.raises(ValueError, match=message):
        model.apply(model.abstract(), features(), **prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": HieraConfig()}, r"encoder\.normalised_maps must be off"),
        ({"mask_hidden": 6}, "mask_hidden 6 must be a multiple of 4"),
        ({"features": 20}, r"features 20 must be a multiple of 8 and of num_heads \* downsample = 4"),
        ({"prompts_per_block": -1}, "prompts_per_block is -1"),
    ],
)
def test_sizes_that_it_refuses(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="stability_threshold is 2"):
        Sam2MaskDecoderConfig(stability_threshold=2.0)
    assert sam2_image_l(prompts_per_block=4).encoder.map_widths == (144, 288, 576, 1152)
