from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from maps import make_map

from cast_jax.contrastive import contrast, pools
from cast_jax.contrastive.bank import choose_entries, empty_bank, push
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.contrast import Anchors, CandidatePixels, draw_negatives
from cast_jax.contrastive.loss import choose_anchors, contrastive_loss, unique_regions
from cast_jax.core import target
from cast_jax.core.errors import UserError

BATCH, PIXELS, EMBEDDING = 2, 24, 5
K = 16

_loss = jax.jit(contrastive_loss, static_argnums=1)


def make_inputs(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((2, BATCH, PIXELS, EMBEDDING)).astype(np.float32)
    return {
        "z_weak": z[0],
        "z_strong": z[1],
        "g": 3 * np.stack([make_map("diffuse", PIXELS, seed=image) for image in range(BATCH)]),
        "valid": rng.random((BATCH, PIXELS)) < 0.85,
        "instance_ids": rng.integers(-1, 3, (BATCH, PIXELS)).astype(np.int32),
    }


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _of_images(images, array):
    return array[images].reshape(-1, *array.shape[2:])


def explicit(key, config, inputs):
    """Loss, count and metrics from explicit lists of negatives, in double precision, anchor by anchor."""
    g_hat, valid = unit(inputs["g"]).astype(np.float32), inputs["valid"]
    image_of = np.repeat(np.arange(BATCH), PIXELS).reshape(BATCH, PIXELS)
    sets = [[image] for image in range(BATCH)] if config.scope == "image" else [list(range(BATCH))]
    z = {view: unit(inputs[view].astype(np.float64)) for view in ("z_weak", "z_strong")}
    directions = [("z_weak", "z_strong"), ("z_strong", "z_weak")][: 1 + config.symmetric]
    loss = count = wrong = known = margin = pairs = 0.0
    set_keys = iter(jax.random.split(key, 1 + len(directions))[1:])
    if config.scope == "image":
        set_keys = (jax.random.fold_in(key, image) for key in list(set_keys) for image in range(BATCH))
    for of_anchors, of_keys in directions:
        for images in sets:
            pick = functools.partial(_of_images, images)
            g_set, ok = g_hat[images] * valid[images][..., None], valid[images]
            unknown, own = np.zeros(ok.shape, np.int32), np.arange(ok.size, dtype=np.int32).reshape(ok.shape)
            anchors = Anchors(g_set, own, ok, unknown, ok, np.array(images, np.int32))
            drawn, drawable = _negatives(next(set_keys), config, anchors, CandidatePixels(g_set, ok, unknown, own))
            assert np.array_equal(drawable, ok)
            drawn, ok = drawn.reshape(-1, config.num_negatives), ok.ravel()
            ids, image = pick(inputs["instance_ids"]), pick(image_of)
            z_anchor, z_key = pick(z[of_anchors]), pick(z[of_keys])
            for p in np.flatnonzero(ok):
                negatives = np.asarray(drawn[p])
                positive, negative = z_anchor[p] @ z_key[p], z_key[negatives] @ z_anchor[p]
                if config.loss == "hinge":
                    loss += np.mean(np.maximum(0, config.margin + negative - positive))
                else:
                    logits = np.append(positive, negative) / config.temperature
                    loss += np.log(np.sum(np.exp(logits))) - logits[0]
                count += 1
                labelled = (ids[negatives] >= 0) & (ids[p] > 0)
                same = labelled & (ids[negatives] == ids[p]) & (image[negatives] == image[p])
                wrong, known = wrong + same.sum(), known + labelled.sum()
                margin += np.sum((positive - negative)[labelled & ~same])
                pairs += np.sum(labelled & ~same)
    return loss, count, {"false_negative_rate": (wrong, known), "margin": (margin, pairs)}


_negatives = jax.jit(draw_negatives, static_argnums=1)


@pytest.mark.parametrize("options", [{"symmetric": True}, {"slots": 32, "max_pools": 3}], ids=["symmetric", "short"])
def test_groups_and_pools_at_a_time_change_nothing(options, monkeypatch):
    config = ContrastiveConfig(num_negatives=K, group_size=7, **options)  # 8 groups a direction
    inputs = make_inputs()

    def graded(z_weak, z_strong):
        loss, count, metrics = contrastive_loss(
            jax.random.key(3), config, **inputs | {"z_weak": z_weak, "z_strong": z_strong}
        )
        return loss / count, metrics

    def run():
        whole = lambda *z: jax.value_and_grad(graded, argnums=(0, 1), has_aux=True)(*z)
        return jax.jit(whole)(inputs["z_weak"], inputs["z_strong"])

    apart = run()
    monkeypatch.setattr(target, "backend", lambda: "gpu")
    monkeypatch.setattr(contrast, "product_dtype", lambda dtype: dtype)
    monkeypatch.setattr(contrast, "groups_together", lambda *_: 3)
    monkeypatch.setattr(pools, "_POOLS", 2)
    for one, other in zip(jax.tree.leaves(run()), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    (short, anchors), some = apart[0][1]["contrastive/short_rows"], "slots" in options
    assert (0 < short < anchors) == some


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": True},
        # Some rows are short.
        {"scope": "image", "score": "d_squared", "slots": 64, "loss": "hinge", "margin": 0.2},
        {"sampler": "inverse_cdf", "map": "uniform"},
    ],
    ids=["symmetric", "image-short-hinge", "inverse_cdf-uniform"],
)
def test_equals_the_explicit_loss_of_its_own_draws(options):
    config = ContrastiveConfig(num_negatives=K, group_size=11, **options)
    key, inputs = jax.random.key(3), make_inputs()
    loss, count, metrics = _loss(key, config, **inputs)
    expected_loss, expected_count, expected_metrics = explicit(key, config, inputs)
    assert count == expected_count
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name, (total, weight) in expected_metrics.items():
        assert weight > 0
        assert metrics[f"contrastive/{name}"][1] == weight
        np.testing.assert_allclose(metrics[f"contrastive/{name}"][0], total, rtol=1e-4, atol=1e-4)
    if config.slots is not None:
        short, anchors = metrics["contrastive/short_rows"]
        assert 0 < short < anchors
    if config.score == "d" and config.sampler == "mixture_proposals":
        accepted, proposed = metrics["contrastive/acceptance_rate"]
        assert abs(accepted / proposed - 0.5) < 0.05


