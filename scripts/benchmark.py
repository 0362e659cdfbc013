"""Measures the costs that BENCHMARKS.md states. Each prints a Markdown table; ``--json FILE`` keeps the numbers.

python scripts/benchmark.py contrastive      the contrastive loss with its gradient against PyTorch (needs torch)
python scripts/benchmark.py step             a whole update of the student against PyTorch (needs torch)
python scripts/benchmark.py encoder          DINOv2-S and the DPT neck at 518 x 518 against PyTorch eager (needs torch)
python scripts/benchmark.py loader           the data pipeline against torch's DataLoader (needs torch and torchvision)
python scripts/benchmark.py loader_memory    the data pipeline's memory from 100 to 10,000 images
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.loss import contrastive_loss
from cast_jax.convert.dinov2 import reference as reference_dinov2
from cast_jax.convert.dpt import reference as reference_dpt
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.flops import matrix_flops
from cast_jax.core.sharding import shard_batch
from cast_jax.core.step import TrainStep
from cast_jax.data.pipeline import LoaderConfig, batch_bytes, make_loader
from cast_jax.data.scenes import write_scenes
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cached import Cached
from cast_jax.data.sources.cityscapes import Cityscapes, label_path
from cast_jax.data.views import ViewConfig
from cast_jax.models.dinov2 import DinoV2, DinoV2Config, dinov2_s
from cast_jax.models.dpt import Dpt, DptConfig
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.student import ProjectionHead, StudentConfig
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised
from cast_jax.trainer import TrainConfig, make_step


def main() -> None:
    """Runs one benchmark."""
    benchmarks: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        "contrastive": contrastive,
        "step": student_step,
        "encoder": encoder,
        "loader": loader,
        "loader_memory": loader_memory,
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
    """Loss and gradient at K = 256, embedding 128, all pixels or 1,024 of an image as anchors, against PyTorch.

    PyTorch's versions run where their time stays below a minute or so; the reference sampler in the smallest case only.
    """
    import torch_contrastive  # beside this file

    literal_limit, blocked_limit = 2**28, 2**29  # anchors x pixels: 1 GiB of scores; about half a minute
    rows = []
    for images, pixels, dim, anchors in (
        (1, 4_096, 109, 1_024),
        (1, 16_384, 109, 1_024),
        (1, 32_768, 109, 1_024),
        (1, 32_768, 201, 1_024),
        (8, 16_384, 109, 1_024),
        (1, 4_096, 109, None),
        (1, 16_384, 109, None),
        (1, 16_384, 201, None),
        (1, 32_768, 109, None),
        (1, 32_768, 109, 4_096),
    ):
        case = _ContrastiveCase(images, pixels, dim, anchors)
        size = images**2 * (anchors or pixels) * pixels
        variants: dict[str, Callable[[], Any]] = {"jax": case.ours("mixture_proposals")}
        if size <= literal_limit:
            variants["literal"] = case.torch(torch_contrastive.literal)
        if size <= blocked_limit:
            variants["blocked"] = case.torch(torch_contrastive.blocked)
        memory = {name: _peak_mib(call) for name, call in variants.items()}
        times = _medians(variants, repeats if size < 2**27 else 3)
        row: dict[str, Any] = {"images": images, "pixels": pixels, "map": dim, "anchors": anchors or "all"}
        row |= {"jax ms": round(1e3 * times["jax"], 1), "jax MiB": memory["jax"]}
        for name in ("literal", "blocked"):
            known = name in times
            row[f"torch {name} ms"] = round(1e3 * times[name], 1) if known else ""
            row[f"{name} MiB"] = memory[name] if known else ""
            row[f"{name} / jax"] = round(times[name] / times["jax"], 1) if known else ""
        rows.append(row)
        print(row, flush=True)
    small = _ContrastiveCase(1, 4_096, 109, 1_024)
    for sampler in ("mixture_proposals", "inverse_cdf", "categorical"):
        milliseconds = 1e3 * _medians({sampler: small.ours(sampler)}, 1)[sampler]
        print(f"{sampler}: {milliseconds:.0f} ms for 1 image of 4,096 pixels with 1,024 anchors", flush=True)
    independent = _gradient_noise(ContrastiveConfig(sampler="inverse_cdf"))
    for pools in (1, 8, 16, 32):
        ratio = _gradient_noise(ContrastiveConfig(max_pools=pools)) / independent
        print(
            f"{pools} pools for 32 groups of 128 anchors: {ratio:.2f} x the independent draws' gradient noise",
            flush=True,
        )
    return rows


def _gradient_noise(config: ContrastiveConfig, keys: int = 12) -> float:
    """Standard deviation of the loss's gradient over draws, for 16 instances of 256 pixels in a row, half learned."""
    rng, pixels, embedding = np.random.default_rng(0), 4_096, 128
    instance = np.repeat(np.arange(16), pixels // 16)
    logits = 4 * rng.normal(size=(pixels, 109)) + 8 * np.eye(109)[instance]
    g = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float32)[None]
    centres = rng.normal(size=(16, embedding))[instance]
    views = [(centres + rng.normal(size=centres.shape)).astype(np.float32)[None] for _ in range(2)]
    valid = jnp.ones((1, pixels), bool)

    @jax.jit
    def gradient(key, z_weak, z_strong, g):
        def mean(z_weak, z_strong):
            total, count, _ = contrastive_loss(key, config, z_weak=z_weak, z_strong=z_strong, g=g, valid=valid)
            return total / count

        return jnp.stack(jax.grad(mean, argnums=(0, 1))(z_weak, z_strong)).ravel()

    found = np.stack([gradient(key, *views, g) for key in jax.random.split(jax.random.key(0), keys)])
    return float(np.sqrt(np.sum(np.var(found, axis=0, ddof=1))))


