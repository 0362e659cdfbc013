"""The mask decoder's shapes, its attention mask, and the spatial prior of grid queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import drawn

from cast_jax.core.decoded import Decoded
from cast_jax.core.rules import named_leaves
from cast_jax.models.functional import Functional
from cast_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig, _attention_mask, _resize, encode_positions

CLASSES, FEATURES = 3, 5
SMALL = {"hidden_dim": 8, "mask_dim": 4, "num_heads": 2, "ffn_dim": 8, "num_layers": 2, "num_levels": 2}
LEARNED = MaskDecoderConfig(**SMALL, num_queries=7, dropout=0.5)
GRID = MaskDecoderConfig(**SMALL, query_stride=6, dropout=0.0)
HEIGHT, WIDTH = 12, 20


def decoder(config: MaskDecoderConfig) -> Functional:
    return Functional(lambda rngs: MaskDecoder(config, FEATURES, CLASSES, dtype=jnp.float32, rngs=rngs))


def maps(batch: int = 2):
    rng = np.random.default_rng(0)
    draw = lambda rows, columns: jnp.asarray(rng.normal(size=(batch, rows, columns, FEATURES)), jnp.float32)
    return draw(HEIGHT, WIDTH), [draw(3, 5), draw(6, 10), draw(12, 20)]


@pytest.mark.parametrize(("config", "queries"), [(LEARNED, 7), (GRID, 2 * 3)])
def test_one_prediction_before_and_after_every_layer(config, queries):
    model = decoder(config)
    outputs = jax.eval_shape(model.apply, model.abstract(), *maps())
    assert outputs.embeddings.shape[:3] == outputs.class_logits.shape[:3] == (2, config.num_layers + 1, queries)
    assert outputs.features.shape[:3] == (2, HEIGHT, WIDTH)
    assert outputs.class_logits.shape[3] == CLASSES + 1
    last = jax.eval_shape(Decoded.last_masks, outputs)
    assert last.shape == (2, queries, HEIGHT, WIDTH)
    assert last.dtype == outputs.class_logits.dtype == jnp.float32


@pytest.mark.parametrize("kind", [{"query_stride": 6}, {"num_queries": 7}])
def test_half_precision_inside_float32_outside(kind):
    config = MaskDecoderConfig(**SMALL | {"num_layers": 5, "dropout": 0.5} | kind)
    model = Functional(lambda rngs: MaskDecoder(config, FEATURES, CLASSES, dtype=jnp.bfloat16, rngs=rngs))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract())} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(lambda params: model.apply(params, *maps(), key=jax.random.key(0)), model.abstract())
    assert outputs.class_logits.dtype == jax.eval_shape(Decoded.last_masks, outputs).dtype == jnp.float32


def test_too_few_levels():
    model = decoder(LEARNED)
    pixel_map, pyramid = maps()
    with pytest.raises(ValueError, match=r"num_levels=2, but the pyramid has 1 maps"):
        jax.eval_shape(model.apply, model.abstract(), pixel_map, pyramid[:1])


def test_the_spatial_prior_is_the_explicit_quadratic():
    """Without mask features, logits are 1 - sharpness |position - centre|^2, in cells, around a moved anchor."""
    model = decoder(GRID)
    params = drawn(model.abstract(), 0.3)
    params["mask_head"] = jax.tree.map(jnp.zeros_like, params["mask_head"])
    last = params["prior_head"]["layers"]["2"]
    last["kernel"], last["bias"] = jnp.zeros_like(last["kernel"]), jnp.array([0.3, -0.8, 0.4])
    decoded = jax.jit(model.apply)(params, *maps())
    mask_logits = np.asarray(decoded._replace(embeddings=decoded.embeddings[:, :1]).last_masks())

    anchors = np.array([[y, x] for y in (3.0, 9.0) for x in (10 / 3, 10.0, 50 / 3)])  # 2 x 3 cells of 6 x 6.67 pixels
    centres = anchors / 6 + 2 * np.tanh([0.3, -0.8])
    sharpness = np.log1p(np.exp(0.4 + 0.5))
    y, x = (np.arange(HEIGHT)[:, None] + 0.5) / 6, (np.arange(WIDTH)[None] + 0.5) / 6
    expected = [1 - sharpness * ((y - cy) ** 2 + (x - cx) ** 2) for cy, cx in centres]
    np.testing.assert_allclose(mask_logits, np.broadcast_to(expected, mask_logits.shape), rtol=1e-4, atol=1e-4)


def test_attention_stays_inside_the_mask_unless_it_is_empty():
    masks = jnp.array([[[[1.0, -1.0], [-2.0, 3.0]], [[-1.0, -1.0], [-0.5, -2.0]], [[0.0, 0.0], [1e-3, -1.0]]]])
    one_each = jnp.eye(3)[None]
    allowed = _attention_mask(one_each, _resize(jnp.moveaxis(masks, 1, -1), (2, 2)))
    assert allowed.tolist() == [[[True, False, False, True], [True] * 4, [False, False, True, False]]]
    # At a coarser level a mask may vanish: then all is allowed again.
    small = (-5.0 + 6.0 * (jnp.arange(16) == 5)).reshape(1, 4, 4, 1)
    assert _attention_mask(jnp.ones((1, 1, 1)), _resize(small, (2, 2))).all()


def test_masks_are_resized_by_their_features():
    """The product of resized features is the resized product: Mask2Former's attention mask."""
    decoded = jax.jit(decoder(GRID).apply)(drawn(decoder(GRID).abstract(), 0.3), *maps())
    masks = decoded.last_masks()
    for size in ((3, 5), (6, 10), (12, 20)):
        expected = jax.image.resize(masks, (*masks.shape[:2], *size), "linear", antialias=False)
        found = jnp.einsum("bqd,bkd->bqk", decoded.embeddings[:, -1], _resize(decoded.features, size))
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-4)