@pytest.mark.parametrize("slots", [224, 300])
def test_slots_that_could_never_serve_an_anchor_are_refused(slots):
    with pytest.raises(
        UserError, match=rf"slots is {slots}; it must be a multiple of 32, at least num_negatives \(256\)"
    ):
        ContrastiveConfig(slots=slots)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda given: {"z_strong": given["z_strong"][:, :7]}, r"z_strong has shape \(2, 7, 5\), which does not fit"),
        (lambda given: {"g": given["g"][:1]}, "g has shape"),
        (lambda given: {"valid": given["valid"].astype(np.float32)}, "valid is of float32; it must be bool"),
        (lambda given: {"instance_ids": given["instance_ids"][:1]}, "instance_ids has shape"),
        (lambda given: {"z_weak": given["z_weak"][0]}, r"z_weak has shape \(24, 5\), not \[batch, pixels, embedding\]"),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes, message):
    given = make_inputs()
    with pytest.raises(ValueError, match=message):
        contrastive_loss(jax.random.key(0), ContrastiveConfig(num_negatives=K), **given | changes(given))


def test_gradients_match_finite_differences():
    config = ContrastiveConfig(num_negatives=K, group_size=11, slots=32)
    with jax.enable_x64(True):
        inputs = make_inputs()
        fixed = {name: jnp.asarray(inputs[name]) for name in ("g", "valid", "instance_ids")}

        @jax.jit
        def mean(z_weak, z_strong):
            loss, count, _ = contrastive_loss(jax.random.key(0), config, z_weak=z_weak, z_strong=z_strong, **fixed)
            return loss / count

        z = [jnp.asarray(inputs[view], jnp.float64) for view in ("z_weak", "z_strong")]
        check_grads(mean, z, order=1, modes=("rev",), eps=1e-6, atol=1e-6, rtol=1e-6)


@jax.jit
def _graded(inputs):
    """Loss, (count, metrics) and gradients with respect to the anchors' embeddings and the map."""

    def total(z_weak, g):
        changed = {**inputs, "z_weak": z_weak, "g": g}
        loss, count, metrics = contrastive_loss(jax.random.key(0), ContrastiveConfig(num_negatives=K), **changed)
        return loss, (count, metrics)

    (loss, rest), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(inputs["z_weak"], inputs["g"])
    return loss, *rest, *gradients


def test_no_gradient_flows_through_the_sampler():
    inputs = make_inputs()
    *_, by_embedding, by_map = _graded(inputs)
    assert not np.any(by_map)
    np.testing.assert_array_equal(np.any(by_embedding != 0, axis=-1), inputs["valid"])


EMPTY = {
    "nothing valid": {"valid": np.zeros((BATCH, PIXELS), bool)},
    "no negatives": {"valid": np.arange(BATCH * PIXELS).reshape(BATCH, PIXELS) == 7},
    "no finite map": {"g": np.full((BATCH, PIXELS, 7), np.nan, np.float32)},
    "constant map": {"g": np.full((BATCH, PIXELS, 7), 0.25, np.float32)},
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_contrast_gives_zero(name):
    loss, count, metrics, *gradients = _graded({**make_inputs(), **EMPTY[name]})
    assert (loss, count) == (0, 0)
    assert not np.any(gradients[0])
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))


