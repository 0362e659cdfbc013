"""Every sampler must draw from exactly the distribution that the method states; the same test must refuse impostors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from maps import MAP_SHAPES, make_map
from scipy import stats

from cast_jax.contrastive import pools
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.contrast import Anchors, CandidatePixels, draw_negatives
from cast_jax.contrastive.cumulative import cumulate, running_sum
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.contrastive.samplers import number_of_slots, prepare_proposals
from cast_jax.contrastive.scores import EXPECTED_ACCEPTANCE

PIXELS, KEYS, K = 64, 64, 64
ANCHORS = np.array([0, 1, 2, 5, 30, 60, 61, 63])
INVALID = np.array([3, 40, 62])
VALID = ~np.isin(np.arange(PIXELS), INVALID)
POWERS = {"d": 1.0, "d_squared": 2.0, "d_sqrt": 0.5, "uniform": 0.0}
SIGNIFICANCE = 1e-3


def explicit_distribution(g_hat: np.ndarray, score: str) -> np.ndarray:
    """[anchors, pixels] probabilities in double precision."""
    g_hat = g_hat.astype(np.float64)
    distance = 0.5 * np.sum((g_hat[ANCHORS][:, None] - g_hat[None]) ** 2, axis=-1)
    weights = distance ** POWERS[score] * VALID
    weights[np.arange(len(ANCHORS)), ANCHORS] = 0
    return weights / weights.sum(-1, keepdims=True)


def p_values(drawn: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """One chi-square p-value for each anchor; rare candidates (expected count below 5) share a cell."""
    found = []
    for draws, p in zip(drawn.reshape(-1, *drawn.shape[-2:]).swapaxes(0, 1), probabilities, strict=True):
        counts, expected = np.bincount(draws.ravel(), minlength=PIXELS), p * draws.size
        common = expected >= 5
        cells = np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())
        keep = cells[1] >= 5
        # Candidates that are all but impossible may be drawn by rounding (√d turns 1e-7 into 3e-4), hardly ever more.
        possible = keep.all() or cells[0][-1] <= 5 + 1e-3 * draws.size
        statistic = np.sum((cells[0][keep] - cells[1][keep]) ** 2 / cells[1][keep])
        found.append(stats.chi2.sf(statistic, max(keep.sum() - 1, 1)) if possible else 0.0)
    return np.array(found)


def draw(g_hat: np.ndarray, config: ContrastiveConfig) -> np.ndarray:
    """int [keys, anchors, K] from the public sampler."""
    drawn, drawable = _draw_for_keys(config, jax.random.split(jax.random.key(7), KEYS), *operands(g_hat))
    assert np.all(drawable)
    return np.asarray(drawn)[:, 0]


def operands(g_hat: np.ndarray) -> tuple[Anchors, CandidatePixels]:
    """The anchors as those of one image, the candidates as pixels of four."""
    of_anchors = jnp.asarray(ANCHORS, jnp.int32)[None]
    yes, unknown = jnp.ones(of_anchors.shape, bool), jnp.full(of_anchors.shape, -1)
    positions = jnp.arange(PIXELS).reshape(4, -1)
    by_image = [
        jnp.asarray(array).reshape(4, PIXELS // 4, *array.shape[1:]) for array in (g_hat * VALID[:, None], VALID)
    ]
    candidates = CandidatePixels(*by_image, -positions - 1, positions)
    return Anchors(jnp.asarray(g_hat)[of_anchors], of_anchors, yes, unknown, yes, jnp.zeros(1, jnp.int32)), candidates


def _draw(config, keys, anchors, pixels):
    return jax.lax.map(lambda key: draw_negatives(key, config, anchors, pixels), keys)


_draw_for_keys = jax.jit(_draw, static_argnums=0)

CONFIGS = [
    *({"sampler": "mixture_proposals", "score": score} for score in ("d", "d_squared", "d_sqrt")),
    {"sampler": "mixture_proposals", "map": "uniform"},
    {"sampler": "mixture_proposals", "slots": 128},  # about half of the rows stay short and are completed
    *({"sampler": "inverse_cdf", "score": score} for score in ("d", "d_squared", "d_sqrt")),
    {"sampler": "inverse_cdf", "map": "uniform"},
    *({"sampler": "categorical", "score": score} for score in ("d", "d_squared", "d_sqrt")),
    {"sampler": "categorical", "map": "uniform"},
]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "-".join(map(str, options.values())))
def test_draws_follow_the_stated_distribution(options):
    config = ContrastiveConfig(num_negatives=K, group_size=8, **options)
    for shape in MAP_SHAPES:
        g_hat = make_map(shape, PIXELS)
        drawn = draw(g_hat, config)
        assert not np.isin(drawn, INVALID).any()
        assert not np.any(drawn == ANCHORS[None, :, None])
        found = p_values(drawn, explicit_distribution(g_hat, config.sampling_score))
        # Bonferroni: one of a thousand right versions of this whole test would fail.
        assert found.min() > SIGNIFICANCE / (len(ANCHORS) * len(MAP_SHAPES) * len(CONFIGS)), (shape, found)


def test_the_number_of_distinct_negatives_is_that_of_independent_draws():
    # Draws with replacement that are too alike, or too different, keep their marginal distribution but not this.
    g_hat = make_map("diffuse", PIXELS)
    drawn = draw(g_hat, ContrastiveConfig(num_negatives=K, group_size=8))
    distinct = np.array([[len(set(row)) for row in of_key] for of_key in drawn])
    rng = np.random.default_rng(0)
    for anchor, p in enumerate(explicit_distribution(g_hat, "d")):
        reference = [len(set(rng.choice(PIXELS, K, p=p / p.sum()))) for _ in range(400)]
        error = np.std(reference) * np.sqrt(1 / KEYS + 1 / 400)
        assert abs(distinct[:, anchor].mean() - np.mean(reference)) < 4 * error


def test_the_test_refuses_gumbel_top_k():
    # Without replacement, the few pixels on other instances can be drawn once only.
    g_hat = make_map("skewed", PIXELS)
    probabilities = explicit_distribution(g_hat, "d")
    rng = np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        perturbed = np.log(probabilities) + rng.gumbel(size=(4 * KEYS, *probabilities.shape))
    drawn = np.argsort(-perturbed, axis=-1)[..., : K // 4]
    large_instance = ANCHORS < 60
    assert p_values(drawn, probabilities)[large_instance].max() < SIGNIFICANCE / 1000


def test_the_test_refuses_a_fixed_pool():
    g_hat = make_map("diffuse", PIXELS)
    probabilities = explicit_distribution(g_hat, "d")
    rng = np.random.default_rng(0)
    pool = rng.choice(np.flatnonzero(VALID), 40)
    drawn = np.stack([rng.choice(pool, (KEYS, K), p=p[pool] / p[pool].sum()) for p in probabilities], axis=1)
    assert p_values(drawn, probabilities).max() < SIGNIFICANCE / 1000


def test_the_test_refuses_proposals_that_do_not_follow_the_envelope(monkeypatch):
    def uniform_terms(candidates, score, peers):
        right = prepare_proposals(candidates, score, peers)
        uniform = cumulate(jnp.broadcast_to(candidates.valid * 1.0, (2, *candidates.valid.shape)))
        return right._replace(pixels=uniform, images=running_sum(uniform.total))

    monkeypatch.setattr(pools, "prepare_proposals", uniform_terms)
    g_hat = make_map("diffuse", PIXELS)
    # A number of negatives of its own, so that no compiled right version is found.
    drawn = draw(g_hat, ContrastiveConfig(num_negatives=4 * K - 1, group_size=8))
    assert p_values(drawn, explicit_distribution(g_hat, "d")).min() < SIGNIFICANCE / 1000


def test_planned_slots():
    assert number_of_slots(256, "d") == 640
    for score, rate in EXPECTED_ACCEPTANCE.items():
        for negatives in (1, 16, 64, 512):
            slots = number_of_slots(negatives, score)
            assert slots % 32 == 0
            assert stats.binom.cdf(negatives - 1, slots, rate) < 1e-4
    assert stats.binom.cdf(255, 640, 0.5) < 1e-6


@pytest.mark.parametrize("score", ["d", "d_squared", "d_sqrt"])
def test_planned_slots_leave_no_row_short(score):
    """On every map, at the method's K: 80,000 rows, of which less than one in a million may be short."""
    config = ContrastiveConfig(num_anchors=2048, score=score)

    @jax.jit
    def short_rows(g):
        def one(key):
            z, valid = jnp.ones((1, len(g), 2)), jnp.ones((1, len(g)), bool)
            *_, metrics = contrastive_loss(key, config, z_weak=z, z_strong=z, g=g[None], valid=valid)
            return metrics["contrastive/short_rows"]

        short, rows = jax.lax.map(one, jax.random.split(jax.random.key(0), 8))
        return jnp.sum(short), jnp.sum(rows)

    for shape in MAP_SHAPES:
        assert short_rows(make_map(shape, 2048)) == (0, 8 * 2048), shape
