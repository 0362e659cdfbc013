"""A segmenter and batches small enough for tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cast_jax.core.annotations import pack_masks
from cast_jax.core.decoded import Decoded
from cast_jax.models.segmenter import Prediction

CLASSES, INSTANCES, SIZE = 3, 4, (32, 48)
TINY: dict[str, Any] = {
    "name": "student_tiny",
    "encoder": {"embed_dim": 16, "depth": 4, "num_heads": 2},
    "decoder": {"features": 8, "out_channels": (8, 8, 8, 8)},
    "mask_decoder": {"hidden_dim": 16, "mask_dim": 8, "num_heads": 2, "ffn_dim": 16, "num_layers": 1},
}


def drawn(abstract: Any, scale: float = 0.1, seed: int = 0) -> Any:
    """Random parameters of these shapes, drawn by numpy: compiling the initialisers takes longer than most tests."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), abstract)


def decoded(mask_logits: Any, class_logits: Any) -> Decoded:
    """Layers with these logits, ``[layers, batch, queries, ...]``: a channel of the features for each mask."""
    layers, batch, queries, height, width = mask_logits.shape
    features = jnp.moveaxis(mask_logits, (1, 3, 4), (0, 1, 2)).reshape(batch, height, width, layers * queries)
    one_each = jnp.eye(layers * queries).reshape(layers, queries, -1)
    embeddings = jnp.broadcast_to(one_each, (batch, *one_each.shape))
    return Decoded(embeddings, features, jnp.moveaxis(class_logits, 1, 0))


def view(batch: int, seed: int) -> dict[str, np.ndarray]:
    """Random images with two or three boxes each and a few ignored pixels."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    masks = np.zeros((batch, INSTANCES, height, width), bool)
    valid = np.zeros((batch, INSTANCES), bool)
    for image in range(batch):
        for slot in range(2 + image % 2):
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            masks[image, slot, top : top + 12, left : left + 16] = True
            valid[image, slot] = True
    ignore = np.zeros((batch, height, width), bool)
    ignore[:, :3, :5] = True
    return {
        "image": rng.integers(0, 256, (batch, height, width, 3)).astype(np.uint8),
        "valid_box": np.tile(np.array([0, 0, height, width], np.float32), (batch, 1)),
        "masks": pack_masks(masks),
        "labels": rng.integers(0, CLASSES, (batch, INSTANCES)).astype(np.int32),
        "instance_valid": valid,
        "scores": np.where(valid, 0.5, 0.0).astype(np.float32),
        "ignore": pack_masks(ignore),
    }


def group(batch: int, seed: int) -> dict[str, Any]:
    """Two views; the strong one shows the middle of the weak one."""
    half = np.array([[0.5, 0.0, SIZE[0] / 4], [0.0, 0.5, SIZE[1] / 4]], np.float32)
    return {
        "weak": view(batch, seed),
        "strong": view(batch, seed + 1),
        "strong_to_weak": np.tile(half, (batch, 1, 1)),
        "instances_cut": np.zeros(batch, np.int32),
    }


class Linear(nnx.Module):
    """Masks and classes by one product of each 8 x 8 square's mean colour: compiles in a moment."""

    queries = 5

    def __init__(self, rngs: nnx.Rngs, classes: int = CLASSES):
        self.masks = nnx.Linear(4, self.queries, use_bias=False, rngs=rngs)
        self.classes = nnx.Linear(3, self.queries * (classes + 1), rngs=rngs)

    def __call__(self, images, *, rngs=None):
        batch, height, width, _ = images.shape
        squares = images.reshape(batch, height // 8, 8, width // 8, 8, 3).mean((2, 4))
        classes = self.classes(squares.mean((1, 2))).reshape(batch, 1, self.queries, -1)
        features = jnp.pad(squares, ((0, 0),) * 3 + ((0, 1),), constant_values=1.0)
        embeddings = jnp.broadcast_to(self.masks.kernel[...].T, (batch, 1, self.queries, 4))
        layers = Decoded(embeddings, features, classes)
        return Prediction(layers.last_masks(), classes[:, 0], squares, layers)