def test_pixels_with_a_broken_map_take_no_part_and_are_reported():
    inputs = make_inputs()
    inputs["g"][0] = np.nan
    inputs["g"][1, :3] = np.inf
    loss, count, metrics, by_embedding, by_map = _graded(inputs)
    assert count == inputs["valid"][1, 3:].sum()
    assert metrics["contrastive/nonfinite"] == (PIXELS + 3, BATCH * PIXELS)
    assert np.isfinite(loss)
    assert loss > 0
    assert np.isfinite(by_embedding).all()
    assert not np.any(by_embedding[0])
    assert not np.any(by_map)


def test_masked_pixels_may_hold_anything():
    inputs = make_inputs()
    expected, *_, gradient, _ = _graded(inputs)
    for view in ("z_weak", "z_strong"):
        inputs[view] = np.where(inputs["valid"][..., None], inputs[view], np.nan)
    loss, *_, by_embedding, _ = _graded(inputs)
    assert loss == expected
    np.testing.assert_array_equal(by_embedding, gradient)


def test_bfloat16_products_are_close(monkeypatch):
    """As on accelerators: only the products of the negatives are narrow, not their sums."""
    inputs = make_inputs()
    inputs["z_weak"] = unit(inputs["z_weak"] + inputs["z_strong"])  # near the minimum, where errors would show
    expected, *_, gradient, _ = _graded(inputs)
    monkeypatch.setattr(contrast, "product_dtype", lambda dtype: jnp.bfloat16)
    narrow = jax.jit(lambda inputs: _graded.__wrapped__(inputs))  # not the compiled float32 version
    loss, *_, by_embedding, _ = narrow(inputs)
    assert loss != expected
    np.testing.assert_allclose(loss, expected, rtol=2e-3)
    np.testing.assert_allclose(by_embedding, gradient, atol=0.02 * np.abs(gradient).max())
    assert by_embedding.dtype == gradient.dtype


def _keys(seed):
    return jax.random.split(jax.random.key(seed), 3)


def test_anchors_are_a_random_subset_of_the_valid_pixels():
    valid = np.zeros((3, 40), bool)
    valid[0], valid[1, 10:30], valid[2, :4] = True, True, True
    position, real = choose_anchors(_keys(0), jnp.asarray(valid), 10)
    np.testing.assert_array_equal(np.sum(real, axis=1), [10, 10, 4])
    for image in range(3):
        chosen = np.asarray(position[image])[np.asarray(real[image])]
        assert len(set(chosen)) == len(chosen)
        assert valid[image, chosen].all()
    other = choose_anchors(_keys(1), jnp.asarray(valid), 10)[0]
    assert not np.array_equal(np.sort(position[0]), np.sort(other[0]))
    everything, real = choose_anchors(_keys(0), jnp.asarray(valid), None)
    assert everything is None
    np.testing.assert_array_equal(real, valid)


def test_regions_are_unique_over_images():
    ids = jnp.array([[0, 1, 2, -1], [0, 2, 5, -1]])
    regions = np.asarray(unique_regions(ids))
    assert len(set(regions[ids >= 0])) == 6
    assert np.all(regions[:, 3] == -1)


def _growth(instance, g, steps, keys=1):
    """By how much a gradient step of these sizes grows the margin between instances, and the false-negative rate."""
    rng, pixels = np.random.default_rng(0), len(instance)
    views = [unit(rng.standard_normal((1, pixels, 16))).astype(np.float32) for _ in range(2)]
    valid, ids = np.ones((1, pixels), bool), instance[None] + 1
    config = ContrastiveConfig(num_negatives=32, map="mask")

    @jax.jit
    def gradients(key, g):
        def loss(z_weak, z_strong):
            given = {"z_weak": z_weak, "z_strong": z_strong, "g": g, "valid": valid, "instance_ids": ids}
            total, count, metrics = contrastive_loss(key, config, **given)
            wrong, drawn = metrics["contrastive/false_negative_rate"]
            return total / count, wrong / drawn

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(*views)

    found = [gradients(key, np.asarray(g, np.float32)[None]) for key in jax.random.split(jax.random.key(5), keys)]
    mean = [np.mean([each[0][view] for each in found], axis=0) for view in range(2)]

    def margin(z_weak, z_strong):
        similarity = unit(z_weak[0].astype(np.float64)) @ unit(z_strong[0].astype(np.float64)).T
        return np.mean(np.diag(similarity)) - np.mean(similarity[instance[:, None] != instance[None]])

    moved = [[view - step * gradient for view, gradient in zip(views, mean, strict=True)] for step in steps]
    return np.array([margin(*pair) - margin(*views) for pair in moved]), np.mean([each[1] for each in found])


