"""Scored instances, worked out by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cast_jax.models.segmenter import Prediction, score_instances

P = jax.nn.sigmoid(jnp.array([1.0, 3.0]))  # of the two mask logits used below


def prediction() -> Prediction:
    """Query 0 is half sure of class 1 and fills two pixels; query 1 is surer but has no pixel; query 2 is class 0."""
    probabilities = jnp.array([[0.3, 0.5, 0.2], [0.05, 0.9, 0.05], [0.6, 0.1, 0.3]])
    masks = jnp.array([[[1.0, 3.0], [-1.0, -2.0]], [[-1.0, 0.0], [-2.0, -4.0]], [[3.0, 3.0], [3.0, 3.0]]])
    return Prediction(
        mask_logits=masks[None], class_logits=jnp.log(probabilities)[None], pixel_features=jnp.zeros((1, 2, 2, 4))
    )


def test_class_probability_times_mask_quality():
    scored = score_instances(prediction(), top_k=10)
    quality = np.array([(P[0] + P[1]) / 2, 0.0, P[1]])
    pairs = [(2, 0, 0.6), (0, 1, 0.5), (0, 0, 0.3), (2, 1, 0.1), (1, 1, 0.9), (1, 0, 0.05)]  # best first, empty last
    expected = np.array([quality[query] * probability for query, _, probability in pairs])
    assert (np.diff(expected) <= 0).all()
    np.testing.assert_allclose(scored.scores[0], expected, rtol=1e-6)
    assert scored.labels[0, :4].tolist() == [label for _, label, _ in pairs[:4]]
    np.testing.assert_allclose(scored.mask_quality[0, :4], quality[[query for query, _, _ in pairs[:4]]], rtol=1e-6)
    np.testing.assert_array_equal(scored.mask_logits[0, 1], prediction().mask_logits[0, 0])
    assert np.isfinite(scored.scores).all()


def test_the_best_class_probabilities_are_kept_before_quality_counts():
    """As in Mask2Former: the top pairs by class, then ranked by the product."""
    scored = score_instances(prediction(), top_k=2)
    assert scored.scores.shape == (1, 2)
    np.testing.assert_allclose(scored.scores[0], [0.6 * P[1], 0.0], rtol=1e-6)
    assert scored.labels[0].tolist() == [0, 1]


def test_a_model_may_judge_its_own_masks():
    judged = dataclasses.replace(prediction(), mask_quality=jnp.array([[0.5, 0.25, 1.0]]))
    scored = score_instances(judged, top_k=3)
    np.testing.assert_allclose(scored.scores[0], [0.6, 0.5 * 0.5, 0.9 * 0.25], rtol=1e-6)
    np.testing.assert_allclose(scored.mask_quality[0], [1.0, 0.5, 0.25], rtol=1e-6)
