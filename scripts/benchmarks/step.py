"""A whole update of the student against PyTorch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks import torch_step
from benchmarks.timing import median, medians
from benchmarks.torch_contrastive import Contrast, blocked, literal

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.flops import matrix_flops
from cast_jax.core.runtime import compute_dtype
from cast_jax.core.sharding import shard_batch
from cast_jax.core.step import TrainStep
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.student import ProjectionHead, StudentConfig
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised
from cast_jax.trainer import TrainConfig, make_step

SPEC = {"name": "student_s", "encoder": {"remat": "none"}}
CLASSES = 8


def student_step(repeats: int) -> list[dict[str, Any]]:
    """An update of ``student_s`` from labels, pseudo-labels and contrast (K = 256), and of labels alone, with AdamW.

    On a CPU one labelled and one pseudo-labelled image of 252 x 504, in float32; elsewhere four and four of 518 x 1036
    in bfloat16. Two views of each, 20 instances; against PyTorch's (``torch_step.py``) in eager mode, on a GPU also
    compiled. Ratios are to PyTorch's time for the same row, by its literal and by its blocked contrastive loss.
    """
    config = segmenter_config(SPEC)
    assert isinstance(config, StudentConfig)
    groups, images = _groups()
    rows = []
    for name, parts, anchors in (
        ("refine", ("labelled",), 0),
        ("distill, no contrast", ("labelled", "unlabelled"), 0),
        ("distill, 1,024 anchors", ("labelled", "unlabelled"), 1_024),
        ("distill, 4,096 anchors", ("labelled", "unlabelled"), 4_096),
    ):
        batch = {part: groups[part] for part in parts}
        ours, step, compiling = _our_update(batch, anchors)
        seconds = median(ours, repeats)
        row = {"update": name, "jax s": seconds, "images/s": len(parts) * images / seconds, "compiling s": compiling}
        row["TFLOP"] = sum(sum(matrix_flops(traced.jaxpr.jaxpr).values()) for traced in step.traced) / 1e12
        row["GiB (jax)"] = (memory_bytes(step.programs[0]) or 0) / 2**30
        theirs = [torch_step.views(group) for group in batch.values()]
        for kind, version in (("literal", literal), ("blocked", blocked)):
            contrast = Contrast(version, anchors) if anchors else None
            if contrast is None and kind == "blocked":
                continue
            for how in ("eager", "compiled") if torch_step.DEVICE == "cuda" else ("eager",):
                update = torch_step.Update(config, CLASSES, theirs, contrast, compiled=how == "compiled")
                row[f"{kind if anchors else 'torch'} {how} / jax"] = median(update, repeats) / seconds
                del update
        rows.append({key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # the whole takes many minutes
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def contrast_share(repeats: int) -> list[dict[str, Any]]:
    """How much longer contrast makes the ``distill`` update of :func:`student_step`; the three take turns."""
    groups, _ = _groups()
    updates = {f"{anchors:,} anchors": _our_update(groups, anchors)[0] for anchors in (0, 1_024, 4_096)}
    seconds = medians(updates, repeats)
    without = next(iter(seconds.values()))
    return [
        {"distill": name, "s": f"{value:.3g}", "longer, %": f"{100 * (value / without - 1):.1f}"}
        for name, value in seconds.items()
    ]


def _groups() -> tuple[dict[str, Any], int]:
    """Labelled and pseudo-labelled images, and how many of each."""
    size, images = ((252, 504), 1) if jax.default_backend() == "cpu" else ((518, 1036), 4)
    names = ("labelled", "unlabelled")
    return {name: _group(jax.random.key(i), images, size, 20, CLASSES) for i, name in enumerate(names)}, images


def _our_update(batch: dict[str, Any], anchors: int) -> tuple[Callable[[], None], TrainStep, float]:
    """An update, its step, and the seconds it took to compile."""
    dtype, size = compute_dtype(), batch["labelled"]["weak"]["image"].shape[1:3]
    segmenter = build_segmenter(SPEC, [str(n) for n in range(CLASSES)], size, dtype=dtype)
    features = segmenter_config(SPEC).feature_dim
    projection = Functional(lambda rngs: ProjectionHead(features, 128, dtype=dtype, rngs=rngs))
    objective = ObjectiveConfig(
        pseudo_label_weight=float("unlabelled" in batch),
        contrastive_weight=0.2 if anchors else 0.0,
        contrastive=ContrastiveConfig(num_anchors=anchors or None),
    )
    step = make_step(SemiSupervised(segmenter, projection, objective), TrainConfig(steps=1_000))
    state, batch = step.initial_state(), shard_batch(batch, step.mesh)
    begin = time.perf_counter()
    step.compile("student", state, {}, batch)
    compiling = time.perf_counter() - begin

    def update() -> None:
        nonlocal state
        state, _, finite = step(state, {}, batch)
        jax.block_until_ready(finite)

    return update, step, compiling


def _group(key: jax.Array, count: int, size: tuple[int, int], instances: int, classes: int) -> dict[str, Any]:
    """Random views of the loader's shapes."""
    height, width = size
    keys = jax.random.split(key, 4)
    view = {
        "image": jax.random.randint(keys[0], (count, height, width, 3), 0, 256, jnp.uint8),
        "valid_box": jnp.tile(jnp.array([0.0, 0.0, height, width]), (count, 1)),
        "masks": jax.random.randint(keys[1], (count, instances, height, width // 8), 0, 256, jnp.uint8),
        "labels": jax.random.randint(keys[2], (count, instances), 0, classes),
        "instance_valid": jax.random.bernoulli(keys[3], 0.5, (count, instances)),
        "scores": jnp.ones((count, instances)),
        "ignore": jnp.zeros((count, height, width // 8), jnp.uint8),
    }
    return {
        "weak": view,
        "strong": view,
        "strong_to_weak": jnp.tile(jnp.eye(2, 3), (count, 1, 1)),
        "instances_cut": jnp.zeros(count, jnp.int32),
    }
