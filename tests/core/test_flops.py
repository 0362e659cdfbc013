"""Matrix products and convolutions against counts by hand, through every construct that holds others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from cast_jax.core.flops import matrix_flops
from cast_jax.core.profiling import by_part
from cast_jax.models.layers import rematerialise

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
PRODUCT = 2 * 4 * 8 * 8


def total(function, *operands) -> int:
    return matrix_flops(jax.make_jaxpr(function)(*operands).jaxpr).total()


def test_products_in_loops_and_branches():
    scan = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]
    assert total(lambda x, w: x @ w + x, X, W) == PRODUCT
    assert total(scan, X, W) == 5 * PRODUCT
    assert total(jax.vmap(scan, (0, None)), jnp.stack([X] * 3), W) == 15 * PRODUCT
    assert total(jax.grad(lambda x, w: scan(x, w).sum(), argnums=1), X, W) == 15 * PRODUCT
    branches = [lambda x, w: x, lambda x, w: x @ w, lambda x, w: (x @ w) @ w]
    assert total(lambda i, x, w: jax.lax.switch(i, branches, x, w), 0, X, W) == 2 * PRODUCT
    assert total(lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x), X, W) == PRODUCT
    assert total(lambda x, w: jax.jit(jnp.matmul)(x, w), X, W) == PRODUCT


def test_what_nobody_uses_does_not_count():
    """As the product that is computed again for the gradient of a linear layer, which needs only what goes in."""

    def loss(x, w):
        again = rematerialise(lambda _, x: jnp.tanh(x) @ w, nnx.Module(), x)
        return again.sum()

    assert total(lambda x, w: (x @ w, x + 1)[1], X, W) == 0
    assert total(loss, X, W) == PRODUCT
    assert total(jax.value_and_grad(loss), X, W) == 2 * PRODUCT


def test_batched_products():
    assert total(lambda a, b: jnp.einsum("nij,njk->nik", a, b), jnp.ones((3, 2, 5)), jnp.ones((3, 5, 7))) == 420


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_and_their_gradients(stride, groups):
    images, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolve(images, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            images, kernel, strides, "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    once = 2 * (2 * 8 * 8 * 6 // stride**2) * (9 * 4 // groups)
    assert total(convolve, images, kernel) == once
    assert total(jax.grad(lambda i, k: (convolve(i, k) ** 2).sum(), argnums=(0, 1)), images, kernel) == 3 * once


def test_a_map_over_devices_counts_all_of_them():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"))
    rows = PartitionSpec(("data", "fsdp"))
    each = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)
    assert total(each, X, W) == PRODUCT


def test_cudnn_attention_counts_as_its_products(monkeypatch):
    module = "jax._src.cudnn.fused_attention_stablehlo"
    for check in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"{module}.{check}", lambda *_: 91000)
    query, key = jnp.ones((2, 64, 3, 8), jnp.bfloat16), jnp.ones((2, 128, 3, 8), jnp.bfloat16)

    def attend(query, key):
        return jax.nn.dot_product_attention(query, key, key, implementation="cudnn").sum()

    once = 2 * 2 * (2 * 3 * 64 * 128 * 8)
    assert total(attend, query, key) == once
    assert total(jax.grad(attend, argnums=(0, 1)), query, key) == 3 * once


class Product(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(W)

    def __call__(self, x):
        with jax.named_scope("mask_decoder"):
            return jnp.tanh(x @ self.kernel[...])


def by_phase(again: bool, checkpoint: bool = False):
    graph, state = nnx.split(Product())

    def loss(state, x):
        with jax.named_scope("encoder"):
            for _ in range(2):
                block = nnx.merge(graph, state)
                if checkpoint:
                    x = jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)
                else:
                    x = rematerialise(Product.__call__, block, x, when=again)
        return (x @ W).sum()

    return by_part(matrix_flops(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(state, X).jaxpr))


@pytest.mark.parametrize("options", [{"again": False}, {"again": True}, {"again": False, "checkpoint": True}])
def test_parts_and_phases(options):
    """The innermost scope takes it; forward and backward are the same whatever is computed again."""
    again = 2 * PRODUCT if options["again"] or options.get("checkpoint") else 0
    part = {"forward": 2 * PRODUCT, "backward": 4 * PRODUCT, "recomputed": again}
    outside = {"forward": PRODUCT, "backward": PRODUCT, "recomputed": 0}
    assert by_phase(**options) == {"mask_decoder": part, "other": outside}
