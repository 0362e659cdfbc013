"""The detector by itself; parity with PyTorch is in tests/convert/test_grounding_dino.py."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.core.errors import UserError
from cast_jax.core.rules import named_leaves
from cast_jax.models.functional import Functional
from cast_jax.models.swin import SwinConfig
from cast_jax.models.teacher.bert import BertConfig
from cast_jax.models.teacher.deformable_attention import levels_of
from cast_jax.models.teacher.grounding_dino import GroundingDino, class_probabilities
from cast_jax.models.teacher.grounding_dino_config import GroundingDinoConfig, mm_grounding_dino_l
from cast_jax.models.teacher.grounding_dino_decoder import proposals_around
from cast_jax.models.teacher.grounding_dino_layers import MASKED_LOGIT, logit
from cast_jax.models.teacher.text import tokens_of

CONFIG = GroundingDinoConfig(
    SwinConfig(embed_dim=8, depths=(1, 1, 4, 1), num_heads=(1, 2, 2, 4), window_size=3, learned_norms=(2, 3)),
    BertConfig(vocab_size=1040, hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=24, max_positions=8, remat=True),
    num_levels=3, hidden_dim=32, num_heads=4, num_points=2, encoder_layers=2, encoder_ffn_dim=48, decoder_layers=2,
    decoder_ffn_dim=40, num_queries=5, fusion_drop_path=0.2, remat=True,
)  # fmt: skip
TOKENS = tokens_of(np.array([[101, 200, 201, 1012, 202, 1012, 102, 0]]))
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


@functools.cache
def network(config: GroundingDinoConfig = CONFIG, dtype=jnp.float32) -> Functional:
    return Functional(lambda rngs: GroundingDino(config, dtype=dtype, rngs=rngs))


def random_params(model: Functional):
    random = np.random.default_rng(1)

    def draw(name: str, leaf):
        drawn = random.normal(size=leaf.shape, scale=0.2).astype(leaf.dtype)
        return drawn + 1.0 if name.endswith("scale") else drawn

    named = {name: draw(name, leaf) for name, leaf in named_leaves(model.abstract()).items()}
    return jax.tree.unflatten(jax.tree.structure(model.abstract()), list(named.values()))


def loss(model: Functional, params, key):
    """Of everything that is predicted, as a training step would."""
    found = model.apply(params, IMAGES, TOKENS, key=key)
    total = jnp.sum(found.proposals.class_logits**2) + jnp.sum(found.proposals.boxes**2)
    return total + jnp.sum(found.class_logits**2) + jnp.sum(found.boxes**3), found


def test_every_parameter_has_a_gradient():
    """With rematerialisation and drop path."""
    model = network()
    run = jax.jit(jax.grad(functools.partial(loss, model), has_aux=True))
    gradient, found = run(random_params(model), jax.random.key(0))
    assert found.class_logits.shape == (2, 2, 5, 8)
    assert found.boxes.shape == (2, 2, 5, 4)
    assert found.query_features.shape == (2, 5, 32)
    assert found.scene.image.shape == (2, 4 * 6 + 2 * 3 + 1 * 2, 32)
    assert np.all(np.asarray(found.class_logits)[..., -1] == MASKED_LOGIT)
    named = named_leaves(gradient)
    assert [name for name, leaf in named.items() if not np.all(np.isfinite(leaf))] == []
    assert [name for name, leaf in named.items() if not np.any(np.asarray(leaf))] == []


def test_dtypes_in_bfloat16():
    """Parameters, their gradients and everything that is exact are float32."""
    model = network(dtype=jnp.bfloat16)
    run = jax.grad(functools.partial(loss, model), has_aux=True)
    gradient, found = jax.eval_shape(run, model.abstract(), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    exact = (found.class_logits, found.boxes, found.proposals.boxes, found.proposals.class_logits)
    assert {values.dtype for values in exact} == {jnp.dtype(jnp.float32)}
    assert {found.query_features.dtype, found.scene.image.dtype, found.scene.text.dtype} == {jnp.dtype(jnp.bfloat16)}


def test_bad_images():
    model = network()
    run = lambda images: jax.eval_shape(model.apply, model.abstract(), images, TOKENS)
    with pytest.raises(ValueError, match="multiples of the patch size 32, got 64x90"):
        run(IMAGES[:, :, :90])
    small = network(dataclasses.replace(CONFIG, num_queries=8))
    with pytest.raises(ValueError, match="8 queries, but the image has 6 positions; use larger images"):
        jax.eval_shape(small.apply, small.abstract(), IMAGES[:, :32, :32], TOKENS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 48}, "hidden_dim 48 must be a multiple of 32"),
        ({"num_heads": 3}, "hidden_dim 32 must be a multiple of 32 and of num_heads, an even one"),
        ({"encoder_ffn_dim": 50}, "num_heads 4 must divide encoder_ffn_dim 50"),
        ({"num_levels": 1}, "num_levels is 1"),
        ({"fusion_drop_path": 1.0}, "fusion_drop_path is 1.0"),
        ({"backbone": SwinConfig(learned_norms=())}, "backbone.learned_norms must name the stages"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="num_heads 5 must divide hidden_dim 16"):
        BertConfig(hidden_dim=16, num_heads=5)


def test_level_sizes():
    """Strides 4 to 32, and half of the coarsest, rounded up."""
    assert mm_grounding_dino_l().level_sizes(1024, 1376) == [(256, 344), (128, 172), (64, 86), (32, 43), (16, 22)]
    assert CONFIG.level_sizes(64, 96) == [(4, 6), (2, 3), (1, 2)]


def test_proposals_by_hand():
    """Squares around the centres; none near the border of the valid part, nor on padding."""
    mask = np.zeros((1, 3, 80), bool)
    mask[:, :2, :60] = True
    anchors, inside = proposals_around(levels_of([jnp.asarray(mask), jnp.ones((1, 1, 1), bool)]))
    inside = np.asarray(inside)[0, :-1, 0].reshape(3, 80)
    assert inside[:2, 1:59].all()
    assert not inside[2].any()
    assert not inside[:, 60:].any()
    assert not inside[:, [0, 59]].any()  # at 1/120 and 119/120
    boxes = jax.nn.sigmoid(anchors)[0]
    np.testing.assert_allclose(boxes[2], [2.5 / 60, 0.25, 0.05, 0.05], atol=1e-6)
    np.testing.assert_allclose(boxes[-1], [0.5, 0.5, 0.1, 0.1], atol=1e-6)
    np.testing.assert_array_equal(boxes[0], 1.0)
    np.testing.assert_allclose(jax.nn.sigmoid(logit(jnp.array([0.0, 0.3, 1.0]))), [1e-5, 0.3, 1 - 1e-5], atol=1e-7)


def test_class_probabilities_by_hand():
    """The mean over a class's tokens; a class of another prompt has none."""
    logits = logit(jnp.array([[[0.5, 0.2, 0.4, 0.9]]]))
    class_map = jnp.array([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(class_probabilities(logits, class_map), [[[0.5, 0.3, 0.0]]], atol=1e-6)
