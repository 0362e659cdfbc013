"""Stacked layers compute what a plain loop over them does, with parameters that are one array each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from cast_jax.core.rules import EACH, layer_names, named_leaves
from cast_jax.models.functional import Functional
from cast_jax.models.stack import Stack


class Net(nnx.Module):
    """``count`` linear layers, of which ``together`` at a time scale what they add by their place in the turn."""

    def __init__(self, count: int, *, rngs: nnx.Rngs):
        self.layers = Stack(lambda: nnx.Linear(3, 3, rngs=rngs), count)

    def __call__(self, x, *, shift, rngs=None, **options):
        def run(each, x, shifts):
            found = []
            for place, (layer, shift) in enumerate(zip(each, shifts, strict=True)):
                x = x + jnp.sin(layer(x) * (place + 1) + shift)
                found.append({"sum": jnp.sum(x), "x": x})
            return x, found

        return self.layers.scan(run, x, shift, **options)


def by_hand(params, x, shift, layers, together):
    kernel, bias = params["layers"][EACH]["kernel"], params["layers"][EACH]["bias"]
    found = []
    for number in range(layers):
        x = x + jnp.sin((x @ kernel[number] + bias[number]) * (number % together + 1) + shift[number])
        found.append(x)
    return x, jnp.stack(found)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(("layers", "together"), [(5, 1), (3, 1), (5, 2), (4, 2), (5, 7), (1, 3)])
def test_a_stack_computes_what_a_loop_does(layers, together, unrolled):
    model = Functional(lambda rngs: Net(5, rngs=rngs))
    params = model.init(jax.random.key(0))
    x, shift = jax.random.normal(jax.random.key(1), (2, 3)), jnp.arange(5.0)
    options = {"layers": layers, "together": together, "unrolled": unrolled}
    run = lambda params, x: model.apply(params, x, shift=shift, **options)
    assert ("scan[" in str(jax.make_jaxpr(run)(params, x))) == (layers >= 2 * together and not unrolled)
    expected, all_expected = by_hand(params, x, shift, layers, together)
    last, found = jax.jit(run)(params, x)
    np.testing.assert_allclose(last, expected, rtol=1e-6)
    np.testing.assert_allclose(found["x"], all_expected, rtol=1e-6)
    np.testing.assert_allclose(found["sum"], all_expected.sum((1, 2)), rtol=1e-5, atol=1e-6)
    check_grads(lambda params: run(params, x)[0], (params,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_layers_start_apart_and_go_by_their_own_names():
    params = Functional(lambda rngs: Net(5, rngs=rngs)).init(jax.random.key(0))
    leaves = named_leaves(params)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "layers/each/kernel": (5, 3, 3),
        "layers/each/bias": (5, 3),
    }
    kernels = leaves["layers/each/kernel"]
    assert len({kernel.tobytes() for kernel in np.asarray(kernels)}) == 5
    assert layer_names("layers/each/bias", (5, 3)) == [f"layers/{layer}/bias" for layer in range(5)]
    assert layer_names("each/bias", (2, 3)) == ["0/bias", "1/bias"]
    assert layer_names("teach/bias", (2, 3)) == ["teach/bias"]


def test_a_program_does_not_grow_with_the_layers():
    def instructions(count: int) -> int:
        model = Functional(lambda rngs: Net(count, rngs=rngs))
        run = jax.grad(lambda params: jnp.sum(model.apply(params, jnp.ones((2, 3)), shift=jnp.ones(count))[0]))
        return jax.jit(run).lower(model.abstract()).as_text().count("\n")

    assert instructions(40) < 1.1 * instructions(4)


def test_a_fault_within_a_layer_is_named():
    """A loop would hide the operation: under ``jax_debug_nans`` layers run one by one."""
    model = Functional(lambda rngs: Net(5, rngs=rngs))
    params = model.init(jax.random.key(0))

    def traced() -> str:
        run = lambda params: model.apply(params, jnp.ones((2, 3)), shift=jnp.arange(5.0))[0]
        return str(jax.make_jaxpr(run)(params))

    assert "scan[" in traced()
    faulty = jax.tree.map(lambda array: array.at[3].set(jnp.inf), params)
    with jax.debug_nans(True):
        assert "scan[" not in traced()
        with pytest.raises(FloatingPointError, match="encountered in sin"):
            model.apply(faulty, jnp.ones((2, 3)), shift=jnp.arange(5.0))
