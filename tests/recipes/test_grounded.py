"""The fused teacher in the recipe: one seam, both networks' own losses, nothing else changed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from teacher_tiny import DETECTOR, SEGMENTER
from tiny import SIZE, drawn, group

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.core.checkpoint import TrainState
from cast_jax.core.optim import OptimizerConfig
from cast_jax.core.rules import named_leaves
from cast_jax.core.sharding import make_mesh
from cast_jax.core.step import TrainStep
from cast_jax.losses.config import CriterionConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised

TEACHER = {
    "name": "grounded_sam2_tiny",
    "detector": {**dataclasses.asdict(DETECTOR), "num_queries": 6, "num_levels": 3},
    "segmenter": dataclasses.asdict(SEGMENTER),
    "num_queries": 5,
}
OBJECTIVE = ObjectiveConfig(
    pseudo_label_weight=1.0,
    contrastive_weight=0.2,
    supervised_views=("weak",),
    pseudo_label_views=("strong",),
    criterion=CriterionConfig(num_points=None),
    contrastive=ContrastiveConfig(num_negatives=4, num_anchors=16, group_size=16, sampler="inverse_cdf"),
)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    weight_decay=0.0,
    learning_rate_rules=(("segmenter/detector/backbone/.*", 0.1), (".*", 1.0)),
    frozen=("segmenter/detector/bert/.*",),
)


@pytest.fixture(scope="module")
def update():
    """One update of `adapt`: parameters before and after, and metrics."""
    segmenter = build_segmenter(TEACHER, ("person", "car", "tree"), SIZE)
    recipe = SemiSupervised(segmenter, Functional(lambda rngs: ProjectionHead(32, 8, rngs=rngs)), OBJECTIVE)
    step = TrainStep(recipe, optimizer=OPTIMIZER, steps=2, mesh=make_mesh(devices=jax.devices()[:1]))
    params = drawn(recipe.abstract(), 0.2)
    before = jax.tree.map(np.asarray, params)
    state: TrainState = step.initial_state(params)
    batch = {"labelled": group(1, 0), "unlabelled": group(1, 10)}
    step.compile("adapt", state, {}, batch)
    state, metrics, finite = step(state, {}, batch)
    assert finite
    return named_leaves(before), named_leaves(jax.tree.map(np.asarray, state.params)), metrics


def test_every_term_is_there(update):
    _, _, metrics = update
    terms = ("class", "box", "giou", "mask", "dice", "iou")
    for prefix in ("loss/supervised", "loss/pseudo_label"):
        assert {f"{prefix}_{term}" for term in terms} <= metrics.keys()
        assert all(metrics[f"{prefix}_{term}"][0] > 0 for term in terms)
    mean = lambda name: float(metrics[name][0] / metrics[name][1])
    total = mean("loss/supervised") + mean("loss/pseudo_label") + 0.2 * mean("contrastive/loss")
    np.testing.assert_allclose(mean("loss/total"), total, rtol=1e-5)


def test_both_networks_learn_but_for_what_is_frozen(update):
    before, after, _ = update
    moved = {name: float(np.abs(after[name] - before[name]).max()) for name in before}
    part = lambda *starts: {name: moved[name] for name in moved if name.startswith(starts)}
    assert not any(part("segmenter/detector/bert/").values())
    assert part("segmenter/detector/bert/")
    # Adam's first step is the rate, wherever there is a gradient.
    np.testing.assert_allclose(max(part("segmenter/detector/backbone/").values()), 1e-3, rtol=0.01)
    learning = ("detector/encoder", "detector/decoder", "detector/selection", "segmenter/encoder", "segmenter/neck")
    learning += ("segmenter/mask_decoder/iou_head", "segmenter/mask_decoder/mask_heads/0")
    for name in learning:
        np.testing.assert_allclose(max(part(f"segmenter/{name}/").values()), 1e-2, rtol=0.01)
    assert max(part("projection/").values()) > 0
    # What masks for single boxes do not use: points and mask prompts, the other masks, the fixed frequencies.
    still = {name for name, change in moved.items() if not change and "/bert/" not in name and "/key/" not in name}
    assert still
    unused = ("segmenter/segmenter/prompt_encoder/", "segmenter/segmenter/mask_decoder/")
    assert all(name.startswith(unused) for name in still), still
