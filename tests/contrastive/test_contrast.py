"""What the contrastive loss is made of: the loss of an anchor, its products, and the turns that groups take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cast_jax.contrastive import contrast
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.groups import Turns
from cast_jax.core import target


@pytest.mark.parametrize("temperature", [1000, 0.2, 0.07, 0.025, 0.0249, 0.01, 0.001])
def test_no_temperature_loses_a_logit(temperature):
    """Whatever the similarities: as far apart as they can be, all at an end, none."""
    rng = np.random.default_rng(0)
    positive = np.float32([-1, 1, 1, -1, -1, 1, *rng.uniform(-1, 1, 4)])
    negative = rng.uniform(-1, 1, (10, 7)).astype(np.float32)
    negative[:4], taken = np.array([1, -1, 1, -1])[:, None], rng.random((10, 7)) < 0.8
    taken[4:6] = False
    config = ContrastiveConfig(temperature=temperature)
    found, slope = jax.value_and_grad(lambda *of: jnp.sum(contrast.anchor_losses(config, *of, taken)), (0, 1))(
        positive, negative
    )
    logits = np.where(np.c_[np.ones(10) > 0, taken], np.c_[positive, negative].astype(float) / temperature, -np.inf)
    total = scipy.special.logsumexp(logits, axis=1)
    np.testing.assert_allclose(found, np.sum(total - logits[:, 0]), rtol=1e-5)
    shares = np.exp(logits - total[:, None])
    np.testing.assert_allclose(slope[0], (shares[:, 0] - 1) / temperature, atol=1e-5 / temperature)
    np.testing.assert_allclose(slope[1], shares[:, 1:] / temperature, atol=1e-5 / temperature)


def test_the_effective_number_of_many_negatives_does_not_overflow():
    positions = jnp.repeat(jnp.arange(2), 25_000)
    np.testing.assert_allclose(contrast.effective_number(positions, jnp.ones(50_000, bool)), 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_similarities_and_their_gradients_are_multiplied_in_the_backend_s_dtype(own, backend, dtype, monkeypatch):
    """And are float32 themselves; the gradients are those of plain products."""
    monkeypatch.setattr(target, "backend", lambda: backend)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((5, 8), (5, 7, 8) if own else (7, 8), (5, 7))
    anchors, negatives, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    through = lambda product: jax.vjp(product, anchors, negatives)[1](weights)
    jaxpr = jax.make_jaxpr(lambda: through(contrast.similarities))()
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= 2
    assert {str(factor.aval.dtype) for product in products for factor in product.invars} == {dtype}
    plain = lambda a, n: jnp.einsum("ae,ase->as" if own else "ae,se->as", a, n)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    for found, wanted in zip(through(contrast.similarities), through(plain), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, atol=tolerance)


def test_groups_take_turns_alone_on_a_cpu_and_together_elsewhere(monkeypatch):
    config = ContrastiveConfig()
    assert contrast.groups_together(config, 128, 128) == 1
    monkeypatch.setattr(target, "backend", lambda: "gpu")
    for size, embedding in ((128, 128), (1, 128), (128, 256)):
        together = contrast.groups_together(config, size, embedding)
        assert 2**22 < together * max(size, embedding) * 2 * config.num_slots <= 2**23
    assert contrast.groups_together(ContrastiveConfig(num_negatives=65_536), 128, 128) == 1


@pytest.mark.parametrize(
    ("groups", "together", "pools", "sharing", "turns"),
    [
        (2744, 51, 1, 43, 64),  # the paper's: all pixels of eight images
        (64, 51, 32, 1, 2),
        (343, 51, 8, 6, 8),
        (10_000, 51, 1, 40, 256),
        (5, 51, 5, 1, 1),
        (65, 51, 22, 2, 3),
    ],
)
def test_the_groups_of_a_turn_share_its_pools(groups, together, pools, sharing, turns):
    plan = Turns.plan(groups, 64, together)
    numbers = np.arange(1, groups + 1)
    split = np.asarray(plan.split(numbers))
    assert split.shape == (turns, pools, sharing)
    assert pools * sharing <= together
    which = np.where(split > 0, split % 64, -1)
    assert (np.where(which < 0, which.max(-1, keepdims=True), which) == which.max(-1, keepdims=True)).all()
    assert np.array_equal(np.sort(split[split > 0]), numbers)
    assert np.array_equal(plan.join(split), numbers)
    assert not plan.alone
    assert Turns.plan(groups, 64, 1).alone
    wide = np.asarray(plan.split(np.stack([numbers, numbers], 1)))
    assert np.array_equal(wide[..., 0], split)
    assert np.array_equal(plan.join(wide)[:, 1], numbers)