class _ContrastiveCase:
    """Random embeddings and a map of softmaxes, for us and for PyTorch."""

    negatives, embedding = 256, 128

    def __init__(self, images: int, pixels: int, dim: int, anchors: int | None):
        rng = np.random.default_rng(0)
        logits = 4 * rng.normal(size=(images, pixels, dim)).astype(np.float32)
        self.g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        self.z_weak, self.z_strong = (_unit(rng.normal(size=(images, pixels, self.embedding))) for _ in range(2))
        self.anchors = anchors

    def ours(self, sampler: str) -> Callable[[], None]:
        config = ContrastiveConfig(num_negatives=self.negatives, num_anchors=self.anchors, sampler=sampler)
        valid = jnp.ones(self.g.shape[:2], bool)

        def loss(z_weak, z_strong, g):
            total, count, _ = contrastive_loss(
                jax.random.key(1), config, z_weak=z_weak, z_strong=z_strong, g=g, valid=valid
            )
            return total / count

        operands = tuple(jnp.asarray(array) for array in (self.z_weak, self.z_strong, self.g))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*operands).compile()
        return functools.partial(_run, step, *operands)

    def torch(self, version: Callable[..., float]) -> Callable[[], None]:
        import torch

        z_weak, z_strong, g = (torch.from_numpy(array).flatten(0, 1) for array in (self.z_weak, self.z_strong, self.g))
        images, pixels = self.g.shape[:2]

        def step() -> None:
            leaves = [z.clone().requires_grad_() for z in (z_weak, z_strong)]
            anchors = torch.arange(images * pixels)
            if self.anchors:
                chosen = torch.rand(images, pixels).topk(self.anchors).indices
                anchors = (chosen + pixels * torch.arange(images)[:, None]).flatten()
            version(*leaves, g, anchors, self.negatives, 0.2)

        return step


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _peak_mib(call: Callable[[], Any]) -> int:
    """How far one call raises the process's peak memory above what it held before (Linux only)."""
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    before = _status_kib("VmRSS")
    call()
    return round((_status_kib("VmHWM") - before) / 1024)


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def student_step(repeats: int) -> list[dict[str, Any]]:
    """An update of ``student_s`` from labels, pseudo-labels and contrast (K = 256), and of labels alone, with AdamW.

    On a CPU one labelled and one pseudo-labelled image of 252 x 504, in float32; elsewhere four and four of 518 x 1036
    in bfloat16. Two views of each, 20 instances; against PyTorch's (``torch_step.py``) in eager mode, on a GPU also
    compiled. Ratios are to PyTorch's time for the same row, by its literal and by its blocked contrastive loss.
    """
    import torch_step  # beside this file
    from torch_contrastive import blocked, literal

    size, images, classes = ((252, 504), 1, 8) if jax.default_backend() == "cpu" else ((518, 1036), 4, 8)
    spec = {"name": "student_s", "encoder": {"remat": "none"}}
    config = segmenter_config(spec)
    assert isinstance(config, StudentConfig)
    groups = {
        name: _group(jax.random.key(i), images, size, 20, classes) for i, name in enumerate(("labelled", "unlabelled"))
    }
    rows = []
    for name, parts, anchors in (
        ("refine", ("labelled",), 0),
        ("distill, no contrast", ("labelled", "unlabelled"), 0),
        ("distill, 1,024 anchors", ("labelled", "unlabelled"), 1_024),
        ("distill, 4,096 anchors", ("labelled", "unlabelled"), 4_096),
    ):
        batch = {part: groups[part] for part in parts}
        seconds, step, compiling = _our_update(spec, size, classes, batch, anchors, repeats)
        row = {"update": name, "jax s": seconds, "images/s": len(parts) * images / seconds, "compiling s": compiling}
        row["TFLOP"] = sum(matrix_flops(step.traced.jaxpr.jaxpr).values()) / 1e12
        row["GiB (jax)"] = (memory_bytes(step.program) or 0) / 2**30
        theirs = [torch_step.views(group) for group in batch.values()]
        for kind, version in (("literal", literal), ("blocked", blocked)):
            contrast = torch_step.Contrast(version, anchors) if anchors else None
            if contrast is None and kind == "blocked":
                continue
            for how in ("eager", "compiled") if torch_step.DEVICE == "cuda" else ("eager",):
                update = torch_step.Update(config, classes, theirs, contrast, compiled=how == "compiled")
                row[f"{kind if anchors else 'torch'} {how} / jax"] = _median(update, repeats) / seconds
                del update
        rows.append({key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # the whole takes many minutes
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def _our_update(
    spec: dict[str, Any], size: tuple[int, int], classes: int, batch: dict[str, Any], anchors: int, repeats: int
) -> tuple[float, TrainStep, float]:
    """Median seconds of an update, the step, and the seconds it took to compile."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    segmenter = build_segmenter(spec, [str(n) for n in range(classes)], size, dtype=dtype)
    projection = Functional(lambda rngs: ProjectionHead(segmenter_config(spec).feature_dim, 128, rngs=rngs))
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

    return _median(update, repeats), step, compiling


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not timed."""
    return _medians({"": run}, repeats)[""]


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
        ("DINOv2-S, remat mlp", _last_map(dinov2_s(remat="mlp")), pixels, torch_encoder, backbone),
        ("DINOv2-S, remat blocks", _last_map(dinov2_s(remat="blocks")), pixels, torch_encoder, backbone),
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


LOADER = LoaderConfig(view=ViewConfig(image_size=(512, 1024), max_instances=100), batch_labelled=4)


def loader(repeats: int) -> list[dict[str, Any]]:
    """Images a second from files of 1024 x 2048 to batches of two views of 512 x 1024 with masks, two at a time.

    Ours by two threads, without and with ``data.cache``; torch's DataLoader by two processes. They take turns of 40
    images, after the batches that each had made ahead.
    """
    try:
        import torch_loader  # beside this file
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "torchvision"):
            raise
        sys.exit(
            f"error: {error.name} is not installed. Only this benchmark needs torchvision; so that it leaves the "
            "environment's torch alone, install it beside: pip install --no-deps --target FOLDER torchvision==0.28.0, "
            "and run this with PYTHONPATH=FOLDER"
        )
    ahead, batches = 6, 10
    with tempfile.TemporaryDirectory() as folder:
        source = _street_scenes(Path(folder), 8, (1024, 2048))
        theirs = torch_loader.batches(source, LOADER.view, LOADER.batch_labelled, workers=2)
        next(theirs)  # its processes are there before our threads
        streams: dict[str, Any] = {
            "cast_jax": make_loader(source, None, LOADER),
            "cast_jax, cache": make_loader(Cached(source, Path(folder) / "cache", LOADER.view), None, LOADER),
            "torch": theirs,
        }
        sizes = {name: batch_bytes(next(stream)) for name, stream in streams.items() if name != "torch"}
        sizes["torch"] = statistics.mean(torch_loader.batch_bytes(next(streams["torch"])) for _ in range(ahead))
        times: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(repeats):
            for name, stream in streams.items():
                _take(stream, ahead)
                start = time.perf_counter()
                _take(stream, batches)
                times[name].append(time.perf_counter() - start)
        for name in ("cast_jax", "cast_jax, cache"):
            streams[name].close()
        del streams, stream, theirs  # ends its processes
    ratios = {name: [torch / own for own, torch in zip(times[name], times["torch"], strict=True)] for name in times}
    return [
        {
            "loader": name,
            "images/s": round(batches * LOADER.batch_labelled / statistics.median(seconds), 1),
            "torch's time / its": round(statistics.median(ratios[name]), 2),
            "least": round(min(ratios[name]), 2),
            "most": round(max(ratios[name]), 2),
            "MB to the device an image": round(sizes[name] / 1e6, 1),
        }
        for name, seconds in times.items()
    ]


def loader_memory(repeats: int) -> list[dict[str, Any]]:
    """What this process holds while it streams 10,000 different records: the median over 20 batches (Linux only).

    The records are links to a few scenes, small ones and those of :func:`loader`. ``repeats`` plays no part.
    """
    rows = []
    for height, cached in ((128, False), (128, True), (1024, False), (1024, True)):
        with tempfile.TemporaryDirectory() as folder:
            source: Source = _street_scenes(Path(folder), 8, (height, 2 * height), records=10_000)
            view = dataclasses.replace(LOADER.view, image_size=(height // 2, height))
            if cached:
                source = Cached(source, Path(folder) / "cache", view)
            stream = make_loader(source, None, dataclasses.replace(LOADER, view=view))
            row: dict[str, Any] = {"images": f"{height} x {2 * height}", "cache": "yes" if cached else "no"}
            taken = 0
            for images in (100, 1_000, 10_000):
                _take(stream, images // LOADER.batch_labelled - taken - 20)
                held = []
                for _ in range(20):
                    _take(stream, 1)
                    held.append(_status_kib("VmRSS") / 1024)
                taken = images // LOADER.batch_labelled
                row[f"MiB at {images} images"] = round(statistics.median(held))
                print(row, flush=True)
            stream.close()
            rows.append(row)
    return rows


def _street_scenes(root: Path, count: int, size: tuple[int, int], records: int = 0) -> Cityscapes:
    """Generated scenes of a (height, width); ``records`` images of a city of links to them instead, if given."""
    write_scenes(root, split_sizes={"train": count}, image_size=size, look="target")
    scenes = Cityscapes(root, "train")
    for number in range(records):
        record = scenes.record(number % count)
        for file in (record.path, label_path(record)):
            suffix = file.name.removeprefix(str(record.image_id))
            link = file.parents[2] / "links" / "city" / f"city_{number:06d}_000000{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return Cityscapes(root, "links") if records else scenes


def _take(stream: Iterator[Any], batches: int) -> None:
    for _ in range(batches):
        next(stream)


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
