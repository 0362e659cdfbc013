"""The fused teacher against the same pair in PyTorch: labelling images, and an update."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from benchmarks.timing import medians, peak_mib, run
from benchmarks.torch_contrastive import Contrast, literal
from benchmarks.torch_teacher import DEVICE, Teacher, Update

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.core.annotations import pack_masks
from cast_jax.core.compiled import memory_bytes
from cast_jax.core.runtime import compute_dtype
from cast_jax.core.sharding import shard_batch
from cast_jax.losses.config import CriterionConfig
from cast_jax.models.dinov2 import IMAGE_MEAN, IMAGE_STD
from cast_jax.models.functional import Functional, count_parameters
from cast_jax.models.registry import build_segmenter, segmenter_config
from cast_jax.models.segmenter import score_instances
from cast_jax.models.student import ProjectionHead
from cast_jax.models.teacher.grounded_sam2 import GroundedSam2Config
from cast_jax.models.teacher.text import load_tokenizer, make_prompts
from cast_jax.recipes.semi_supervised import ObjectiveConfig, SemiSupervised
from cast_jax.trainer import TrainConfig, make_step

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
INSTANCES = 10  # of an image, each a rectangle
ANCHORS = 1_024  # of an image


def teacher(repeats: int) -> list[dict[str, Any]]:
    """Zero-shot masks, and an update of one labelled and one pseudo-labelled image.

    On a CPU MM-Grounding-DINO-T with SAM2-T at 512 x 512, and for the update, which takes 20 GiB at their size, both
    with fewer and narrower layers at 256 x 256, in float32; elsewhere the paper's pair at 1024 x 1024,
    eight images at once, with products in bfloat16. Random weights, eight classes, 100 boxes an image. An update is one
    of ``adapt``, of two views an image: the detector's losses, those of every pixel of masks prompted with ten boxes an
    image, the contrastive loss of 1,024 anchors an image (PyTorch's: as the paper words it), and AdamW; ours keeps all
    that a gradient needs, as PyTorch does, or computes image by image and blocks again, as it is configured.
    """
    cpu = jax.default_backend() == "cpu"
    name, side = ("grounded_sam2_t", 512) if cpu else ("grounded_sam2_l", 1024)
    trained = ("grounded_sam2_tiny", 256) if cpu else (name, side)
    rows = []
    for what, (model, pixels), measure in (
        ("zero-shot", (name, side), functools.partial(_zero_shot, images=1 if cpu else 8)),
        ("update", trained, functools.partial(_update, kept=True)),
        ("update, as configured", trained, functools.partial(_update, kept=False)),
    ):
        config = segmenter_config(_spec(model, pixels, kept=True))
        assert isinstance(config, GroundedSam2Config)
        theirs = Teacher(config, make_prompts(CLASSES, load_tokenizer("words")), pixels)
        rows.append({"what": what, "side": pixels} | measure(model, pixels, theirs, repeats))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # the whole takes many minutes
        del theirs
    return rows


def _spec(name: str, side: int, kept: bool) -> dict[str, Any]:
    """With ``kept`` nothing is computed again in the gradient, and all images go together."""
    spec = {"name": name, "tokenizer": "words", "detector_size": (side, side), "segmenter_size": (side, side)}
    if not kept:
        return spec
    detector = {"remat": False, "backbone": {"remat": "none"}, "bert": {"remat": False}}
    segmenter = {"encoder": {"remat": "none"}, "prompts_per_block": 0}
    return spec | {"detector": detector, "segmenter": segmenter, "images_at_once": 0}


def _build(spec: dict[str, Any], side: int) -> Functional:
    return build_segmenter(spec, CLASSES, (side, side), dtype=compute_dtype())


def _zero_shot(name: str, side: int, theirs: Teacher, repeats: int, images: int) -> dict[str, Any]:
    """From images to scored masks."""
    model = _build(_spec(name, side, kept=False), side)
    params, pixels = model.init(jax.random.key(0)), _images(images, side)
    given = jnp.asarray(pixels, jnp.float32)
    forward = jax.jit(lambda params, pixels: score_instances(model.apply(params, pixels / 255.0), 100))
    begin = time.perf_counter()
    program = forward.lower(params, given).compile()
    compiling, shown = time.perf_counter() - begin, _normalised(pixels)
    ours, torchs = lambda: run(program, params, given), lambda: _wait(theirs.predict(shown))
    return _row(images, count_parameters(params), compiling, program, ours, torchs, repeats)


def _update(name: str, side: int, theirs: Teacher, repeats: int, kept: bool) -> dict[str, Any]:
    """Forward and backward of ``adapt``'s three terms and AdamW, for one labelled and one unlabelled image."""
    objective = ObjectiveConfig(
        pseudo_label_weight=1.0,
        contrastive_weight=0.2,
        criterion=CriterionConfig(num_points=None),
        contrastive=ContrastiveConfig(num_anchors=ANCHORS),
    )
    projection = Functional(lambda rngs: ProjectionHead(theirs.features, 128, dtype=compute_dtype(), rngs=rngs))
    recipe = SemiSupervised(_build(_spec(name, side, kept), side), projection, objective)
    step = make_step(recipe, TrainConfig(steps=1_000))
    images, masks, labels, boxes = _images(2, side), *_instances(2, side)
    groups = {
        group: _group(images[n : n + 1], masks[n : n + 1], labels[n : n + 1])
        for n, group in enumerate(("labelled", "unlabelled"))
    }
    state, given = step.initial_state(), shard_batch(groups, step.mesh)
    begin = time.perf_counter()
    step.compile("teacher", state, {}, given)
    compiling = time.perf_counter() - begin

    def ours() -> None:
        nonlocal state
        state, _, finite = step(state, {}, given)
        jax.block_until_ready(finite)

    coarse = masks.reshape(2, INSTANCES, side // 4, 4, side // 4, 4).mean((3, 5))  # what a predicted pixel stands for
    both = lambda arrays: [torch.from_numpy(array).to(DEVICE) for array in [*arrays, *arrays]]  # the same in both views
    targets = both(coarse.astype(np.float32)), both(labels.astype(np.int64)), both(boxes)
    update = Update(theirs, Contrast(literal, ANCHORS), _normalised(np.concatenate([images, images])), *targets)
    torchs = lambda: _wait(update())
    return _row(2, count_parameters(recipe.abstract()), compiling, step.programs[0], ours, torchs, repeats)


def _row(
    images: int,
    parameters: int,
    compiling: float,
    program: Any,
    ours: Callable[[], None],
    torchs: Callable[[], None],
    repeats: int,
) -> dict[str, Any]:
    """Memory first, in calls of their own, then both in turn."""
    memory = [_risen(ours, program), _risen(torchs, None)]
    seconds = medians({"jax": ours, "torch": torchs}, repeats)
    values = {
        "M parameters": parameters / 1e6,
        "jax s": seconds["jax"],
        "images/s": images / seconds["jax"],
        "torch / jax": seconds["torch"] / seconds["jax"],
        "compiling s": compiling,
        "GiB (jax)": memory[0],
        "GiB (torch)": memory[1],
    }
    return {key: float(f"{value:.3g}") for key, value in values.items()}


def _risen(call: Callable[[], None], program: Any) -> float:
    """GiB that a call needs beyond what it finds: by the process on a CPU, else by what each framework says."""
    if DEVICE == "cpu":
        return peak_mib(call) / 2**10
    if program is not None:
        return ((memory_bytes(program) or 0) - program.memory_analysis().argument_size_in_bytes) / 2**30
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _wait(result: Any) -> None:
    del result
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def _normalised(pixels: np.ndarray) -> torch.Tensor:
    values = (pixels / 255.0 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2).contiguous().to(DEVICE)


def _instances(images: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rectangles: masks, classes, and corners in [0, 1]."""
    random = np.random.default_rng(1)
    size = random.integers(side // 16, side // 4, (images, INSTANCES, 2))
    first = random.integers(0, side - size)
    last = first + size
    y, x = np.arange(side)[:, None], np.arange(side)
    within = lambda at, axis: (at >= first[..., axis, None, None]) & (at < last[..., axis, None, None])
    masks = within(y, 0) & within(x, 1)
    corners = np.concatenate([first[..., ::-1], last[..., ::-1]], axis=-1) / side
    return masks, random.integers(0, len(CLASSES), (images, INSTANCES)), corners.astype(np.float32)


def _group(images: np.ndarray, masks: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """A group of the loader's batches, whose two views are the same."""
    count, side = len(images), images.shape[1]
    view = {
        "image": images,
        "valid_box": np.tile(np.array([0.0, 0.0, side, side], np.float32), (count, 1)),
        "masks": pack_masks(masks),
        "labels": labels.astype(np.int32),
        "instance_valid": np.ones(labels.shape, bool),
        "scores": np.ones(labels.shape, np.float32),
        "ignore": np.zeros((count, side, side // 8), np.uint8),
    }
    same = np.tile(np.eye(2, 3, dtype=np.float32), (count, 1, 1))
    return {"weak": view, "strong": view, "strong_to_weak": same, "instances_cut": np.zeros(count, np.int32)}
