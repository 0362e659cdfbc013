"""The objective: its terms, their weights, and which parameters each of them teaches."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import INSTANCES, SIZE, TINY, Linear, drawn, group

from cast_jax.contrastive.bank import Bank, Entries
from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.fused_map import MAPS
from cast_jax.core.annotations import pack_masks
from cast_jax.core.errors import UserError
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.profiling import SCOPES, part_of
from cast_jax.core.rules import named_leaves
from cast_jax.core.sharding import make_mesh
from cast_jax.core.step import TrainStep
from cast_jax.losses.config import CriterionConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.base import view_images, view_targets
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised, instance_map

KEY = jax.random.key(0)
ALL = ObjectiveConfig(
    supervised_weight=0.7,
    pseudo_label_weight=0.5,
    contrastive_weight=0.3,
    supervised_views=("weak",),
    pseudo_label_views=("strong",),
    contrastive_stride=2,
    criterion=CriterionConfig(num_points=None),
    contrastive=ContrastiveConfig(num_negatives=4, num_anchors=32, group_size=32, sampler="inverse_cdf"),
)
NAMES = ("person", "car", "tree")


@functools.cache
def parts() -> tuple[Functional, Functional]:
    return build_segmenter(TINY, NAMES, SIZE), Functional(lambda rngs: ProjectionHead(8, 8, rngs=rngs))


def recipe(**changes) -> SemiSupervised:
    return SemiSupervised(*parts(), dataclasses.replace(ALL, **changes), NAMES)


def parameters():
    segmenter, projection = parts()
    return {"segmenter": drawn(segmenter.abstract(), 0.2), "projection": drawn(projection.abstract(), 0.2)}


def batch():
    return {"labelled": group(2, 0), "unlabelled": group(2, 10)}


@functools.cache
def everything():
    """Loss and metrics of all terms together."""
    return jax.tree.map(np.asarray, jax.jit(recipe().loss_fn)(parameters(), {}, batch(), KEY))


def mean(metrics, name: str) -> float:
    total, count = metrics[name]
    return float(total / count)


def test_the_total_is_the_weighted_sum():
    loss, metrics = everything()
    terms = [mean(metrics, name) for name in ("loss/supervised", "loss/pseudo_label", "contrastive/loss")]
    np.testing.assert_allclose(loss, 0.7 * terms[0] + 0.5 * terms[1] + 0.3 * terms[2], rtol=1e-6)
    assert metrics["loss/total"][0] == loss
    assert min(terms) > 0
    assert len({round(term, 4) for term in terms}) == 3


def test_the_metrics():
    _, metrics = everything()
    expected = {"loss/total", "contrastive/loss", "contrastive/false_negative_rate", "contrastive/margin"}
    for prefix in ("supervised", "pseudo_label"):
        expected |= {f"loss/{prefix}", *(f"loss/{prefix}_{term}" for term in ("mask", "dice", "class"))}
    assert expected <= set(metrics)
    assert all(pair[0].shape == pair[1].shape == () for pair in metrics.values())
    weak = batch()["unlabelled"]["weak"]  # kept instances are counted there
    assert mean(metrics, "pseudo_labels/per_image") == weak["instance_valid"].sum() / 2 == 2.5
    assert mean(metrics, "pseudo_labels/score") == 0.5
    for position, name in enumerate(NAMES):
        count = np.sum(weak["instance_valid"] & (weak["labels"] == position))
        assert float(metrics[f"pseudo_labels/per_image/{name}"][0]) == count


def test_the_contrastive_term_teaches_features_but_not_the_sampler():
    """Its gradient reaches encoder, neck and projection, and stops at the predictions that only choose negatives.

    Alone, the term is what it is among the others, and its weight is a factor.
    """
    pixel = recipe(supervised_weight=0.0, pseudo_label_weight=0.0, contrastive_weight=2.0)
    value = jax.jit(jax.value_and_grad(pixel.loss_fn, has_aux=True))
    (loss, metrics), gradient = value(parameters(), {}, batch(), KEY)
    np.testing.assert_allclose(loss, 2.0 * mean(everything()[1], "contrastive/loss"), rtol=1e-5)
    assert not [name for name in metrics if name.startswith(("loss/supervised", "loss/pseudo_label"))]

    sizes = {name: float(np.abs(leaf).max()) for name, leaf in named_leaves(gradient).items()}
    assert np.isfinite(list(sizes.values())).all()
    assert {name for name, size in sizes.items() if "mask_decoder" in name and size > 0} == set()
    for reached in ("projection/out/kernel", "segmenter/encoder/", "segmenter/decoder/"):
        assert max(size for name, size in sizes.items() if name.startswith(reached)) > 0


def test_profiles_know_the_parts():
    """Every name by which a profile adds up times stands in the program; the optimiser's is the step's own."""
    text = jax.jit(recipe().loss_fn).lower(parameters(), {}, batch(), KEY).as_text(debug_info=True)
    found = {part_of(path)[0] for path in re.findall(r'"(jit\([^"]+)"', text)}
    assert found == {*SCOPES, "other"} - {"optimizer", "online_labels"}


def test_supervised_only():
    plain = recipe(pseudo_label_weight=0.0, contrastive_weight=0.0, supervised_views=("weak", "strong"))
    params = jax.eval_shape(plain.init, KEY)
    assert set(params) == {"segmenter"}
    both = {"labelled": batch()["labelled"]}
    one = {"labelled": {key: both["labelled"][key] for key in ("strong", "instances_cut")}}
    for labelled in (both, one):
        loss, metrics = jax.eval_shape(plain.loss_fn, params, {}, labelled, KEY)
        assert loss.shape == ()
        assert {"loss/total", "loss/supervised", "loss/supervised_mask"} <= set(metrics)
        assert not [name for name in metrics if name.startswith(("contrastive/", "pseudo_labels/", "loss/pseudo"))]
    assert set(jax.eval_shape(recipe().init, KEY)) == {"segmenter", "projection"}


def test_views_that_are_not_there():
    ObjectiveConfig().check_views(("strong",), "steps.x")
    with pytest.raises(UserError, match=r"steps\.x: objective\.supervised_views \('weak',\) has none of data\.views"):
        ObjectiveConfig(supervised_views=("weak",)).check_views(("strong",), "steps.x")
    with pytest.raises(UserError, match=r"steps\.x: objective\.pseudo_label_views"):
        ObjectiveConfig(pseudo_label_weight=1.0, pseudo_label_views=("weak",)).check_views(("strong",), "steps.x")
    with pytest.raises(UserError, match=r"steps\.x: the contrastive term needs data\.views"):
        ObjectiveConfig(contrastive_weight=0.2).check_views(("strong",), "steps.x")


def test_images_and_targets_of_a_view():
    view = group(2, 0)["weak"]
    np.testing.assert_allclose(view_images(view), view["image"] / 255.0, rtol=1e-6)
    targets = view_targets(view)
    assert targets.masks.shape == (2, INSTANCES, *SIZE)
    np.testing.assert_array_equal(pack_masks(np.asarray(targets.masks)), view["masks"])
    for weights in (targets.class_weights, targets.mask_weights):
        np.testing.assert_array_equal(weights, np.ones((2, INSTANCES)))
    assert targets.ignore[:, :3, :5].all()
    assert int(targets.ignore.sum()) == 2 * 15


def test_instance_map_by_hand():
    """A 4 x 8 image read at the centres (1, 2), (1, 6), (3, 2), (3, 6) of a 2 x 2 grid."""
    masks = np.zeros((1, 3, 4, 8), bool)
    masks[0, 0, :, :4] = True  # left half
    masks[0, 1, 2:, :] = True  # lower half: behind the first where both are
    masks[0, 2] = True  # everywhere, but only padding
    ignore = np.zeros((1, 4, 8), bool)
    view = {
        "masks": jnp.asarray(pack_masks(masks)),
        "instance_valid": jnp.array([[True, True, False]]),
        "ignore": jnp.asarray(pack_masks(ignore)),
    }
    assert instance_map(view, (4, 8), (2, 2)).tolist() == [[1, 0, 1, 2]]
    ignore[0, 1, 6] = ignore[0, 3, 2] = True
    view["ignore"] = jnp.asarray(pack_masks(ignore))
    assert instance_map(view, (4, 8), (2, 2)).tolist() == [[1, -1, -1, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_label_weight": -1.0}, r"pseudo_label_weight is -1\.0; it must lie in \[0, inf\)"),
        ({"contrastive_weight": float("nan")}, "contrastive_weight is nan"),
        ({"supervised_weight": float("inf")}, "supervised_weight is inf"),
        ({"contrastive_stride": 0}, "contrastive_stride is 0"),
        ({"supervised_views": ("week",)}, "supervised_views 'week' is unknown; known: weak, strong"),
        ({"supervised_weight": 0.0}, "supervised_weight, .* are all 0"),
    ],
)
def test_faulty_objectives_are_named(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        ObjectiveConfig(**options)


@pytest.mark.parametrize("kind", MAPS)
def test_every_map_of_the_ablation_is_contrasted(kind):
    """A uniform map has no channels."""
    contrastive = dataclasses.replace(ALL.contrastive, map=kind, sampler="mixture_proposals")
    loss, metrics = jax.jit(recipe(contrastive=contrastive).loss_fn)(parameters(), {}, batch(), KEY)
    assert np.isfinite(loss)
    assert mean(metrics, "contrastive/loss") > 0


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_abstract_parameters_are_those_of_init(weight):
    found = recipe(contrastive_weight=weight)
    described = lambda tree: {name: (leaf.shape, leaf.dtype) for name, leaf in named_leaves(tree).items()}
    assert described(found.abstract()) == described(jax.eval_shape(found.init, KEY))
    assert ("projection" in found.abstract()) == bool(weight)


def test_updates_fill_the_bank():
    """Through the compiled step: the first update finds nothing to contrast, and the ring goes on from there."""
    contrastive = dataclasses.replace(ALL.contrastive, scope="bank", bank_size=100, bank_new=60)
    with_bank = SemiSupervised(*parts(), dataclasses.replace(ALL, contrastive=contrastive), NAMES, SIZE)
    step = TrainStep(with_bank, optimizer=OptimizerConfig(), steps=3, mesh=make_mesh())
    state = step.initial_state(parameters())
    assert state.bank.z.shape == (100, 8)
    step.compile("distill", state, {}, batch())
    anchors, filled = [], []
    for _ in range(2):
        state, metrics, finite = step(state, {}, batch())
        assert finite
        anchors.append(float(metrics["contrastive/loss"][1]))
        filled.append(int(state.bank.valid.sum()))
    assert anchors[0] == 0 < anchors[1]
    assert filled == [60, 100]
    assert int(state.bank.next) == 20
    assert recipe().init_bank() is None


def after_one_update(kind: type[SemiSupervised], accumulate: int, images: dict, **changes):
    """The metrics, and Adam's moments: the gradients and their squares, times a constant."""
    objective = dataclasses.replace(ALL, **{"contrastive_weight": 0.0} | changes)
    projection = Functional(lambda rngs: ProjectionHead(3, 8, rngs=rngs))  # of the three colours
    one = kind(Functional(Linear), projection, objective, NAMES)
    optimizer = OptimizerConfig(clip_norm=None)
    step = TrainStep(one, optimizer=optimizer, steps=3, mesh=make_mesh(), accumulate=accumulate)
    state = step.initial_state(drawn(one.abstract(), 2.0))
    step.compile("distill", state, {}, images)
    state, metrics, finite = step(state, {}, images)
    assert finite
    return jax.device_get((metrics, state.opt_state))


