"""The losses of several views, computed together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoded

from cast_jax.core.sharding import join_batches, split_batches
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.detection import DetectionConfig
from cast_jax.losses.set_criterion import point_keys, set_loss, set_terms
from cast_jax.losses.targets import Targets
from cast_jax.models.segmenter import Prediction
from cast_jax.recipes.criteria import Criteria, view_losses

SIDE, CLASSES = 16, 2


def view(seed: int, images: int) -> tuple[Prediction, Targets]:
    """Two layers of logits for ``images`` images with three slots, the last of them empty."""
    rng = np.random.default_rng(seed)
    masks, classes = rng.normal(0, 3, (2, images, 4, SIDE, SIDE)), rng.normal(0, 1, (2, images, 4, CLASSES + 1))
    layers = decoded(np.float32(masks), np.float32(classes))
    prediction = Prediction(layers.last_masks(), layers.class_logits[:, -1], None, layers)
    targets = Targets(
        masks=jnp.asarray(rng.random((images, 3, SIDE, SIDE)) < 0.3).at[:, 2].set(False),
        labels=jnp.asarray(rng.integers(0, CLASSES, (images, 3))),
        valid=jnp.asarray([[True, True, False]] * images),
        class_weights=jnp.asarray(rng.uniform(0.5, 1.5, (images, 3)), jnp.float32),
        mask_weights=jnp.asarray(rng.uniform(0.5, 1.5, (images, 3)), jnp.float32),
        background_weights=jnp.asarray(rng.uniform(0.5, 1.5, images), jnp.float32),
        ignore=jnp.asarray(rng.random((images, SIDE, SIDE)) < 0.1),
    )
    return prediction, targets


@pytest.mark.parametrize("instances", [None, 5.0])
def test_views_together_are_each_view_by_itself(instances):
    """Also of unequal numbers of images, each image with points of its own key."""
    config, key, sizes = CriterionConfig(num_points=40), jax.random.key(3), (2, 1)
    predictions, targets = zip(*(view(seed, images) for seed, images in enumerate(sizes)), strict=True)
    criteria = Criteria(config, DetectionConfig())
    joined = join_batches(predictions)
    together = jax.jit(lambda: view_losses(joined, key, targets, criteria, [instances] * 2))()
    keys = split_batches(point_keys(key, sum(sizes), 2, 3), sizes)
    for (loss, terms), prediction, target, of_view in zip(together, predictions, targets, keys, strict=True):
        by_itself = set_terms(of_view, prediction.layers, target, config)
        alone, others = set_loss(by_itself, target.valid, 4, config, instances)
        np.testing.assert_allclose(loss, alone, rtol=1e-5)
        jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5), terms, others)
    assert together[0][0] != together[1][0]
