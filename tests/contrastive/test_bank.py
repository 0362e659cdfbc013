"""The memory bank: a ring of past pixels, and the loss against them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from maps import make_map

from cast_jax.contrastive.bank import Bank, Entries, choose_entries, empty_bank, push
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.loss import contrastive_loss

CONFIG = ContrastiveConfig(num_negatives=6, group_size=16, scope="bank", bank_size=5, bank_new=3)


def entries(values, valid) -> Entries:
    values = jnp.asarray(values, jnp.float32)[:, None]
    return Entries(values, -values, jnp.asarray(valid, bool))


def test_the_oldest_are_overwritten_first():
    bank = push(empty_bank(CONFIG, 1, 1), entries([1, 2, 3], [1, 0, 1]))
    np.testing.assert_array_equal(bank.z[:, 0], [1, 3, 0, 0, 0])
    np.testing.assert_array_equal(bank.valid, [1, 1, 0, 0, 0])
    bank = push(bank, entries([4, 5, 6], [1, 1, 1]))
    assert int(bank.next) == 0
    bank = push(push(bank, entries([7, 8, 9], [0, 0, 0])), entries([7, 8, 9], [0, 1, 1]))
    np.testing.assert_array_equal(bank.z[:, 0], [8, 9, 4, 5, 6])
    np.testing.assert_array_equal(bank.g_hat, -bank.z)
    assert bank.valid.all()
    assert int(bank.next) == 2


def test_entries_are_random_valid_pixels():
    rng = np.random.default_rng(0)
    z, g = rng.normal(size=(2, 8, 4)), np.abs(rng.normal(size=(2, 8, 3)))
    g[1, 5] = np.nan
    valid = np.zeros((2, 8), bool)
    valid[0, 2] = valid[1, 4:6] = True
    chosen = choose_entries(jax.random.key(0), CONFIG, z=z, g=g, valid=valid)
    assert chosen.valid.sum() == 2  # one of the three has a broken map
    found = np.asarray(chosen.z)[np.asarray(chosen.valid)]
    expected = np.stack([z[0, 2], z[1, 4]])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    maps = np.stack([g[0, 2], g[1, 4]])
    maps /= np.linalg.norm(maps, axis=-1, keepdims=True)
    order = [int(np.argmax(expected @ row)) for row in found]  # which pixel each entry is
    assert sorted(order) == [0, 1]
    np.testing.assert_allclose(found, expected[order], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(chosen.g_hat)[np.asarray(chosen.valid)], maps[order], rtol=1e-5)
    assert not np.asarray(chosen.g_hat)[~np.asarray(chosen.valid)].any()
    many = [choose_entries(jax.random.key(n), CONFIG, z=z, g=np.ones_like(g), valid=valid | True) for n in (0, 1)]
    assert many[0].valid.all()
    assert not np.array_equal(many[0].z, many[1].z)


def inputs():
    rng = np.random.default_rng(1)
    z = rng.standard_normal((2, 2, 12, 4)).astype(np.float32)
    return {
        "z_weak": z[0],
        "z_strong": z[1],
        "g": np.stack([make_map("diffuse", 12, seed=image) for image in range(2)]),
        "valid": np.ones((2, 12), bool),
        "instance_ids": np.ones((2, 12), np.int32),
    }


def full_bank(given, size: int, valid: int) -> Bank:
    """Pixels of another batch, the first ``valid`` of them written."""
    rng = np.random.default_rng(2)
    unit = lambda array: array / np.linalg.norm(array, axis=-1, keepdims=True)
    z = unit(rng.standard_normal((size, 4))).astype(np.float32)
    g_hat = unit(np.roll(given["g"].reshape(24, -1), 5, axis=0)[:size]).astype(np.float32)
    return Bank(jnp.asarray(z), jnp.asarray(g_hat), jnp.arange(size) < valid, jnp.asarray(0))


@pytest.mark.parametrize("sampler", ["mixture_proposals", "categorical"])
def test_the_expected_loss_is_the_weighted_mean_over_the_bank(sampler):
    """With one negative, the loss is linear in its probability: the mean over keys is the sum over written entries."""
    given = inputs()
    bank = full_bank(given, 20, 13)
    config = ContrastiveConfig(num_negatives=1, group_size=24, scope="bank", sampler=sampler, symmetric=True)
    run = jax.jit(jax.vmap(lambda key: contrastive_loss(key, config, bank=bank, **given)[:2]))
    losses, counts = run(jax.random.split(jax.random.key(0), 2000))
    unit = lambda array: array / np.linalg.norm(array, axis=-1, keepdims=True)
    weak, strong, g_hat = (unit(given[name].reshape(24, -1)) for name in ("z_weak", "z_strong", "g"))
    score = (1 - g_hat @ np.asarray(bank.g_hat).T) * np.asarray(bank.valid)
    share = score / score.sum(axis=-1, keepdims=True)
    expected = 0.0
    for anchors in (weak, strong):
        negative = anchors @ np.asarray(bank.z).T / config.temperature
        positive = (weak * strong).sum(-1, keepdims=True) / config.temperature
        expected += (share * np.log1p(np.exp(negative - positive))).sum()
    assert (counts == 48).all()
    assert abs(losses.mean() - expected) < 4 * losses.std() / 2000**0.5


def test_nothing_flows_into_the_bank_and_its_pixels_are_other_instances():
    given = inputs()
    bank = full_bank(given, 20, 20)

    def loss(z_weak, z):
        changed = given | {"z_weak": z_weak}
        total, _, metrics = contrastive_loss(jax.random.key(0), CONFIG, bank=bank._replace(z=z), **changed)
        return total, metrics

    (to_weak, to_bank), metrics = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(given["z_weak"], bank.z)
    assert np.any(to_weak)
    assert not np.any(to_bank)
    wrong, known = metrics["contrastive/false_negative_rate"]
    assert wrong == 0
    assert known == 24 * CONFIG.num_negatives


def test_an_empty_bank_has_nothing_to_contrast():
    given = inputs()
    bank = empty_bank(CONFIG, 4, given["g"].shape[-1])
    total, count, metrics = jax.jit(lambda bank: contrastive_loss(jax.random.key(0), CONFIG, bank=bank, **given))(bank)
    assert total == count == metrics["contrastive/margin"][1] == 0


def test_a_scope_without_its_bank_is_refused():
    given = inputs()
    with pytest.raises(ValueError, match="scope 'bank' needs a bank"):
        contrastive_loss(jax.random.key(0), CONFIG, **given)
    with pytest.raises(ValueError, match="scope 'batch' has no bank"):
        contrastive_loss(jax.random.key(0), ContrastiveConfig(), bank=empty_bank(CONFIG, 4, 3), **given)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"^bank_new is 6; it must be at most bank_size 5"):
        ContrastiveConfig(bank_size=5, bank_new=6)
