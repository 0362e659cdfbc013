"""Stacked layers compute what a plain loop over them does, with parameters that are one array each."""

from __future__ import annotations

import functools

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
        self.layers = Stack(functools.partial(nnx.Linear, 3, 3), count, rngs=rngs)

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


class Both(nnx.Module):
    """A layer, some more of them in a stack or a list, and a last one."""

    def __init__(self, stacked: int, *, rngs: nnx.Rngs):
        pair = lambda rngs: nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs), Deep(rngs=rngs))
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.layers = Stack(pair, 4, rngs=rngs) if stacked else nnx.List([pair(rngs) for _ in range(4)])
        self.last = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self): ...


class Deep(nnx.Module):
    """A stack in a stack's layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = Stack(functools.partial(nnx.Linear, 3, 3), 2, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)


def test_layers_begin_as_if_they_were_made_in_turn():
    stacked, listed = (Functional(lambda rngs, on=on: Both(on, rngs=rngs)).init(jax.random.key(7)) for on in (1, 0))
    each = [listed["layers"][str(number)] for number in range(4)]
    in_turn = {**listed, "layers": {EACH: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)}}
    jax.tree.map(np.testing.assert_array_equal, stacked, in_turn)
    kernels = named_leaves(stacked)["layers/each/layers/2/layers/each/kernel"]
    assert kernels.shape == (4, 2, 3, 3)
    assert len({kernel.tobytes() for kernel in np.asarray(kernels).reshape(8, -1)}) == 8


def test_flax_s_own_streams_will_do():
    rngs = nnx.Rngs(0)
    kernels = [Net(5, rngs=streams).layers.each.kernel[...] for streams in (rngs, rngs, nnx.Rngs(1))]
    assert len({kernel.tobytes() for kernel in np.asarray(kernels).reshape(15, -1)}) == 15


def test_programs_do_not_grow_with_the_layers():
    def drawing(count: int) -> int:
        init = Functional(lambda rngs: Net(count, rngs=rngs)).init
        return jax.jit(init).lower(jax.random.key(0)).as_text().count("\n")

    def instructions(count: int) -> int:
        model = Functional(lambda rngs: Net(count, rngs=rngs))
        run = jax.grad(lambda params: jnp.sum(model.apply(params, jnp.ones((2, 3)), shift=jnp.ones(count))[0]))
        return jax.jit(run).lower(model.abstract()).as_text().count("\n")

    assert instructions(40) < 1.1 * instructions(4)
    assert drawing(40) == drawing(4)


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
