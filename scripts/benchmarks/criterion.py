"""The student's criterion with its gradient, by slots and instances, against Mask2Former's of Hugging Face in PyTorch.

Ten layers of 100 queries on four images of 252 x 504, whose maps are 72 x 144, as in ``benchmark.py step``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from benchmarks.timing import medians, run, temporary_mib
from benchmarks.torch_step import DEVICE
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from cast_jax.core.decoded import Decoded
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.set_criterion import set_criterion
from cast_jax.losses.targets import Targets

IMAGES, LAYERS, QUERIES, CHANNELS, SIZE, CLASSES = 4, 10, 100, 384, (252, 504), 8


def criterion(repeats: int) -> list[dict[str, Any]]:
    """Slots are what the program has room for, instances what is there."""
    rows = []
    layers = _predicted()
    for slots, instances in ((20, 20), (100, 20), (100, 5), (100, 100)):
        targets = _targets(slots, instances)
        graded = jax.jit(jax.value_and_grad(_loss)).lower(layers, targets, jax.random.key(0)).compile()
        variants = {
            "ours": functools.partial(run, graded, layers, targets, jax.random.key(0)),
            "torch": _in_torch(layers, targets),
        }
        seconds = medians(variants, repeats)
        rows.append(
            {
                "slots": slots,
                "instances an image": instances,
                "s": f"{seconds['ours']:.2f}",
                "MiB beside arguments and results": round(temporary_mib(graded)),
                "torch / ours": f"{seconds['torch'] / seconds['ours']:.1f}",
            }
        )
    return rows


def _predicted() -> Decoded:
    keys = jax.random.split(jax.random.key(1), 3)
    return Decoded(
        embeddings=0.05 * jax.random.normal(keys[0], (IMAGES, LAYERS, QUERIES, CHANNELS)),
        features=jax.random.normal(keys[1], (IMAGES, *(2 * side // 7 for side in SIZE), CHANNELS)),
        class_logits=jax.random.normal(keys[2], (IMAGES, LAYERS, QUERIES, CLASSES + 1)),
    )


def _targets(slots: int, instances: int) -> Targets:
    """Blocky masks in the first slots."""
    random = np.random.default_rng(0)
    coarse = random.random((IMAGES, slots, 4, 9)) < 0.3
    masks = np.repeat(np.repeat(coarse, SIZE[0] // 4, axis=2), SIZE[1] // 9, axis=3)
    valid = np.broadcast_to(np.arange(slots) < instances, (IMAGES, slots))
    return Targets(
        masks=jnp.asarray(masks & valid[..., None, None]),
        labels=jnp.asarray(random.integers(0, CLASSES, (IMAGES, slots))),
        valid=jnp.asarray(valid),
        class_weights=jnp.ones((IMAGES, slots)),
        mask_weights=jnp.ones((IMAGES, slots)),
        background_weights=jnp.ones(IMAGES),
        ignore=jnp.zeros((IMAGES, *SIZE), bool),
    )


def _loss(layers: Decoded, targets: Targets, key: jax.Array) -> jax.Array:
    return set_criterion(key, layers, targets, CriterionConfig())[0]


def _in_torch(layers: Decoded, targets: Targets) -> Any:
    """A call of the same with its gradient; the instances only, as lists."""
    loss = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES), {})  # type: ignore[no-untyped-call, call-arg]
    to_torch = lambda array: torch.from_numpy(np.array(array)).to(DEVICE)
    embeddings, features, classes = (to_torch(array).requires_grad_() for array in layers)
    valid = np.asarray(targets.valid)
    of_images = lambda values: [to_torch(v[keep]) for v, keep in zip(values, valid, strict=True)]
    masks = [image.float() for image in of_images(np.asarray(targets.masks))]
    labels = [image.long() for image in of_images(np.asarray(targets.labels))]

    def call() -> None:
        logits = torch.einsum("blqd,bhwd->lbqhw", embeddings, features)
        predictions = [
            {"masks_queries_logits": mask, "class_queries_logits": of_class}
            for mask, of_class in zip(logits, classes.transpose(0, 1), strict=True)
        ]
        terms = loss(**predictions[-1], mask_labels=masks, class_labels=labels, auxiliary_predictions=predictions[:-1])
        weighted = [(2.0 if "cross_entropy" in name else 5.0) * term for name, term in terms.items()]
        gradients = torch.autograd.grad(torch.stack(weighted).sum(), (embeddings, features, classes))
        gradients[0].sum().item()  # waits for a GPU

    return call
