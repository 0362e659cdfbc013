"""A module and its parameter tree are the same thing in two shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cast_jax.core.rules import named_leaves
from cast_jax.models.functional import Functional, count_parameters, fill_in
from cast_jax.models.registry import build_segmenter


class Toy(nnx.Module):
    """Two layers in a list, a free parameter and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, use_bias=False, rngs=rngs)])
        self.token = nnx.Param(jax.random.normal(rngs.params(), (4,)))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, scale=1.0, rngs: nnx.Rngs | None = None):
        hidden = self.layers[0](x) + self.token[...]
        hidden = hidden if rngs is None else self.dropout(hidden, deterministic=False, rngs=rngs)
        return scale * self.layers[1](hidden)


X = jnp.arange(12.0).reshape(4, 3)


def test_the_tree_is_nested_and_plain():
    toy = Functional(Toy)
    params = toy.init(jax.random.key(0))
    assert set(params) == {"layers", "token"}
    assert set(params["layers"]) == {"0", "1"}
    assert set(params["layers"]["0"]) == {"kernel", "bias"}
    assert set(params["layers"]["1"]) == {"kernel"}
    assert count_parameters(params) == count_parameters(toy.abstract()) == 3 * 4 + 4 + 4 * 2 + 4
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(params) == described(toy.abstract()) == described(jax.eval_shape(toy.init, jax.random.key(0)))


def test_apply_is_the_module():
    toy = Functional(Toy)
    params = toy.init(jax.random.key(0))
    first, second = params["layers"]["0"], params["layers"]["1"]
    by_hand = (X @ first["kernel"] + first["bias"] + params["token"]) @ second["kernel"]
    np.testing.assert_allclose(toy.apply(params, X), by_hand, rtol=1e-5)
    np.testing.assert_allclose(toy.apply(params, X, scale=2.0), 2 * by_hand, rtol=1e-5)
    gradient = jax.grad(lambda params: jnp.sum(toy.apply(params, X)))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    # Nothing stays behind in the function.
    np.testing.assert_array_equal(toy.apply(jax.tree.map(jnp.zeros_like, params), X), 0.0)


def test_fresh_parameters_are_the_module_s_own():
    """What nnx makes by itself."""
    key = jax.random.key(3)
    _, state = nnx.split(Toy(nnx.Rngs(params=key)))
    own = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    fresh = named_leaves(Functional(Toy).init(key))
    assert fresh.keys() == own.keys()
    for name, leaf in fresh.items():
        np.testing.assert_allclose(leaf, own[name], rtol=1e-6)


def test_what_is_only_described_is_drawn(monkeypatch):
    toy, key = Functional(Toy), jax.random.key(5)
    fresh = toy.init(key)
    given = {**toy.abstract(), "token": np.arange(4.0)}
    filled = fill_in(given, toy.init, key)
    assert filled["token"] is given["token"]
    jax.tree.map(np.testing.assert_array_equal, filled["layers"], fresh["layers"])
    jax.tree.map(np.testing.assert_array_equal, fill_in(toy.abstract(), toy.init, key), fresh)
    assert fill_in(filled, init=None, key=key) is filled  # nothing is drawn

    jitted = []
    monkeypatch.setattr(jax, "jit", lambda draw, **options: jitted.append(draw) or draw)
    fill_in(given, toy.init, key)
    drawn = jax.eval_shape(jitted[0], key)
    assert drawn.keys() == named_leaves(fresh).keys() - {"token"}


def test_seeds_and_dropout_keys():
    toy = Functional(Toy)
    params, others = toy.init(jax.random.key(0)), toy.init(jax.random.key(1))
    assert not np.array_equal(params["token"], others["token"])
    plain = [toy.apply(params, X) for _ in range(2)]
    np.testing.assert_array_equal(*plain)
    dropped = [toy.apply(params, X, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0], dropped[2])
    assert not np.array_equal(dropped[0], plain[0])


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "mask_decoder"),
    [("student_s", 22_056_576, 2_700_768, 25_616_265), ("student_l", 304_368_640, 30_615_040, 25_911_177)],
)
def test_sizes_of_the_full_models(name, encoder, decoder, mask_decoder):
    """The paper's student has 52 M parameters; DINOv2-S and -L have 22 M and 304 M. Nothing is allocated."""
    params = build_segmenter({"name": name}, "abcdefgh", (518, 1036)).abstract()
    sizes = {part: count_parameters(tree) for part, tree in params.items()}
    assert sizes == {"encoder": encoder, "decoder": decoder, "mask_decoder": mask_decoder}
    if name == "student_s":
        assert 50e6 < count_parameters(params) < 54e6