def test_a_gradient_step_grows_the_margin_between_instances():
    """Proposition 3.1: the expected inter-instance margin grows, in proportion to the step size."""
    instance = np.repeat([0, 1, 2, 3], 16)
    g = np.eye(4)[instance] + 0.01 * np.random.default_rng(1).random((64, 4))
    growth, wrong = _growth(instance, g, (0.01, 0.02, 0.04))
    assert wrong < 0.01
    assert growth[0] > 0
    np.testing.assert_allclose(growth / growth[0], [1, 2, 4], rtol=0.02)


def test_the_margin_grows_with_the_share_of_true_negatives():
    """Proposition 3.1: the growth is in proportion to α, the share of negatives on other instances, and positive."""
    instance = np.repeat([0, 1], 32)
    growth, alpha = [], []
    for wanted in (0.0, 0.2, 0.4):
        # Pixels of an instance have the score w, those of different ones 1: 31 w of 31 w + 32 draws are wrong.
        w = 32 * wanted / (31 * (1 - wanted))
        g = np.concatenate([np.sqrt(1 - w) * np.eye(2)[instance], np.sqrt(w) * np.eye(64)], axis=1)
        grown, wrong = _growth(instance, g, (0.02,), keys=16)
        np.testing.assert_allclose(wrong, wanted, atol=0.01)
        growth.append(grown[0])
        alpha.append(1 - wrong)
    assert min(growth) > 0
    slope, _ = np.polyfit(alpha, growth, 1)
    assert slope > 0
    # A line through all three: what the positives alone contribute does not depend on α.
    np.testing.assert_allclose(np.polyval(np.polyfit(alpha, growth, 1), alpha), growth, rtol=0.05)


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_number_of_groups():
    inputs = {
        "z_strong": jnp.zeros((1, 512, 8)),
        "g": jnp.zeros((1, 512, 4)),
        "valid": jnp.ones((1, 512), bool),
    }

    def kept_bytes(num_anchors):
        config = ContrastiveConfig(num_negatives=64, group_size=16, num_anchors=num_anchors)

        def pullback(z_weak):
            return jax.vjp(lambda z: contrastive_loss(jax.random.key(0), config, z_weak=z, **inputs)[0], z_weak)[1]

        residuals = jax.tree.leaves(jax.eval_shape(pullback, jnp.zeros((1, 512, 8))))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    # Only what belongs to the anchors themselves: two gradients of 8 float32 and two positions of 4 bytes, each.
    assert kept_bytes(496) - kept_bytes(16) <= 480 * (2 * 8 * 4 + 2 * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map": "fused"}, "^map.*fusion, mask, class, uniform"),
        ({"score": "uniform"}, "^score.*d, d_squared, d_sqrt"),
        ({"scope": "world"}, "^scope.*batch, image, bank"),
        ({"loss": "triplet"}, "^loss.*infonce, hinge"),
        ({"sampler": "gumbel"}, "^sampler.*mixture_proposals, inverse_cdf, categorical"),
        ({"temperature": 0.0}, r"^temperature is 0\.0; it must lie in \[0\.001, 1000\]"),
        ({"num_anchors": 0}, r"^num_anchors is 0; it must lie in \[1, inf\)"),
        ({"slots": 100}, "^slots.*multiple of 32"),
        ({"temperature": float("nan")}, "^temperature is nan"),
        ({"num_negatives": 10**11}, r"^num_negatives is 100000000000; it must lie in \[1, 65536\]"),
        ({"num_negatives": 0}, "^num_negatives is 0"),
        ({"margin": -1.0}, r"^margin is -1\.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**options)


@pytest.mark.parametrize("sampler", ["mixture_proposals", "inverse_cdf"])
@pytest.mark.parametrize("scope", ["image", "batch", "bank"])
def test_a_uniform_map_needs_no_channels(scope, sampler):
    """As ``pseudo_probability(kind="uniform")`` makes it; the draws are those of any other map."""
    config = ContrastiveConfig(num_negatives=K, map="uniform", scope=scope, sampler=sampler, bank_size=32, bank_new=20)
    inputs = make_inputs()

    def loss(dim):
        given = inputs | {"g": inputs["g"][..., :dim]}
        bank = None
        if scope == "bank":
            given_bank = {name: given[name] for name in ("g", "valid")} | {"z": given["z_strong"]}
            entries = choose_entries(jax.random.key(1), config, **given_bank)
            bank = push(empty_bank(config, EMBEDDING, dim), entries)
        return _loss(jax.random.key(0), config, **given, bank=bank)[0]

    assert np.isfinite(loss(0))
    np.testing.assert_allclose(loss(0), loss(3), rtol=1e-6)