def test_keys_outside_the_mask_are_not_read():
    """Where no query's mask lies the map may change; where one does, the change is noticed."""
    model = decoder(LEARNED)
    params = drawn(model.abstract(), 0.3, seed=4)
    pixel_map, pyramid = maps(1)
    run = jax.jit(model.apply)
    before = run(params, pixel_map, pyramid)
    allowed = np.asarray(_attention_mask(before.embeddings[:, 0], _resize(before.features, (3, 5))))[0]

    def change(key: int):
        """What a change of one pixel of the first level does to each prediction."""
        changed = pyramid[0].reshape(1, 15, FEATURES).at[0, key].add(3.0).reshape(1, 3, 5, FEATURES)
        after = run(params, pixel_map, [changed, *pyramid[1:]])
        return np.abs(after.class_logits - before.class_logits).max(axis=(0, 2, 3)).tolist()

    assert allowed.any()
    assert not allowed.any(0).all()
    assert change(int(np.argmin(allowed.any(0)))) == [0.0, 0.0, 0.0]
    changes = change(int(np.argmax(allowed.any(0))))
    assert changes[0] == 0.0  # nothing is attended to before the first layer
    assert min(changes[1:]) > 1e-3


def test_dropout_follows_its_key():
    model = decoder(LEARNED)
    params = drawn(model.abstract(), 0.3)
    run = jax.jit(lambda params, key: model.apply(params, *maps(), key=key).class_logits)
    first, again, other = (run(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 1e-3


def test_positions_are_sines_and_cosines_of_geometric_wavelengths():
    features = encode_positions(jnp.array([[0.0, 4.0]]), 8, 1024.0)
    # y = 0: sin 0, sin 0, cos 0, cos 0; x = 4: one whole wave of length 4, a 256th of the wave of length 1024.
    angle = 2 * np.pi * 4 / 1024
    np.testing.assert_allclose(features[0], [0, 0, 1, 1, 0, np.sin(angle), 1, np.cos(angle)], atol=1e-5)


def test_every_parameter_is_used_but_the_keys_biases_which_softmax_does_not_see():
    model = decoder(GRID)
    params = drawn(model.abstract(), 0.3)

    def loss(params):
        decoded = model.apply(params, *maps())
        return jnp.sum(decoded.last_masks() ** 2) + jnp.sum(decoded.class_logits**2)

    gradient = named_leaves(jax.jit(jax.grad(loss))(params))
    silent = [name for name, leaf in gradient.items() if not np.abs(leaf).max() > 0]
    assert sorted(silent) == [f"layers/each/{name}/key/bias" for name in ("cross", "self_attention")]


def test_several_turns_compute_what_single_layers_do():
    """Five layers and two levels: two turns of a loop and a layer that is left, against a loop in Python."""
    config = MaskDecoderConfig(**SMALL | {"num_layers": 5}, num_queries=7, dropout=0.5)
    model = decoder(config)
    params = drawn(model.abstract(), 0.3)
    pixel_map, pyramid = maps()
    weights = np.random.default_rng(1).normal(size=(2, 6, 7, CLASSES + 1))

    def loss(params):
        found = model.apply(params, pixel_map, pyramid, key=jax.random.key(3))
        return jnp.sum(found.class_logits * weights) + jnp.sum(found.last_masks() ** 2), found

    graded = lambda: jax.value_and_grad(loss, has_aux=True)(params)
    (_, looped), gradients = jax.jit(graded)()
    with jax.debug_nans(True):  # which runs every layer by itself
        (_, single), expected = graded()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (looped, gradients), (single, expected))
    first = named_leaves(gradients)["layers/each/cross/query/kernel"]
    assert (np.abs(first).max(axis=(1, 2)) > 1e-4).all()


def test_on_a_gpu_turns_are_compiled_one_by_one(monkeypatch):
    """And compute what the loop does, gradients too."""
    model = decoder(MaskDecoderConfig(**SMALL | {"num_layers": 4}, num_queries=7, dropout=0.0))
    params, found, loops = drawn(model.abstract(), 0.3), {}, {}

    def total(params):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(model.apply(params, *maps())))

    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        run = lambda params: jax.value_and_grad(lambda params: total(params))(params)  # traced anew
        loops[backend] = "scan[" in str(jax.make_jaxpr(run)(params))
        found[backend] = jax.jit(run)(params)
    assert loops == {"cpu": True, "gpu": False}
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=2e-5), *found.values())
