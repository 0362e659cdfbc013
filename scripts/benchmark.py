"""Measures the costs that BENCHMARKS.md states. Each prints a Markdown table; ``--json FILE`` keeps the numbers.

python scripts/benchmark.py contrastive      the samplers with the loss, forward and backward
python scripts/benchmark.py step             one student update, with and without the contrastive term
python scripts/benchmark.py encoder          DINOv2-S and the DPT neck at 518 x 518 against PyTorch eager (needs torch)
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.convert.dinov2 import reference as reference_dinov2
from cast_jax.convert.dpt import reference as reference_dpt
from cast_jax.losses.set_criterion import CriterionConfig
from cast_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_s
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.student import ProjectionHead
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised


def main() -> None:
    """Runs one benchmark."""
    benchmarks: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "contrastive": contrastive,
        "step": student_step,
        "encoder": encoder,
    }
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


def encoder(repeats: int) -> list[dict[str, Any]]:
    """One image of 518 x 518, float32; the gradient is that of the results' sum, for all parameters."""
    import torch

    layers, grid, size = (2, 5, 8, 11), (37, 37), 518
    backbone = reference_dinov2(dinov2_s()).eval()
    neck = reference_dpt(dinov2_s(), DptConfig(), layers).neck.eval()
    image, tokens = torch.randn(1, 3, size, size), [torch.randn(1, 1 + 37 * 37, 384) for _ in layers]

    def torch_encoder():
        return backbone(image).last_hidden_state

    def torch_neck():
        return neck(tokens, *grid)[-1]

    def torch_backward(forward, model):
        model.zero_grad()
        forward().sum().backward()

    def torch_forward(forward):
        with torch.inference_mode():
            forward()

    keys = jax.random.split(jax.random.key(0), 5)
    pixels = jax.random.normal(keys[0], (1, size, size, 3))
    maps = [jax.random.normal(key, (1, *grid, 384)) for key in keys[1:]]
    rows = []
    for name, model, inputs, theirs, module in (
        ("DINOv2-S", _last_map(dinov2_s()), pixels, torch_encoder, backbone),
        ("DINOv2-S, remat", _last_map(dinov2_s(remat=True)), pixels, torch_encoder, backbone),
        ("DPT-S", _finest(DptConfig(finest_scale=8)), maps, torch_neck, neck),
    ):
        params = model.init(jax.random.key(1))

        def loss(params, inputs, model=model):
            return model.apply(params, inputs).sum()

        for part, function in (("forward", loss), ("forward + backward", jax.grad(loss))):
            compiled = jax.jit(function).lower(params, inputs).compile()
            other = (
                functools.partial(torch_forward, theirs)
                if part == "forward"
                else functools.partial(torch_backward, theirs, module)
            )
            ours = _medians({"jax": functools.partial(_run, compiled, params, inputs), "torch": other}, repeats)
            rows.append(
                {
                    "network": name,
                    "part": part,
                    "jax ms": round(1e3 * ours["jax"], 1),
                    "torch ms": round(1e3 * ours["torch"], 1),
                    "torch / jax": round(ours["torch"] / ours["jax"], 2),
                    "temporary MiB (jax)": temporary_mib(compiled),
                }
            )
    return rows


def _last_map(config: DinoV2Config) -> Functional:
    """The encoder up to its last map."""

    class Last(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.encoder = DinoV2(config, rngs=rngs)

        def __call__(self, images, *, rngs=None):
            return self.encoder(images, layers=(config.depth - 1,), rngs=rngs)[0]

    return Functional(lambda rngs: Last(rngs))


def _finest(config: DptConfig) -> Functional:
    """The DPT neck of a ViT-S up to its finest map."""

    class Finest(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.decoder = Dpt(384, config, rngs=rngs)

        def __call__(self, maps, *, rngs=None):
            return self.decoder(maps)[0]

    return Functional(lambda rngs: Finest(rngs))


def _run(compiled, *arguments) -> None:
    jax.block_until_ready(compiled(*arguments))


def _medians(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turn, after one call that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


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
            "temporary MiB": temporary_mib(variants[name][0]),
        }
        for name, seconds in times.items()
    ]


def temporary_mib(compiled: Any) -> float:
    """Memory that a compiled function needs beside its arguments and results."""
    return round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
