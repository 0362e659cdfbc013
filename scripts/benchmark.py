"""Measures the costs that BENCHMARKS.md states. Each prints a Markdown table; ``--json FILE`` keeps the numbers.

python scripts/benchmark.py contrastive      the samplers with the loss, forward and backward
python scripts/benchmark.py step             one student update, with and without the contrastive term
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.losses.set_criterion import CriterionConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised


def main() -> None:
    """Runs one benchmark."""
    benchmarks: dict[str, Callable[[int], list[dict[str, Any]]]] = {"contrastive": contrastive, "step": student_step}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=benchmarks)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each variant, alternating")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = benchmarks[options.benchmark](options.repeats)
    print(f"{time.strftime('%Y-%m-%d')}, jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}\n")
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def contrastive(repeats: int) -> list[dict[str, Any]]:
    """4 images of 32 x 32 pixels, 256 anchors each, K = 64: every sampler on the same arrays."""
    batch, pixels, embedding, queries = 4, 1024, 64, 60
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = {
        "z_weak": jax.random.normal(keys[0], (batch, pixels, embedding)),
        "z_strong": jax.random.normal(keys[1], (batch, pixels, embedding)),
        "g": jax.nn.softmax(4 * jax.random.normal(keys[2], (batch, pixels, queries))),
        "valid": jnp.ones((batch, pixels), bool),
    }
    variants = {}
    for sampler in ("mixture_proposals", "inverse_cdf", "categorical"):
        config = ContrastiveConfig(num_negatives=64, num_anchors=256, sampler=sampler)

        def loss(z_weak, z_strong, config=config):
            total, count, _ = contrastive_loss(
                jax.random.key(1), config, **{**arrays, "z_weak": z_weak, "z_strong": z_strong}
            )
            return total / count

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(arrays["z_weak"], arrays["z_strong"]).compile()
        variants[sampler] = (step, (arrays["z_weak"], arrays["z_strong"]))
    return compare(variants, repeats)


def student_step(repeats: int) -> list[dict[str, Any]]:
    """``student_tiny`` at 128 x 128, 4 labelled and 4 unlabelled images in two views: gradient of the objective."""
    size, classes = (128, 128), 8
    segmenter = build_segmenter({"name": "student_tiny"}, classes, size)
    features = segmenter_config({"name": "student_tiny"}).decoder.features
    projection = Functional(lambda rngs: ProjectionHead(features, 64, rngs=rngs))
    batch = {
        group: _group(jax.random.key(i), 4, size, 32, classes) for i, group in enumerate(("labelled", "unlabelled"))
    }
    variants = {}
    for weight in (0.0, 0.2):
        objective = ObjectiveConfig(
            pseudo_label_weight=1.0,
            contrastive_weight=weight,
            contrastive_stride=2,
            criterion=CriterionConfig(num_points=None),
            contrastive=ContrastiveConfig(num_negatives=64, num_anchors=128),
        )
        recipe = SemiSupervised(segmenter, projection, objective)
        params = recipe.init(jax.random.key(0))
        step = jax.jit(jax.grad(lambda p, b, r=recipe: r.loss_fn(p, {}, b, jax.random.key(2))[0]))
        variants[f"contrastive weight {weight}"] = (step.lower(params, batch).compile(), (params, batch))
    return compare(variants, repeats)


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


def compare(variants: dict[str, tuple[Any, tuple[Any, ...]]], repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of each compiled variant, called in turn, their ratio to the first, and temporary memory."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for compiled, arguments in variants.values():
        jax.block_until_ready(compiled(*arguments))
    for _ in range(repeats):
        for name, (compiled, arguments) in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(times.values())))
    return [
        {
            "variant": name,
            "median ms": round(1e3 * statistics.median(seconds), 1),
            "least ms": round(1e3 * min(seconds), 1),
            "ratio to first": round(statistics.median(seconds) / first, 2),
            "temporary MiB": round(variants[name][0].memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
        for name, seconds in times.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