class EachItself(SemiSupervised):
    """Normalises each micro-batch by its own instances."""

    normalisers = None


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Also where micro-batches hold different numbers of instances (here 4 and 6), by which the terms are divided."""
    images = {"labelled": group(4, 0), "unlabelled": group(4, 10)}
    for kind in images.values():
        for name in ("weak", "strong"):
            kind[name]["ignore"] = np.zeros_like(kind[name]["ignore"])
    whole, moments = after_one_update(SemiSupervised, 1, images)
    metrics, accumulated = after_one_update(SemiSupervised, 2, images)
    assert metrics.keys() == whole.keys()
    for name in whole:
        assert mean(metrics, name) == pytest.approx(mean(whole, name), rel=1e-5), name
        if name not in ("loss/supervised", "loss/pseudo_label", "loss/total"):  # these are means already
            np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), accumulated, moments)
    apart, _ = after_one_update(EachItself, 2, images)
    assert abs(mean(apart, "loss/total") / mean(whole, "loss/total") - 1) > 1e-3


@pytest.mark.parametrize("options", [{"num_anchors": None}, {"num_anchors": 4}, {"symmetric": True}], ids=str)
def test_accumulated_contrast_is_the_mean_over_the_anchors_of_the_whole_batch(options):
    """Where micro-batches differ in how much of their images is real: every second one is half padding."""
    images = {"labelled": group(4, 0), "unlabelled": group(4, 10)}
    for kind in images.values():
        kind["strong"]["valid_box"][1::2, 3] = SIZE[1] / 2
    contrastive = dataclasses.replace(ALL.contrastive, scope="image", **options)
    alone = {"supervised_weight": 0.0, "pseudo_label_weight": 0.0, "contrastive_weight": 1.0}
    counts = []
    for accumulate in (1, 2):
        metrics, _ = after_one_update(SemiSupervised, accumulate, images, contrastive=contrastive, **alone)
        assert mean(metrics, "loss/total") == pytest.approx(mean(metrics, "contrastive/loss"), rel=1e-6)
        counts.append(float(metrics["contrastive/loss"][1]))
    assert counts[0] == counts[1]


def test_micro_batches_share_the_bank_s_new_entries():
    contrastive = dataclasses.replace(ALL.contrastive, scope="bank", bank_size=10, bank_new=4)
    with_bank = SemiSupervised(*parts(), dataclasses.replace(ALL, contrastive=contrastive), NAMES, SIZE)
    number = jnp.arange(8.0)
    entries = Entries(number[:, None], number[:, None], jnp.array([True, True, True, False] * 2))
    bank = Bank(jnp.zeros((10, 1)), jnp.zeros((10, 1)), jnp.zeros(10, bool), jnp.zeros((), jnp.int32))
    bank = with_bank.update_bank(bank, entries)
    assert bank.z[:, 0].tolist() == [0, 2, 4, 6] + [0] * 6
    assert int(bank.next) == 4
