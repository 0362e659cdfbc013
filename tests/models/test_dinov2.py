"""DINOv2 equals Hugging Face's on re-randomised weights; counts its parameters; resizes positions in three ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from published import copy_weights

from cast_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_b, dinov2_l, dinov2_s, tiny
from cast_jax.models.layers import REMAT

SIZES = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4, "position_grid": 5}


def parameters(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def small(dtype=jnp.float32, **changes) -> DinoV2:
    """An encoder with random weights, drawn by numpy: compiling the initialisers would take longer than the test."""
    model = nnx.eval_shape(lambda: DinoV2(DinoV2Config(**SIZES | changes), dtype=dtype, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.2, leaf.dtype)
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def run(model: DinoV2, inputs: np.ndarray, layers: tuple[int, ...], seed: int | None = None) -> list[jax.Array]:
    """One compilation instead of one an operation; ``seed`` switches dropout and drop path on."""
    graph, state = nnx.split(model)

    def apply(state, inputs):
        return nnx.merge(graph, state)(inputs, layers=layers, rngs=None if seed is None else nnx.Rngs(dropout=seed))

    return jax.jit(apply)(state, inputs)


def images(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(batch, height, width, 3)).astype(np.float32)


def reference(registers: int, swiglu: bool) -> torch.nn.Module:
    """A tiny Hugging Face model in which no tensor is zero or constant."""
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=20,
        use_swiglu_ffn=swiglu, attn_implementation="eager", **extra,
    )  # fmt: skip
    model = getattr(transformers, f"{name}Model")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("registers", "ffn", "size"),
    [(0, "mlp", (12, 28)), (0, "swiglu", (20, 20)), (3, "mlp", (28, 12)), (3, "mlp", (8, 12))],
)
def test_equals_hugging_face(registers, ffn, size):
    theirs = reference(registers, swiglu=ffn == "swiglu")
    ours = small(num_register_tokens=registers, ffn=ffn, position_offset=0.0, position_antialias=registers > 0)
    copy_weights(theirs, ours, "encoder")
    inputs = images(*size)
    with torch.no_grad():
        result = theirs(torch.from_numpy(inputs).permute(0, 3, 1, 2), output_hidden_states=True)
        earlier = theirs.layernorm(result.hidden_states[2]).numpy()
    graph, state = nnx.split(ours)
    middle, last = jax.jit(lambda state: nnx.merge(graph, state).tokens(inputs, layers=(1, 2)))(state)
    expected = result.last_hidden_state.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(last, expected, atol=5e-5)
    np.testing.assert_allclose(middle, earlier, atol=5e-5)
    patches = expected[:, 1 + registers :].reshape(2, size[0] // 4, size[1] // 4, -1)
    np.testing.assert_allclose(run(ours, inputs, layers=(2,))[0], patches, atol=5e-5)


def test_gradients_equal_hugging_face():
    theirs, ours = reference(0, swiglu=False), small(position_offset=0.0)
    copy_weights(theirs, ours, "encoder")
    inputs = images(12, 16)
    weights = np.random.default_rng(4).normal(size=(2, 13, 24)).astype(np.float32)
    output = theirs(torch.from_numpy(inputs).permute(0, 3, 1, 2)).last_hidden_state
    (output * torch.from_numpy(weights)).sum().backward()
    graph, state = nnx.split(ours)
    grads = jax.jit(jax.grad(lambda s: (nnx.merge(graph, s).tokens(inputs, layers=(2,))[0] * weights).sum()))(state)
    blocks = grads["blocks"]["each"]
    pairs = [
        (grads["position_embedding"], theirs.embeddings.position_embeddings.grad[0]),
        (
            grads["patch_embedding"]["kernel"],
            theirs.embeddings.patch_embeddings.projection.weight.grad.permute(2, 3, 1, 0),
        ),
        (blocks["attention"]["query"]["kernel"][0], theirs.encoder.layer[0].attention.q_proj.weight.grad.T),
        (blocks["mlp"]["fc1"]["kernel"][1], theirs.encoder.layer[1].mlp.fc1.weight.grad.T),
    ]
    for mine, other in pairs:
        scale = other.abs().max().item()
        assert scale > 1e-2
        np.testing.assert_allclose(mine[...] / scale, other.numpy() / scale, atol=5e-5)


@pytest.mark.parametrize("size", [(12, 28), (40, 24), (20, 24)])
def test_official_position_offset(size):
    """The official release resizes by ``scale_factor=(n + 0.1) / grid`` instead of by size."""
    model = small(position_offset=0.1)
    rows, columns = size[0] // 4, size[1] // 4
    table = torch.from_numpy(np.array(model.position_embedding[...])).double()
    factors = ((rows + 0.1) / 5, (columns + 0.1) / 5)
    resized = torch.nn.functional.interpolate(
        table[1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2), scale_factor=factors, mode="bicubic"
    )
    expected = resized.permute(0, 2, 3, 1).reshape(1, -1, 24).float().numpy()
    model.patch_embedding.kernel[...] *= 0.0
    model.patch_embedding.bias[...] *= 0.0
    np.testing.assert_allclose(model._embed(images(*size, batch=1))[:, 1:], expected, atol=1e-6)


def test_the_trained_grid_is_used_as_it_is():
    model = small(position_offset=0.1)
    table = model.position_embedding[...]
    np.testing.assert_array_equal(model._patch_positions(table, (5, 5)).reshape(25, 24), table[1:])


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (dinov2_s(), 22_056_576),
        (dinov2_s(num_register_tokens=4), 22_058_112),
        (dinov2_b(), 86_580_480),
        (dinov2_l(), 304_368_640),
    ],
)
def test_parameter_counts(config, count):
    assert parameters(nnx.eval_shape(lambda: DinoV2(config, rngs=nnx.Rngs(0)))) == count


def test_registers_choose_their_position_convention():
    assert (dinov2_s().position_offset, dinov2_s().position_antialias) == (0.1, False)
    config = dinov2_s(num_register_tokens=4)
    assert (config.position_offset, config.position_antialias) == (0.0, True)
    assert dinov2_s(num_register_tokens=4, position_offset=0.1).position_offset == 0.1


def test_rematerialisation_changes_nothing():
    inputs = images(8, 12)

    def gradient(remat: str):
        graph, state = nnx.split(small(depth=2, remat=remat, dropout=0.2, drop_path=0.2))

        def loss(state):
            (features,) = nnx.merge(graph, state)(inputs, layers=(1,), rngs=nnx.Rngs(dropout=5))
            return (features**2 * jnp.arange(24)).sum()

        return jax.jit(jax.value_and_grad(loss))(state)

    plain = gradient("none")
    for remat in ("elementwise", "blocks"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, gradient(remat))


def test_rematerialisation_saves_memory():
    """With ``jax.checkpoint`` alone XLA:CPU computes all blocks again at once, and needs as much as without it."""

    def temporary_bytes(remat: str) -> int:
        graph, state = nnx.split(small(depth=6, remat=remat))
        loss = lambda state: sum(map(jnp.sum, nnx.merge(graph, state)(images(64, 64), layers=(5,))))
        return jax.jit(jax.grad(loss)).lower(state).compile().memory_analysis().temp_size_in_bytes

    plain, products, whole = map(temporary_bytes, REMAT)
    assert whole < 0.5 * plain
    assert whole < products < 0.75 * plain


def test_randomness_only_with_rngs():
    model, inputs = small(dropout=0.5, drop_path=0.5), images(8, 8)
    plain = run(small(), inputs, layers=(2,))[0]
    np.testing.assert_array_equal(run(model, inputs, layers=(2,))[0], plain)
    first, second = (run(model, inputs, layers=(2,), seed=seed)[0] for seed in (0, 1))
    assert np.abs(first - plain).max() > 1e-2
    assert np.abs(first - second).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    model = small(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    features, exact = (run(encoder, images(8, 12), layers=(1,))[0] for encoder in (model, small()))
    assert features.dtype == jnp.bfloat16
    assert features.shape == (2, 2, 3, 24)
    np.testing.assert_allclose(features.astype(jnp.float32), exact, atol=0.1)


def test_layers_are_returned_in_the_order_asked_for():
    model, inputs = small(), images(8, 8)
    first, last = run(model, inputs, layers=(0, 2))
    swapped = run(model, inputs, layers=(2, 0))
    np.testing.assert_array_equal(swapped[0], last)
    np.testing.assert_array_equal(swapped[1], first)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got 12x30"):
        small()(images(12, 30), layers=(2,))
    with pytest.raises(ValueError, match=r"from 0 to 2, got \(3,\)"):
        small()(images(8, 8), layers=(3,))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        DinoV2Config(embed_dim=10, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="ffn 'relu' is unknown; known: mlp, swiglu"):
        tiny(ffn="relu")
